"""What is measured first, and what is not measured at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoplan import Budget, autoplan, plan_of
from autoplan.benchmark import shapes_of
from autoplan.priorities import NOT_WORTH_IT, largest_first, most_to_save_first, work, worth_planning
from autoplan.records import EAGER, Call, LayerPlan, LayerProfile, Option


def profile(name: str, size: int, rows: int = 64, count: int = 1, siblings: str = "") -> LayerProfile:
    calls = (Call("default", rows, "float32", count),)
    return LayerProfile(name, (), size, size, True, "float32", "cpu", calls, siblings)


def small_ones(profiles: list[LayerProfile], keep: tuple[str, ...] = (), **group_of: str) -> list[str]:
    kept, left_alone = worth_planning(profiles, {"default": 1.0}, group_of, keep)
    assert sorted([*(p.name for p in kept), *(item.name for item in left_alone)]) == sorted(p.name for p in profiles)
    assert {item.reason for item in left_alone} <= {NOT_WORTH_IT}
    return [item.name for item in left_alone]


def test_a_layer_that_takes_no_time_is_not_planned() -> None:
    profiles = [profile("large", 1000), profile("gate", 50), profile("twice", 1000)]  # 0.125 % of the time
    assert small_ones(profiles) == ["gate"]
    assert small_ones([*profiles, profile("other", 101)]) == ["gate"]  # 0.5 %, and a little more


def test_hundreds_of_small_layers_are_planned_as_they_together_take_all_the_time() -> None:
    assert small_ones([profile(f"layer.{i}", 256) for i in range(400)]) == []  # 0.25 % each
    mixed = [profile(f"large.{i}", 256) for i in range(300)] + [profile(f"gate.{i}", 8) for i in range(300)]
    assert small_ones(mixed) == [f"gate.{i}" for i in range(300)]  # 0.1 % together
    assert small_ones(mixed[:300] + [profile(f"gate.{i}", 30) for i in range(300)]) == []  # 1.4 % together


def test_of_layers_that_are_alike_all_are_small_or_none() -> None:
    profiles = [profile("large", 1000), *(profile(f"small.{i}", 40) for i in range(5))]  # 0.16 % each, 0.8 % in all
    assert len(small_ones(profiles)) == 5
    assert small_ones([*profiles, profile("small.5", 40), profile("small.6", 40)]) == []  # 1.1 % in all


def test_groups_siblings_and_pins() -> None:
    large = [profile(f"large.{i}", 1000) for i in range(4)]
    tiny = [profile("q", 60), profile("k", 60)]
    assert small_ones(large + tiny) == ["q", "k"]
    assert small_ones(large + tiny, keep=("k",)) == ["q"]
    assert small_ones(large + tiny, q="group 1", k="group 1") == ["q", "k"]
    assert small_ones(large + tiny, keep=("k",), q="group 1", k="group 1") == []
    together = {"q": "group 1", **{f"large.{i}": "group 1" for i in range(1)}}
    assert small_ones(large + tiny, **together) == ["k"]
    siblings = [profile("q", 1000, siblings="q+k"), profile("k", 60, siblings="q+k")]
    assert small_ones(large + siblings) == []


def test_work_grows_with_rows_from_where_it_is_no_longer_the_weight_that_is_waited_for() -> None:
    weights = {"prefill": 1.0, "decode": 256.0}
    one, few, many = (work(profile("x", 100, rows=rows), weights) for rows in (1, 32, 640))
    assert one == few == many / 10
    assert work(profile("x", 100, rows=0), weights) == 0
    calls = (Call("prefill", 640, "float32", 1), Call("decode", 1, "float32", 2))
    both = LayerProfile("x", (), 100, 100, True, "float32", "cpu", calls)
    assert work(both, weights) == many + 2 * 256 * one


def test_weights_are_timed_in_the_order_of_the_time_that_layers_spend_in_them() -> None:
    profiles = [profile("a", 100), profile("b", 500), *(profile(f"c.{i}", 300) for i in range(4))]
    wanted: dict[Any, Any] = {shape: [] for p in profiles for shape in shapes_of(p, EAGER)}
    order = [shape.in_features for shape in largest_first(wanted, profiles, {}, EAGER)]
    assert order == [300, 500, 100]  # four of 300 take more than one of 500


def test_a_weight_is_timed_at_all_its_rows_before_the_next_one() -> None:
    calls = [tuple(Call(f"{rows}", rows, "float32", 1) for rows in own) for own in ((1, 512), (256, 2))]
    profiles = [LayerProfile(f"{i}", (), 100 + i, 100, True, "float32", "cpu", own) for i, own in enumerate(calls)]
    wanted: dict[Any, Any] = {
        shape: [] for i in range(2) for p in profiles for shape in list(shapes_of(p, EAGER))[i:][:1]
    }
    order = [(shape.in_features, shape.rows) for shape in largest_first(wanted, profiles, {}, EAGER)]
    assert order == [(100, 1), (100, 512), (101, 256), (101, 2)]


def test_scores_come_in_the_order_of_the_time_that_an_option_would_save() -> None:
    def layer(name: str, us: float, fastest: float, rejected: str = "") -> LayerPlan:
        options = (Option("none", "1:linear", us), Option("int8", "1:x", fastest, rejected=rejected), Option("fp8"))
        return LayerPlan(name, (), 8, 8, True, "float32", (), us, "none", "", options)

    layers = [layer("a", 10, 9), layer("b", 100, 10), layer("c", 1000, 1, "too coarse"), layer("d", 50, 5)]
    assert [item.name for item in most_to_save_first(layers)] == ["b", "d", "a", "c"]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.body, self.head = nn.Linear(256, 1), nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x) * self.gate(x.relu()))  # of another tensor: no siblings
        return y


@pytest.mark.parametrize(("pin", "budget", "planned"), [
    ({}, Budget(divergence=0.1), False),
    ({"gate": "bf16"}, Budget(divergence=0.1), True),
    ({}, Budget(divergence=0.1, nbytes=10**6), True),
])  # fmt: skip
def test_in_a_plan_a_small_layer_is_left_alone_with_the_reason(
    timer: Any, pin: dict[str, str], budget: Budget, planned: bool
) -> None:
    model = autoplan(Gated(), torch.randn(24, 256), candidates=["bf16"], pin=pin, budget=budget, cache=False)
    plan = plan_of(model)
    assert ("gate" in [layer.name for layer in plan.layers]) is planned
    if not planned:
        assert type(model.gate) is nn.Linear
        assert [(item.name, item.reason) for item in plan.left_alone] == [("gate", NOT_WORTH_IT)]
        assert "under 0.5 % of the layers' time" in plan.report()

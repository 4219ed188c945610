"""Which calls of a float32 model to plan inside a region of autocast."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoplan import Budget, inside
from autoplan.inside import promising, recorded_inside
from autoplan.recorder import Recording, record
from autoplan.records import Autocast

LOOSE = Budget(divergence=0.5)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def recording_of(model: nn.Module, **rows: int) -> Recording:
    """A workload of each name, with inputs of so many rows and of one more."""
    with record(model) as recording:
        for name, count in rows.items():
            with recording.workload(name, weight=3.0):
                model(torch.randn(count, 32))
                model(torch.randn(count + 1, 32))
    return recording


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


@pytest.fixture
def times(timer: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Outside and inside, of each workload in turn."""
    given: list[tuple[float, float]] = []

    def compare(calls: Any, **options: Any) -> Any:
        found = dict(timer.compare(calls, **options))
        outside, there = given.pop(0)
        found["outside"] = replace(found["outside"], baseline_us=outside)
        found["inside"] = replace(found["inside"], baseline_us=outside, ratio=there / outside)
        return found

    monkeypatch.setattr("autoplan.timing.compare", compare)
    return given


@pytest.mark.parametrize(
    ("given", "least"),
    [
        ([(10, 5), (100, 50)], 0),
        ([(10, 11), (100, 101)], None),
        ([(10, 20), (100, 50)], 136),  # sqrt(3 rows * 6 rows) of 32 elements
        ([(10, 5), (100, 120)], None),  # sizes do not tell these from the others, and all together lose
        ([(10, 5), (100, 101)], 0),  # and all together gain
    ],
)
def test_the_region_is_for_calls_that_gain(
    model: Model, times: list[Any], given: list[tuple[float, float]], least: int | None
) -> None:
    recording = recording_of(model, few=2, many=6)
    times.extend(given)
    found = promising(model, recording, LOOSE, None)
    assert found == (None if least is None else Autocast("cpu", "bfloat16", least))
    assert not times
    assert not torch.is_autocast_enabled("cpu")


def test_sizes_that_overlap_are_all_inside_or_none(model: Model, times: list[Any]) -> None:
    recording = recording_of(model, one=5, other=6)
    times.extend([(10, 20), (100, 50)])
    assert promising(model, recording, LOOSE, None) == Autocast("cpu", "bfloat16", 0)


def test_what_is_compared_runs_inside_and_outside(model: Model, timer: Any) -> None:
    seen = []
    recording = recording_of(model, only=4)
    model.layer.register_forward_hook(lambda _, args, y: seen.append(y.dtype))
    timer.inside_ratio = 0.5
    assert promising(model, recording, LOOSE, None) == Autocast("cpu", "bfloat16", 0)
    assert seen == [torch.float32, torch.bfloat16] * 2  # timed, and judged


def test_the_region_alone_may_take_a_quarter_of_the_budget(model: Model, timer: Any) -> None:
    recording = recording_of(model, only=4)
    timer.inside_ratio = 0.5
    with torch.no_grad():
        (x,) = recording.inputs[0].args
        y = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            error = float(((model(x) - y).norm() / y.norm()) ** 2)
    assert promising(model, recording, Budget(divergence=4.1 * error), None) is not None
    assert promising(model, recording, Budget(divergence=3.9 * error), None) is None
    assert promising(model, recording, "lossless", None) is not None
    assert promising(model, recording, Budget(nbytes=10**6), None) is not None


def test_a_model_that_cannot_run_there_gets_none(model: Model, timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Model, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("this model wants float32")
        return self.layer(x)

    recording = recording_of(model, only=4)
    monkeypatch.setattr(Model, "forward", refuse)
    timer.inside_ratio = 0.5
    assert promising(model, recording, LOOSE, None) is None
    assert not torch.is_autocast_enabled("cpu")


def test_a_model_of_layers_and_little_else_gets_none(model: Model, timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recording, rest = recording_of(model, few=2, many=6), iter([0.05, 0.05, 0.05, 0.2])
    timer.inside_ratio = 0.5
    monkeypatch.setattr(inside, "_rest", lambda *_: next(rest))
    assert promising(model, recording, LOOSE, None) is None
    assert promising(model, recording, LOOSE, None) is not None


@pytest.mark.parametrize("slow", ["layer", "norm"])
def test_what_is_not_spent_in_layers(slow: str) -> None:
    model = nn.Sequential(OrderedDict(layer=nn.Linear(32, 32), norm=nn.LayerNorm(32)))
    with torch.no_grad(), record(model) as recording:
        model(torch.randn(4, 32))
    module = model.get_submodule(slow)
    own = module.forward

    def slowly(x: Tensor) -> Tensor:
        time.sleep(0.1)
        return own(x)

    module.forward = slowly  # type: ignore[method-assign]
    rest = inside._rest(model, recording, recording.inputs[0])
    assert 0 < rest < 0.3 if slow == "layer" else rest > 0.7


def test_it_is_timed_for_real(model: Model) -> None:
    """Weights' casts are kept from call to call, where they need gradients, and gone in the end."""
    model.requires_grad_(True)
    recording = recording_of(model, only=4)
    us, there = inside._times(model, recording.inputs[0])
    assert us > 0
    assert there > 0
    assert not torch.is_autocast_enabled("cpu")


def test_what_layers_see_inside(model: Model) -> None:
    recording = recording_of(model, few=2, many=6)
    there = recorded_inside(model, recording, Autocast("cpu", "bfloat16", 5 * 32))
    (before,), (within,) = recording.profiles(), there.profiles()
    assert [(call.workload, call.rows, call.dtype) for call in within.calls] == [
        ("few", 2, "float32"), ("few", 3, "float32"), ("many", 6, "bfloat16"), ("many", 7, "bfloat16"),
    ]  # fmt: skip
    assert {call.dtype for call in before.calls} == {"float32"}
    assert there.call_weights() == recording.call_weights()
    assert there.inputs == recording.inputs  # which stay outside

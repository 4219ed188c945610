"""Siblings from end to end: found, timed against each for itself, chosen, run as one product, replayed from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoplan import Budget, Plan, PlanCache, apply_plan, benchmark, coldness, make_plan, record, timing
from autoplan.arms import Contender
from autoplan.benchmark import APART, measure
from autoplan.candidates import find_candidate
from autoplan.errors import CacheError
from autoplan.kernels.ops import find_kernel
from autoplan.layers import PlannedLinear
from autoplan.records import Part, Shape
from autoplan.selection import fused_sets

LOOSE = Budget(divergence=0.5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32, bias=False), nn.Linear(64, 32)
        self.o = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = x.tanh()
        return x + self.o(self.q(h) + torch.cat((self.k(h), self.v(h)), dim=-1))


def blocks() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(Block(), Block())


def rows(count: int = 24) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(1))


def planned(**request: Any) -> Plan:
    model = blocks()
    with record(model) as recording:
        model(rows())
    return make_plan(model, recording, **({"budget": LOOSE, "cache": False} | request))


def names(plan: Plan) -> list[list[str]]:
    return [[plan.layers[i].name for i in places] for places in fused_sets(plan.layers)]


BOTH = [["0.q", "0.k", "0.v"], ["1.q", "1.k", "1.v"]]


def test_siblings_run_as_one_product_and_replay(timer: Any, tmp_path: Path) -> None:
    plan = planned()
    assert {layer.chosen for layer in plan.layers} == {"int8_dynamic"}
    assert names(plan) == BOTH
    q = plan.layers[0]
    assert (q.siblings, q.choice.us) == ("0.q+k+v", pytest.approx(q.option("int8_dynamic").us * 0.4))  # type: ignore[operator]
    assert plan.us == pytest.approx(sum(layer.choice.us or 0 for layer in plan.layers))
    assert "as one product: q+k+v" in " ".join(plan.report("markdown").split())
    plan.save(tmp_path / "plan.json")
    races = timer.races
    model = apply_plan(blocks(), Plan.load(tmp_path / "plan.json"))
    assert timer.races == races
    assert Plan.load(tmp_path / "plan.json") == plan
    assert isinstance(model[0].q, PlannedLinear)
    assert model[0].q._siblings is model[0].v._siblings is not model[1].q._siblings
    assert model[0].q._siblings.whole.out_features == 128  # type: ignore[union-attr]
    assert model[0].o._siblings is None
    with torch.no_grad():
        y, expected = model(rows()), blocks()(rows())
        assert ((y - expected).norm() / expected.norm()) < 0.1
        apart = apply_plan(blocks(), plan.at(divergence=0.0))
        assert torch.equal(apart(rows()), expected)


def test_they_run_alone_where_one_product_is_not_surely_faster(timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    race = timer.race

    def no_gain(arms: Any, *, baseline: str, **others: Any) -> Any:
        ratios, width = timer.ratios, timer.width
        if baseline == "/".join(APART):
            timer.ratios, timer.width = {"int8_dynamic": 0.97}, 0.02
        found = race(arms, baseline=baseline, **others)
        timer.ratios, timer.width = ratios, width
        return found

    monkeypatch.setattr(timing, "race", no_gain)
    plan = planned()
    assert names(plan) == []
    assert {layer.chosen for layer in plan.layers} == {"int8_dynamic"}
    assert all(option.fused is None for layer in plan.layers for option in layer.options)


def test_pins_exclusions_and_one_kernel_for_all_rows(timer: Any) -> None:
    assert names(planned(pin={"0.k": "bf16"})) == BOTH[1:]
    left = planned(exclude="*.v")
    assert names(left) == [["0.q", "0.k"], ["1.q", "1.k"]]
    assert left.layers[0].siblings == "0.q+k"
    assert names(planned(candidates=["none"])) == []
    assert all("," not in layer.choice.program for layer in planned(batch_invariant=True).layers)


def test_equal_blocks_are_timed_once_and_found_in_the_cache(timer: Any) -> None:
    cache = PlanCache()
    planned(cache=cache)
    races = timer.races
    shapes = [cache.get("timings", key)["fingerprint"]["shape"] for key in cache.keys("timings")]  # type: ignore[index]
    together = [shape for shape in shapes if "parts" in shape]
    assert len(together) == len({str(shape) for shape in together}) > 0
    assert all([part["out_features"] for part in shape["parts"]] == [64, 32, 32] for shape in together)
    planned(cache=cache, budget=Budget(divergence=0.4))
    assert timer.races == races


def test_a_plan_file_that_lies_about_its_programs_is_refused(timer: Any) -> None:
    data = planned().to_dict()
    option = next(o for o in data["layers"][0]["options"] if o["candidate"] == "int8_dynamic")
    option["fused"]["program"] = "rm -rf"
    with pytest.raises(CacheError, match="no program of kernels"):
        Plan.from_dict(data)
    del option["fused"]
    alone = Plan.from_dict(data)  # says that it runs with the others, but not how: it runs alone
    assert alone.layers[0].choice.program == option["program"]
    model = apply_plan(blocks(), alone)
    assert model[0].q._siblings is None


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("name", ["int8_dynamic/onednn_u8s8", "int8_weight_only/int8pack", "int4_g32/int4pack"])
def test_a_real_race(mode: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_RACE_SECONDS", 0.3)
    monkeypatch.setattr(coldness, "MAX_COPIES", 3)
    candidate, kernel = name.split("/")
    parts = (Part(candidate, 32, True, kernel), Part(candidate, 16, False, kernel))
    shape = Shape(4, 64, 48, True, "float32", "float32", "cpu", mode, parts)
    found = measure({shape: [Contender(find_candidate(candidate), find_kernel(kernel))]}, {}, None)
    (m,) = found.values()
    assert m.baseline_us > 0
    assert 0 <= m.ratio_low <= m.ratio <= m.ratio_high
    assert m.rounds > 0

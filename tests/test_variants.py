"""Kernels with tile sizes to choose: what is timed of them, and that a plan, its report and its replay know them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoplan import Budget, Plan, PlanCache, apply_plan, make_plan, options, record
from autoplan.candidates import Candidate, base, find_candidate
from autoplan.errors import CacheError
from autoplan.kernels import find_kernel, ops
from autoplan.kernels.ops import LinearSpec, Packed
from autoplan.layers import PlannedLinear
from autoplan.records import Call, Device, LayerProfile, Measurement, Shape

CPU = Device("cpu", "cpu")
LOOSE = Budget(divergence=0.1)


class Tiled(Candidate):
    """int8 weights on a kernel with six configs at few rows, two others at many, and none beyond 100."""

    name = "tests_tiled"
    tensors = ("codes", "scale")
    kernels = ("tests_tiles", "dequantize_int8")

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return find_candidate("int8_weight_only").quantize(weight)


ran: list[tuple[str, int]] = []  # config and rows of every call


def variants(spec: LinearSpec, rows: int) -> Sequence[str]:
    if rows > 100:
        return ()
    return [f"BM{rows}.w{warps}" for warps in range(1, 7)] if rows < 16 else ["BM64.w4", "BM64.w8"]


def configured(config: str) -> ops.Run:
    def run(x: Tensor, packed: Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ran.append((config, x.shape[0]))
        return find_kernel("dequantize_int8").run(x, packed, bias, dtype)

    return run


@pytest.fixture(autouse=True)
def tiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Candidate]:
    kernel = dataclasses.replace(
        find_kernel("dequantize_int8"), name="tests_tiles", run=configured("own"), variants=variants,
        configured=configured,
    )  # fmt: skip
    candidate = Tiled()
    monkeypatch.setitem(ops._KERNELS, kernel.name, kernel)
    monkeypatch.setitem(base._CANDIDATES, candidate.name, candidate)
    monkeypatch.setattr(ops, "_probe_once", lambda name: None)
    ran.clear()
    ops.parse_program.cache_clear()
    yield candidate
    ops.parse_program.cache_clear()


def profile(*rows: int) -> LayerProfile:
    return LayerProfile("x", (), 64, 64, True, "float32", "cpu", tuple(Call("default", r, "float32", 1) for r in rows))


def timed_kernels(candidate: Candidate, *rows: int, batch_invariant: bool = False) -> dict[int, list[str]]:
    menu = options.screen(profile(*rows), [candidate], CPU)
    wanted = options.to_time([menu], "eager", batch_invariant)
    return {shape.rows: [c.kernel.name for c in contenders] for shape, contenders in wanted.items()}


def test_the_best_guesses_for_the_rows_take_part(tiled: Candidate) -> None:
    few, many = [f"tests_tiles@BM1.w{w}" for w in (1, 2, 3, 4)], ["tests_tiles@BM64.w4", "tests_tiles@BM64.w8"]
    assert timed_kernels(tiled, 1, 32, 512) == {
        1: [*few, "dequantize_int8"],
        32: [*many, "dequantize_int8"],
        512: ["dequantize_int8"],  # it named none
    }


def test_a_batch_invariant_layer_tries_the_guesses_for_all_its_rows(tiled: Candidate) -> None:
    found = timed_kernels(tiled, 1, 32, batch_invariant=True)
    assert found[1] == found[32]
    assert len(found[1]) == 4 + 2 + 1


SHORT = {"t": "tests_tiles", "d": "dequantize_int8"}


def layer(ratios: dict[int, dict[str, float]], **rules: Any) -> Any:
    """The option of the candidate with these ratios, by rows and kernel (in short)."""
    found = {}
    for rows, own in ratios.items():
        shape = Shape(rows, 64, 64, True, "float32", "float32", "cpu", "eager")
        found[shape, "none", "linear"] = Measurement(shape, "none", "linear", 10.0, 1.0, 1.0, 1.0, 8)
        for short, ratio in own.items():
            kernel = SHORT[short[0]] + short[1:]
            high = math.inf if ratio >= 3 else ratio * 1.01  # hopeless: dropped before there was an interval
            found[shape, "tests_tiled", kernel] = Measurement(
                shape, "tests_tiled", kernel, 10.0, ratio, ratio * 0.99, high, 8, "slow" if ratio >= 3 else ""
            )
    candidates = [find_candidate("none"), find_candidate("tests_tiled")]
    menu = options.Menu(profile(*ratios), CPU, dict.fromkeys(candidates, ()), {})
    made = options.with_times(menu, found, options.Rules("eager", {"default": 1.0}, **rules))
    return made.option("tests_tiled")


def test_configs_that_were_timed_at_some_rows_only_make_a_program() -> None:
    option = layer({1: {"t@a": 0.3, "t@b": 0.4, "d": 5.0}, 64: {"t@c": 0.5, "d": 0.9}, 512: {"d": 0.8}})
    few, many = math.isqrt(64) + 1, math.isqrt(64 * 512) + 1
    assert option.program == f"1:tests_tiles@a,{few}:tests_tiles@c,{many}:dequantize_int8"
    assert option.us == pytest.approx(3 + 5 + 8)
    assert not option.rejected


def test_one_config_everywhere_if_several_gain_too_little() -> None:
    ratios = {1: {"t@a": 0.300, "t@b": 0.299}, 64: {"t@a": 0.5, "t@b": 0.51}}
    assert layer(ratios).program == "1:tests_tiles@a"
    invariant = layer({1: {"t@a": 0.3, "t@b": 0.9}, 64: {"t@a": 0.9, "t@b": 0.5}}, batch_invariant=True)
    assert invariant.program == "1:tests_tiles@a"
    rejected = layer({1: {"t@a": 0.3}, 64: {"t@b": 0.5}}, batch_invariant=True)
    assert "not timed" in rejected.rejected


def test_a_config_that_fails_anywhere_is_out_and_reasons_name_kernels_once() -> None:
    broken = layer({1: {"t@a": 0.1, "t@b": 0.5}, 64: {"t@a": math.inf, "t@b": 0.5}})
    assert broken.program == "1:tests_tiles@b"
    hopeless = layer({1: {"t@a": 9.0, "t@b": 8.0, "d": 7.0}})
    assert hopeless.rejected == "dequantize_int8: slow; tests_tiles: slow"


def model() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def plan_with_programs(timer: Any, cache: PlanCache | bool = False) -> tuple[nn.Sequential, Plan]:
    """A plan whose layers run one config at 2 rows and another at 40."""
    timer.ratios = {"tests_tiled/tests_tiles@BM2.w3": 0.3, "tests_tiled/tests_tiles@BM64.w8": 0.4}
    made = model()
    with record(made) as recording:
        with recording.workload("few"):
            for _ in range(3):
                made(torch.randn(2, 64))
        with recording.workload("many"):
            for _ in range(3):
                made(torch.randn(40, 64))
    return made, make_plan(made, recording, candidates=["tests_tiled"], budget=LOOSE, cache=cache)


def test_a_plan_names_its_configs_reports_them_shortly_and_replays_them(timer: Any, tmp_path: Any) -> None:
    made, plan = plan_with_programs(timer)
    program = f"1:tests_tiles@BM2.w3,{math.isqrt(2 * 48) + 1}:tests_tiles@BM64.w8"
    assert [layer.choice.program for layer in plan.layers] == [program, program]
    assert "@" not in plan.report()
    assert "tests_tiles" in plan.report()
    assert "tests_tiles@BM2.w3" in plan.report("csv")
    plan.save(tmp_path / "tiled.plan.json")
    again = Plan.load(tmp_path / "tiled.plan.json")
    assert again == plan
    replayed = apply_plan(made, again)
    ran.clear()
    with torch.no_grad():
        replayed(torch.randn(2, 64))
        replayed(torch.randn(40, 64))
    assert ran == [("BM2.w3", 2)] * 2 + [("BM64.w8", 40)] * 2
    assert isinstance(replayed[0], PlannedLinear)
    assert replayed[0].nbytes() == 64 * 64 + 4 * 64  # one layout, held once


def test_timings_of_configs_are_cached_one_by_one(timer: Any) -> None:
    cache = PlanCache()
    _, plan = plan_with_programs(timer, cache)
    races = timer.races
    _, again = plan_with_programs(timer, cache)
    assert timer.races == races
    assert again == plan


def test_a_damaged_config_is_refused_as_the_plan_is_read(timer: Any) -> None:
    _, plan = plan_with_programs(timer)
    data = plan.to_dict()
    for option in data["layers"][0]["options"]:
        option["program"] = option["program"].replace("@", "@@")
    with pytest.raises(CacheError, match="no program of kernels"):
        Plan.from_dict(data)

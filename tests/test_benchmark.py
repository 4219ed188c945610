"""What has to be timed and what is known already; a kernel that fails is a result."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from autoplan import PlanCache, benchmark, timing
from autoplan.arms import Contender
from autoplan.benchmark import BASELINE, bucket_rows, measure, shapes_of
from autoplan.candidates import Candidate, find_candidate
from autoplan.kernels.ops import find_kernel
from autoplan.records import Call, Device, LayerProfile, Measurement, Shape

SHAPE = Shape(4, 16, 16, True, "float32", "float32", "cpu", "eager")
ENVIRONMENT = {"device": "a machine"}


def contenders(*names: str) -> list[Contender]:
    layer = LayerProfile("x", (), 16, 16, True, "float32", "cpu", (Call("default", 4, "float32", 1),))
    cpu = Device("cpu", "cpu")
    return [Contender(c, k) for c in map(find_candidate, names) for k in c.usable_kernels(layer, cpu)[0]]


def test_rows_are_bucketed() -> None:
    assert [bucket_rows(rows) for rows in range(17)] == [1, *range(1, 17)]
    expected = {17: 24, 24: 24, 25: 32, 33: 48, 49: 64, 65: 96, 128: 128, 129: 192, 193: 256, 1024: 1024, 1025: 1536}
    assert {rows: bucket_rows(rows) for rows in expected} == expected
    assert bucket_rows(10**9) == bucket_rows(10**8)  # beyond the last one
    assert all(rows <= bucket_rows(rows) <= max(rows * 1.5, 16) for rows in range(1, 5000))


def test_the_shapes_of_a_layer() -> None:
    calls = (
        Call("a", 17, "float32", 2),
        Call("a", 24, "float32", 3),
        Call("b", 20, "float32", 5),
        Call("b", 0, "float32", 9),
        Call("b", 20, "bfloat16", 1),
    )
    shapes = shapes_of(LayerProfile("x", ("y",), 8, 4, False, "float32", "cpu", calls), "compiled")
    assert shapes == {
        Shape(24, 8, 4, False, "float32", "float32", "cpu", "compiled"): {"a": 5.0, "b": 5.0},
        Shape(24, 8, 4, False, "bfloat16", "float32", "cpu", "compiled"): {"b": 1.0},
    }


def test_enough_copies_to_leave_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "last_level_cache_bytes", lambda: 1000)
    assert [benchmark._copies(size) for size in (1, 100, 400, 600, 1e9)] == [64, 12, 3, 2, 2]
    monkeypatch.undo()
    assert benchmark.last_level_cache_bytes() >= 1 << 15


def test_what_is_cached_is_not_timed_again(timer: Any) -> None:
    cache, wanted = PlanCache(), {SHAPE: contenders("none", "bf16")}
    first = measure(wanted, ENVIRONMENT, cache)
    assert timer.races == 1
    assert set(first) == {(SHAPE, c.candidate.name, c.kernel.name) for c in wanted[SHAPE]}
    assert measure(wanted, ENVIRONMENT, cache) == first
    assert timer.races == 1
    more = measure({SHAPE: contenders("none", "bf16", "int8_dynamic")}, ENVIRONMENT, cache)
    assert timer.races == 2
    assert {key: more[key] for key in first} == first
    measure(wanted, {"device": "another machine"}, cache)
    assert timer.races == 3
    measure(wanted, ENVIRONMENT, None)
    assert timer.races == 4


def test_neighbours_that_differ_in_rows_share_the_quantized_weight(timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized: list[int] = []
    (contender, *_) = contenders("int8_weight_only")
    quantize = type(contender.candidate).quantize

    def counting(self: Candidate, weight: Tensor) -> dict[str, Tensor]:
        quantized.append(weight.shape[0])
        return quantize(self, weight)

    monkeypatch.setattr(type(contender.candidate), "quantize", counting)
    shapes = [SHAPE, replace(SHAPE, rows=8), replace(SHAPE, out_features=32)]
    measure({shape: [contender] for shape in shapes}, ENVIRONMENT, None)
    assert quantized == [16, 32]
    assert timer.races == 3


def test_progress_is_told_and_time_may_run_out(timer: Any) -> None:
    told: list[tuple[str, int, int]] = []
    wanted = {SHAPE: contenders("none")}
    assert measure(wanted, ENVIRONMENT, None, progress=lambda *now: told.append(now), seconds_left=lambda: 0) == {}
    assert told == [("timing", 0, 1), ("timing", 1, 1)]
    assert timer.races == 0


@pytest.mark.parametrize(
    "damage",
    [
        {"ratio": "fast"}, {"ratio": -1.0}, {"ratio": 0}, {"ratio_low": 2.0, "ratio_high": 1.0},
        {"baseline_us": None}, {"baseline_us": 0.0}, {"rounds": "many"}, {"rounds": None}, {"candidate": "bf16"}, None,
    ],
)  # fmt: skip
def test_a_damaged_record_is_a_miss(timer: Any, damage: Any) -> None:
    cache, wanted = PlanCache(), {SHAPE: contenders("none")[:1]}
    found = measure(wanted, ENVIRONMENT, cache)
    (key,) = cache.keys("timings")
    record: Any = cache.get("timings", key)
    value = {} if damage is None else record["value"] | damage
    cache._records["timings"][key] = record | {"value": value}
    assert measure(wanted, ENVIRONMENT, cache) == found
    assert timer.races == 2


def test_failures_are_kept_in_files_too() -> None:
    failed = Measurement(SHAPE, "c", "k", 10.0, math.inf, math.inf, math.inf, 0, "failed: it")
    value = benchmark._to_value(failed)
    assert value["ratio"] is None
    assert benchmark._from_record(SHAPE, value) == failed


class Failing(Candidate):
    """Fails where it is told to, with an error that has no message."""

    tensors = ("weight",)

    def __init__(self, where: str) -> None:
        self.name, self.where = f"failing_{where}", where

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        if self.where == "quantize":
            raise NotImplementedError
        return {"weight": weight}


def failing(where: str) -> Contender:
    def broken(*_: Any) -> Any:
        raise NotImplementedError

    kernel = replace(find_kernel("linear"), name=f"broken_{where}")
    if where == "pack":
        kernel = replace(kernel, layout=replace(kernel.layout, pack=broken))
    return Contender(Failing(where), replace(kernel, run=broken) if where == "run" else kernel)


@pytest.mark.parametrize("where", ["quantize", "pack", "run"])
def test_a_kernel_that_fails_is_a_measurement_with_a_note(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from autoplan.kernels import ops

    contender = failing(where)
    monkeypatch.setitem(ops._KERNELS, contender.kernel.name, contender.kernel)
    found = measure({SHAPE: [contender, *contenders("none", "bf16")]}, ENVIRONMENT, None)
    ops.parse_program.cache_clear()
    broken = found[SHAPE, contender.candidate.name, contender.kernel.name]
    assert broken.ratio == broken.ratio_high == math.inf
    assert "NotImplementedError" in broken.note
    assert found[(SHAPE, *BASELINE)].ratio == 1
    assert all(0 < m.ratio < math.inf for key, m in found.items() if key[1] != contender.candidate.name)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_real_race(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_RACE_SECONDS", 0.5)
    monkeypatch.setattr(benchmark, "_MAX_COPIES", 4)
    shape = Shape(4, 16, 16, True, "float32", "float32", "cpu", mode)
    before, state = timing.timings_made, torch.get_rng_state()
    found = measure({shape: contenders("none", "int8_weight_only")}, ENVIRONMENT, None)
    assert timing.timings_made > before
    assert torch.equal(torch.get_rng_state(), state)
    plain = found[(shape, *BASELINE)]
    assert plain.ratio == plain.ratio_low == plain.ratio_high == 1
    for m in found.values():
        assert m.shape == shape
        assert 0 <= m.ratio_low <= m.ratio <= m.ratio_high
        assert m.baseline_us == plain.baseline_us > 0


def test_measurements_are_found_by_shape_and_candidate() -> None:
    other = Shape(8, 16, 16, True, "float32", "float32", "cpu", "eager")
    found = {
        (shape, "c", kernel): Measurement(shape, "c", kernel, 1.0, 0.5, 0.4, 0.6, 8)
        for shape, kernel in [(SHAPE, "k"), (other, "k"), (SHAPE, "part")]
    }
    assert list(benchmark.kernel_measurements(found, SHAPE, "c")) == ["k", "part"]
    assert list(benchmark.kernel_measurements(found, other, "c")) == ["k"]
    assert benchmark.kernel_measurements(found, SHAPE, "d") == {}

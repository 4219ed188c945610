"""What has to be timed and what is known already; a kernel that fails is a result."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from autoplan import PlanCache, benchmark, coldness, timing
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


def test_weights_are_as_cold_as_the_model_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coldness, "last_level_cache_bytes", lambda: 1000)
    sizes = (None, 50_000, 9000, 1025, 1024, 257, 256, 1)
    assert [coldness.bytes_between(size) for size in sizes] == [*[9600] * 3, 2048, 1024, 512, 256, 2]
    monkeypatch.setattr(coldness, "_available_bytes", lambda: math.inf)
    in_memory = [(1, 1), (1, 100), (1, 400), (1, 600), (1, 1e9)]
    assert [coldness.copies(9600, *sizes) for sizes in in_memory] == [64, 12, 3, 2, 2]
    assert coldness.copies(9600, 3200, 100) == 3  # as many as the model has
    few_layers = [(100, 1), (1000, 1), (10, 40), (10, 4)]
    assert [coldness.copies(256, *sizes) for sizes in few_layers] == [3, 2, 26, 26]
    monkeypatch.setattr(coldness, "_available_bytes", lambda: 800.0)
    assert [coldness.copies(1200, 1, size) for size in (100, 300, 1e9)] == [4, 1, 1]
    monkeypatch.undo()
    assert coldness.last_level_cache_bytes() >= 1 << 15
    assert coldness._available_bytes() > 1 << 20


def test_what_stays_in_the_cache_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coldness, "last_level_cache_bytes", lambda: 8 << 20)
    measured = coldness.resident_bytes.__wrapped__
    assert measured() in [(8 << 20) >> halved for halved in range(5)]
    seconds, now = dict.fromkeys([9, 8, 4, 2], 10.0) | {1: 5.0}, 0.0  # by MiB, for each: memory is twice as slow

    def read(part: Tensor) -> None:
        nonlocal now
        now += part.nbytes * seconds.get(part.nbytes >> 20, 1.0)

    monkeypatch.setattr(Tensor, "sum", read)
    monkeypatch.setattr(coldness.time, "perf_counter", lambda: now)
    assert measured() == 1 << 20
    seconds |= {4: 6.0}
    assert measured() == 4 << 20
    seconds = dict.fromkeys([9, 8, 4, 2, 1], 1.0)  # nothing is faster than memory
    assert measured() == 8 << 20
    monkeypatch.setattr(coldness, "_available_bytes", lambda: 38 << 20)  # too short to tell
    seconds |= {4: 0.1}
    assert measured() == 8 << 20


@pytest.mark.parametrize(
    ("resident", "warm"),
    [
        (2048, {"none", "bf16", "int8_weight_only"}),
        (2047, {"bf16", "int8_weight_only"}),
        (1000, {"int8_weight_only"}),
        (100, set()),
    ],
)
def test_arms_are_as_warm_as_in_a_model_of_their_own(
    resident: int, warm: set[str], timer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coldness, "resident_bytes", lambda: resident)
    raced: list[timing.Arm] = []
    race = timing.race

    def seen(arms: Sequence[timing.Arm], **settings: Any) -> Any:
        raced.extend(arms)
        return race(arms, **settings)

    monkeypatch.setattr(timing, "race", seen)
    measure({SHAPE: contenders("none", "bf16", "int8_weight_only")}, ENVIRONMENT, None, model_bytes=2048)
    assert {arm.group for arm in raced if arm.before} == warm
    assert {arm.group for arm in raced if not arm.before}.isdisjoint(warm)


def test_what_reads_its_weight_slowly_is_not_called_to_warm_it() -> None:
    called: list[str] = []
    arm = timing.Arm("a", "a", [lambda: called.append("first"), lambda: called.append("second")])
    for slow, calls in ((1e9, ["first", "second"] * coldness.SETTLING), (0.0, ["first"])):
        called.clear()
        settle = benchmark._as_warm(arm, 20.0, slow).before
        assert settle is not None
        settle()
        assert called == calls


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


def test_what_others_disturbed_is_timed_again(timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = itertools.count(0, 10**12)  # at each reading: a thousand seconds more
    monkeypatch.setattr("autoplan.contention.waited_ns", lambda: next(waited))
    cache, wanted = PlanCache(), {SHAPE: contenders("none", "bf16")}
    assert measure(wanted, ENVIRONMENT, cache)
    assert measure(wanted, ENVIRONMENT, cache)
    assert timer.races == 2
    monkeypatch.setattr("autoplan.contention.waited_ns", lambda: 0)
    measure(wanted, ENVIRONMENT, cache)
    measure(wanted, ENVIRONMENT, cache)
    assert timer.races == 3


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


# Kernels that were hopeless with a like weight.


def int8() -> list[Contender]:
    """`none`, and a candidate with two kernels at least."""
    own = contenders("none", "int8_weight_only")
    assert len([c for c in own if c.candidate.name == "int8_weight_only"]) >= 2
    return own


QUICK, SLOW = "int8_weight_only/int8pack", "int8_weight_only/dequantize_int8"


@pytest.mark.parametrize(
    ("change", "slow", "left_out"),
    [
        ({"in_features": 32}, 1.2, True),
        ({"in_features": 32, "out_features": 64}, 1.2, True),
        ({"in_features": 32}, 1.1, False),  # under twice the best one's time
        ({"in_features": 80, "out_features": 64}, 1.2, False),  # 20 times as large
        ({"in_features": 32, "rows": 5}, 1.2, False),
        ({"in_features": 32, "dtype": "bfloat16"}, 1.2, False),
        ({"in_features": 32, "mode": "compiled"}, 1.2, False),
    ],
)
def test_a_kernel_that_was_hopeless_with_a_like_weight_is_not_raced_again(
    timer: Any, change: dict[str, Any], slow: float, left_out: bool
) -> None:
    timer.ratios |= {QUICK: 0.6, SLOW: slow}
    arms, other = timer.raced, replace(SHAPE, **change)
    wanted = {SHAPE: int8(), other: int8()}
    found = measure(wanted, ENVIRONMENT, None, thorough=False)
    assert set(found) == {(shape, c.candidate.name, c.kernel.name) for shape in wanted for c in wanted[shape]}
    assert arms[0] - arms[1] == ({SLOW} if left_out else set())
    own = found[other, "int8_weight_only", "dequantize_int8"]
    assert own.ratio == slow
    assert (own.rounds == 0) == (own.ratio_high == math.inf) == left_out
    assert own.note == ("not timed: 2.0 times as slow as int8pack with a weight of 16x16" if left_out else "")
    arms.clear()
    assert measure(wanted, ENVIRONMENT, None)[other, "int8_weight_only", "dequantize_int8"].rounds
    assert arms[0] == arms[1]


def test_no_candidate_loses_its_last_kernel_whatever_is_the_best_elsewhere(timer: Any) -> None:
    """Of two kernels each is hopeless with one weight: the next weight races those that the nearest one leaves."""
    timer.ratios |= {QUICK: 0.3, SLOW: 0.9}
    arms = timer.raced
    sizes = [replace(SHAPE, in_features=n) for n in (16, 80, 160)]  # 80 is nearer to 160
    cache, wanted = PlanCache(), {shape: int8() for shape in sizes}
    first = measure({sizes[0]: int8()}, ENVIRONMENT, cache)
    timer.ratios |= {QUICK: 0.9, SLOW: 0.3}
    measure({sizes[2]: int8()}, ENVIRONMENT, cache)
    arms.clear()
    found = measure(wanted, ENVIRONMENT, cache, thorough=False)
    assert {key: found[key] for key in first} == first
    assert [SLOW in own for own in arms] == [False]  # of the one that was not in the cache
    assert QUICK in arms[0]
    for names in ("int8pack", "dequantize_int8"):
        assert all((shape, "int8_weight_only", names) in found for shape in sizes)
    only = [c for c in int8() if c.kernel.name in ("linear", "dequantize_int8")]
    arms.clear()
    measure({sizes[0]: int8(), replace(SHAPE, in_features=32): only}, ENVIRONMENT, cache, thorough=False)
    assert arms == [{"none/linear", SLOW}]  # the better one does not take part


def test_what_was_left_out_is_not_remembered_as_measured(timer: Any) -> None:
    timer.ratios |= {QUICK: 0.3, SLOW: 0.9}
    cache, other = PlanCache(), replace(SHAPE, in_features=32)
    arms, wanted = timer.raced, {SHAPE: int8(), other: int8()}
    found = measure(wanted, ENVIRONMENT, cache, thorough=False)
    again = measure(wanted, ENVIRONMENT, cache, thorough=False, seconds_left=lambda: 0.0)  # as ranks look it up
    assert again == found
    assert len(arms) == 2
    measure({other: int8()}, ENVIRONMENT, cache, thorough=False)
    assert arms[2] == arms[0] - arms[1] | {"none/linear"}


def test_the_order_of_candidates_and_kernels_does_not_matter(timer: Any) -> None:
    timer.ratios |= {QUICK: 0.3, SLOW: 0.9, "bf16": 0.5}
    shapes = [replace(SHAPE, in_features=n) for n in (64, 16, 32, 128)]
    own = contenders("none", "int8_weight_only", "bf16", "int8_dynamic")
    one = measure(dict.fromkeys(shapes, own), ENVIRONMENT, None, thorough=False)
    other = measure(dict.fromkeys(shapes, own[::-1]), ENVIRONMENT, None, thorough=False)
    assert one == other
    assert any(m.note.startswith("not timed") for m in one.values())


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


@pytest.mark.parametrize(
    ("ratio", "note", "seconds", "kept"),
    [
        (1.0, "undecided when time ran out", 1.0, False),
        (1.0, "undecided when time ran out", math.inf, True),
        (1.0, "", 1.0, True),
        (math.inf, "failed: NotImplementedError: no such dtype", math.inf, True),
        (math.inf, "failed: OutOfMemoryError: CUDA out of memory", math.inf, False),
        (math.inf, "failed: RuntimeError: DefaultCPUAllocator: can't allocate memory", math.inf, False),
        (math.inf, "failed: InductorError: CppCompileError: C++ compile error", math.inf, False),
    ],
)
def test_what_may_pass_is_not_kept(
    ratio: float, note: str, seconds: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def race(arms: Any, contenders: Any, *_: Any) -> list[Measurement]:
        low, high = (0.0, math.inf) if note else (ratio, ratio)
        return [Measurement(SHAPE, c.candidate.name, c.kernel.name, 9.0, ratio, low, high, 1, note) for c in contenders]

    monkeypatch.setattr(benchmark, "_race", race)
    cache = PlanCache()
    found = measure({SHAPE: contenders("none")}, ENVIRONMENT, cache, seconds_left=lambda: seconds)
    assert {m.note for m in found.values()} == {note}
    assert bool(cache._records["timings"]) == kept


def test_time_that_runs_out_while_a_weight_is_drawn_ends_timing(timer: Any) -> None:
    left = iter([1.0, -1.0])
    assert measure({SHAPE: contenders("none")}, ENVIRONMENT, None, seconds_left=lambda: next(left)) == {}
    assert timer.races == 0


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
    monkeypatch.setattr(coldness, "MAX_COPIES", 4)
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

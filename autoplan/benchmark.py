"""What has to be timed, and timing it: each distinct shape once, whatever the number of layers."""

from __future__ import annotations

import functools
import itertools
import math
import random
import sys
import time
import types
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from autoplan import coldness, timing
from autoplan.arms import Arms, Call, Contender, Maker
from autoplan.cache.fingerprint import digest, source_digest
from autoplan.cache.store import PlanCache, entry
from autoplan.candidates import Candidate
from autoplan.contention import BUSY, Contention
from autoplan.errors import CacheError
from autoplan.records import COMPILED, LayerProfile, Measurement, Shape

BASELINE = ("none", "linear")
APART = ("apart", "one by one")  # that of a shape with parts
MARGIN = 0.02
_BUCKETS: list[int] = sorted({*range(1, 17), *(2**k for k in range(5, 24)), *(3 * 2 ** (k - 1) for k in range(4, 24))})
_RACE_SECONDS = 6.0  # what takes longer tells kernels apart that are as good as equal
_VERDICT_SECONDS = 40.0  # but for calls so long that no verdict fits in
_PASSING = ("OutOfMemory", "MemoryError", "allocate memory", "Inductor", "CompileError")  # in notes of what may pass
_HOPELESS = 2.0  # times the time of the candidate's best kernel
_ALIKE = 16.0  # times as many elements at most: beyond, what a call costs whatever the weight counts for more, or less

Key = tuple[Shape, str, str]  # shape, candidate, kernel
Progress = Callable[[str, int, int], None]  # stage, done, total


def bucket_rows(rows: int) -> int:
    """The rows that are timed for `rows`: exact to 16, then the next power of two or its 1.5 multiple."""
    return _BUCKETS[min(bisect_left(_BUCKETS, max(rows, 1)), len(_BUCKETS) - 1)]


def shapes_of(profile: LayerProfile, mode: str) -> dict[Shape, dict[str, float]]:
    """The shapes a layer has to be timed at, each with how often it is called per workload."""
    shapes: dict[Shape, dict[str, float]] = {}
    for call in profile.calls:
        if call.rows:
            shape = Shape(
                rows=bucket_rows(call.rows),
                in_features=profile.in_features,
                out_features=profile.out_features,
                has_bias=profile.has_bias,
                dtype=call.dtype,
                weight_dtype=profile.dtype,
                device=profile.device,
                mode=mode,
            )
            counts = shapes.setdefault(shape, {})
            counts[call.workload] = counts.get(call.workload, 0.0) + call.count
    return shapes


def measure(
    wanted: Mapping[Shape, Sequence[Contender]],
    environment: Mapping[str, Any],
    cache: PlanCache | None,
    *,
    seed: int = 0,
    model_bytes: int | None = None,
    progress: Progress | None = None,
    seconds_left: Callable[[], float] = lambda: math.inf,
    thorough: bool = True,
) -> dict[Key, Measurement]:
    """Time what is wanted and not in the cache, one race per shape, plain `F.linear` in every round.

    `model_bytes` are those of all float weights that the model reads between two calls of a layer: on CPU weights are
    as cold as that makes them, without it as cold as in a model that no cache holds.

    Neighbours that differ in rows only share the quantized weights. Once `seconds_left()` says none, what was not timed
    is absent from the answer. Unless this is to be `thorough`, a kernel that took twice the time of its candidate's
    best one with a like weight is not raced again: the answer has what was measured there, without an interval.

    What was timed while others took the CPUs is in the answer, with a note, and not in the cache: see `disturbed`.
    """
    found: dict[Key, Measurement] = {}
    left_out: dict[Key, Measurement] = {}
    between = coldness.bytes_between(model_bytes)
    arms: Arms | None = None
    for done, (shape, contenders) in enumerate(wanted.items()):
        if progress:
            progress("timing", done, len(wanted))
        missing = []
        for contender in contenders:
            key = (shape, contender.candidate.name, contender.kernel.name)
            known = (
                cache.get("timings", digest(_fingerprint(shape, contender, environment, between))) if cache else None
            )
            measurement = _from_record(shape, known["value"]) if known else None
            if measurement is None or (measurement.candidate, measurement.kernel) != key[1:]:
                missing.append(contender)
            else:
                found[key] = measurement
        if not thorough:
            left_out |= _hopeless(shape, contenders, found, left_out)
            missing = [c for c in missing if (shape, c.candidate.name, c.kernel.name) not in left_out]
        if not missing or seconds_left() <= 0:
            continue
        if arms is not None and replace(arms.shape, rows=shape.rows, parts=shape.parts) != shape:
            arms = None  # another weight: this one is freed before that is made
        arms = _arms(shape, seed, arms)
        if (left := seconds_left()) <= 0:  # drawing a large weight takes its time
            continue
        measured = _race(arms, missing, seed, between, left)
        if shape.device == "cuda":
            arms = None
            torch.cuda.empty_cache()  # the weight copies' memory: the user's again
        found.update({(shape, m.candidate, m.kernel): m for m in measured})
        if cache:
            by_key = {(c.candidate.name, c.kernel.name): c for c in missing}
            records = [
                entry(_fingerprint(shape, by_key[m.candidate, m.kernel], environment, between), _to_value(m))
                for m in measured
                if _lasts(m, cut_short=left < _VERDICT_SECONDS)
            ]
            cache.put_many("timings", dict(records))
    if progress:
        progress("timing", len(wanted), len(wanted))
    return left_out | found


def _lasts(measurement: Measurement, cut_short: bool) -> bool:
    """Whether another run would find the same: not where time or CPUs were lacking, or memory or a compiler failed."""
    note = measurement.note
    if BUSY in note:
        return False
    if note.startswith("failed:"):
        return not any(sign in note for sign in _PASSING)
    return not (cut_short and note.startswith("undecided"))


def disturbed(found: Mapping[Key, Measurement]) -> list[str]:
    """A note on the shapes at which others took the CPUs while kernels were timed; none if there are none."""
    shapes = {shape for shape, *_ in found}
    busy = {shape for (shape, *_), measurement in found.items() if BUSY in measurement.note}
    if not busy:
        return []
    return [
        f"at {len(busy)} of {len(shapes)} shapes, threads had to wait while kernels were timed: {BUSY}, or there are "
        "more threads than CPUs. Choices may be wrong: plan again with cache=False when the machine is idle"
    ]


def _hopeless(
    shape: Shape, contenders: Sequence[Contender], found: Mapping[Key, Measurement], left_out: Mapping[Key, Measurement]
) -> dict[Key, Measurement]:
    """Which kernels need no race at `shape`, as one with a like weight has shown, and what was measured in that.

    One race tells for all kernels of a candidate, so that the best of them is never among these: that with the weight
    nearest in size, of those that left none of them out.
    """
    wanted: dict[str, set[str]] = {}
    for contender in contenders:
        wanted.setdefault(contender.candidate.name, set()).add(contender.kernel.name)
    hopeless: dict[Key, Measurement] = {}
    for name, kernels in wanted.items():
        partly = {at for at, candidate, _ in left_out if candidate == name}
        like = [at for at, candidate, _ in found if candidate == name and at not in partly and _alike(at, shape)]
        if not like:
            continue
        nearest = min(like, key=lambda at: _times_larger(at, shape))
        measured = kernel_measurements(found, nearest, name)
        here = [m for kernel, m in measured.items() if kernel in kernels and m.ratio < math.inf]
        best = min(here, key=lambda m: (m.ratio, m.kernel), default=None)
        if best is None:
            continue
        for m in here:
            if m.ratio >= _HOPELESS * best.ratio and (name, m.kernel) != BASELINE:
                note = (
                    f"not timed: {m.ratio / best.ratio:.1f} times as slow as {best.kernel} with a weight of "
                    f"{nearest.out_features}x{nearest.in_features}"
                )
                hopeless[shape, name, m.kernel] = replace(
                    m, shape=shape, ratio_low=0.0, ratio_high=math.inf, rounds=0, note=note
                )
    return hopeless


def _alike(one: Shape, other: Shape) -> bool:
    """Whether kernels that are hopeless at one shape are so at the other: just the weights differ, and these little."""

    def around(shape: Shape) -> tuple[int, str, str, str, str]:
        return shape.rows, shape.dtype, shape.weight_dtype, shape.device, shape.mode

    return one != other and around(one) == around(other) and _times_larger(one, other) <= _ALIKE


def _times_larger(one: Shape, other: Shape) -> float:
    """The larger weight's number of elements / the smaller one's."""
    sizes = sorted(shape.in_features * shape.out_features for shape in (one, other))
    return sizes[1] / sizes[0]


def candidate_digest(candidate: Candidate) -> str:
    """A digest of the source that defines a candidate; its name where there is no file (a notebook)."""
    module = sys.modules.get(type(candidate).__module__)
    try:
        return source_digest(module) if isinstance(module, types.ModuleType) else candidate.name
    except (CacheError, TypeError):
        return candidate.name


def _fingerprint(shape: Shape, contender: Contender, environment: Mapping[str, Any], between: int) -> dict[str, Any]:
    most = coldness.MAX_COPIES_ON_GPU if shape.device == "cuda" else coldness.MAX_COPIES
    timer = {"margin": MARGIN, "max_copies": most, "version": 5}
    return {
        "environment": dict(environment),
        "shape": {key: value for key, value in asdict(shape).items() if key != "parts" or value},
        "candidate": contender.candidate.name,
        "candidate_source": candidate_digest(contender.candidate),
        "kernel": contender.kernel.name,
        "timer": timer if shape.device == "cuda" else timer | {"bytes_between": between},
    }


def _to_value(measurement: Measurement) -> dict[str, Any]:
    value = {key: item for key, item in asdict(measurement).items() if key != "shape"}
    return {key: None if item == math.inf else item for key, item in value.items()}  # files hold finite numbers


def _from_record(shape: Shape, value: Mapping[str, Any]) -> Measurement | None:
    try:
        numbers = {name: math.inf if value[name] is None else float(value[name])
                   for name in ("baseline_us", "ratio", "ratio_low", "ratio_high")}  # fmt: skip
        texts = {name: str(value[name]) for name in ("candidate", "kernel", "note")}
        measurement = Measurement(shape=shape, rounds=int(value["rounds"]), **numbers, **texts)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        return None
    sound = 0 < measurement.baseline_us < math.inf and 0 <= measurement.ratio_low <= measurement.ratio_high
    return measurement if sound and measurement.ratio > 0 else None


def _arms(shape: Shape, seed: int, last: Arms | None = None) -> Arms:
    """What makes the arms of a race at `shape`: with the weight of the `last` one, else with random ones."""
    draw = functools.partial(
        torch.randn, generator=torch.Generator(shape.device).manual_seed(seed), device=shape.device
    )
    x = draw((shape.rows, shape.in_features)).to(getattr(torch, shape.dtype))
    if last is not None:
        return last.at(shape, x)
    weight_dtype = getattr(torch, shape.weight_dtype)
    weight = (draw((shape.out_features, shape.in_features)) * 0.02).to(weight_dtype)
    bias = draw(shape.out_features).to(weight_dtype) if shape.has_bias else None
    return Arms(shape, weight, bias, x, shared=shape.device == "cuda")


def _race(
    arms_of: Arms, contenders: Sequence[Contender], seed: int, between: int, seconds_left: float
) -> list[Measurement]:
    """One race, with copies of each weight, so many that it is as cold as in a model with `between` bytes of weights.

    On a CPU, arms of a candidate with which these stay in a cache are called some times before each sample. At a shape
    with parts, the baseline is the parts one after another, and a contender the product of all.
    """
    shape, weight = arms_of.shape, arms_of.weight
    on_gpu, first = shape.device == "cuda", APART if shape.parts else BASELINE
    failures: dict[tuple[str, str], str] = {}
    with torch.no_grad():
        makers: dict[tuple[str, str], Maker] = {first: arms_of.apart() if shape.parts else arms_of.plain()}
        for contender in contenders:
            key = (contender.candidate.name, contender.kernel.name)
            if key == first:
                continue
            try:
                makers[key] = arms_of.fused(contender) if shape.parts else arms_of.planned(contender)
            except Exception as error:  # a result like an exception while it is timed: the report tells it
                failures[key] = _failure(error)
        baseline = "/".join(first)
        copies = (
            coldness.copies_on_gpu(weight.nbytes)
            if on_gpu
            else coldness.copies(between, weight.nbytes, weight.nbytes * (1 + len(makers) / 2))
        )
        arms = _dealt(makers, first, copies, random.Random(seed), failures)
        if not on_gpu:
            by_name: dict[str, Contender | None] = {"/".join((c.candidate.name, c.kernel.name)): c for c in contenders}
            by_name[baseline] = contenders[0] if shape.parts else None
            layers, slow = between / weight.nbytes, weight.nbytes / coldness.SLOW + coldness.ENTERED
            arms = [_as_warm(arm, arms_of.bytes_held(by_name[arm.name]) * layers, slow) for arm in arms]
        calls, notes = 1, dict[str, str]()
        if on_gpu and shape.mode == COMPILED:
            arms, calls, notes = on_graphs(arms, baseline)
        contention = Contention()
        results = timing.race(
            arms,
            baseline=baseline,
            margin=MARGIN,
            max_seconds=min(_RACE_SECONDS, seconds_left),
            verdict_seconds=min(_VERDICT_SECONDS, seconds_left),
            seed=seed,
            clock=timing.clock_of(shape.device),
            min_batch_us=timing.BATCH_US[shape.device],
        )
        busy = contention.note()
    baseline_us = results[baseline].baseline_us / calls
    measured = [
        Measurement(shape, *key, baseline_us, timed.ratio, timed.ratio_low, timed.ratio_high, timed.rounds, note)
        for key in makers
        if key not in failures
        for timed in [results["/".join(key)]]
        for note in ["; ".join(filter(None, (notes.get(timed.name), timed.note, busy)))]
    ]
    measured += [
        Measurement(shape, *key, baseline_us, math.inf, math.inf, math.inf, 0, note) for key, note in failures.items()
    ]
    wanted = {(contender.candidate.name, contender.kernel.name) for contender in contenders}
    return [measurement for measurement in measured if (measurement.candidate, measurement.kernel) in wanted]


def _as_warm(arm: timing.Arm, model_bytes: float, slow: float) -> timing.Arm:
    """The arm as in a model of so many bytes of layers like it: if a cache holds these, so before each sample.

    The other arms' have driven them out. What takes more than `slow` seconds is not called again for that; by a limit
    of each arm's own, the one with the fewest bytes would be the slow one where all take about as long.
    """
    if not coldness.stays(model_bytes):
        return arm

    def settle() -> None:
        for call in itertools.chain.from_iterable(itertools.repeat(arm.calls, coldness.SETTLING)):
            began = time.perf_counter()
            call()
            if time.perf_counter() - began > slow:
                return

    return replace(arm, before=settle)


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {error}".partition("\n")[0]


def _dealt(
    makers: Mapping[tuple[str, str], Maker],
    first: tuple[str, str],
    copies: int,
    chance: random.Random,
    failures: dict[tuple[str, str], str],
) -> list[timing.Arm]:
    """The arms, each with its copies: allocated in turns of random order, and used in random order.

    What cannot be packed gets no arm, and its reason in `failures`; but the baseline, `first`, must not fail.

    Memory placement alone can make one of two identical arms look several percent faster, when each arm's copies lie
    side by side; and when they lie in a fixed order, one arm can fetch the memory of the next.
    """
    calls: dict[tuple[str, str], list[Call]] = {key: [] for key in makers}
    for _ in range(copies):
        for key in chance.sample(list(makers), len(makers)):
            if key in failures:
                continue
            try:
                calls[key].append(makers[key]())
            except Exception as error:
                if key == first:
                    raise
                failures[key] = _failure(error)
                calls[key].clear()
    for own in calls.values():
        chance.shuffle(own)
    return [timing.Arm("/".join(key), key[0], own) for key, own in calls.items() if own]


def on_graphs(arms: Sequence[timing.Arm], baseline: str) -> tuple[list[timing.Arm], int, dict[str, str]]:
    """The arms as users of CUDA graphs run them: each call replays some turns through the arm's copies.

    Also returns how many of an arm's former calls that is, and notes. What no graph can hold makes the same turns call
    by call, so that its launches count.
    """
    plain = next(arm for arm in arms if arm.name == baseline)
    clock = timing.clock_of("cuda")
    _turns(plain, 1)()
    began = clock()
    _turns(plain, 1)()
    turns = max(1, round(1000 * timing.BATCH_US["cuda"] / max(clock() - began, 1)))
    replayed, notes = [], {}
    for arm in arms:
        run = _turns(arm, turns)
        try:
            replayed.append(replace(arm, calls=[_captured(run)]))
        except Exception as error:  # if the arm itself is broken, the race will tell
            reason = _failure(error).removeprefix("failed: ")
            notes[arm.name] = f"timed with its launches, as no CUDA graph can hold it: {reason}"
            replayed.append(replace(arm, calls=[run]))
    return replayed, turns * len(plain.calls), notes


def _turns(arm: timing.Arm, count: int) -> Callable[[], None]:
    def run() -> None:
        for call in itertools.chain.from_iterable(itertools.repeat(arm.calls, count)):
            call()

    return run


def _captured(run: Callable[[], None]) -> Call:
    """What replays `run`, recorded as a CUDA graph on the current device. Raises where a graph cannot hold it."""
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what is made on first use (code, workspaces) must not be made while recording
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")  # other threads may do as they like
        try:
            try:
                run()
            finally:
                graph.capture_end()
        except Exception as error:
            # A recording that failed leaves torch's random generator believing in it, and the user's next draw would
            # raise; one that succeeds sets that right.
            torch.cuda.synchronize()
            spare, something = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
            spare.capture_begin(capture_error_mode="thread_local")
            something.add_(1)
            spare.capture_end()
            raise error.__context__ or error from None  # the first error says why
    torch.cuda.synchronize()

    def replay(held: Callable[[], None] = run) -> None:  # a graph reads tensors where they lay, and keeps none alive
        graph.replay()

    return replay


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The stream that graphs are recorded on: one for all, as each that calls cuBLAS keeps a workspace."""
    return torch.cuda.Stream(device)


def kernel_measurements(found: Mapping[Key, Measurement], shape: Shape, candidate: str) -> dict[str, Measurement]:
    """What was measured of each kernel of a candidate at a shape."""
    return {kernel: m for (at, name, kernel), m in found.items() if at == shape and name == candidate}

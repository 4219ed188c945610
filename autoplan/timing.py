"""The racing timer: which kernel of each candidate is fastest, and does it beat the baseline for certain?

Every round samples the baseline and every running arm once, in random order, so that drift, throttling and noisy
neighbours hit both sides of a pair (Duet benchmarking, Bulej et al. 2020, https://arxiv.org/abs/2001.05811). A sample
is the quickest of a few short batches of calls, because what disturbs a call only ever adds time (Chen and Revels 2016,
https://arxiv.org/abs/1608.04295). What counts is the median over the rounds of log(sample / baseline sample), with an
interval from order statistics: it assumes nothing about the noise, where bootstrap and MAD intervals of 8 to 16 rounds
were seen to cover as little as 91 % when they say 95 %. No round is thrown away: the median ignores bad ones already.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from autoplan.errors import KernelError

# Calls are timed in batches that last about so long: on a GPU, the gap before the first launch must be lost in it.
BATCH_US = {"cpu": 50.0, "cuda": 1000.0}
# Those of a whole model: on a GPU, the Python of all calls but the first has to run while it computes.
MODEL_BATCH_US = {"cpu": 50.0, "cuda": 20_000.0}
timings_made = 0  # samples timed by this process; tests read it to show that replaying a plan times nothing

_Result = TypeVar("_Result")

_ALPHA = 0.05  # reported intervals: 95 %, jointly for all arms of a race (Bonferroni), as the planner picks the best
# Verdicts before the end need 99 % at every look: so looking often costs little of the 5 % (Haybittle 1971, Peto 1976).
_LOOK_ALPHA = 0.01
_LOOK_EVERY = 4  # rounds
_HOPELESS = 3.0  # times the baseline's time: not worth the rounds that a verdict would take
_HOPELESS_AT_ONCE = 10.0  # the same: not worth one round
_CLEARLY_SLOWER = 1.2  # the same, where rounds are dear; calls that long are disturbed little
_WARM_UP_US = 50_000.0  # per arm, for the copies after the first
_MAX_CALLS = 1000  # per batch
_MAX_BATCHES = 4  # per sample, while they fit in:
_SAMPLE_US = 5_000.0  # about the time slice of a scheduler: longer calls are interrupted one and all, so one has to do


@dataclass(frozen=True, slots=True)
class Arm:
    """One kernel in a race; `calls` holds one callable per copy of the weights, rotated so that caches are cold.

    Let the copies exceed the caches by far: where they lie in memory was seen to make equal kernels differ by 2 to 5 %,
    which no timer can tell from a better kernel.
    """

    name: str
    group: str  # the candidate; its kernels compete with each other
    calls: Sequence[Callable[[], object]]
    before: Callable[[], object] | None = None  # called before each sample, and not timed


@dataclass(frozen=True, slots=True)
class Timing:
    """Paired timing of one arm against the baseline of its race."""

    name: str
    group: str
    baseline_us: float  # median time of one baseline call over all rounds
    ratio: float  # time / baseline time, exp(median of the paired logs); inf for an arm that failed
    ratio_low: float  # 95 % confidence interval of `ratio`, jointly with the other arms;
    ratio_high: float  # (0, inf) where there are too few rounds for one
    rounds: int
    note: str  # why it was stopped, is undecided, or failed; else ""


class CudaClock:
    """Nanoseconds on the timeline of the current CUDA stream; every reading waits for the work given to it before."""

    def __init__(self) -> None:
        self._ns, self._last = 0, self._event()

    def __call__(self) -> int:
        event = self._event()
        event.synchronize()
        self._ns += round(1e6 * self._last.elapsed_time(event))  # from reading to reading: far apart, it loses digits
        self._last = event
        return self._ns

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def clock_of(device_type: str) -> Callable[[], int]:
    """The clock for calls on "cpu" or "cuda": nanoseconds, read when what was called before is done."""
    return CudaClock() if device_type == "cuda" else time.perf_counter_ns


def switch(timing: Timing, margin: float = 0.02) -> bool:
    """Whether the arm beats the baseline by more than `margin`, with confidence."""
    return timing.ratio_high < 1 - margin


def race(
    arms: Sequence[Arm],
    *,
    baseline: str,
    margin: float = 0.02,
    min_rounds: int = 8,
    max_rounds: int = 128,
    max_seconds: float | None = None,
    verdict_seconds: float | None = None,
    min_batch_us: float = BATCH_US["cpu"],
    seed: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:
    """Time the arms against the arm named `baseline`, each only until its verdict is clear; one Timing per arm.

    An arm stops once it is surely slower than another kernel of its group, or surely not `margin` faster than the
    baseline; and a group, once it has surely won or is known so closely that more rounds cannot matter. The race ends
    when every group has stopped.
    `max_seconds` (by `clock`, warm-up included) may end it sooner, but not before one round; where rounds are so dear
    that no verdict fits in, arms that were clearly slower twice are dropped, and the first verdict may take
    `verdict_seconds` (default: no more). A batch has the same number of calls for all arms, so many that the baseline's
    lasts about `min_batch_us`.
    `clock` counts nanoseconds; for a GPU it must wait for the work under way (see `clock_of`).

    Raises: ValueError for arms that cannot be raced; KernelError when the baseline itself fails.
    """
    _check_limits(margin, min_rounds, max_rounds, max_seconds)
    bench = _Bench(arms, baseline, min_batch_us, seed, clock)
    _drop_hopeless_at_once(bench)
    verdict = max(min_rounds, bench.rounds_for_interval())
    while True:
        bench.run_round()
        if bench.rounds == 2:
            dear = max_seconds is not None and bench.seconds_of(verdict) > max_seconds
            _drop_hopeless(bench, _CLEARLY_SLOWER if dear else _HOPELESS)
        early = verdict_seconds is not None and bench.rounds < verdict
        limit = bench.limit(max_rounds, verdict_seconds if early else max_seconds)
        if limit or (bench.rounds >= min_rounds and (bench.rounds - min_rounds) % _LOOK_EVERY == 0):
            _drop_beaten(bench, margin)
            for kernels in bench.groups():
                if _settled(bench, kernels, margin):
                    bench.running = [name for name in bench.running if name not in kernels]
            if limit or not bench.running:
                return bench.timings(bench.running, limit)


def compare(
    calls: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    precision: float = 0.01,
    min_rounds: int = 8,
    max_rounds: int = 40,
    max_seconds: float | None = None,
    min_batch_us: float = BATCH_US["cpu"],
    seed: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:
    """Time a few expensive callables (whole models) against the one named `baseline`; one Timing per callable.

    All of them run in every round, until each ratio is known to +-`precision` or a limit is reached: when to stop
    depends on no verdict, so there is none to bias. Any callable may be the baseline: with the planned model as
    baseline, one comparison pairs it with the float model and with the best uniform plan.

    Raises: ValueError for calls that cannot be compared; KernelError when the baseline itself fails.
    """
    return compare_with_each(
        calls, baselines=(baseline,), precision=precision, min_rounds=min_rounds, max_rounds=max_rounds,
        max_seconds=max_seconds, min_batch_us=min_batch_us, seed=seed, clock=clock,
    )[baseline]  # fmt: skip


def compare_with_each(
    calls: Mapping[str, Callable[[], object]],
    *,
    baselines: Sequence[str],
    before: Mapping[str, Callable[[], object]] | None = None,
    precision: float = 0.01,
    min_rounds: int = 8,
    max_rounds: int = 40,
    max_seconds: float | None = None,
    min_batch_us: float = BATCH_US["cpu"],
    seed: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, dict[str, Timing]]:
    """As `compare`, with the same rounds read against each of several baselines: {baseline: {name: Timing}}.

    The first baseline decides when to stop, and is the one that may not fail; intervals are joint for one baseline.
    Those that `before` names are preceded by that call, which is not timed: one of their own leaves caches as they do.
    """
    _check_limits(precision, min_rounds, max_rounds, max_seconds)
    first = baselines[0]
    before = before or {}
    arms = [Arm(name, name, (call,), before.get(name)) for name, call in calls.items()]
    bench = _Bench(arms, first, min_batch_us, seed, clock)
    while True:
        bench.run_round()
        limit = bench.limit(max_rounds, max_seconds)
        if limit or bench.rounds >= min_rounds:
            undecided = [n for n in bench.running if bench.interval(n, first, _ALPHA).half_width > precision]
            if limit or not undecided:
                return {name: bench.timings(undecided, limit, name) for name in baselines}


@dataclass(frozen=True, slots=True)
class _Interval:
    """A median of log-ratios and its confidence interval."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def _median_interval(samples: NDArray[np.float64], alpha: float) -> _Interval:
    """Median and the interval that holds the true one with a probability of at least 1 - alpha, whatever the noise.

    David and Nagaraja, Order Statistics (3rd ed., 2003), section 7.1. Unbounded where the samples are too few for one.
    """
    ordered = np.sort(samples).tolist()
    median = (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2
    rank = _outer_rank(len(ordered), alpha)
    return _Interval(median, ordered[rank - 1], ordered[-rank]) if rank else _Interval(median, -math.inf, math.inf)


@functools.cache
def _outer_rank(count: int, alpha: float) -> int:
    """Largest k with P(fewer than k of `count` samples lie below the median) <= alpha / 2; 0 if there is none."""
    rank, ways = 0, 1
    while ways / 2**count <= alpha / 2:
        rank += 1
        ways += math.comb(count, rank)
    return rank


class _Bench:
    """The arms of a race, who is still running, and what every round has shown."""

    def __init__(
        self, arms: Sequence[Arm], baseline: str, min_batch_us: float, seed: int, clock: Callable[[], int]
    ) -> None:
        _check_arms(arms, baseline)
        self.arms = {arm.name: arm for arm in arms}
        self.baseline = self.arms[baseline]
        self.running = [arm.name for arm in arms if arm.name != baseline]
        self.rounds = 0
        self.calls_per_batch = self.batches = 1
        self._notes = dict.fromkeys(self.arms, "")
        self._failed: set[str] = set()
        # A dropped arm never comes back, so every list covers the first rounds, and two lists pair up without gaps.
        self._log_ns: dict[str, list[float]] = {name: [] for name in self.arms}
        self._warm_ns = dict.fromkeys(self.arms, math.inf)  # of the quickest single call so far, before the rounds
        self._random = random.Random(seed)
        self._clock = clock
        self._start_ns = self._round_ns = clock()
        self._comparisons = max(1, len(self.running))
        for arm in arms:
            self._guarded(arm, self._warm_up)
        self._guarded(self.baseline, lambda baseline: self._choose_batches(baseline, min_batch_us))

    def groups(self) -> list[list[str]]:
        """The running kernels of each candidate."""
        groups: dict[str, list[str]] = {}
        for name in self.running:
            groups.setdefault(self.arms[name].group, []).append(name)
        return list(groups.values())

    def drop(self, name: str, why: str) -> None:
        self.running.remove(name)
        self._notes[name] = f"stopped after {self.rounds} rounds: {why}"

    def log_ratios(self, name: str, reference: str) -> NDArray[np.float64]:
        """log(time of `name` / time of `reference`) of every round that both ran."""
        ours, theirs = self._log_ns[name], self._log_ns[reference]
        count = min(len(ours), len(theirs))
        return np.subtract(ours[:count], theirs[:count])

    def interval(self, name: str, reference: str, alpha: float) -> _Interval:
        return _median_interval(self.log_ratios(name, reference), alpha / self._comparisons)

    def run_round(self) -> None:
        began = self._clock()
        order = [self.baseline.name, *self.running]
        self._random.shuffle(order)
        for name in order:
            elapsed = self._guarded(self.arms[name], self._sample)
            if elapsed is not None:
                self._log_ns[name].append(math.log(max(elapsed, 1)))
        self.rounds += 1
        self._round_ns = self._clock() - began

    def rounds_for_interval(self) -> int:
        """The fewest rounds that give an interval at all."""
        return next(n for n in itertools.count(1) if _outer_rank(n, _ALPHA / self._comparisons))

    def seconds_of(self, rounds: int) -> float:
        """What so many rounds will have taken, at the pace of the last one."""
        return (self._clock() - self._start_ns + (rounds - self.rounds) * self._round_ns) / 1e9

    def limit(self, max_rounds: int, max_seconds: float | None) -> str:
        """The limit that forbids another round, in words; "" if none does."""
        if not self.running:
            return "no arm left"
        if self.rounds >= max_rounds:
            return f"after {self.rounds} rounds"
        if max_seconds is not None and self._clock() - self._start_ns + self._round_ns > max_seconds * 1e9:
            return f"when time ran out, after {self.rounds} rounds"
        return ""

    def timings(self, undecided: Sequence[str], limit: str, baseline: str | None = None) -> dict[str, Timing]:
        """Against the baseline of the race, or another arm that ran in every round."""
        self._notes.update(dict.fromkeys(undecided, f"undecided {limit}"))
        return {name: self._timing(arm, baseline or self.baseline.name) for name, arm in self.arms.items()}

    def _timing(self, arm: Arm, baseline: str) -> Timing:
        if baseline in self._failed:
            note = f"{baseline} {self._notes[baseline]}"
            return Timing(arm.name, arm.group, math.nan, math.inf, 0.0, math.inf, 0, note)
        baseline_us = math.exp(float(np.median(self._log_ns[baseline]))) / 1000 / self.calls_per_batch
        if arm.name in self._failed:
            ratio = low = high = math.inf
        elif arm.name == baseline:
            ratio = low = high = 1.0
        elif not self._log_ns[arm.name]:
            ratio, low, high = self.warm_ratio(arm.name), 0.0, math.inf
        else:
            found = self.interval(arm.name, baseline, _ALPHA)
            ratio, low, high = math.exp(found.median), math.exp(found.low), math.exp(found.high)
        rounds = len(self._log_ns[arm.name])
        return Timing(arm.name, arm.group, baseline_us, ratio, low, high, rounds, self._notes[arm.name])

    def _warm_up(self, arm: Arm) -> None:
        """Leave one-off costs (JIT, first touch) behind: one call per copy, fewer where they are slow."""
        began = self._clock()
        for i in range(len(arm.calls)):
            self._call_once(arm, i)
            if self._clock() - began > _WARM_UP_US * 1000:
                break

    def _call_once(self, arm: Arm, copy: int) -> None:
        began = self._clock()
        arm.calls[copy]()
        self._warm_ns[arm.name] = min(self._warm_ns[arm.name], max(1, self._clock() - began))

    def warm_ratio(self, name: str) -> float:
        """Time of a single call of `name` before the rounds / the baseline's, each the quickest one."""
        return self._warm_ns[name] / self._warm_ns[self.baseline.name]

    def call_again(self, name: str) -> None:
        """One more call before the rounds: the first one may have compiled something."""
        self._guarded(self.arms[name], lambda arm: self._call_once(arm, 0))

    def _choose_batches(self, baseline: Arm, min_batch_us: float) -> None:
        """How many calls make a batch and how many batches a sample, from the quickest of a few calls."""
        times = [max(1, self._sample(baseline))]
        while len(times) < _MAX_BATCHES and sum(times) < _SAMPLE_US * 1000:
            times.append(max(1, self._sample(baseline)))
        quickest_us = min(times) / 1000
        self.calls_per_batch = min(math.ceil(min_batch_us / quickest_us), _MAX_CALLS)
        self.batches = min(max(1, int(_SAMPLE_US / (self.calls_per_batch * quickest_us))), _MAX_BATCHES)

    def _sample(self, arm: Arm) -> int:
        """Nanoseconds of the quickest of some batches of calls, each going on with the copies after the last one's."""
        global timings_made
        timings_made += 1
        if arm.before is not None:
            arm.before()
        quickest, first = math.inf, self.rounds * self.batches * self.calls_per_batch
        for start in range(first, first + self.batches * self.calls_per_batch, self.calls_per_batch):
            batch = [arm.calls[i % len(arm.calls)] for i in range(start, start + self.calls_per_batch)]
            began = self._clock()
            for call in batch:
                call()
            quickest = min(quickest, self._clock() - began)
        return int(quickest)

    def _guarded(self, arm: Arm, run: Callable[[Arm], _Result]) -> _Result | None:
        """What `run` returns, or None if the arm fails: then it is out of the race, with the reason as its note."""
        try:
            return run(arm)
        except Exception as error:
            if arm is self.baseline:
                raise KernelError(
                    f"the baseline {arm.name!r} failed while it was being timed, so nothing can be compared with it: "
                    f"{type(error).__name__}: {error}"
                ) from error
            self._failed.add(arm.name)
            self.running.remove(arm.name)
            self._notes[arm.name] = f"failed: {type(error).__name__}: {error}"
            return None


def _drop_hopeless_at_once(bench: _Bench) -> None:
    for name in list(bench.running):
        if bench.warm_ratio(name) > _HOPELESS_AT_ONCE:
            bench.call_again(name)
        if name in bench.running and bench.warm_ratio(name) > _HOPELESS_AT_ONCE:
            bench.drop(name, f"at least {bench.warm_ratio(name):.1f} times as slow as {bench.baseline.group}")


def _drop_hopeless(bench: _Bench, times: float) -> None:
    for name in list(bench.running):
        # The smallest ratio: one of the rounds may have been interrupted.
        ratio = math.exp(bench.log_ratios(name, bench.baseline.name).min())
        if ratio > times:
            bench.drop(name, f"at least {ratio:.1f} times as slow as {bench.baseline.group}")


def _drop_beaten(bench: _Bench, margin: float) -> None:
    """Stop the arms that surely cannot be chosen."""
    for name in list(bench.running):
        found = bench.interval(name, bench.baseline.name, _LOOK_ALPHA)
        if found.low > 0:
            bench.drop(name, f"slower than {bench.baseline.group}")
        elif found.low > math.log1p(-margin):
            bench.drop(name, f"not {margin:.0%} faster than {bench.baseline.group}")
    for kernels in bench.groups():
        best = _best(bench, kernels)
        for name in kernels:
            if bench.interval(name, best, _LOOK_ALPHA).low > 0:
                bench.drop(name, f"slower than {best}")


def _settled(bench: _Bench, kernels: Sequence[str], margin: float) -> bool:
    """Whether more rounds could neither change the verdict on this candidate nor tell its kernels apart to any use."""
    best = _best(bench, kernels)
    width = bench.interval(best, bench.baseline.name, _ALPHA).half_width
    won = bench.interval(best, bench.baseline.name, _LOOK_ALPHA).high < math.log1p(-margin)
    # A sure win still needs a figure good enough to weigh candidates by; one on the edge has to be known more closely.
    known = width <= (2 * margin if won else margin / 2)
    return known and all(bench.interval(name, best, _ALPHA).half_width <= margin for name in kernels)


def _best(bench: _Bench, kernels: Sequence[str]) -> str:
    return min(kernels, key=lambda name: (bench.interval(name, bench.baseline.name, _ALPHA).median, name))


def _check_arms(arms: Sequence[Arm], baseline: str) -> None:
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"every arm of a race needs its own name; used more than once: {', '.join(twice)}")
    if baseline not in names:
        raise ValueError(f"the baseline {baseline!r} is not among the arms: {', '.join(names) or 'there are none'}")
    empty = [arm.name for arm in arms if not arm.calls]
    if empty:
        raise ValueError(f"an arm needs at least one callable to time; none given for: {', '.join(empty)}")


def _check_limits(margin: float, min_rounds: int, max_rounds: int, max_seconds: float | None) -> None:
    if not 0 < margin < 1:
        raise ValueError(f"margin and precision are fractions between 0 and 1, not {margin}")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"need 1 <= min_rounds <= max_rounds, not {min_rounds} and {max_rounds}")
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds must be positive, not {max_seconds}")

"""The racing timer against a simulated machine, whose noise and true speeds are known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from autoplan import timing
from autoplan.errors import KernelError
from autoplan.timing import Arm, Timing, compare, compare_with_each, race, switch

SEEDS = range(300)


class Machine:
    """A clock that calls advance, with what real machines do: jitter, preemption, drift, phases when all is slow."""

    def __init__(self, seed: int = 0, jitter: float = 0.05, preemption: float = 0.05, turbulent: bool = True) -> None:
        self.now_ns = 0
        self.log: list[tuple[str, int]] = []  # every call: its arm, and the copy that it used
        self._random = random.Random(seed)
        self._jitter, self._preemption, self._turbulent = jitter, preemption, turbulent
        self._slow_until_ns = 0

    def clock(self) -> int:
        return self.now_ns

    def call(self, name: str, us: float, copy: int = 0) -> Callable[[], None]:
        def run() -> None:
            self.log.append((name, copy))
            self.now_ns += int(1000 * us * self._slowdown())

        return run

    def arm(self, name: str, us: float, group: str | None = None, copies: int = 3) -> Arm:
        return Arm(name, group or name, [self.call(name, us, copy) for copy in range(copies)])

    def race(self, arms: Sequence[Arm], baseline: str = "none", **options: object) -> dict[str, Timing]:
        return race(arms, baseline=baseline, clock=self.clock, **options)  # type: ignore[arg-type]

    def _slowdown(self) -> float:
        factor = math.exp(self._random.gauss(0, self._jitter))
        if self._random.random() < self._preemption:
            factor += self._random.expovariate(1.0)
        if self._turbulent:
            factor *= 1.2 + 0.2 * math.sin(self.now_ns / 1e9)
            if self._random.random() < 0.002:
                self._slow_until_ns = self.now_ns + 100_000_000
            if self.now_ns < self._slow_until_ns:
                factor *= 1.6
        return factor


QUIET = {"jitter": 0.0, "preemption": 0.0, "turbulent": False}


def share(verdicts: Iterable[bool]) -> float:
    return float(np.mean(list(verdicts)))


def failing(error: Exception, after: int = 0) -> Callable[[], None]:
    calls = iter(range(after))

    def run() -> None:
        if next(calls, None) is None:
            raise error

    return run


# Statistics: how often the timer is right. Calls of 10 ms, so that one call is a sample and the test is quick.


@pytest.mark.parametrize("jitter", [0.02, 0.10, 0.30])
def test_an_identical_arm_is_hardly_ever_switched_to(jitter: float) -> None:
    switched = []
    for seed in SEEDS:
        machine = Machine(seed, jitter)
        result = machine.race([machine.arm("none", 10_000), machine.arm("twin", 10_000)], seed=seed, max_rounds=64)
        switched.append(switch(result["twin"]))
    assert share(switched) <= 0.01


@pytest.mark.parametrize("groups", [1, 6])
def test_none_of_six_identical_arms_is_switched_to(groups: int) -> None:
    switched = []
    for seed in SEEDS:
        machine = Machine(seed, jitter=0.10)
        twins = [machine.arm(f"twin{i}", 10_000, group=f"group{i % groups}") for i in range(6)]
        result = machine.race([machine.arm("none", 10_000), *twins], seed=seed, max_rounds=24)
        switched.append(any(switch(found) for found in result.values()))
    assert share(switched) <= 0.01


@pytest.mark.parametrize("jitter", [0.01, 0.02, 0.04])
def test_an_arm_that_is_5_percent_faster_is_switched_to(jitter: float) -> None:
    switched = []
    for seed in SEEDS:
        machine = Machine(seed, jitter)
        result = machine.race([machine.arm("none", 10_000), machine.arm("faster", 9_500)], seed=seed)
        switched.append(switch(result["faster"]))
    assert share(switched) >= 0.95


def test_the_quickest_of_short_batches_sees_through_preemption() -> None:
    switched = []
    for seed in SEEDS[:100]:
        machine = Machine(seed, jitter=0.02, preemption=0.4)
        result = machine.race([machine.arm("none", 100), machine.arm("faster", 95)], seed=seed)
        switched.append(switch(result["faster"]))
    assert share(switched) >= 0.95


@pytest.mark.parametrize("ratio", [0.7, 0.95, 1.0])
def test_the_interval_holds_the_true_ratio(ratio: float) -> None:
    """Nominally in 95 % of races; verdicts, which end them, are allowed to cost 2 %."""
    held = []
    for seed in SEEDS:
        machine = Machine(seed, jitter=0.03)
        found = machine.race([machine.arm("none", 10_000), machine.arm("arm", ratio * 10_000)], seed=seed)["arm"]
        assert found.ratio_low <= found.ratio <= found.ratio_high
        held.append(found.ratio_low <= ratio <= found.ratio_high)
    assert share(held) >= 0.93


@pytest.mark.parametrize("count", [6, 8, 9, 16, 40])
def test_order_statistics_cover_skewed_and_heavy_tailed_noise(count: int) -> None:
    rng = np.random.default_rng(count)
    for samples, median in (
        (rng.standard_cauchy((2000, count)), 0.0),
        (rng.exponential(1.0, (2000, count)), math.log(2)),
    ):
        found = [timing._median_interval(row, 0.05) for row in samples]
        assert share(interval.low <= median <= interval.high for interval in found) >= 0.94


def test_too_few_samples_give_no_interval() -> None:
    found = timing._median_interval(np.array([1.0, 3.0, 2.0, 5.0, 4.0]), 0.05)
    assert (found.median, found.low, found.high) == (3.0, -math.inf, math.inf)
    found = timing._median_interval(np.array([1.0, 3.0, 2.0, 5.0, 4.0, 6.0]), 0.05)
    assert (found.median, found.low, found.high) == (3.5, 1.0, 6.0)


def test_the_fastest_kernel_of_each_group_is_found() -> None:
    speeds = {"a1": 60.0, "a2": 75.0, "a3": 90.0, "b1": 80.0, "b2": 70.0}
    for seed in SEEDS[:50]:
        machine = Machine(seed)
        arms = [machine.arm(name, us, group=name[0]) for name, us in speeds.items()]
        result = machine.race([machine.arm("none", 100), *arms], seed=seed)
        for group, best in (("a", "a1"), ("b", "b2")):
            assert min((t for t in result.values() if t.group == group), key=lambda t: t.ratio).name == best
            assert switch(result[best])


# The race: who runs, in which order, and until when


def test_the_baseline_is_in_every_round_and_arms_stop_one_by_one() -> None:
    machine = Machine()
    arms = [machine.arm("none", 100), machine.arm("fast", 50, "a"), machine.arm("slower", 70, "a")]
    result = machine.race([*arms, machine.arm("loser", 130), machine.arm("hopeless", 400)])
    assert result["none"].rounds == max(found.rounds for found in result.values())
    assert result["none"] == replace(result["none"], ratio=1.0, ratio_low=1.0, ratio_high=1.0, note="")
    assert result["fast"].note == ""
    assert result["slower"].note == f"stopped after {result['slower'].rounds} rounds: slower than fast"
    assert result["loser"].note == f"stopped after {result['loser'].rounds} rounds: slower than none"
    assert result["hopeless"].rounds == 2
    assert result["hopeless"].note.startswith("stopped after 2 rounds: at least ")
    assert (result["hopeless"].ratio_low, result["hopeless"].ratio_high) == (0.0, math.inf)
    assert result["hopeless"].ratio == pytest.approx(4, rel=0.5)


def test_an_arm_of_ten_times_the_time_is_dropped_before_the_first_round() -> None:
    machine = Machine(**QUIET)
    arms = [machine.arm("none", 100), machine.arm("fast", 50), machine.arm("slow", 900), machine.arm("hopeless", 1200)]
    result = machine.race(arms)
    assert [name for name, _ in machine.log].count("hopeless") == 3 + 1  # each copy, and once more
    found = result["hopeless"]
    assert (found.rounds, found.ratio_low, found.ratio_high) == (0, 0.0, math.inf)
    assert found.ratio == pytest.approx(12)
    assert found.note == "stopped after 0 rounds: at least 12.0 times as slow as none"
    assert result["slow"].rounds == 2
    only = machine.race([machine.arm("none", 100), machine.arm("hopeless", 1200)])
    assert (only["none"].rounds, only["none"].baseline_us) == (1, pytest.approx(100))
    whole = compare({name: machine.call(name, us) for name, us in [("plan", 100), ("slow", 1200)]}, baseline="plan",
                    clock=machine.clock)  # fmt: skip
    assert whole["slow"].rounds >= 8


def test_an_arm_whose_first_call_is_slow_is_not_hopeless() -> None:
    """What is compiled on first use takes long once; an arm may have a single copy, and its second call may fail."""
    machine = Machine(**QUIET)
    compiling = iter([90_000.0])

    def first_slow() -> None:
        machine.now_ns += int(1000 * next(compiling, 50.0))

    def second_fails() -> None:
        machine.call("fails", 90_000)()
        if [name for name, _ in machine.log].count("fails") > 1:
            raise RuntimeError("no more")

    result = machine.race([machine.arm("none", 100), Arm("fast", "fast", [first_slow]),
                           Arm("fails", "fails", [second_fails])])  # fmt: skip
    assert switch(result["fast"])
    assert result["fast"].ratio == pytest.approx(0.5, rel=0.01)
    assert (result["fails"].ratio, result["fails"].note) == (math.inf, "failed: RuntimeError: no more")


def test_elimination_saves_most_samples() -> None:
    machine = Machine()
    arms = [machine.arm("none", 100), *(machine.arm(f"arm{us}", us) for us in (50, 80, 120, 150, 200))]
    before = timing.timings_made
    machine.race(arms)
    assert timing.timings_made - before < 128 * len(arms) / 4


def test_an_arm_on_the_edge_is_noted_as_undecided() -> None:
    machine = Machine(jitter=0.3)
    found = machine.race([machine.arm("none", 100), machine.arm("edge", 97)], max_rounds=16)["edge"]
    assert (found.rounds, found.note) == (16, "undecided after 16 rounds")


def test_a_group_that_is_known_well_enough_stops_while_others_go_on() -> None:
    machine = Machine(jitter=0.05, preemption=0.0, turbulent=False)
    arms = [machine.arm("none", 100), machine.arm("fast", 50), machine.arm("edge", 98)]
    result = machine.race(arms)
    assert result["fast"].rounds < result["edge"].rounds == result["none"].rounds
    assert result["fast"].note == ""
    assert switch(result["fast"])
    assert result["fast"].ratio == pytest.approx(0.5, rel=0.02)


def test_an_arm_that_gains_less_than_the_margin_says_so() -> None:
    machine = Machine(**QUIET)  # type: ignore[arg-type]
    result = machine.race([machine.arm("none", 100), machine.arm("arm", 99)])
    assert result["arm"].note == "stopped after 8 rounds: not 2% faster than none"
    assert not switch(result["arm"])
    assert switch(result["arm"], margin=0.005)


def test_baseline_time_and_ratio_without_noise() -> None:
    machine = Machine(**QUIET)  # type: ignore[arg-type]
    result = machine.race([machine.arm("none", 7), machine.arm("arm", 3.5)])
    assert result["arm"].baseline_us == result["none"].baseline_us == pytest.approx(7)
    assert result["arm"].ratio == pytest.approx(0.5)
    assert (result["arm"].rounds, result["none"].rounds) == (8, 8)


def test_the_order_varies_and_the_seed_repeats_it() -> None:
    def order(seed: int) -> list[str]:
        machine = Machine(**QUIET)  # type: ignore[arg-type]
        machine.race([machine.arm(name, 5000, copies=1) for name in ("none", "a", "b")], seed=seed, max_rounds=20)
        return [name for name, _ in machine.log]

    assert order(1) == order(1)
    assert order(1) != order(2)
    rounds = order(1)[4:]  # after a warm-up call of each, and one to see how long the baseline takes
    firsts = {tuple(rounds[i : i + 3]) for i in range(0, 24, 3)}
    assert all(len(set(first)) == 3 for first in firsts)
    assert len(firsts) > 3


@pytest.mark.parametrize(("us", "copies", "per_sample"), [(10.0, 3, 20), (100.0, 3, 4), (2500.0, 4, 2), (9000.0, 3, 1)])
def test_samples_are_batches_over_rotating_copies(us: float, copies: int, per_sample: int) -> None:
    machine = Machine(**QUIET)  # type: ignore[arg-type]
    machine.race([machine.arm("none", us, copies=copies), machine.arm("arm", us, copies=2)], min_rounds=6, max_rounds=6)
    for name, count in (("none", copies), ("arm", 2)):
        used = [copy for arm, copy in machine.log if arm == name][-6 * per_sample :]
        assert used == [i % count for i in range(6 * per_sample)]


def test_every_copy_is_warmed_up_once_unless_calls_are_slow() -> None:
    machine = Machine(**QUIET)  # type: ignore[arg-type]
    machine.race([machine.arm("none", 10_000, copies=9), machine.arm("arm", 100_000, copies=9)], max_rounds=8)
    warm_up = machine.log[: machine.log.index(("arm", 0))]
    assert [copy for _, copy in warm_up] == [0, 1, 2, 3, 4, 5]
    assert machine.log[6:8] == [("arm", 0), ("none", 0)]


def test_the_first_call_of_an_arm_is_never_counted() -> None:
    machine = Machine(**QUIET)  # type: ignore[arg-type]
    slow_once = iter([lambda: machine.call("jit", 1e6)()])

    def jitted() -> None:
        next(slow_once, machine.call("jit", 50))()

    found = machine.race([machine.arm("none", 100), Arm("jit", "jit", [jitted])])["jit"]
    assert found.ratio == pytest.approx(0.5)


def test_max_seconds_is_respected_and_every_arm_has_a_figure() -> None:
    machine = Machine(turbulent=False)
    arms = [machine.arm("none", 1000), machine.arm("twin", 1000), machine.arm("edge", 980)]
    result = machine.race(arms, max_seconds=0.2)
    assert machine.now_ns <= 0.2e9 * 1.02  # a round may take a little longer than the one before
    assert result["edge"].note == f"undecided when time ran out, after {result['edge'].rounds} rounds"
    result = machine.race(arms, max_seconds=1e-6)
    assert [found.rounds for found in result.values()] == [1, 1, 1]
    assert result["twin"].ratio == pytest.approx(1, rel=0.9)
    assert not switch(result["twin"])


def test_where_rounds_are_dear_the_first_verdict_may_take_longer() -> None:
    def raced(**limits: float) -> tuple[Timing, float]:
        machine = Machine(turbulent=False)
        arms = [machine.arm("none", 1e5), machine.arm("fast", 4e4), machine.arm("twin", 1e5)]
        found = machine.race(arms, max_seconds=1.0, **limits)
        assert found["none"].ratio == 1
        return found["fast"], machine.now_ns / 1e9

    found, seconds = raced()
    assert found.note.startswith("undecided when time ran out")
    assert seconds < 1.2
    found, seconds = raced(verdict_seconds=4.0)
    assert switch(found)
    assert 1.2 < seconds < 4.0


def test_a_lone_baseline_needs_one_round() -> None:
    machine = Machine()
    result = machine.race([machine.arm("none", 100, copies=1)])
    assert (result["none"].ratio, result["none"].rounds) == (1.0, 1)


def test_a_clock_that_stands_still_divides_by_nothing() -> None:
    result = race([Arm(name, name, [lambda: None]) for name in ("none", "arm")], baseline="none", clock=lambda: 0)
    assert result["arm"].ratio == 1.0


# Failures


@pytest.mark.parametrize("after", [0, 3, 30])
def test_an_arm_that_raises_leaves_the_race(after: int) -> None:
    machine = Machine()
    broken = Arm("broken", "broken", [failing(RuntimeError("no such shape"), after)])
    result = machine.race([machine.arm("none", 100), broken, machine.arm("fast", 50)])
    assert result["broken"].note == "failed: RuntimeError: no such shape"
    assert (result["broken"].ratio, result["broken"].ratio_high) == (math.inf, math.inf)
    assert not switch(result["broken"])
    assert switch(result["fast"])


@pytest.mark.parametrize("after", [0, 30])
def test_a_baseline_that_raises_ends_the_race(after: int) -> None:
    machine = Machine()
    cause = RuntimeError("out of memory")
    arms = [Arm("none", "none", [failing(cause, after)]), machine.arm("arm", 100)]
    with pytest.raises(KernelError, match=r"baseline 'none' failed while .* RuntimeError: out of memory") as caught:
        machine.race(arms)
    assert caught.value.__cause__ is cause


def test_an_interrupt_is_not_swallowed() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        race([Arm("none", "none", [lambda: None]), Arm("arm", "arm", [interrupted])], baseline="none")


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["none", "a", "b", "a"], {}, "needs its own name; used more than once: a$"),
        (["a", "b"], {}, "the baseline 'none' is not among the arms: a, b$"),
        ([], {}, "the baseline 'none' is not among the arms: there are none$"),
        (["none", "empty"], {}, "at least one callable to time; none given for: empty$"),
        (["none"], {"margin": 0.0}, "fractions between 0 and 1, not 0.0"),
        (["none"], {"min_rounds": 9, "max_rounds": 8}, "min_rounds <= max_rounds, not 9 and 8"),
        (["none"], {"max_seconds": 0}, "max_seconds must be positive, not 0"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(names: list[str], options: dict[str, object], message: str) -> None:
    machine = Machine()
    arms = [machine.arm(name, 100, copies=0 if name == "empty" else 1) for name in names]
    with pytest.raises(ValueError, match=message):
        machine.race(arms, **options)  # type: ignore[arg-type]
    assert not machine.log


# Whole models


def test_compare_times_every_callable_in_every_round() -> None:
    machine = Machine(jitter=0.01)
    calls = {
        name: machine.call(name, us) for name, us in {"float": 90_000, "uniform": 55_000, "planned": 50_000}.items()
    }
    result = compare(calls, baseline="planned", clock=machine.clock)
    rounds = {found.rounds for found in result.values()}
    assert len(rounds) == 1
    assert 8 <= rounds.pop() <= 40
    assert result["planned"].ratio == 1
    for name, true in {"float": 1.8, "uniform": 1.1}.items():
        assert 1 < result[name].ratio_low < true < result[name].ratio_high
        assert result[name].group == name


def test_the_same_rounds_are_read_against_each_baseline() -> None:
    machine = Machine(jitter=0.01)
    true = {"float": 90_000, "planned": 50_000, "broken": 50_000}
    calls = {name: machine.call(name, us) for name, us in true.items()}
    calls["broken"] = lambda: 1 / 0
    found = compare_with_each(calls, baselines=("float", "planned", "broken"), clock=machine.clock)
    assert found["float"]["planned"].ratio == pytest.approx(1 / found["planned"]["float"].ratio)
    for baseline, other in (("float", "planned"), ("planned", "float")):
        timed = found[baseline][other]
        assert timed.ratio_low < true[other] / true[baseline] < timed.ratio_high
        assert found[baseline][baseline].ratio == 1
        assert found[baseline]["broken"].ratio == math.inf
    assert found["planned"]["float"].baseline_us < 0.7 * found["float"]["planned"].baseline_us
    assert found["broken"]["float"].ratio_high == math.inf
    assert "ZeroDivisionError" in found["broken"]["float"].note


def test_what_comes_before_a_turn_is_not_timed() -> None:
    machine = Machine(**QUIET)  # type: ignore[arg-type]
    calls = {"float": machine.call("float", 90_000), "planned": machine.call("planned", 45_000)}
    before = {"planned": machine.call("before planned", 300_000)}
    found = compare_with_each(calls, baselines=("float",), before=before, max_rounds=8, clock=machine.clock)
    assert found["float"]["planned"].ratio == pytest.approx(0.5)
    names = [name for name, _ in machine.log]
    assert [names[i + 1] for i, name in enumerate(names) if name == "before planned"] == ["planned"] * 8


def test_compare_stops_once_precise_and_at_its_limits() -> None:
    machine = Machine(jitter=0.001, preemption=0.0, turbulent=False)
    calls = {name: machine.call(name, 10_000) for name in ("float", "planned")}
    assert compare(calls, baseline="float", clock=machine.clock)["planned"].rounds == 8
    found = compare(calls, baseline="float", precision=1e-6, max_rounds=12, clock=machine.clock)["planned"]
    assert (found.rounds, found.note) == (12, "undecided after 12 rounds")
    began = machine.now_ns
    found = compare(calls, baseline="float", max_seconds=0.125, clock=machine.clock)["planned"]
    assert machine.now_ns - began <= 0.125e9
    assert (found.rounds, found.ratio_low, found.ratio_high) == (4, 0.0, math.inf)


@pytest.mark.parametrize("ratio", [1.0, 0.9])
def test_compare_covers_the_true_ratio(ratio: float) -> None:
    held = []
    for seed in SEEDS:
        machine = Machine(seed, jitter=0.01)
        calls = {"float": machine.call("float", 50_000), "planned": machine.call("planned", ratio * 50_000)}
        found = compare(calls, baseline="float", precision=0.01, seed=seed, clock=machine.clock)["planned"]
        held.append(found.ratio_low <= ratio <= found.ratio_high)
    assert share(held) >= 0.93


def test_timings_are_counted() -> None:
    machine = Machine(**QUIET)  # type: ignore[arg-type]
    before = timing.timings_made
    machine.race([machine.arm("none", 10_000), machine.arm("arm", 5_000)])
    assert timing.timings_made - before == 17  # 8 rounds of 2, and one to see how long the baseline takes
    compare({"float": machine.call("float", 10_000)}, baseline="float", clock=machine.clock)
    assert timing.timings_made - before == 19

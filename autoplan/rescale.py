"""Solve, measure, rescale, solve again: the fastest plan whose measured divergence keeps the budget.

The solver adds up the harms of single layers. As long as harms add up, one factor, kappa, between their sum and what is
measured is all there is to learn, and a round or two of measuring teaches it. Where they do not (errors that amplify
or cancel each other, very few bits), a factor per candidate is fitted to a handful of measured plans; and where that
is not enough either, plans are found by measuring alone: the worst contributors go, and what can come back does.

With a time budget the most accurate plan is wanted, and predicted harms are only near: plans that may well be
the best are measured, 32 at most, each teaching which to try next (see `posterior`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoplan.errors import BudgetError
from autoplan.posterior import Harms, Posterior, measured_best
from autoplan.records import LayerPlan
from autoplan.selection import Budget, Choice, choose, choosing, decisions, total_harm, total_us

ROUNDS = 3
_FIRST_KAPPA = 1.15  # the whole does a little more harm than its parts add up to (median 1.13 over many models)
_ADDITIVE = 1.5  # measured / predicted beyond this, either way: harms do not add up
_PLANS_AROUND = 6  # that factors per candidate are fitted to, beside those measured already
_PRIOR = 0.2  # weight of "all factors are alike" in that fit, against 1 for a measured plan
_MOST_UNLIKE = 10.0  # how far one candidate's factor may be from the whole's: few plans tell little of a rare one
_PLANS_IN_TIME = 32  # measured inside a time budget
_COMEBACKS = 10  # measurements spent on switching again what was put back


@dataclass(frozen=True, slots=True)
class Measured:
    """The divergence of one plan on held-out inputs."""

    value: float
    bound: float  # one-sided 95 % upper bound: what has to keep the budget


@dataclass(frozen=True, slots=True)
class Settled:
    """The plan that was found, and what was learnt on the way."""

    options: list[LayerPlan]  # the layers as they came, harms corrected if harms did not add up
    layers: list[LayerPlan]  # the same, each with what was chosen for it
    kappa: float  # the measured upper bound over the sum of harms
    gap: float
    price_us: float
    rounds: int
    notes: tuple[str, ...]


Measure = Callable[[Sequence[LayerPlan]], Measured]
Keeps = Callable[[Sequence[LayerPlan]], bool]


def within_budget(
    layers: Sequence[LayerPlan],
    budget: Budget,
    measure: Measure,
    *,
    seed: int = 0,
    seconds_left: Callable[[], float] = lambda: math.inf,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Settled:
    """The fastest plan (with a time budget: the most accurate) whose measured upper bound keeps `budget`.

    At most 3 rounds of solving; where harms do not add up, a bounded number of measurements more. If nothing keeps the
    budget, every layer that is not pinned gets `none`, and a note says so. Once no seconds are left, the best so far.

    Raises BudgetError when no plan is even predicted to fit.
    """
    return _Search(layers, budget, measure, seed, seconds_left, progress).settle()


class _Search:
    """The plans measured so far, and the search for a better one."""

    def __init__(
        self,
        layers: Sequence[LayerPlan],
        budget: Budget,
        measure: Measure,
        seed: int,
        seconds_left: Callable[[], float],
        progress: Callable[[int, int], None],
    ) -> None:
        self.layers, self.budget, self.measure = list(layers), budget, measure
        self.random, self.seconds_left, self.progress = np.random.default_rng(seed), seconds_left, progress
        self.limit = math.inf if budget.divergence is None else budget.divergence
        self.measured: dict[tuple[str, ...], Measured] = {}  # by the candidates chosen
        self.kappa, self.rounds, self.adds_up = _FIRST_KAPPA, 0, True
        self.notes: list[str] = []

    def settle(self) -> Settled:
        while self.rounds < ROUNDS and (choice := self._next()):
            self.progress(self.rounds, ROUNDS)
            self.rounds += 1
            plan = choosing(self.layers, choice.candidates)
            self._learn(plan, self._measure(plan), choice)
            if self.budget.divergence is None or (self.seconds_left() <= 0 and self._best()):
                break
        if self.budget.time is not None:
            self._refine()
        best = self._best()
        over = [plan for plan in map(self._plan, self.measured) if not self.keeps(plan)]
        if over and (best is None or not self.adds_up):
            best = self._by_measuring(best, over)
        return self._settled(self._nothing(over) if best is None else best)

    # Rounds of solving.

    def _next(self) -> Choice | None:
        """What the solver would choose now, unless it was measured already."""
        try:
            choice = choose(self.layers, self.budget, self.kappa)
        except BudgetError:
            if not self.measured:  # before anything is measured, this is the caller's to know
                raise
            return None
        return None if choice.candidates in self.measured else choice

    def _learn(self, plan: Sequence[LayerPlan], measured: Measured, choice: Choice) -> None:
        """Kappa from a measured plan; factors per candidate once it shows that harms do not add up."""
        harm = total_harm(plan)
        if not harm:
            return
        ratio = measured.value / harm
        budget_binds = measured.bound > self.limit or choice.price_us > 0
        if self.adds_up and self.budget.time is None and budget_binds and not 1 / _ADDITIVE <= ratio <= _ADDITIVE:
            self.adds_up = False
            self.notes.append(f"harms do not add up: together they did {ratio:.3g} times the sum of each alone")
            self._fit_factors(min(max(ratio, 1e-3), 1e3))
            harm = total_harm(self._plan(choice.candidates))
        self.kappa = _finite_ratio(measured.bound, harm)

    def _fit_factors(self, prior: float) -> None:
        """Multiply each candidate's harms by what fits the measured plans best, in least squares of relative errors.

        Plans around the present one are measured first: those that the solver finds for harms changed at random.
        The factors are non-negative: multiplicative updates from the prior (Daube-Witherspoon & Muehllehner, "An
        Iterative Image Space Reconstruction Algorithm Suitable for Volume ECT", IEEE TMI 5(2), 1986).
        """
        harmful = [o for layer in self.layers for o in layer.options if not o.rejected and o.harm]
        names = sorted({option.candidate for option in harmful})
        if len(names) < 2:  # kappa says it all
            return
        for _ in range(_PLANS_AROUND):
            shaken = _times(self.layers, lambda name: float(self.random.lognormal(0.0, 1.0)))
            try:
                choice = choose(shaken, self.budget, prior)
            except BudgetError:
                continue
            if self.seconds_left() > 0:
                self._measure(self._plan(choice.candidates))
        table, ones = [], []
        for plan in map(self._plan, self.measured):
            value = self._measure(plan).value
            if 0 < value < math.inf:
                table.append([total_harm([x for x in plan if x.chosen == name]) / value for name in names])
                ones.append(1.0)
        a = np.vstack([*table, np.eye(len(names)) * _PRIOR / prior])
        b = np.array([*ones, *[_PRIOR] * len(names)])
        factors = np.full(len(names), prior)
        for _ in range(500):
            factors *= (a.T @ b) / (a.T @ (a @ factors))
        factors = factors.clip(prior / _MOST_UNLIKE, prior * _MOST_UNLIKE)
        fitted = dict(zip(names, factors.tolist(), strict=True))
        self.layers = _times(self.layers, lambda name: fitted.get(name, 1.0))
        listed = ", ".join(f"{name} {factor:.3g}" for name, factor in fitted.items())
        self.notes.append(f"so harms were multiplied by what fits {len(ones)} measured plans, by candidate: {listed}")

    # Inside a time budget.

    def _refine(self) -> None:
        """Measure the plans that may be the most accurate ones, and correct the harms by what they did."""
        (first, measured), *_ = self.measured.items()
        harm = total_harm(self._plan(first))
        if not 0 < measured.value < math.inf or not harm:
            return
        names = [layer.name for layer in self.layers]
        posterior = Posterior(_harms(self.layers, measured.value / harm), int(self.random.integers(1 << 31)))
        budget = replace(self.budget, divergence=None)  # the measured one is what has to keep it

        def solved(harms: Harms) -> dict[str, str]:
            choice = choose(_with_harms(self.layers, harms), budget, 1.0)
            return dict(zip(names, choice.candidates, strict=True))

        def measure(plan: Mapping[str, str]) -> float:
            return self._measure(self._plan([plan[name] for name in names])).value

        before = len(self.measured)
        best = measured_best(posterior, solved, measure, _PLANS_IN_TIME, lambda: self.seconds_left() > 0)
        if tried := len(self.measured) - before:
            self.layers = _with_harms(self.layers, posterior.mean())
            self.kappa = _finite_ratio(measured.bound, total_harm(self._plan(first)))
            self.notes.append(
                f"{tried} more plans inside the time budget were measured: the best did {measure(best):.3g}, "
                f"the one of the least predicted harm {measured.value:.3g}"
            )

    # What is known of plans.

    def _plan(self, names: Sequence[str]) -> list[LayerPlan]:
        return choosing(self.layers, names)

    def _measure(self, plan: Sequence[LayerPlan]) -> Measured:
        names = tuple(layer.chosen for layer in plan)
        if names not in self.measured:
            exact = all(name == "none" for name in names)  # but for rounding, on whichever kernel
            self.measured[names] = Measured(0.0, 0.0) if exact else self.measure(plan)
        return self.measured[names]

    def keeps(self, plan: Sequence[LayerPlan]) -> bool:
        """Whether a plan keeps every limit; one that there is no time left to measure does not."""
        budget = self.budget
        known = tuple(layer.chosen for layer in plan) in self.measured
        if not known and self.seconds_left() <= 0 and any(layer.chosen != "none" for layer in plan):
            return False
        us = sum(layer.baseline_us for layer in plan)
        if budget.time is not None and total_us(plan) > budget.time * us * (1 + 1e-9):  # sums in another order
            return False
        if budget.nbytes is not None and sum(layer.choice.nbytes or 0 for layer in plan) > budget.nbytes:
            return False
        return self._measure(plan).bound <= self.limit

    def _worth(self, plan: Sequence[LayerPlan]) -> float:
        """What the budget makes least, as predicted: time, or harm where time is limited."""
        return total_us(plan) if self.budget.time is None else self.kappa * total_harm(plan)

    def _best(self) -> list[LayerPlan] | None:
        worth = self._worth if self.budget.time is None else lambda plan: self._measure(plan).value
        return min(filter(self.keeps, map(self._plan, self.measured)), key=worth, default=None)

    # Where adding up does not help.

    def _by_measuring(self, best: list[LayerPlan] | None, over: list[list[LayerPlan]]) -> list[LayerPlan] | None:
        """From a plan over the budget as far back as it takes; then as much of it as possible after all."""
        wanted = [plan for plan in over if best is None or self._worth(plan) < self._worth(best)]
        if not wanted:
            return best
        target = min(wanted, key=lambda plan: self._measure(plan).bound)
        start = best or put_back(target, self.keeps)
        if start is None or self.budget.time is not None:
            return start
        return switch_again(start, target, self.keeps)

    def _nothing(self, over: list[list[LayerPlan]]) -> list[LayerPlan]:
        closest = min(over, key=lambda plan: self._measure(plan).bound)
        measured = self._measure(closest)
        self.notes.append(
            f"no plan was inside the divergence budget of {self.limit:.3g} in {self.rounds} rounds (the closest of "
            f"{len(self.measured)} measured {measured.value:.3g}, at most {measured.bound:.3g}), "
            "so no layer is quantized"
        )
        return _with_none(closest, _switched(closest))

    def _settled(self, plan: list[LayerPlan]) -> Settled:
        if (harm := total_harm(plan)) and tuple(layer.chosen for layer in plan) in self.measured:
            self.kappa = _finite_ratio(self._measure(plan).bound, harm)
        gap, price = 0.0, 0.0
        try:
            choice = choose(self.layers, self.budget, self.kappa)
        except BudgetError:  # pinned layers alone break the budget: there is nothing better
            pass
        else:
            least = (1 - choice.gap) * self._worth(self._plan(choice.candidates))
            gap, price = max(0.0, 1 - least / self._worth(plan)) if self._worth(plan) else 0.0, choice.price_us
        return Settled(self.layers, plan, self.kappa, gap, price, self.rounds, tuple(self.notes))


def put_back(plan: Sequence[LayerPlan], keeps: Keeps) -> list[LayerPlan] | None:
    """The plan with its worst contributors on `none`, as few as `keeps` asks for; None if all of them are too few.

    Worst first means most harm for the time that it saves. How many: by bisection, so for 224 layers 8 are asked about.
    """

    def price(decision: list[int]) -> float:
        layers = [plan[i] for i in decision]
        saved = sum((layer.option("none").us or 0.0) for layer in layers) - total_us(layers)
        return total_harm(layers) / saved if saved > 0 else math.inf

    order = sorted(_switched(plan), key=price, reverse=True)
    found, too_few, enough = None, 0, len(order)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        fewer = _with_none(plan, order[:middle])
        if keeps(fewer):
            found, enough = fewer, middle
        else:
            too_few = middle
    if found is None and keeps(none := _with_none(plan, order)):
        found = none
    return found


def switch_again(plan: Sequence[LayerPlan], target: Sequence[LayerPlan], keeps: Keeps) -> list[LayerPlan]:
    """The plan with as much of the faster `target` as `keeps` allows: what saves most first, and halves of the rest."""

    def saved(decision: list[int]) -> float:
        return total_us([plan[i] for i in decision]) - total_us([target[i] for i in decision])

    current = list(plan)
    everything = decisions(plan).values()
    differing = [d for d in everything if any(plan[i].chosen != target[i].chosen for i in d) and saved(d) > 0]
    blocks = _halves(sorted(differing, key=saved, reverse=True))
    for _ in range(_COMEBACKS):
        if not blocks:
            break
        block = blocks.pop(0)
        taken = {i for decision in block for i in decision}
        more = choosing(current, [(target if i in taken else current)[i].chosen for i in range(len(current))])
        if keeps(more):
            current = more
        elif len(block) > 1:
            blocks += _halves(block)
    return current


def _halves(block: list[list[int]]) -> list[list[list[int]]]:
    middle = (len(block) + 1) // 2
    return [half for half in (block[:middle], block[middle:]) if half]


def _switched(plan: Sequence[LayerPlan]) -> list[list[int]]:
    """The decisions against `none` that could have been for it: not those that a pin forces."""
    return [
        decision
        for decision in decisions(plan).values()
        if any(plan[i].chosen != "none" for i in decision)
        and not any(plan[i].option("none").rejected for i in decision)
    ]


def _with_none(plan: Sequence[LayerPlan], put_back: Sequence[list[int]]) -> list[LayerPlan]:
    back = {i for decision in put_back for i in decision}
    return choosing(plan, ["none" if i in back else layer.chosen for i, layer in enumerate(plan)])


def _harms(layers: Sequence[LayerPlan], factor: float = 1.0) -> dict[tuple[str, str], float]:
    """The harm of every open option, by layer and candidate, times `factor`."""
    return {
        (layer.name, o.candidate): o.harm * factor
        for layer in layers
        for o in layer.options
        if not o.rejected and o.harm is not None
    }


def _with_harms(layers: Sequence[LayerPlan], harms: Harms) -> list[LayerPlan]:
    """The layers with these harms."""
    return [
        replace(
            layer,
            options=tuple(replace(o, harm=harms.get((layer.name, o.candidate), o.harm)) for o in layer.options),
        )
        for layer in layers
    ]


def _times(layers: Sequence[LayerPlan], factor: Callable[[str], float]) -> list[LayerPlan]:
    """The layers with every open option's harm multiplied by the factor of its candidate."""
    return _with_harms(layers, {pair: harm * factor(pair[1]) for pair, harm in _harms(layers).items()})


def _finite_ratio(bound: float, harm: float) -> float:
    return min(max(bound / harm, 1e-9), 1e9)

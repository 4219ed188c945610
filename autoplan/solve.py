"""Which candidate for which layer: an exact multiple-choice knapsack and its certificate.

Every layer takes exactly one choice; the total time is minimised while the total harm (and, if asked, the bytes) stay
inside their limits. Three classical pieces do the work:

- The LP relaxation is solved by taking the increments of every layer's convex hull in order of time saved per harm
  (Sinha & Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27(3), 1979). One sort yields a
  good feasible plan and the Lagrange multiplier.
- With multipliers p >= 0, `sum_i min_k (time + p * amount) - p * limit` bounds every feasible plan from below
  (Geoffrion, "Lagrangean relaxation for integer programming", 1974). What cannot beat the best known plan is dropped.
- What is left is searched layer by layer, keeping only states that no other state beats in time and in every amount
  (Nemhauser & Ullmann, "Discrete Dynamic Programming and Capital Allocation", Management Science 15(9), 1969).

The search adds integers, on a grid of 2**-60 of the limit (or of the total time), so equal sums are equal in whatever
order they are added, and a permutation of identical layers is a tie and not a rounding accident.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoplan.errors import BudgetError

__all__ = ["Solution", "solve"]

_GRID_BITS = 60  # sums of two grid values stay inside int64
_HUGE = 1e100  # anything above is as good as infinite, and sums below cannot overflow
_WORK = 5_000_000  # states x choices visited before the search becomes a beam and reports its gap
_BEAM = 250  # states that are kept even then

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Solution:
    """One choice per layer, what it costs, and proof of how good it is."""

    choice: tuple[int, ...]
    time: float
    harm: float
    lower_bound: float  # no plan inside the limits is faster
    gap: float  # (time - lower_bound) / time; 0.0 when the plan is optimal
    price: float  # Lagrange multiplier: time that one more unit of harm would save; 0.0 when harm does not bind


def solve(
    time: _Floats,
    harm: _Floats,
    budget: float,
    *,
    nbytes: _Floats | None = None,
    max_nbytes: float | None = None,
) -> Solution:
    """Minimise the total of `time` [layers, choices] while the totals of `harm` and `nbytes` stay inside their limits.

    Column 0 is `none`: finite time, no harm. An infinite time or harm marks a choice that a layer cannot take. Among
    plans of equal time the one with less harm wins; a layer with equal choices takes the lower column (where the byte
    limit binds: the lighter one). The plan is optimal and `gap` is 0.0 unless the search had to be cut short, which
    takes thousands of layers, two tight limits, or times that are an exact linear function of harm.

    Raises:
        BudgetError: a limit is negative or NaN, or no plan inside `budget` is as small as `max_nbytes`.
        ValueError: shapes differ, or values are negative, NaN, or not those of `none` in column 0.
    """
    if not budget >= 0:
        raise BudgetError(f"the harm budget must be a number >= 0, not {budget}")
    time, harm = _checked(time, harm)
    price = _price(time, harm, budget)
    if nbytes is None and max_nbytes is not None:
        raise ValueError("max_nbytes needs nbytes")
    time = np.where(harm <= budget, time, np.inf)

    # The fastest choice of every layer, ties to less harm and then to the lower column, is the answer if it fits.
    fastest = np.lexsort((harm, time), axis=1)[:, 0]
    if nbytes is None or max_nbytes is None:
        if _total(harm, fastest) <= budget:
            return _solution(fastest, time, harm, price)
        amounts, limits = [harm], [budget]
        incumbent = None
    else:
        nbytes = _checked_nbytes(nbytes, max_nbytes, time)
        unlimited = solve(time, harm, budget)
        if _total(nbytes, np.array(unlimited.choice, dtype=np.intp)) <= max_nbytes:
            return unlimited
        lightest = solve(np.where(np.isfinite(time), nbytes, np.inf), harm, budget)
        if lightest.time > max_nbytes:
            raise BudgetError(
                f"no plan within a harm of {budget:g} fits into {max_nbytes:,.0f} bytes: "
                f"the smallest takes {lightest.time:,.0f}; allow more bytes or more harm, or offer smaller candidates"
            )
        time = np.where(nbytes <= max_nbytes, time, np.inf)
        amounts = [harm, nbytes]
        # An infinite budget has no grid; the most harm that a plan can do is as good a limit.
        limits = [min(budget, math.fsum(np.where(np.isfinite(time), harm, 0.0).max(axis=1).tolist())), max_nbytes]
        incumbent = np.array(lightest.choice)

    # A choice slower than a whole plan that fits is never taken; without it the grid of the times is finer.
    known = np.zeros(len(time), dtype=np.intp) if incumbent is None else incumbent
    time = np.where(time <= _total(time, known), time, np.inf)
    allowed = np.isfinite(time)
    usable = _undominated_choices(time, *amounts)
    amounts = [np.where(allowed, amount, 0.0) for amount in amounts]
    slowest = np.where(allowed, time, 0.0)
    exponent = math.frexp(math.fsum(slowest.max(axis=1).tolist()))[1] - _GRID_BITS
    values = np.stack(
        [np.rint(np.ldexp(slowest, -exponent)), *(_on_grid(a, limit) for a, limit in zip(amounts, limits, strict=True))]
    ).astype(np.int64)
    rooms = [_room(limit, len(time)) for limit in limits]
    if incumbent is None:
        base, incumbent, multiplier = _greedy(values, usable, rooms[0].safe)
        multipliers = [multiplier]
    else:
        base, incumbent, multipliers = _dual(values, usable, rooms, incumbent)
        price = math.ldexp(multipliers[0], min(exponent + _GRID_BITS - math.frexp(limits[0])[1], 800))
    found = _search(values, usable, rooms, multipliers, base, incumbent, _Fits(amounts, limits))
    if found.optimal:
        return _solution(found.choice, time, harm, price)
    bound = math.ldexp(float(found.bound - len(time)), exponent)  # less what rounding to the grid can hide
    return _solution(found.choice, time, harm, price, min(max(bound, 0.0), _total(time, found.choice)))


# --- input and output ---


def _checked(time: _Floats, harm: _Floats) -> tuple[_Floats, _Floats]:
    """Both tables as float64, with an infinite time and no harm wherever a choice cannot be taken."""
    time, harm = np.asarray(time, dtype=np.float64), np.asarray(harm, dtype=np.float64)
    if time.ndim != 2 or time.shape != harm.shape or (time.shape[0] and not time.shape[1]):
        raise ValueError(f"time and harm must both be [layers, choices], not {time.shape} and {harm.shape}")
    usable = ~(time >= _HUGE) & ~(harm >= _HUGE)
    for name, table in (("time", time), ("harm", harm)):
        wrong = usable & ~(table >= 0)
        if wrong.any():
            layer, k = np.argwhere(wrong)[0]
            raise ValueError(f"{name} of layer {layer}, choice {k} must be a number >= 0, not {table[layer, k]}")
    if not usable[:, :1].all() or harm[:, :1].any():
        layer = np.flatnonzero(~usable[:, 0] | (harm[:, 0] != 0))[0]
        raise ValueError(
            f"choice 0 must be `none`, with a finite time and no harm; "
            f"layer {layer} has time {time[layer, 0]} and harm {harm[layer, 0]}"
        )
    return np.where(usable, time, np.inf), np.where(usable, harm, 0.0)


def _checked_nbytes(nbytes: _Floats, max_nbytes: float, time: _Floats) -> _Floats:
    if not max_nbytes >= 0:
        raise BudgetError(f"max_nbytes must be a number >= 0, not {max_nbytes}")
    nbytes = np.asarray(nbytes, dtype=np.float64)
    if nbytes.shape != time.shape:
        raise ValueError(f"nbytes must be [layers, choices] like time, {time.shape}, not {nbytes.shape}")
    wrong = np.isfinite(time) & ~((nbytes >= 0) & (nbytes < _HUGE))
    if wrong.any():
        layer, k = np.argwhere(wrong)[0]
        raise ValueError(f"nbytes of layer {layer}, choice {k} must be finite and >= 0, not {nbytes[layer, k]}")
    return np.where(np.isfinite(time), nbytes, 0.0)


def _solution(
    choice: NDArray[np.intp], time: _Floats, harm: _Floats, price: float, bound: float | None = None
) -> Solution:
    total = _total(time, choice)
    bound = total if bound is None else bound
    gap = (total - bound) / total if total > bound else 0.0
    return Solution(tuple(choice.tolist()), total, _total(harm, choice), bound, gap, price)


def _total(table: _Floats, choice: NDArray[np.intp]) -> float:
    """The correctly rounded sum, whatever the order of the layers."""
    return math.fsum(table[np.arange(len(choice)), choice].tolist())


# --- LP relaxation ---


def _hull_increments(time: _Floats, harm: _Floats) -> tuple[NDArray[np.intp], list[tuple[float, int, int]]]:
    """Per layer the fastest of the least harmful choices, and the steps from there along the lower convex hull of its
    (harm, time) points as `(time saved per harm, layer, choice)`; best steps first, ties in layer order."""
    start = np.zeros(len(time), dtype=np.intp)
    increments: list[tuple[float, int, int]] = []
    for layer, order in enumerate(np.lexsort((time, harm), axis=1).tolist()):
        hull: list[tuple[float, int, int]] = []  # (slope of the step that leads here, layer, choice)
        t, h = time[layer].tolist(), harm[layer].tolist()
        for k in order:
            if t[k] == math.inf or (hull and t[k] >= t[hull[-1][2]]):
                continue
            slope = math.inf
            while hull:
                last = hull[-1][2]
                slope = (t[last] - t[k]) / (h[k] - h[last]) if h[k] > h[last] else math.inf
                if slope <= hull[-1][0]:
                    break
                hull.pop()
            hull.append((slope if hull else math.inf, layer, k))
        start[layer] = hull[0][2]
        increments += hull[1:]
    increments.sort(key=lambda step: -step[0])  # stable: a layer's own steps stay in order
    return start, increments


def _price(time: _Floats, harm: _Floats, budget: float) -> float:
    """The slope at which the LP relaxation runs out of budget."""
    start, increments = _hull_increments(time, harm)
    choice, harms = start.tolist(), harm.tolist()
    used = _total(harm, start)
    for slope, layer, k in increments:
        used += harms[layer][k] - harms[layer][choice[layer]]
        if used > budget:
            return slope
        choice[layer] = k
    return 0.0


def _greedy(values: _Ints, usable: NDArray[np.bool_], safe: int) -> tuple[NDArray[np.intp], NDArray[np.intp], float]:
    """The plan up to the first hull step that does not fit, the same plan with whatever later steps still fit, and the
    slope of the step that did not."""
    start, increments = _hull_increments(np.where(usable, values[0], np.inf), values[1].astype(np.float64))
    amounts = values[1].tolist()
    filled = start.tolist()
    base: list[int] | None = None
    multiplier = 0.0
    used = int(values[1, np.arange(len(start)), start].sum())
    stopped = [False] * len(start)  # a layer's later steps build on its earlier ones
    for slope, layer, k in increments:
        more = used + amounts[layer][k] - amounts[layer][filled[layer]]
        if stopped[layer] or more > safe:
            if base is None:
                base, multiplier = filled.copy(), slope
            stopped[layer] = True
        else:
            used, filled[layer] = more, k
    return np.array(filled if base is None else base), np.array(filled), multiplier


def _dual(
    values: _Ints, usable: NDArray[np.bool_], rooms: list[_Room], incumbent: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.intp], list[float]]:
    """A plan that attains the Lagrangian bound, the fastest plan met that fits, and the multipliers of harm and bytes
    that (nearly) maximise the bound. It is concave: the multiplier of bytes is bisected, and for each of its values the
    hulls of `time + multiplier * nbytes` give the other."""
    time, harm, nbytes = (value.astype(np.float64) for value in values)
    rows = np.arange(len(time))
    plans = [incumbent]

    def inner(multiplier: float) -> tuple[NDArray[np.intp], float, float]:
        """The plan, the multiplier of harm, and the bytes of the LP solution, which uses up the harm."""
        choice, increments = _hull_increments(np.where(usable, time + multiplier * nbytes, np.inf), harm)
        used, size = harm[rows, choice].sum(), nbytes[rows, choice].sum()
        price = 0.0
        for slope, layer, k in increments:
            step = harm[layer, k] - harm[layer, choice[layer]]
            growth = nbytes[layer, k] - nbytes[layer, choice[layer]]
            if used + step > rooms[0].safe:
                price = slope
                break
            used, size, choice[layer] = used + step, size + growth, k
        if size < rooms[1].safe and (values[1:, rows, choice].sum(axis=1) <= [room.safe for room in rooms]).all():
            plans.append(choice)
        return choice, price, size + growth * (rooms[0].safe - used) / step if price else size

    low, high = -float(_GRID_BITS), float(_GRID_BITS)
    base, price, _ = inner(2.0**high)
    for _ in range(40):
        middle = (low + high) / 2
        choice, slope, size = inner(2.0**middle)
        if size <= rooms[1].most:
            high, base, price = middle, choice, slope
        else:
            low = middle
    return base, min(plans, key=lambda plan: int(values[0, rows, plan].sum())), [price, 2.0**high]


# --- exact search on the grid ---


def _on_grid(amount: _Floats, limit: float) -> _Floats:
    """Rounded down, so that nothing that fits is ruled out; the plan that is returned is checked in floating point."""
    return np.floor(np.ldexp(amount, _GRID_BITS - math.frexp(limit)[1]))


@dataclass(frozen=True, slots=True)
class _Room:
    """A limit in grid steps: sums above `most` never fit, sums up to `safe` always do, rounding included."""

    most: int
    safe: int


def _room(limit: float, layers: int) -> _Room:
    steps = math.ldexp(math.frexp(limit)[0], _GRID_BITS)
    most = int(steps) + int(math.ulp(steps)) // 2  # math.fsum rounds to the nearest float, ties to even
    return _Room(most if float(most) <= steps else most - 1, int(steps) - layers)


@dataclass(frozen=True, slots=True)
class _Fits:
    """The final word on whether a plan is inside its limits."""

    amounts: list[_Floats]
    limits: list[float]

    def __call__(self, choice: NDArray[np.intp]) -> bool:
        return all(_total(a, choice) <= limit for a, limit in zip(self.amounts, self.limits, strict=True))


@dataclass(frozen=True, slots=True)
class _Step:
    """How the states after one layer came about, for the way back."""

    layer: int
    choice: NDArray[np.intp]
    parent: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class _Found:
    choice: NDArray[np.intp]
    bound: int  # of the total time, in grid steps
    optimal: bool


def _undominated_choices(time: _Floats, *amounts: _Floats) -> NDArray[np.bool_]:
    """Which choices no other choice of the same layer beats or (from a lower column) equals in everything."""
    shape = (*time.shape, time.shape[1])
    no_worse = np.ones(shape, dtype=bool)  # [layer, j, k]: j is no worse than k
    for table in (time, *amounts):
        no_worse &= table[:, :, None] <= table[:, None, :]
    earlier = np.triu(np.ones(shape[1:], dtype=bool), 1)
    beaten = no_worse & (earlier | ~no_worse.transpose(0, 2, 1))
    return np.isfinite(time) & ~beaten.any(axis=1)


def _undominated_states(states: _Ints) -> NDArray[np.intp]:
    """Indices of the states [1 + amounts, states] worth keeping, by rising (first) amount."""
    if len(states) == 2:
        return _staircase(states[0], states[1])
    # Three dimensions: cut the states into slices of rising bytes. A state is beaten if the staircase of (harm, time)
    # over all lighter slices passes below it. Inside a slice only equals are found: keeping too many is merely slower.
    order = np.lexsort((states[0], states[1], states[2]))
    kept: list[NDArray[np.intp]] = []
    front = np.zeros(0, dtype=np.intp)
    for piece in np.array_split(order, max(1, min(32, len(order) // 64))):
        time, harm, nbytes = states[:, piece]
        alive = np.ones(len(piece), dtype=bool)
        alive[1:] = (time[1:] < time[:-1]) | (harm[1:] < harm[:-1]) | (nbytes[1:] < nbytes[:-1])
        if front.size:
            below = np.searchsorted(states[1, front], harm, side="right") - 1
            alive &= (below < 0) | (states[0, front[below]] > time)
        kept.append(piece[alive])
        front = np.concatenate([front, kept[-1]])
        front = front[_staircase(states[0, front], states[1, front])]
    return np.concatenate(kept)


def _staircase(time: _Ints, amount: _Ints) -> NDArray[np.intp]:
    """Indices of the points that no other point beats, by rising amount; of equal points the first."""
    order = np.argsort(amount, kind="stable")  # timsort: its input is a few sorted runs, one per choice
    t = time[order]
    keep = np.ones(len(t), dtype=bool)
    keep[1:] = t[1:] < np.minimum.accumulate(t)[:-1]
    order = order[keep]
    last = np.ones(len(order), dtype=bool)  # of several points with the same amount the last is the fastest
    last[:-1] = np.diff(amount[order]) > 0
    return order[last]


def _search(
    values: _Ints,
    usable: NDArray[np.bool_],
    rooms: list[_Room],
    multipliers: list[float],
    base: NDArray[np.intp],
    incumbent: NDArray[np.intp],
    fits: _Fits,
) -> _Found:
    """Pareto dynamic programming over `values` [time and amounts, layers, choices], as differences from the plan `base`
    that minimises the Lagrangian: a state's excess is by how much it raises the lower bound."""
    rows = np.arange(len(base))
    totals = values[:, rows, base].sum(axis=1)
    delta = np.where(usable, values - values[:, rows, base][:, :, None], 0)
    weights = np.array([1.0, *multipliers])[:, None]
    room = np.array([[r.most] for r in rooms]) - totals[1:, None]
    safe = np.array([[r.safe] for r in rooms]) - totals[1:, None]
    to_spare = float((weights[1:] * room).sum())
    best = int((values[0, rows, incumbent] - values[0, rows, base]).sum())

    def margin() -> float:
        """How much more excess than `best` a plan may have: the room that `base` leaves at its price, all that rounding
        can add up to, and what `base` falls short of the minimum (nothing, but for rounding when it was found)."""
        spread = (weights * np.abs(delta).max(axis=2)).sum()
        rounding = float(spread + abs(to_spare)) * 2.0**-48 + math.ulp(float(totals[0]))
        return to_spare + rounding - float(np.where(usable, excess, 0.0).min(axis=1).sum())

    excess = (weights[:, :, None] * delta).sum(axis=0)
    usable = usable & (excess <= best + margin())
    delta = np.where(usable, delta, 0)
    slack = margin()
    # Layers where leaving the base is dear come first: few states pass, and the close calls multiply only at the end.
    second = np.where(usable & (np.arange(usable.shape[1]) != base[:, None]), excess, np.inf).min(axis=1)
    free = np.argsort(-second, kind="stable")
    free = free[np.isfinite(second[free])]
    least = np.zeros((len(rooms), len(free) + 1), dtype=np.int64)  # what the layers from each one on add at least
    least[:, :-1] = delta[1:, free].min(axis=2)[:, ::-1].cumsum(axis=1)[:, ::-1]
    most = np.zeros(len(free) + 1)  # and at most, of the last amount; as floats, and rounded up: it may be out of range
    most[:-1] = delta[-1, free].max(axis=1)[::-1].cumsum(dtype=np.float64)[::-1] * (1 + 1e-12)
    never_short = room[-1] - np.minimum(most, 2.0 ** (_GRID_BITS + 1)).astype(np.int64)
    ahead = usable[free].sum(axis=1)[::-1].cumsum()[::-1].tolist()  # choices from here on
    work = _WORK // len(rooms)

    states = np.zeros((len(values), 1), dtype=np.int64)
    cost = np.zeros(1)  # the excess of every state
    history: list[_Step] = []
    dropped = math.inf  # least excess of a state that was given up without proof
    for step, layer in enumerate(free):
        options = np.flatnonzero(usable[layer] & (excess[layer] <= best + slack))
        choice, parent = np.nonzero(excess[layer, options, None] + cost <= best + slack)
        grown = delta[:, layer, options[choice]] + states[:, parent]
        alive = np.flatnonzero((grown[1:] + least[:, step + 1, None] <= room).all(axis=0))
        comparable = grown[:, alive]
        if len(comparable) == 3:  # states whose bytes the layers ahead cannot use up are not told apart by them
            comparable[2] = np.maximum(comparable[2], never_short[step + 1])
        keep = alive[_undominated_states(comparable)]
        cost = (weights * grown[:, keep]).sum(axis=0)
        work -= len(options) * states.shape[1]
        width = max(_BEAM, work // ahead[step])
        if len(keep) > width:
            order = np.argsort(cost, kind="stable")
            dropped = min(dropped, float(cost[order[width]]))
            best_first = np.sort(order[:width])
            keep, cost = keep[best_first], cost[best_first]
        states = grown[:, keep]
        history.append(_Step(int(layer), options[choice[keep]], parent[keep]))
        done = states[0, (states[1:] <= safe).all(axis=0)]  # the base in all later layers completes these
        if done.size:
            best = min(best, int(done.min()))

    bound = best if not states.size else int(states[0].min())
    if dropped < math.inf:
        bound = min(bound, math.floor(dropped - slack))
    bound += int(totals[0])

    def rank(plan: NDArray[np.intp]) -> tuple[float, ...]:  # as floats: a difference that no sum would show is a tie
        return tuple(values[:, rows, plan].sum(axis=1).astype(np.float64).tolist())

    found = next((plan for plan in _plans(states, totals, history, base) if fits(plan)), incumbent)
    found = min(found, incumbent, key=rank)
    return _Found(found, bound, rank(found)[0] <= float(bound))


def _plans(states: _Ints, totals: _Ints, history: list[_Step], base: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
    """The plans behind the final states, fastest first, then least harm."""
    for state in np.lexsort((states + totals[:, None]).astype(np.float64)[::-1]):
        plan, at = base.copy(), state
        for step in reversed(history):
            plan[step.layer], at = step.choice[at], step.parent[at]
        yield plan

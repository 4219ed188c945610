"""Choosing one candidate per layer inside a budget: from the options of every layer to a plan's layers."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoplan.errors import BudgetError
from autoplan.records import FrontierPoint, LayerPlan, LayerProfile, Option
from autoplan.solve import Solution, solve

_Floats = NDArray[np.float64]

_PINNED = "pinned to "  # how the reason starts for which options beside a pinned one are out
PLAIN = "1:linear"  # the program of a layer that is left as it is

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FRONTIER_POINTS = 24

PRESETS = {"lossless": (0.002, 5e-4), "high": (0.01, 1e-2), "balanced": (0.03, 3e-2)}  # KL in nats, relative error


@dataclass(frozen=True, slots=True)
class Budget:
    """What a plan must satisfy.

    Attributes:
        divergence: mean KL in nats per token for logits, relative squared error otherwise; None leaves it unlimited.
        nbytes: resident bytes of the planned layers' weights.
        time: fraction of the float model's time in the planned layers.
        preset: the name this budget was given by, if any.

    Raises BudgetError when a limit is not a positive number (divergence may be 0).
    """

    divergence: float | None = None
    nbytes: int | None = None
    time: float | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        for name, limit, least in (
            ("divergence", self.divergence, 0.0),
            ("nbytes", self.nbytes, 1),
            ("time", self.time, 1e-9),
        ):
            if limit is None:
                continue
            if not (isinstance(limit, numbers.Real) and least <= limit < float("inf")):
                raise BudgetError(f"budget {name} must be a positive number, not {limit!r}")
            plain = int(limit) if name == "nbytes" else float(limit)  # numpy's go into no file
            object.__setattr__(self, name, plain)
        if self.divergence is None and self.nbytes is None and self.time is None and self.preset is None:
            raise BudgetError("an empty budget: give divergence, nbytes or time, or a preset: " + ", ".join(PRESETS))

    @classmethod
    def of(cls, budget: Budget | str, logits: bool) -> Budget:
        """A preset's limits for this kind of output, or the budget itself. Raises BudgetError naming the presets."""
        if isinstance(budget, Budget):
            return budget
        if not isinstance(budget, str) or budget not in PRESETS:
            raise BudgetError(f"budget {budget!r} is neither a Budget nor one of the presets {', '.join(PRESETS)}")
        return cls(divergence=PRESETS[budget][0 if logits else 1], preset=budget)


@dataclass(frozen=True, slots=True)
class Choice:
    """What the solver picked, one candidate per layer."""

    candidates: tuple[str, ...]
    gap: float
    price_us: float


def choose(layers: Sequence[LayerPlan], budget: Budget, kappa: float) -> Choice:
    """The fastest choice per layer inside the budget; with a time budget, the most accurate one inside it.

    Predicted divergence is `kappa` times the sum of the layers' harms. Raises BudgetError when nothing fits.
    """
    return _choose(layers, _menus(layers, budget.nbytes is not None), budget, kappa)


def _choose(layers: Sequence[LayerPlan], menus: Sequence[Sequence[_Way]], budget: Budget, kappa: float) -> Choice:
    size = (len(menus), max(map(len, menus), default=1))
    us, harm, nbytes = np.full(size, np.inf), np.zeros(size), np.zeros(size)
    for i, menu in enumerate(menus):
        for j, way in enumerate(menu):
            us[i, j], harm[i, j], nbytes[i, j] = way.us, kappa * way.harm, way.nbytes
    limit = np.inf if budget.divergence is None else budget.divergence
    if budget.time is None:
        solution, picked = _solve(us, harm, limit, nbytes, budget.nbytes, "divergence")
    else:
        time_limit = budget.time * sum(layer.baseline_us for layer in layers)
        solution, picked = _solve(
            np.where(np.isfinite(us), harm, np.inf), us, time_limit, nbytes, budget.nbytes, "time (us)"
        )
        if harm[np.arange(len(menus)), picked].sum() > limit:
            raise BudgetError(
                f"inside {budget.time:.0%} of the float time, the least predicted divergence is "
                f"{harm[np.arange(len(menus)), picked].sum():.3g}, above the {limit:.3g} allowed"
            )
    chosen = {k: name for menu, j in zip(menus, picked, strict=True) for k, name in menu[j].candidates.items()}
    return Choice(tuple(chosen[k] for k in range(len(layers))), solution.gap, solution.price)


def _solve(
    objective: _Floats, spent: _Floats, limit: float, nbytes: _Floats, max_nbytes: int | None, what: str
) -> tuple[Solution, list[int]]:
    """Least objective with `spent` inside `limit`; the solver wants the choice that spends nothing in column 0.

    So each row is sorted by what it spends (stable: ties keep `none` first) and its least is taken off the limit.
    """
    spent = np.where(np.isfinite(objective), spent, np.inf)
    order = np.argsort(spent, axis=1, kind="stable")
    objective, spent, nbytes = (np.take_along_axis(table, order, axis=1) for table in (objective, spent, nbytes))
    least = spent[:, :1]
    room = limit - least.sum()
    if room < 0:
        raise BudgetError(f"the least {what} that any plan needs is {least.sum():.4g}, and the limit is {limit:.4g}")
    solution = solve(objective, spent - least, room, nbytes=nbytes, max_nbytes=max_nbytes)
    return solution, [int(order[i, j]) for i, j in enumerate(solution.choice)]


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to decide some layers: candidates by the layer's index, and what they take together."""

    candidates: dict[int, str]
    us: float
    harm: float
    nbytes: int


def _menus(layers: Sequence[LayerPlan], bytes_count: bool) -> list[list[_Way]]:
    """What there is to decide, each with the ways to decide it: a layer, a group, or siblings.

    What siblings take depends on all of them, so they are one decision; their ways are all combinations of what each
    may use, but for those that others beat. If a group ties one of them to other layers, the groups are the decisions,
    and siblings count as one product where they are in one group. Raises BudgetError where nothing is open.
    """
    groups = decisions(layers)
    group_of = {i: name for name, group in groups.items() for i in group}
    sets = [places for places in siblings_of(layers) if any(o.fused for i in places for o in layers[i].options)]
    menus = []
    for places in sets:
        own = list(dict.fromkeys(group_of[i] for i in places))
        if len(own) > 1 and {i for name in own for i in groups.get(name, ())} == set(places):
            menus.append(_combined(layers, [groups.pop(name) for name in own], places, bytes_count))
    for group in groups.values():
        inside = [places for places in sets if set(places) <= set(group)]
        menus.append([_way(layers, dict.fromkeys(group, name), inside) for name in _open(layers, group)])
    return sorted(menus, key=lambda menu: min(menu[0].candidates))


def decisions(layers: Sequence[LayerPlan]) -> dict[str, list[int]]:
    """The indices of the layers that get one candidate together, by group; a layer without a group decides alone."""
    groups: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        groups.setdefault(layer.group or f" {i}", []).append(i)
    return groups


def _combined(
    layers: Sequence[LayerPlan], groups: Sequence[Sequence[int]], places: Sequence[int], bytes_count: bool
) -> list[_Way]:
    """The ways to decide siblings that are in several groups (most are a group of their own)."""
    ways = [_Way({}, 0.0, 0.0, 0)]
    for group in groups:
        more = [_way(layers, dict.fromkeys(group, name), ()) for name in _open(layers, group)]
        both = [
            _Way(a.candidates | b.candidates, a.us + b.us, a.harm + b.harm, a.nbytes + b.nbytes)
            for a in ways
            for b in more
        ]
        ways = _unbeaten(both, bytes_count)
    as_one = [dict.fromkeys(places, option.candidate) for option in _eligible(layers[places[0]])]
    fused = [_way(layers, candidates, [places]) for candidates in as_one if _fuse(layers, places, candidates)]
    return _unbeaten([*ways, *fused], bytes_count)


def _unbeaten(ways: Sequence[_Way], bytes_count: bool) -> list[_Way]:
    """The ways that no other one beats in time, harm and (if they count) bytes; the first of equal ones."""
    kept: list[_Way] = []
    for way in sorted(ways, key=lambda way: (way.us, way.harm, way.nbytes)):
        if not any(
            other.harm <= way.harm and (other.nbytes <= way.nbytes or not bytes_count) for other in reversed(kept)
        ):
            kept.append(way)
    return kept


def _way(layers: Sequence[LayerPlan], candidates: dict[int, str], sets: Sequence[Sequence[int]]) -> _Way:
    """What these choices take together; the siblings of `sets` run as one product if they can."""
    taken = {i: layers[i].option(name) for i, name in candidates.items()}
    as_one = {i for places in sets if _fuse(layers, places, candidates) for i in places}
    us = [o.fused.us if i in as_one and o.fused is not None else o.us or 0.0 for i, o in taken.items()]
    return _Way(
        candidates, sum(us), sum(o.harm or 0.0 for o in taken.values()), sum(o.nbytes or 0 for o in taken.values())
    )


def _open(layers: Sequence[LayerPlan], group: Sequence[int]) -> list[str]:
    """The candidates that every layer of the group may use, in their order. Raises BudgetError if there is none."""
    menus = [[option.candidate for option in _eligible(layers[i])] for i in group]
    names = [candidate for candidate in menus[0] if all(candidate in menu for menu in menus)]
    if not names:
        raise BudgetError(_nothing_open([layers[i] for i in group]))
    return names


def siblings_of(layers: Sequence[LayerPlan]) -> list[list[int]]:
    """The sets of siblings among the layers: the indices of each, in order."""
    sets: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        if layer.siblings:
            sets.setdefault(layer.siblings, []).append(i)
    return [places for places in sets.values() if len(places) > 1]


def fused_sets(layers: Sequence[LayerPlan]) -> list[list[int]]:
    """The sets of siblings that run as one product."""
    chosen = {i: layer.chosen for i, layer in enumerate(layers)}
    return [
        places
        for places in siblings_of(layers)
        if all(layers[i].runs_fused for i in places) and _fuse(layers, places, chosen)
    ]


def _fuse(layers: Sequence[LayerPlan], places: Sequence[int], candidates: Mapping[int, str]) -> bool:
    """Whether these siblings run as one product: they chose alike, and it is offered, which says that it is faster."""
    return len({candidates[i] for i in places}) == 1 and all(
        layers[i].option(candidates[i]).fused is not None for i in places
    )


def _nothing_open(layers: Sequence[LayerPlan]) -> str:
    """Why no candidate can be chosen: a pin demands what a gate, or another pin of the group, forbids."""
    pins = {option.rejected: layer for layer in layers for option in layer.options if _PINNED in option.rejected}
    for rejected, layer in pins.items():
        wanted = layer.option(rejected.removeprefix(_PINNED))
        if wanted.rejected:
            return f"layer {layer.name!r} is {rejected}, which it cannot use: {wanted.rejected}. Change pin="
    menus = "; ".join(f"{layer.name}: {', '.join(o.candidate for o in _eligible(layer))}" for layer in layers)
    return f"the layers of a group must get one candidate, and none is open to all of them ({menus}). Change pin="


def _eligible(layer: LayerPlan) -> list[Option]:
    return [option for option in layer.options if not option.rejected]


def choosing(layers: Sequence[LayerPlan], candidates: Sequence[str]) -> list[LayerPlan]:
    """The layers with these candidates chosen; siblings that chose alike run as one product where that is faster."""
    names = dict(enumerate(candidates))
    as_one = {i for places in siblings_of(layers) if _fuse(layers, places, names) for i in places}
    return [replace(layer, chosen=names[i], runs_fused=i in as_one) for i, layer in enumerate(layers)]


def total_us(layers: Sequence[LayerPlan]) -> float:
    """Predicted microseconds of the chosen options."""
    return sum(layer.choice.us or 0.0 for layer in layers)


def total_harm(layers: Sequence[LayerPlan]) -> float:
    """Sum of the chosen options' harms, before kappa."""
    return sum(layer.choice.harm or 0.0 for layer in layers)


def is_plain(layer: LayerPlan) -> bool:
    """Whether the layer stays the nn.Linear that it is."""
    return (layer.chosen, layer.choice.program) == ("none", PLAIN)


def float_bytes(layer: LayerPlan | LayerProfile) -> int:
    """Bytes of the layer's float weight."""
    return layer.in_features * layer.out_features * FLOAT_BYTES[layer.dtype]


def is_pinned(layer: LayerPlan) -> bool:
    """Whether the caller had forced the chosen candidate on the layer, so that others were not asked."""
    return any(option.rejected == f"{_PINNED}{layer.chosen}" for option in layer.options)


def kernel_names(program: str) -> str:
    """The kernels of a program, in order of rows."""
    return "/".join(step.partition(":")[2] for step in program.split(","))


def explained(layer: LayerPlan, budget: Budget, kappa: float, pinned: bool) -> LayerPlan:
    """The layer with the reason of its choice, in a sentence."""
    choice = layer.choice
    if pinned:
        reason = "pinned by the caller"
    elif choice.candidate != "none":
        harm = kappa * (choice.harm or 0.0)
        reason = f"fastest, {harm / budget.divergence:.1%} of budget" if budget.divergence else "fastest"
    elif any(not option.rejected for option in layer.options if option.candidate != "none"):
        reason = "budget buys more elsewhere"
    elif not is_plain(layer):
        reason = "exact, and faster"
    else:
        reason = "nothing is surely faster"
    if layer.runs_fused:
        reason += f"; as one product: {layer.siblings.removeprefix(layer.name.rpartition('.')[0] + '.')}"
    return replace(layer, reason=reason)


def frontier(layers: Sequence[LayerPlan], kappa: float) -> tuple[FrontierPoint, ...]:
    """The fastest plans over the range of divergences that the options span, each solved exactly."""
    menus = _menus(layers, bytes_count=False)
    harms = [[kappa * way.harm for way in menu] for menu in menus]
    least, most = sum(map(min, harms)), sum(map(max, harms))
    limits = [least, *np.geomspace(max(least, most / 1e4), most, _FRONTIER_POINTS).tolist()] if most else [0.0]
    points: list[FrontierPoint] = []
    for limit in limits:
        choice = _choose(layers, menus, Budget(divergence=limit * (1 + 1e-9)), kappa)
        chosen = choosing(layers, choice.candidates)
        point = FrontierPoint(
            divergence=kappa * total_harm(chosen),
            us=total_us(chosen),
            nbytes=sum(layer.choice.nbytes or 0 for layer in chosen),
            switched=sum(not is_plain(layer) for layer in chosen),
        )
        if not points or point.us < points[-1].us:
            points.append(point)
    return tuple(points)


def best_uniform(layers: Sequence[LayerPlan], budget: Budget, kappa: float) -> tuple[str, list[LayerPlan]]:
    """The best plan of one candidate wherever it is open (else `none`) that is predicted to keep the budget.

    The best is the fastest; with a time budget, the most accurate one inside it.
    """
    groups = decisions(layers).values()
    menus = [_open(layers, group) for group in groups]
    best: tuple[str, list[LayerPlan]] | None = None
    rank = total_us if budget.time is None else total_harm
    for name in sorted({name for menu in menus for name in menu}, key=lambda name: (name != "none", name)):
        ways = [next(c for c in (name, "none", *menu) if c in menu) for menu in menus]
        chosen = {i: way for way, group in zip(ways, groups, strict=True) for i in group}
        uniform = choosing(layers, [chosen[i] for i in range(len(layers))])
        if _keeps(uniform, budget, kappa) and (best is None or rank(uniform) < rank(best[1])):
            best = (name, uniform)
    return best or ("none", list(layers))


def _keeps(layers: Sequence[LayerPlan], budget: Budget, kappa: float) -> bool:
    """Whether a plan is predicted to keep the budget."""
    taken = [
        (kappa * total_harm(layers), budget.divergence),
        (sum(layer.choice.nbytes or 0 for layer in layers), budget.nbytes),
        (total_us(layers), budget.time and budget.time * sum(layer.baseline_us for layer in layers)),
    ]
    return all(limit is None or value <= limit for value, limit in taken)


def keep_float(layers: Sequence[LayerPlan], reason: str) -> tuple[LayerPlan, ...]:
    """Every layer as it was, on plain F.linear; the other options keep their evidence."""
    kept = []
    for layer in layers:
        us = layer.baseline_us
        plain = Option("none", PLAIN, us, us, us, nbytes=float_bytes(layer), harm=0.0)
        options = tuple(plain if option.candidate == "none" else option for option in layer.options)
        kept.append(replace(layer, chosen="none", runs_fused=False, options=options, reason=reason))
    return tuple(kept)

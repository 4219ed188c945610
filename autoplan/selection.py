"""Choosing one candidate per layer inside a budget: from the options of every layer to a plan's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoplan.errors import BudgetError
from autoplan.records import FrontierPoint, LayerPlan, Option
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
            if limit is not None and not (isinstance(limit, int | float) and limit >= least and limit != float("inf")):
                raise BudgetError(f"budget {name} must be a positive number, not {limit!r}")
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
    groups = _decisions(layers)
    menus = [_menu([layers[i] for i in group]) for group in groups]
    for group, menu in zip(groups, menus, strict=True):
        if not menu:
            raise BudgetError(_nothing_open([layers[i] for i in group]))
    size = (len(groups), max(map(len, menus), default=1))
    us, harm, nbytes = np.full(size, np.inf), np.zeros(size), np.zeros(size)
    for i, (group, menu) in enumerate(zip(groups, menus, strict=True)):
        for j, candidate in enumerate(menu):
            options = [layers[k].option(candidate) for k in group]
            us[i, j] = sum(option.us or 0.0 for option in options)
            harm[i, j] = kappa * sum(option.harm or 0.0 for option in options)
            nbytes[i, j] = sum(option.nbytes or 0 for option in options)
    limit = np.inf if budget.divergence is None else budget.divergence
    if budget.time is None:
        solution, picked = _solve(us, harm, limit, nbytes, budget.nbytes, "divergence")
    else:
        time_limit = budget.time * sum(layer.baseline_us for layer in layers)
        solution, picked = _solve(
            np.where(np.isfinite(us), harm, np.inf), us, time_limit, nbytes, budget.nbytes, "time (us)"
        )
        if harm[np.arange(len(groups)), picked].sum() > limit:
            raise BudgetError(
                f"inside {budget.time:.0%} of the float time, the least predicted divergence is "
                f"{harm[np.arange(len(groups)), picked].sum():.3g}, above the {limit:.3g} allowed"
            )
    chosen = {k: menus[i][j] for i, j in enumerate(picked) for k in groups[i]}
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


def _decisions(layers: Sequence[LayerPlan]) -> list[list[int]]:
    """Indices of the layers that are decided together."""
    groups: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        groups.setdefault(layer.group or f" {i}", []).append(i)
    return list(groups.values())


def _menu(layers: Sequence[LayerPlan]) -> list[str]:
    """The candidates that every one of `layers` may use, in their order."""
    menus = [[option.candidate for option in _eligible(layer)] for layer in layers]
    return [candidate for candidate in menus[0] if all(candidate in menu for menu in menus)]


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
    """The layers with these candidates chosen."""
    return [replace(layer, chosen=name) for layer, name in zip(layers, candidates, strict=True)]


def total_us(layers: Sequence[LayerPlan]) -> float:
    """Predicted microseconds of the chosen options."""
    return sum(layer.choice.us or 0.0 for layer in layers)


def total_harm(layers: Sequence[LayerPlan]) -> float:
    """Sum of the chosen options' harms, before kappa."""
    return sum(layer.choice.harm or 0.0 for layer in layers)


def is_plain(layer: LayerPlan) -> bool:
    """Whether the layer stays the nn.Linear that it is."""
    return (layer.chosen, layer.choice.program) == ("none", PLAIN)


def float_bytes(layer: LayerPlan) -> int:
    """Bytes of the layer's float weight."""
    return layer.in_features * layer.out_features * FLOAT_BYTES[layer.dtype]


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
    return replace(layer, reason=reason)


def frontier(layers: Sequence[LayerPlan], kappa: float) -> tuple[FrontierPoint, ...]:
    """The fastest plans over the range of divergences that the options span, each solved exactly."""
    harms = [
        [
            kappa * sum(layers[i].option(candidate).harm or 0.0 for i in group)
            for candidate in _menu([layers[i] for i in group])
        ]
        for group in _decisions(layers)
    ]
    least, most = sum(map(min, harms)), sum(map(max, harms))
    limits = [least, *np.geomspace(max(least, most / 1e4), most, _FRONTIER_POINTS).tolist()] if most else [0.0]
    points: list[FrontierPoint] = []
    for limit in limits:
        chosen = choosing(layers, choose(layers, Budget(divergence=limit * (1 + 1e-9)), kappa).candidates)
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
    """The fastest plan of one candidate wherever it is open (else `none`) that is predicted to keep the budget."""
    names = {option.candidate for layer in layers for option in _eligible(layer)}
    best: tuple[str, list[LayerPlan]] | None = None
    for name in sorted(names, key=lambda name: (name != "none", name)):
        menus = [[option.candidate for option in _eligible(layer)] for layer in layers]
        uniform = choosing(layers, [next(c for c in (name, "none", *menu) if c in menu) for menu in menus])
        fits = budget.divergence is None or kappa * total_harm(uniform) <= budget.divergence
        if fits and (best is None or total_us(uniform) < total_us(best[1])):
            best = (name, uniform)
    return best or ("none", list(layers))


def keep_float(layers: Sequence[LayerPlan], reason: str) -> tuple[LayerPlan, ...]:
    """Every layer as it was, on plain F.linear; the other options keep their evidence."""
    kept = []
    for layer in layers:
        us = layer.baseline_us
        plain = Option("none", PLAIN, us, us, us, nbytes=float_bytes(layer), harm=0.0)
        options = tuple(plain if option.candidate == "none" else option for option in layer.options)
        kept.append(replace(layer, chosen="none", options=options, reason=reason))
    return tuple(kept)

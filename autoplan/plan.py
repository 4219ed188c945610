"""The plan: for each layer the chosen candidate, its kernels, and the evidence for and against. Plain data."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from autoplan import report as report_room
from autoplan.cache import codec
from autoplan.cache.typed import from_plain, to_plain
from autoplan.errors import BudgetError, CacheError
from autoplan.records import Autocast, FrontierPoint, LayerPlan, LeftAlone, Option, Outcome
from autoplan.selection import FLOAT_BYTES, Budget, choose, choosing, float_bytes, is_plain

SCHEMA = 1
MIGRATIONS: dict[int, codec.Migration] = {}  # files of every schema from 1 on stay readable

_KERNEL = r"[1-9]\d{0,8}:[\w.]+(@[\w.]+)?"
_PROGRAM = re.compile(rf"{_KERNEL}(,{_KERNEL})*")

_Revalidator = TypeVar("_Revalidator", bound=Callable[..., "Plan"])
_revalidators: list[
    Callable[..., Plan]
] = []  # the one that `revalidates` was given: timing is not for this room to know


@dataclass(frozen=True)
class Plan:
    """What each layer runs as, and why. Made by `make_plan`, applied by `apply_plan`."""

    layers: tuple[LayerPlan, ...]
    left_alone: tuple[LeftAlone, ...]
    budget: Budget
    workloads: dict[str, float]
    mode: str  # what the times are for: EAGER, COMPILED or WITHOUT_GRAPHS, of records
    fingerprints: dict[str, Any]  # environment, model, data, options
    frontier: tuple[FrontierPoint, ...]
    gap: float  # certified, relative: no plan is faster by more than this under the predictions
    price_us: float  # microseconds that one unit of divergence buys at the optimum; in a time budget, the inverse
    outcome: Outcome | None  # None for a point of the frontier that was not measured
    planning_seconds: dict[str, float]  # stage -> seconds
    autocast: Autocast | None = None  # the region that the model is planned for, and enters by itself
    kappa: float = 1.0  # where there is no outcome to tell it: that of the plan this is another point of
    stale: tuple[str, ...] = field(default=(), compare=False)  # how the environment it runs in differs from its own
    revalidated: tuple[str, ...] = ()  # what `revalidate` found and changed, where this plan comes from it
    schema: int = field(default=SCHEMA)

    @property
    def baseline_us(self) -> float:
        """`us` of the float model, on plain F.linear."""
        return sum(layer.baseline_us for layer in self.layers)

    @property
    def region(self) -> Autocast | None:
        """The region that the planned model enters: none where a plan switches nothing, as that is the float model."""
        return None if all(map(is_plain, self.layers)) else self.autocast

    @property
    def us(self) -> float:
        """Predicted microseconds in the planned layers, in one forward of each workload times its weight."""
        return sum(layer.choice.us or 0.0 for layer in self.layers)

    @property
    def predicted_divergence(self) -> float:
        """In the unit of the budget: KL in nats per token of logits, else relative squared error."""
        return sum(self.scaled_harm(layer.choice) for layer in self.layers)

    def scaled_harm(self, option: Option) -> float:
        """What an option adds to the predicted divergence: kappa times its harm."""
        return self._kappa() * (option.harm or 0.0)

    @property
    def nbytes(self) -> int:
        """Resident bytes of the planned layers' weights."""
        return sum(layer.choice.nbytes or 0 for layer in self.layers)

    @property
    def baseline_nbytes(self) -> int:
        return sum(float_bytes(layer) for layer in self.layers)

    def report(self, format: str = "text") -> str:
        """The per-layer table and the totals, as "text", "markdown", "csv" or "json"."""
        return report_room.render(self, format)

    def at(self, *, divergence: float | None = None, speedup: float | None = None, nbytes: int | None = None) -> Plan:
        """Another point of the frontier, solved anew from the stored evidence: nothing is measured.

        `divergence` and `nbytes` are limits to be fastest under; `speedup` (of the planned layers, predicted) is a
        target to be most accurate at. Raises BudgetError when the point does not exist, or none of them is given.
        """
        given = {"divergence": divergence, "speedup": speedup, "nbytes": nbytes}
        if sum(value is not None for value in given.values()) == 0:
            raise BudgetError("plan.at() wants divergence=, speedup= or nbytes=")
        kappa = self._kappa()
        if speedup is not None:
            if not speedup > 0:
                raise BudgetError(f"speedup must be positive, not {speedup!r}")
            budget = Budget(divergence=divergence, nbytes=nbytes, time=1 / speedup)
        else:
            budget = Budget(divergence=divergence, nbytes=nbytes)
        choice = choose(self.layers, budget, kappa)
        layers = tuple(map(_rechosen, self.layers, choosing(self.layers, choice.candidates)))
        return replace(
            self, layers=layers, budget=budget, gap=choice.gap, price_us=choice.price_us, outcome=None, kappa=kappa
        )

    def revalidate(self, model: Any, inputs: Any = None, **options: Any) -> Plan:
        """This plan made one of the environment here, in seconds: what it chose is timed anew, and kept where it holds.

        At each shape that was recorded, the choice, its fastest open rival and plain `F.linear` are timed (what is in
        the cache is not). A choice stays unless it cannot run here, or another is surely faster; then the plan is
        solved anew, from the harms that it holds, within the budget. The new plan has the environment of here, is not
        stale, and lists in `revalidated`, which its report shows, what has changed. This plan is left as it is.

        Args:
            model: the float model that the plan was made for, with its weights; it is left as it is.
            inputs: as `example_inputs` of `autoplan`. With these, the divergence of the whole is measured, and its
                speed against the float model; without, both are as predicted. Where the plan surely breaks its budget
                here, or is surely slower as a whole, every layer stays float.
            output, cache, progress, seed: as for `autoplan`.

        Raises PlanMismatchError when it is another model; RecordingError when the model is planned already;
        CandidateError when a pinned choice cannot run here, BudgetError when without the choices that cannot nothing
        keeps the budget.
        """
        return _revalidators[-1](self, model, inputs, **options)

    def _kappa(self) -> float:
        return self.outcome.kappa if self.outcome else self.kappa

    def to_dict(self) -> dict[str, Any]:
        """Builtins only: dicts, lists, strings, numbers, None."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """The inverse of `to_dict`, checking every field. Raises CacheError naming the field that is wrong."""
        if isinstance(data, dict) and "digest" in data:
            data = codec.unsealed(codec.plain(data))
        if isinstance(data, dict) and type(data.get("schema")) is int:
            data = codec.migrated(data, SCHEMA, MIGRATIONS)
        plan: Plan = from_plain(cls, data, "plan")
        _check_fingerprints(plan.fingerprints)
        if plan.autocast and plan.autocast.dtype != "bfloat16":
            raise CacheError(f"plan.autocast.dtype: {plan.autocast.dtype!r} is not 'bfloat16'")
        for layer in plan.layers:
            if layer.chosen not in [option.candidate for option in layer.options]:
                raise CacheError(f"plan.layers {layer.name!r}: chose {layer.chosen!r}, which is not among its options")
            for option in (layer.choice, layer.option(layer.chosen)):  # as it runs with its siblings, and alone
                if not _PROGRAM.fullmatch(option.program):
                    raise CacheError(f"plan.layers {layer.name!r}: {option.program!r} is no program of kernels")
            if layer.dtype not in FLOAT_BYTES:
                raise CacheError(
                    f"plan.layers {layer.name!r}: dtype {layer.dtype!r} is none of {', '.join(FLOAT_BYTES)}"
                )
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a path or URL ending in `.json` (readable) or `.pkl` (pickle of builtins). Raises CacheError.

        The file is `to_dict()` and a digest of it, so that no changed letter goes unseen.
        """
        codec.write(path, codec.sealed(self.to_dict()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote, from a path or URL.

        Raises CacheError when it is missing, damaged, hostile or of a newer schema.
        """
        return cls.from_dict(codec.read(path))


def revalidates(function: _Revalidator) -> _Revalidator:
    """Make `function(plan, model, inputs, **options)` what `Plan.revalidate` does. Returns it."""
    _revalidators[:] = [function]
    return function


def _check_fingerprints(fingerprints: dict[str, Any]) -> None:
    """What `apply_plan` will read must be there in the form that it is read in, or not at all."""
    path = "plan.fingerprints"
    for key in ("environment", "model"):
        if not isinstance(fingerprints.get(key, {}), dict):
            raise CacheError(f"{path}.{key} must be a mapping")
    layers = fingerprints.get("model", {}).get("layers", {})
    if not isinstance(layers, dict):
        raise CacheError(f"{path}.model.layers must be a mapping")
    for name, item in layers.items():
        if not isinstance(item, dict):
            raise CacheError(f"{path}.model.layers.{name} must be a mapping")


def _rechosen(before: LayerPlan, layer: LayerPlan) -> LayerPlan:
    same = (layer.chosen, layer.runs_fused) == (before.chosen, before.runs_fused)
    return layer if same else replace(layer, reason="chosen by plan.at(), not measured on the whole model")

"""What the caller asked for: arguments checked, layers selected, and everything that the plan will depend on."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoplan import kernels
from autoplan.benchmark import Progress, candidate_digest
from autoplan.cache import fingerprint
from autoplan.cache.store import PlanCache
from autoplan.candidates import Candidate
from autoplan.candidates.base import select
from autoplan.divergence import OutputPicker
from autoplan.errors import AutoplanError, CacheError, CandidateError
from autoplan.fisher import Loss
from autoplan.kernels import find_kernel
from autoplan.offload import named_values
from autoplan.recorder import Recording, match
from autoplan.records import Autocast, Device, LayerProfile, LeftAlone, label
from autoplan.selection import Budget

Evaluate = Callable[[nn.Module], float] | tuple[Callable[[nn.Module], float], float]
Patterns = str | Sequence[str]
Distributed = Any  # None, False, "per device", or a torch.distributed.ProcessGroup, which not every torch has

DEVICES = ("cpu", "cuda")  # where layers are planned

_logger = logging.getLogger("autoplan")


@dataclass(frozen=True)
class Request:
    """The keyword arguments of `autoplan` and `make_plan`; their meaning is told there.

    Raises AutoplanError (or a kind of it) for what can be judged before anything is measured.
    """

    budget: Budget | str = "high"
    candidates: Sequence[str | Candidate] | None = None
    include: Patterns | None = None
    exclude: Patterns | None = None
    pin: Mapping[str, str] | None = None
    groups: Sequence[Patterns] | None = None
    output: OutputPicker | None = None
    loss: Loss | None = None
    evaluate: Evaluate | None = None
    cache: PlanCache | str | Path | bool | None = None
    compiled: bool | None = None
    batch_invariant: bool = False
    max_seconds: float | None = None
    progress: Progress | bool | None = None
    seed: int = 0
    strict: bool = False
    distributed: Distributed = None
    autocast: bool = True

    def __post_init__(self) -> None:
        Budget.of(self.budget, logits=True)
        judge = self.judge
        if judge is not None and not callable(judge[0]):
            raise AutoplanError("evaluate= must be callable(model) -> float, or (callable, tolerance)")
        if self.output is not None and not callable(self.output):
            raise AutoplanError("output= must be a callable that picks a tensor from what the model returns")
        if self.loss is not None and not callable(self.loss):
            raise AutoplanError("loss= must be a callable that makes one number (a tensor) of what the model returns")
        if self.max_seconds is not None and not (_is_number(self.max_seconds) and self.max_seconds > 0):
            raise AutoplanError(f"max_seconds must be a positive number, not {self.max_seconds!r}")
        if judge is not None and judge[1] is not None and not (_is_number(judge[1]) and judge[1] >= 0):
            raise AutoplanError(f"the tolerance of evaluate= must be a number >= 0, not {judge[1]!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise AutoplanError(f"seed must be an integer >= 0, not {self.seed!r}")
        for name, flag in (("strict", self.strict), ("autocast", self.autocast)):
            if not isinstance(flag, bool):
                raise AutoplanError(f"{name} must be True or False, not {flag!r}")
        if self.compiled is not None and not isinstance(self.compiled, bool):
            raise AutoplanError(f"compiled must be True, False or None, not {self.compiled!r}")
        if not (self.progress is None or isinstance(self.progress, bool) or callable(self.progress)):
            raise AutoplanError(
                f"progress must be None, True, False or callable(stage, done, total), not {self.progress!r}"
            )
        for name in (self.pin or {}).values():
            if name not in {candidate.name for candidate in self.chosen_candidates()}:
                known = ", ".join(candidate.name for candidate in self.chosen_candidates())
                raise CandidateError(f"pin: {name!r} is not among the candidates: {known}")

    @property
    def judge(self) -> tuple[Callable[[nn.Module], float], float | None] | None:
        """The user's own metric and its tolerance, if there is one."""
        if self.evaluate is None:
            return None
        return self.evaluate if isinstance(self.evaluate, tuple) else (self.evaluate, None)

    @property
    def wants_bytes(self) -> bool:
        return isinstance(self.budget, Budget) and self.budget.nbytes is not None

    @property
    def names_its_question(self) -> bool:
        """Whether scores can be found again by the request: of some callables no digest tells what they do."""
        return all(function is None or _code(function) for function in (self.output, self.loss))

    def chosen_candidates(self) -> tuple[Candidate, ...]:
        return select(self.candidates)

    def layers(self, recording: Recording) -> tuple[list[LayerProfile], list[LeftAlone]]:
        """The layers to plan, and those left alone with the reason."""
        profiles = recording.profiles()
        left_alone = [*recording.left_alone, *recording.not_called()]
        names = [name for profile in profiles for name in (profile.name, *profile.aliases)]
        included = set(names) if self.include is None else match(names, self.include, "include")
        excluded = set() if self.exclude is None else match(names, self.exclude, "exclude")
        kept = []
        for profile in profiles:
            own = {profile.name, *profile.aliases}
            if own & excluded:
                left_alone.append(LeftAlone(profile.name, "excluded by the caller"))
            elif profile.device not in DEVICES:
                left_alone.append(
                    LeftAlone(profile.name, f"it is on {profile.device}; layers on {' and '.join(DEVICES)} are planned")
                )
            elif not own & included:
                left_alone.append(LeftAlone(profile.name, "not among the layers that the caller included"))
            else:
                kept.append(profile)
        siblings = {name: label(names) for names in recording.siblings({p.name for p in kept}) for name in names}
        return [replace(profile, siblings=siblings.get(profile.name, "")) for profile in kept], left_alone

    def pinned(self, profiles: Sequence[LayerProfile]) -> dict[str, str]:
        """Layer -> the candidate that the caller forces on it. Raises CandidateError where it cannot run there."""
        by_name = {candidate.name: candidate for candidate in self.chosen_candidates()}
        pinned: dict[str, str] = {}
        for pattern, name in (self.pin or {}).items():
            matched = match([profile.name for profile in profiles], pattern, "pin")
            for profile in profiles:
                if profile.name not in matched:
                    continue
                device = device_of(profile)
                usable, reasons = by_name[name].usable_kernels(profile, device)
                reason = by_name[name].rejects(profile, device)
                if reason or not usable:
                    reason = reason or "; ".join(reasons.values()) or f"it has no kernel for {profile.device}"
                    raise CandidateError(f"pin: layer {profile.name!r} cannot use {name}: {reason}")
                pinned[profile.name] = name
        return pinned

    def group_of(self, profiles: Sequence[LayerProfile]) -> dict[str, str]:
        """Layer -> the group whose layers must get one candidate. Raises AutoplanError for a layer in two."""
        group_of: dict[str, str] = {}
        for number, patterns in enumerate(self.groups or (), start=1):
            for name in match([profile.name for profile in profiles], patterns, "groups"):
                if name in group_of:
                    raise AutoplanError(f"groups: layer {name!r} is in two groups")
                group_of[name] = f"group {number}"
        return group_of

    def fingerprints(
        self,
        model: nn.Module,
        recording: Recording,
        profiles: Sequence[LayerProfile],
        mode: str,
        region: Autocast | None = None,
    ) -> dict[str, Any]:
        """All that a plan depends on, as plain data: environment, model, data, options.

        `region` is that of autocast which the planned model is to enter by itself, if any.
        """
        device = profiles[0].device if profiles else "cpu"
        model_print = fingerprint.model_fingerprint(named_values(model), self.strict)
        by_tensor: Any = model_print["tensors"]
        layers = {
            profile.name: by_tensor[name]
            for profile in profiles
            for name in (f"{alias}.weight" for alias in (profile.name, *profile.aliases))
            if name in by_tensor  # a tied weight is listed under the first of its names only
        }
        calls = [[p.name, [[c.workload, c.rows, c.dtype, c.count] for c in p.calls]] for p in profiles]
        return {
            "environment": fingerprint.environment(device, fingerprint.source_digest(kernels)),
            "model": {
                "digest": model_print["digest"],
                "structure": fingerprint.structure_digest(model),
                "layers": layers,
            },
            "data": {
                "digest": _data_digest(recording),
                "calls": fingerprint.digest(calls),
                "workloads": dict(recording.weights),
                "forwards": dict(recording.forwards),
            },
            "options": self._plain(mode) | {"autocast": asdict(region) if region else self.autocast},
            "planner": {"source": _own_source(), "lacking": self._lacking(device)},
        }

    def _lacking(self, device: str) -> list[str]:
        """The kernels of the candidates that a CPU's machine lacks something for, such as a compiler.

        What a GPU's need is in the environment; and looking would compile them all, where a plan may be known already.
        """
        if device != "cpu":
            return []
        kernels = {name: find_kernel(name) for candidate in self.chosen_candidates() for name in candidate.kernels}
        return sorted(name for name, kernel in kernels.items() if device in kernel.devices and kernel.lacks())

    def _plain(self, mode: str) -> dict[str, Any]:
        budget = self.budget
        return {
            "budget": budget if isinstance(budget, str) else [budget.divergence, budget.nbytes, budget.time],
            "candidates": {candidate.name: candidate_digest(candidate) for candidate in self.chosen_candidates()},
            "include": _listed(self.include),
            "exclude": _listed(self.exclude),
            "pin": dict(self.pin or {}),
            "groups": None if self.groups is None else [_listed(patterns) for patterns in self.groups],
            "output": None if self.output is None else _code(self.output) or _type_name(self.output),
            "loss": None if self.loss is None else _code(self.loss) or _type_name(self.loss),
            "mode": mode,
            "batch_invariant": self.batch_invariant,
            "seed": self.seed,
        }


@functools.cache
def _own_source() -> str:
    """A digest of the planner itself: another one may plan otherwise."""
    return fingerprint.source_digest(*sorted(Path(__file__).parent.glob("*.py")))


@contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress]:
    """What to tell how far planning is: the caller's callable, a bar on a terminal, or nobody."""
    if callable(progress):
        yield progress
        return
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda stage, done, total: None
        return
    from tqdm import tqdm

    with tqdm(bar_format="{desc} {bar} {n_fmt}/{total_fmt} {elapsed}", leave=False, file=sys.stderr) as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.set_description_str(f"autoplan: {stage}", refresh=False)
            bar.total, bar.n = total, done
            bar.refresh()

        yield show


def device_of(profile: LayerProfile) -> Device:
    """The device that a layer was recorded on."""
    if profile.device == "cuda":
        return Device("cuda", torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    return Device(profile.device, profile.device)


def _type_name(item: object) -> str:
    kind = item if hasattr(item, "__qualname__") else type(item)
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(patterns: Patterns | None) -> list[str] | None:
    return None if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)


def _code(function: object) -> str:
    """A digest of what the caller's function does; empty where its code alone does not say."""
    try:
        return f"code:{fingerprint.function_digest(function)}"
    except CacheError:
        return ""


def _data_digest(recording: Recording) -> str:
    """A digest of the recorded inputs; empty for inputs of a kind without one, and then nothing is cached for them."""
    try:
        return fingerprint.data_digest([[item.workload, item.args, item.kwargs] for item in recording.inputs])
    except CacheError as error:
        _logger.info("the recorded inputs have no digest, so neither scores nor plans are cached: %s", error)
        return ""

"""The only wiring: record, measure, score, solve, validate, apply."""

from __future__ import annotations

import copy
import functools
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from autoplan import benchmark, fusion, inside, offload, options, priorities, rescale, sensitivity, validate
from autoplan.apply import StandIns, apply_plan, stand_ins
from autoplan.arms import Contender
from autoplan.benchmark import MARGIN, Key, Progress
from autoplan.cache import fingerprint
from autoplan.cache.store import PlanCache, entry, resolve
from autoplan.candidates import Candidate
from autoplan.distributed import Ranks, from_leader, in_shares, together
from autoplan.divergence import OutputPicker, Reference, references, split_inputs, undisturbed
from autoplan.errors import AutoplanError, CacheError, RecordingError
from autoplan.fisher import Loss
from autoplan.options import Rules
from autoplan.plan import Plan
from autoplan.recorder import Recording, as_calls, device_of_model, record, recorded, refuse_planned, unwrap
from autoplan.records import (
    COMPILED,
    EAGER,
    NO_DIVERGENCE,
    WITHOUT_GRAPHS,
    Autocast,
    LayerPlan,
    LayerProfile,
    Measurement,
    Option,
    Outcome,
    Sensitivity,
    Shape,
)
from autoplan.request import Distributed, Evaluate, Patterns, Request, device_of, shown
from autoplan.selection import (
    PLAIN,
    Budget,
    float_bytes,
    frontier,
)
from autoplan.sensitivity import Size, Subject, size_of
from autoplan.validate import Whole

Model = TypeVar("Model", bound=nn.Module)

_logger = logging.getLogger("autoplan")
_planning_lock = threading.RLock()

_TIMING_SHARE, _SCORING_SHARE = 0.5, 0.8  # of max_seconds, by when timing and scoring have to be done


def autoplan(
    model: Model,
    example_inputs: Any = None,
    *,
    budget: Budget | str = "high",
    candidates: Sequence[str | Candidate] | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    pin: Mapping[str, str] | None = None,
    groups: Sequence[Patterns] | None = None,
    output: OutputPicker | None = None,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    cache: PlanCache | str | Path | bool | None = None,
    compiled: bool | None = None,
    batch_invariant: bool = False,
    max_seconds: float | None = None,
    progress: Progress | bool | None = None,
    seed: int = 0,
    strict: bool = False,
    distributed: Distributed = None,
    autocast: bool = True,
) -> Model:
    """Give every Linear of `model` the fastest candidate that keeps the model's output inside `budget`, in place.

    With `example_inputs` the model is recorded on them, planned and changed before this returns. Without, the first
    call of the model records and returns its own float output, once the plan is made and applied; if that fails, a
    warning says why, and the float model stays. A model that is planned already is returned as it is, with a warning.

    Args:
        model: a module, or what `torch.compile` made of one; the same object is returned.
        example_inputs: a Tensor, a tuple (arguments), a mapping (keyword arguments), or an iterable of these (batches).
        budget: a `Budget`, or "lossless", "high", "balanced".
        candidates: names or `Candidate` objects to choose among; by default all that the device supports.
            "int4_grouped" stands for `int4_g32`, `int4_g64` and `int4_g128`.
        include, exclude: fnmatch globs on layer names; exclude wins.
        pin: {glob: candidate}, forced on the layers that match, however slow; below 10 dB SQNR it is a BudgetError.
        groups: each item a glob, or several, whose layers must get one candidate.
        output: picks the output tensor that the divergence is measured on. Of a model that returns logits as a plain
            tensor, `lambda y: {"logits": y}` says so.
        loss: `callable(what the model returns) -> Tensor`, one number, a mean over tokens or samples: harm is predicted
            from its gradient (the empirical Fisher) instead of labels drawn from the model's own output.
        evaluate: `callable(model) -> float`, higher is better, or `(callable, tolerance)`: the last judge of the plan,
            whose score may be lower than the float model's by the tolerance, else by 1 % of it.
        cache: a `PlanCache`, a folder, file or fsspec URL, None for the user's own cache folder, False for none.
        compiled: whether the model will run compiled, on CUDA with CUDA graphs; None: exactly if it is wrapped by
            `torch.compile`, and without CUDA graphs if that is how it was wrapped (see its `mode="reduce-overhead"`).
            `model.compile()` does not wrap it: say True.
        batch_invariant: one kernel per layer, whatever the rows of a call.
        max_seconds: stop measuring after about this long and plan with what is known.
        progress: None shows a bar on a terminal, False nothing; or `callable(stage, done, total)`.
        seed: of every random choice.
        strict: the plan's digests of the weights cover every byte (1 to 3 s per GB), for `apply_plan(weights="strict")`
            and against changes made on purpose, rather than a sample.
        distributed: who plans together. None: all ranks, where torch.distributed is initialised, and all of them have
            to call this: they share the measuring, and get one plan, made on what the first of them recorded; what
            fails on one fails on all. False: this process alone. "per device": as None, with a plan for each kind of
            device, where None refuses ranks that are unlike. A process group: its ranks.
        autocast: whether the planned form of a float32 model may enter `torch.autocast(device_type, torch.bfloat16)`
            by itself. It does where "bf16" is among the candidates, that is faster as a whole, and the divergence from
            the float32 model stays inside the budget; of several workloads in those that are faster for it, if their
            inputs are larger than those of the others. What it returns is float32 as before. A model that is called,
            or was recorded, in a region of the caller's is left to that; with `Budget(time=)`, a fraction of what
            float layers take outside, and for ranks that plan together, there is none.

    Raises:
        AutoplanError: an argument cannot be used; the message says which, and the remedy. BudgetError if no plan fits,
            CandidateError for an unknown candidate, RecordingError for inputs or patterns that find no layer.
    """
    request = Request(
        budget, candidates, include, exclude, pin, groups, output, loss, evaluate, cache, compiled, batch_invariant,
        max_seconds, progress, seed, strict, distributed, autocast,
    )  # fmt: skip
    if not isinstance(model, nn.Module):
        raise AutoplanError(
            f"autoplan takes an nn.Module, not a {type(model).__name__}: of a pipeline, plan the modules"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise AutoplanError(
            "autoplan cannot change a ScriptModule: plan the model before torch.jit, or use torch.compile"
        )
    root = unwrap(model)
    if "_autoplan_plan" in vars(root):
        _logger.warning("this model is planned already and is returned as it is: see plan_of(model)")
        return model
    _FirstCall.forget(model)
    if example_inputs is None:
        _FirstCall(model, request)
        return model
    calls = as_calls(example_inputs)
    with together(distributed) as ranks:
        with record(root, seed=seed) as recording, undisturbed(root):
            for args, kwargs in calls:
                root(*args, **kwargs)
        plan = _make_plan(model, recording, request, ranks)
    return apply_plan(model, plan, weights="skip")


def make_plan(
    model: nn.Module,
    recording: Recording,
    *,
    budget: Budget | str = "high",
    candidates: Sequence[str | Candidate] | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    pin: Mapping[str, str] | None = None,
    groups: Sequence[Patterns] | None = None,
    output: OutputPicker | None = None,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    cache: PlanCache | str | Path | bool | None = None,
    compiled: bool | None = None,
    batch_invariant: bool = False,
    max_seconds: float | None = None,
    progress: Progress | bool | None = None,
    seed: int = 0,
    strict: bool = False,
    distributed: Distributed = None,
    autocast: bool = True,
) -> Plan:
    """Plan `model` on what `recording` saw, and change nothing. Arguments and errors as for `autoplan`.

    Raises RecordingError where the recording is of another model or empty, or the model is planned already.
    """
    request = Request(
        budget, candidates, include, exclude, pin, groups, output, loss, evaluate, cache, compiled, batch_invariant,
        max_seconds, progress, seed, strict, distributed, autocast,
    )  # fmt: skip
    with together(distributed) as ranks:
        return _make_plan(model, recording, request, ranks)


def _make_plan(model: nn.Module, recording: Recording, request: Request, ranks: Ranks) -> Plan:
    root = unwrap(model)
    refuse_planned(root)
    if not isinstance(recording, Recording) or recording.model is not root:
        raise RecordingError("make_plan wants the recording of this very model: `with record(model) as recording:`")
    recording.require_inputs()
    mode = _mode(model, root is not model if request.compiled is None else request.compiled)
    device = device_of_model(root)
    # One planning at a time: two that time at once would time each other.
    with (
        _planning_lock,
        shown(request.progress) as progress,
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),  # where kernels are timed
        torch.autocast(device.type, enabled=False),  # replays enter the region that they were recorded in
    ):
        return _Planning(_replica(root), recording, request, mode, progress, ranks).run()


def _mode(model: nn.Module, compiled: bool) -> str:
    """What times are to be for. CUDA graphs are assumed of a compiled model on CUDA, unless its wrapper has none."""
    if not compiled:
        return EAGER
    config = getattr(model, "get_compiler_config", lambda: None)()
    if device_of_model(model).type == "cuda" and config is not None and not config.get("triton.cudagraphs"):
        return WITHOUT_GRAPHS
    return COMPILED


def _replica(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares the parameters: trials in it are seen by nobody who runs the model.

    Buffers are its own. A model that cannot be copied is tried out in place; what is swapped in is always taken out.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for hook in (hook for module in model.modules() for hook in offload.hooks(module)):
        offloaded = getattr(hook, "weights_map", None)  # not parameters, between calls
        shared[id(offloaded)] = offloaded
    try:
        return copy.deepcopy(model, dict(shared))
    except Exception as error:
        _logger.info("the model cannot be copied, so candidates are tried in the model itself: %s", error)
        return model


@dataclass
class _Planning:
    """One run of the planner, stage by stage."""

    model: nn.Module
    recording: Recording
    request: Request
    mode: str
    progress: Progress
    ranks: Ranks
    region: Autocast | None = None  # that the planned model is to enter by itself
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    cut_short: bool = False  # a stage ran out of time: with more, the plan could be another

    def run(self) -> Plan:
        """The plan that the cache has; or one made now, for a region of autocast where that is faster."""
        self._prepare()
        if plan := self.ranks.from_first(self._known_plan):
            return plan
        plan = self._for_faster_side() if self._may_enter() else self._made()
        return self.ranks.from_first(lambda: self._kept(plan))

    def _kept(self, plan: Plan) -> Plan:
        """The plan with what all of planning took, once it is in the cache."""
        own = {stage: seconds for stage, seconds in self.seconds.items() if stage == "region"}
        seconds = plan.planning_seconds | own | {"total": time.monotonic() - self.began}
        plan = replace(plan, planning_seconds={stage: round(spent, 3) for stage, spent in seconds.items()})
        if self._seconds_left() > 0 and not self.cut_short and (cache := self._plan_cache()):
            cache.put("plans", *entry(self.prints, plan.to_dict()))
        return plan

    def _prepare(self) -> None:
        """What is to be planned, and the fingerprints of all that this depends on."""
        self.began = time.monotonic()
        request, recording = self.request, self.recording
        if dropped := recording.inputs_dropped:
            self.notes.append(
                f"{dropped} recorded inputs were too large or could not be copied, and were not judged on"
            )
        with self._stage("fingerprints"):
            self.cache = resolve(request.cache)
            profiles, self.left_alone = request.layers(recording)
            pinned, group_of = request.pinned(profiles), request.group_of(profiles)
            own = request.fingerprints(self.model, recording, profiles, self.mode, self.region)
            self.prints = self.ranks.meet(own, device_of_model(self.model), recording.sizes())
            profiles, weights = self.ranks.from_first(lambda: (profiles, recording.call_weights()))
            if not request.wants_bytes:  # of bytes a layer may have many that takes no time
                profiles, small = priorities.worth_planning(profiles, weights, group_of, pinned)
                self.left_alone += small
        self.profiles = profiles
        self.rules = Rules(self.mode, weights, pinned, group_of, request.wants_bytes, request.batch_invariant)

    # A region of autocast: on which side of it the planned model is faster.

    def _may_enter(self) -> bool:
        """Whether the planned model may enter a region of autocast by itself."""
        budget = self.request.budget
        return (
            self.request.autocast
            and self.ranks.alone
            and not (isinstance(budget, Budget) and budget.time is not None)
            and all(item.autocast is None for item in self.recording.inputs)
            and any(profile.dtype == "float32" for profile in self.profiles)
            and any(candidate.name == "bf16" for candidate in self.request.chosen_candidates())
        )

    def _for_faster_side(self) -> Plan:
        """The plan for the side that promises more; the faster of two, where the other side may be faster."""
        with self._stage("region"):
            region = inside.promising(self.model, self.recording, self.request.budget, self.request.output)
        if region is None:
            plan = self._made()
            gain = plan.outcome.other_side if plan.outcome else None
            if gain is None or gain.high >= 1:
                return plan
            there = self._made_inside(inside.everywhere(self.model))
            return _noted(plan, there) if isinstance(there, str) else _faster(plan, there)
        there = self._made_inside(region)
        if isinstance(there, str):
            self.notes.append(there)
            return self._made()
        loss = there.outcome.other_side if there.outcome else None
        return there if loss and loss.value > 1 + MARGIN else _faster(self._made(), there)

    def _made_inside(self, region: Autocast) -> Plan | str:
        """The plan for this region, or why there is none."""
        left = self._seconds_left()
        if left < sum(self.seconds.values()):  # what planning for outside has taken, if it has
            return "no time was left to plan for a region of autocast"
        request = replace(self.request, max_seconds=None if left == math.inf else left)
        try:
            recording = inside.recorded_inside(self.model, self.recording, region)
            there = _Planning(self.model, recording, request, self.mode, self.progress, self.ranks, region)
            there._prepare()
            plan = there._made()
        except Exception as error:
            return f"planning for a region of autocast failed: {type(error).__name__}: {error}"
        self.cut_short = self.cut_short or there.cut_short
        return plan

    def _made(self) -> Plan:
        """The plan for this side."""
        with self._stage("timing"):
            layers = self._timed(self.profiles, self.rules)
        if self.ranks.hold_shards:
            with undisturbed(self.model, eager=False):
                return from_leader(self.ranks, self.model, lambda: self._decided(layers))
        return self.ranks.from_first(lambda: self._decided(layers))

    def _decided(self, layers: list[LayerPlan]) -> Plan:
        """The plan, once it is known what each option gains."""
        request, recording = self.request, self.recording
        with self._stage("scoring"), undisturbed(self.model):
            split = split_inputs(self.model, recording.inputs)
            if not split.held_out:
                self.notes.append("not held out: a single sample had to serve scoring and validation alike")
            scoring = references(self.model, split.scoring, request.output)
            budget = Budget.of(request.budget, scoring[0].logits)
            sizes: dict[Size, int] = {}
            scores = self._scores(layers, self.profiles, scoring, budget.divergence, sizes)
            layers = [
                options.with_scores(layer, scores, lambda layer, option: self._nbytes(sizes, layer, option))
                for layer in layers
            ]
        whole = Whole(
            self.model,
            StandIns(self.model),
            recording.inputs,
            recording.weights,
            request.output,
            self.mode,
            request.seed,
            self.region,
        )
        with self._stage("validation"), undisturbed(self.model):
            validation = references(self.model, split.validation, request.output)
            final = references(self.model, split.final, request.output)
            settled = rescale.within_budget(
                layers,
                budget,
                lambda plan: whole.measure(plan, validation),
                seed=request.seed,
                seconds_left=self._seconds_left,
                progress=lambda done, total: self.progress("validation", done, total),
            )
        with self._stage("whole model"):
            self.progress("whole model", 0, 1)
            outcome = Outcome(
                None, "", None, NO_DIVERGENCE, scoring[0].logits, split.held_out, settled.kappa, settled.rounds,
                (*self.notes, *settled.notes),
            )  # fmt: skip
            decided, outcome = validate.do_no_harm(
                whole, settled.layers, budget, outcome, final,
                judge=request.judge, pinned=self.rules.pinned, seconds_left=self._seconds_left,
                autocast=self.region is not None or self._may_enter(),
            )  # fmt: skip
            self.progress("whole model", 1, 1)
        return Plan(
            layers=tuple(decided),
            left_alone=tuple(self.left_alone),
            budget=budget,
            workloads=dict(recording.weights),
            mode=self.mode,
            fingerprints=self.prints,
            frontier=frontier(settled.options, settled.kappa),
            gap=settled.gap,
            price_us=settled.price_us,
            outcome=outcome,
            planning_seconds=dict(self.seconds),
            autocast=self.region,
        )

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began

    def _seconds_left(self, share: float = 1.0) -> float:
        """Until this share of `max_seconds` is over: a stage that took all of it would leave the next one nothing."""
        limit = self.request.max_seconds
        left = math.inf if limit is None else self.began + share * limit - time.monotonic()
        self.cut_short = self.cut_short or left <= 0
        return left

    # What is known already.

    def _plan_cache(self) -> PlanCache | None:
        """The cache, if plans may be taken from it: the inputs have a digest, and no judge of the user's is asked."""
        return self.cache if self._can_find_scores() and self.request.evaluate is None else None

    def _known_plan(self) -> Plan | None:
        cache = self._plan_cache()
        found = cache.get("plans", fingerprint.digest(self.prints)) if cache else None
        if found is None:
            return None
        try:
            return Plan.from_dict(found["value"])
        except CacheError as error:
            _logger.warning("a cached plan cannot be used, so the model is planned anew: %s", error)
            return None

    # Time: which candidates can win, and on which kernels.

    def _timed(self, profiles: Sequence[LayerProfile], rules: Rules) -> list[LayerPlan]:
        candidates = self.request.chosen_candidates()
        menus = [options.screen(profile, candidates, device_of(profile)) for profile in profiles]
        wanted = priorities.largest_first(
            options.to_time(menus, self.mode, rules.batch_invariant), profiles, rules.call_weights, self.mode
        )
        measure = functools.partial(self._measure, model_bytes=sum(map(float_bytes, profiles)))
        found = in_shares(self.ranks, wanted, measure)
        layers = [options.with_times(menu, found, rules) for menu in menus]
        fused = in_shares(self.ranks, fusion.to_time(layers, menus, rules), measure)
        self.notes += benchmark.disturbed(found | fused)
        return fusion.with_times(layers, menus, fused, rules)

    def _measure(
        self, wanted: Mapping[Shape, Sequence[Contender]], from_cache_only: bool, model_bytes: int
    ) -> dict[Key, Measurement]:
        return benchmark.measure(
            wanted,
            self.prints["environment"],
            self.cache,
            seed=self.request.seed,
            model_bytes=model_bytes,
            progress=None if from_cache_only else self.progress,
            seconds_left=(lambda: 0.0) if from_cache_only else lambda: self._seconds_left(_TIMING_SHARE),
            thorough=self.request.batch_invariant,  # then one kernel has to be known at all rows
        )

    # Harm: what the candidates that are left do to the output.

    def _scores(
        self,
        layers: Sequence[LayerPlan],
        profiles: Sequence[LayerProfile],
        scoring: Sequence[Reference],
        limit: float | None,
        sizes: dict[Size, int],
    ) -> dict[tuple[str, str], Sensitivity]:
        request = self.request
        scores, notes = sensitivity.measure(
            priorities.most_to_save_first(layers),
            profiles,
            Subject(self.model, self.recording, scoring, request.output, request.loss, request.seed, sizes),
            self.prints,
            self.cache if self._can_find_scores() else None,
            limit=limit,
            progress=self.progress,
            seconds_left=lambda: self._seconds_left(_SCORING_SHARE),
        )
        self.notes += notes
        return scores

    def _can_find_scores(self) -> bool:
        return bool(self.prints["data"]["digest"]) and self.request.names_its_question

    def _nbytes(self, sizes: dict[Size, int], layer: LayerPlan, option: Option) -> int:
        """Bytes resident with this option, found by building it where scoring has not."""
        if (option.candidate, option.program) == ("none", PLAIN):
            return float_bytes(layer)
        key = size_of(layer, option.candidate, option.program)
        if key not in sizes:
            made = stand_ins(self.model, (layer.name,), option.candidate, option.program)
            sizes[key] = made[layer.name].nbytes()
        return sizes[key]


def _noted(plan: Plan, note: str) -> Plan:
    """The plan with one note more; a plan without an outcome has none."""
    return plan if plan.outcome is None else replace(plan, outcome=validate.noted(plan.outcome, note))


def _faster(outside: Plan, there: Plan) -> Plan:
    """Of a plan for outside autocast and one for a region of it, the one that is faster as a whole."""

    def speedup(plan: Plan) -> float:
        return plan.outcome.speedup.value if plan.outcome and plan.outcome.speedup else 0.0

    enters = speedup(there) > speedup(outside)
    plan, other, name = (there, outside, "without autocast") if enters else (outside, there, "in autocast")
    plan = _noted(plan, f"a plan {name} was made too, and was no faster")
    return replace(plan, planning_seconds={**plan.planning_seconds, name: sum(other.planning_seconds.values())})


class _FirstCall:
    """Lets the first call of a model record itself, eagerly and in float; the plan follows as it returns.

    Calls that other threads make meanwhile run the float model, and are not recorded.
    If planning fails, the float model stays, with a warning. A copy of the model waits for its own first call.
    """

    def __init__(self, model: nn.Module, request: Request) -> None:
        self.model, self.request = model, request
        self._lock, self.returned = threading.Lock(), False
        model.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True)
        model.register_forward_hook(self.on_return, with_kwargs=True)
        model.register_forward_hook(self.after, with_kwargs=True, always_call=True)

    @staticmethod
    def forget(model: nn.Module) -> None:
        """Take away the hooks of a model that waits for its first call."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), _FirstCall):
                    del hooks[key]

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._is_mine():  # the last call was interrupted, so that no hook ran after it
            self._stop()
        if not self._lock.acquire(blocking=False):
            return
        self.thread, self.returned = threading.get_ident(), False
        root = unwrap(self.model)
        try:
            self.recording = Recording(root, self.request.seed, only_thread=self.thread)
            self.context = recorded(self.recording)
            self.context.__enter__()
        except Exception as error:
            self.forget(self.model)
            self._warn(error)
            return
        if module is root:  # the recording's own hook on it came too late for the call that is under way
            self.recording._keep(args, kwargs)

    def on_return(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        self.returned = self.returned or self._is_mine()

    def after(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if not self._is_mine():
            return
        if not self.returned:  # the call raised: the next one records anew
            self._stop()
            return
        self.context.__exit__(None, None, None)
        del self.thread
        self.forget(self.model)
        try:
            with together(self.request.distributed) as ranks:
                plan = _make_plan(self.model, self.recording, self.request, ranks)
            apply_plan(self.model, plan, weights="skip")
        except Exception as error:
            self._warn(error)

    def _is_mine(self) -> bool:
        """Whether it is a call of this thread that is recorded."""
        return getattr(self, "thread", None) == threading.get_ident()

    def _stop(self) -> None:
        """Record no more of the call that was under way; the next one is recorded."""
        del self.thread
        self.context.__exit__(None, None, None)
        self._lock.release()

    def _warn(self, error: Exception) -> None:
        _logger.warning("planning failed, the float model stays: %s: %s", type(error).__name__, error)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "request": self.request}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock, self.returned = threading.Lock(), False

"""The only wiring: record, measure, score, solve, validate, apply."""

from __future__ import annotations

import copy
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from autoplan import benchmark, options, sensitivity, validate
from autoplan.apply import apply_plan, stand_ins, swapped
from autoplan.benchmark import Progress
from autoplan.cache import fingerprint
from autoplan.cache.store import PlanCache, entry, resolve
from autoplan.candidates import Candidate
from autoplan.divergence import OutputPicker, Reference, references, split_inputs, undisturbed
from autoplan.errors import AutoplanError, CacheError, RecordingError
from autoplan.options import Rules
from autoplan.plan import Plan
from autoplan.recorder import Recording, as_calls, device_of_model, record, refuse_planned, unwrap
from autoplan.records import (
    COMPILED,
    EAGER,
    WITHOUT_GRAPHS,
    Estimate,
    LayerPlan,
    LayerProfile,
    Option,
    Outcome,
    Sensitivity,
)
from autoplan.request import Evaluate, Patterns, Request, device_of
from autoplan.selection import (
    PLAIN,
    Budget,
    Choice,
    best_uniform,
    choose,
    choosing,
    explained,
    float_bytes,
    frontier,
    is_plain,
    keep_float,
    total_harm,
    total_us,
)

Model = TypeVar("Model", bound=nn.Module)

_logger = logging.getLogger("autoplan")
_planning_lock = threading.RLock()

_STRATEGY = "sweep"
_ROUNDS = 3
_FIRST_KAPPA = 1.15  # the whole does a little more harm than its parts add up to (median 1.13 over many models)
_WHOLE_MODEL_SECONDS = 20.0
_EVALUATE_TOLERANCE = 0.01  # of the float model's score, where the caller names none


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
    evaluate: Evaluate | None = None,
    cache: PlanCache | str | Path | bool | None = None,
    compiled: bool | None = None,
    batch_invariant: bool = False,
    max_seconds: float | None = None,
    progress: Progress | bool | None = None,
    seed: int = 0,
) -> Model:
    """Give every Linear of `model` the fastest candidate that keeps the model's output inside `budget`, in place.

    With `example_inputs` the model is recorded on them, planned and changed before this returns. Without, the first
    call of the model records and returns its own float output; the plan is made and applied right after it. A model
    that is planned already is returned as it is, with a warning.

    Args:
        model: a module, or what `torch.compile` made of one; the same object is returned.
        example_inputs: a Tensor, a tuple (arguments), a mapping (keyword arguments), or an iterable of these (batches).
        budget: a `Budget`, or "lossless", "high", "balanced".
        candidates: names or `Candidate` objects to choose among; by default all that the device supports.
        include, exclude: fnmatch globs on layer names; exclude wins.
        pin: {glob: candidate}, forced on the layers that match, however slow (but never below 10 dB SQNR).
        groups: each item a glob, or several, whose layers must get one candidate.
        output: picks the output tensor that the divergence is measured on.
        evaluate: `callable(model) -> float`, higher is better, or `(callable, tolerance)`: the last judge of the plan.
        cache: a `PlanCache`, a folder, file or fsspec URL, None for the user's own cache folder, False for none.
        compiled: whether the model will run compiled, on CUDA with CUDA graphs; None: exactly if it is wrapped by
            `torch.compile`, and without CUDA graphs if that is how it was wrapped (see its `mode="reduce-overhead"`).
        batch_invariant: one kernel per layer, whatever the rows of a call.
        max_seconds: stop measuring after about this long and plan with what is known.
        progress: None shows a bar on a terminal, False nothing; or `callable(stage, done, total)`.
        seed: of every random choice.

    Raises:
        AutoplanError: an argument cannot be used; the message says which, and the remedy.
    """
    request = Request(
        budget, candidates, include, exclude, pin, groups, output, evaluate, cache, compiled, batch_invariant,
        max_seconds, progress, seed,
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
    with record(root, seed=seed) as recording, undisturbed(root):
        for args, kwargs in calls:
            root(*args, **kwargs)
    return apply_plan(model, _make_plan(model, recording, request), weights="skip")


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
    evaluate: Evaluate | None = None,
    cache: PlanCache | str | Path | bool | None = None,
    compiled: bool | None = None,
    batch_invariant: bool = False,
    max_seconds: float | None = None,
    progress: Progress | bool | None = None,
    seed: int = 0,
) -> Plan:
    """Plan `model` on what `recording` saw, and change nothing. Arguments and errors as for `autoplan`."""
    request = Request(
        budget, candidates, include, exclude, pin, groups, output, evaluate, cache, compiled, batch_invariant,
        max_seconds, progress, seed,
    )  # fmt: skip
    return _make_plan(model, recording, request)


def _make_plan(model: nn.Module, recording: Recording, request: Request) -> Plan:
    root = unwrap(model)
    refuse_planned(root)
    if not isinstance(recording, Recording) or recording.model is not root:
        raise RecordingError("make_plan wants the recording of this very model: `with record(model) as recording:`")
    if not recording.inputs:
        reason = "its inputs are too large or cannot be copied" if recording.inputs_dropped else "nothing was run"
        raise RecordingError(f"nothing was recorded ({reason}): run the model inside `with record(model):`")
    mode = _mode(model, root is not model if request.compiled is None else request.compiled)
    device = device_of_model(root)
    # One planning at a time: two that time at once would time each other.
    with (
        _planning_lock,
        _progress(request.progress) as progress,
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),  # where kernels are timed
    ):
        return _Planning(_replica(root), recording, request, mode, progress).run()


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
    shared = {id(parameter): parameter for parameter in model.parameters()}
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
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> Plan:
        self.began = time.monotonic()
        request, recording = self.request, self.recording
        if dropped := recording.inputs_dropped:
            self.notes.append(
                f"{dropped} recorded inputs were too large or could not be copied, and were not judged on"
            )
        with self._stage("fingerprints"):
            self.cache = resolve(request.cache)
            profiles, left_alone = request.layers(recording)
            self.pinned, group_of = request.pinned(profiles), request.group_of(profiles)
            self.prints = request.fingerprints(self.model, recording, profiles, self.mode)
        if plan := self._known_plan():
            return plan
        with self._stage("timing"):
            rules = Rules(
                self.mode, recording.call_weights(), self.pinned, group_of, request.wants_bytes, request.batch_invariant
            )
            layers = self._timed(profiles, rules)
        with self._stage("scoring"), undisturbed(self.model):
            split = split_inputs(self.model, recording.inputs)
            if not split.held_out:
                self.notes.append("not held out: a single sample had to serve scoring and validation alike")
            scoring = references(self.model, split.scoring, request.output)
            budget = Budget.of(request.budget, scoring[0].logits)
            scores = self._scores(layers, profiles, scoring)
            sizes: dict[Any, int] = {}
            layers = [
                options.with_scores(layer, scores, lambda layer, option: self._nbytes(sizes, layer, option))
                for layer in layers
            ]
        with self._stage("validation"), undisturbed(self.model):
            validation = references(self.model, split.validation, request.output)
            final = references(self.model, split.final, request.output)
            chosen, choice, kappa, rounds = self._solve(layers, budget, validation)
            divergence = self._divergence(chosen, final)
        with self._stage("whole model"):
            outcome = Outcome(None, "", None, divergence, scoring[0].logits, split.held_out, kappa, rounds)
            decided, outcome = self._do_no_harm(chosen, budget, outcome, final)
        self.seconds["total"] = time.monotonic() - self.began
        plan = Plan(
            layers=tuple(decided),
            left_alone=tuple(left_alone),
            budget=budget,
            workloads=dict(recording.weights),
            mode=self.mode,
            fingerprints=self.prints,
            frontier=frontier(layers, kappa),
            gap=choice.gap,
            price_us=choice.price_us,
            outcome=replace(outcome, notes=tuple(self.notes)),
            planning_seconds={stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
        )
        if self._seconds_left() > 0 and (cache := self._plan_cache()):
            cache.put("plans", *entry(self.prints, plan.to_dict()))
        return plan

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began

    def _seconds_left(self) -> float:
        limit = self.request.max_seconds
        return math.inf if limit is None else self.began + limit - time.monotonic()

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
        found = benchmark.measure(
            options.to_time(menus, self.mode, rules.batch_invariant),
            self.prints["environment"],
            self.cache,
            seed=self.request.seed,
            progress=self.progress,
            seconds_left=self._seconds_left,
        )
        return [options.with_times(menu, found, rules) for menu in menus]

    # Harm: what the candidates that are left do to the output.

    def _scores(
        self, layers: Sequence[LayerPlan], profiles: Sequence[LayerProfile], scoring: Sequence[Reference]
    ) -> dict[tuple[str, str], Sensitivity]:
        """A score for every open option, from the cache or measured now; fewer if max_seconds runs out."""
        by_name = {profile.name: profile for profile in profiles}
        scope = {name: self.prints[name] for name in ("model", "data", "environment")} | {
            "strategy": _STRATEGY,
            "output": self.prints["options"]["output"],
            "seed": self.request.seed,
        }
        scores: dict[tuple[str, str], Sensitivity] = {}
        trials, keys = [], {}
        for layer in layers:
            for option in layer.options:
                if option.rejected or option.candidate == "none":
                    continue
                pair = (layer.name, option.candidate)
                source = self.prints["options"]["candidates"][option.candidate]
                keys[pair] = {**scope, "layer": layer.name, "program": option.program, "candidate": source}
                if known := self._known_score(pair, keys[pair]):
                    scores[pair] = known
                else:
                    trials.append(sensitivity.Trial(by_name[layer.name], option.candidate, option.program))
        fresh: dict[str, Any] = {}
        measured = sensitivity.STRATEGIES[_STRATEGY](self.model, trials, self.recording, scoring, self.request.output)
        for done in range(len(trials)):
            if self._seconds_left() <= 0:
                self.notes.append(f"max_seconds ran out with {len(trials) - done} of {len(trials)} scores missing")
                break
            self.progress("scoring", done, len(trials))
            score = next(measured)
            pair = (score.layer, score.candidate)
            scores[pair] = score
            value = {"harm": _finite(score.harm), "sqnr_db": _finite(min(score.sqnr_db, options.SHOWN_DB))}
            fresh.update([entry(keys[pair], value)])
        if self.cache is not None and self._can_find_scores():
            self.cache.put_many("sensitivities", fresh)
        return scores

    def _known_score(self, pair: tuple[str, str], key: Mapping[str, Any]) -> Sensitivity | None:
        if self.cache is None or not self._can_find_scores():
            return None
        found = self.cache.get("sensitivities", fingerprint.digest(dict(key)))
        if found is None:
            return None
        harm, sqnr = found["value"].get("harm"), found["value"].get("sqnr_db")
        harm, sqnr = math.inf if harm is None else harm, -math.inf if sqnr is None else sqnr
        sound = isinstance(harm, float) and isinstance(sqnr, float) and harm >= 0
        return Sensitivity(*pair, harm, sqnr) if sound else None

    def _can_find_scores(self) -> bool:
        return bool(self.prints["data"]["digest"]) and self.request.names_its_question

    def _nbytes(self, sizes: dict[Any, int], layer: LayerPlan, option: Option) -> int:
        """Bytes resident with this option, found once per size by building it."""
        if (option.candidate, option.program) == ("none", PLAIN):
            return float_bytes(layer)
        key = (option.candidate, option.program, layer.in_features, layer.out_features, layer.dtype)
        if key not in sizes:
            made = stand_ins(self.model, (layer.name,), option.candidate, option.program)
            sizes[key] = made[layer.name].nbytes()
        return sizes[key]

    # Solve, measure, rescale, solve again.

    def _solve(
        self, layers: Sequence[LayerPlan], budget: Budget, validation: Sequence[Reference]
    ) -> tuple[list[LayerPlan], Choice, float, int]:
        """The fastest layers whose measured divergence keeps the budget; with the choice, kappa and rounds it took."""
        kappa, best = _FIRST_KAPPA, None
        tried: dict[tuple[str, ...], Estimate] = {}
        for _ in range(_ROUNDS):
            choice = choose(layers, budget, kappa)
            if choice.candidates in tried:
                break
            self.progress("validation", len(tried), _ROUNDS)
            chosen = choosing(layers, choice.candidates)
            measured = tried[choice.candidates] = self._divergence(chosen, validation)
            if budget.divergence is None:
                return chosen, choice, kappa, 1
            if total_harm(chosen):
                kappa = min(max(measured.high / total_harm(chosen), 1e-9), 1e9)  # finite, also where the output is not
            if measured.high <= budget.divergence and (best is None or total_us(chosen) < total_us(best[0])):
                best = (chosen, choice, kappa)
        if best is not None:
            return *best, len(tried)
        closest = min(tried.values(), key=lambda estimate: estimate.high)
        self.notes.append(
            f"no plan was inside the divergence budget of {budget.divergence:.3g} in {len(tried)} rounds (the closest "
            f"measured {closest.value:.3g}, up to {closest.high:.3g}), so no layer is quantized"
        )
        unquantized = [self.pinned.get(layer.name, "none") for layer in layers]
        return choosing(layers, unquantized), choice, kappa, len(tried)

    def _divergence(self, layers: Sequence[LayerPlan], against: Sequence[Reference]) -> Estimate:
        made = self._stand_ins(layers)
        return validate.divergence_of(self.model, made, against, self.request.output).estimate(self.request.seed)

    def _stand_ins(self, layers: Sequence[LayerPlan]) -> dict[str, nn.Module]:
        """The modules that these layers' choices need; plain layers stay as they are."""
        made: dict[str, nn.Module] = {}
        for layer in layers:
            if not is_plain(layer):
                names = (layer.name, *layer.aliases)
                made.update(stand_ins(self.model, names, layer.chosen, layer.choice.program))
        return made

    # The whole model: against the float model, against the best uniform plan, and before the user's own judge.

    def _do_no_harm(
        self, chosen: list[LayerPlan], budget: Budget, outcome: Outcome, final: Sequence[Reference]
    ) -> tuple[Sequence[LayerPlan], Outcome]:
        kappa = outcome.kappa
        explain = [explained(layer, budget, kappa, layer.name in self.pinned) for layer in chosen]
        name, uniform = best_uniform(chosen, budget, kappa)
        outcome = replace(outcome, uniform=name)
        if all(is_plain(layer) for layer in chosen):
            self.notes.append("nothing was switched: no candidate is faster, accurate enough and inside the budget")
            return explain, outcome
        variants = {"float": {}, "plan": self._stand_ins(chosen)}
        if [layer.chosen for layer in uniform] != [layer.chosen for layer in chosen]:
            variants["uniform"] = self._stand_ins(uniform)
        self.progress("whole model", 0, 1)
        with undisturbed(self.model, eager=False):
            ratios = validate.whole_model_times(
                self.model,
                variants,
                self.recording.inputs,
                self.recording.weights,
                baseline="plan",
                mode=self.mode,
                seconds=_WHOLE_MODEL_SECONDS,
                seed=self.request.seed,
            )
        self.progress("whole model", 1, 1)
        outcome = replace(outcome, speedup=ratios["float"], versus_uniform=ratios.get("uniform"))
        if outcome.versus_uniform is not None and outcome.versus_uniform.high < 1:
            explain, outcome = self._consider_uniform(explain, uniform, budget, outcome, final)
        if reason := self._veto(explain, budget, outcome):
            self.notes.append(reason)
            unchanged = replace(outcome, speedup=None, versus_uniform=None, divergence=Estimate(0.0, 0.0, 0.0))
            return keep_float(chosen, "the float model is kept: see the notes"), unchanged
        return explain, outcome

    def _consider_uniform(
        self,
        chosen: list[LayerPlan],
        uniform: list[LayerPlan],
        budget: Budget,
        outcome: Outcome,
        final: Sequence[Reference],
    ) -> tuple[list[LayerPlan], Outcome]:
        """A uniform plan surely beat the solver's as a whole: take it, if it keeps the budget."""
        ratio, was = outcome.versus_uniform, outcome.speedup
        if ratio is None or was is None:
            return chosen, outcome
        with undisturbed(self.model):
            divergence = self._divergence(uniform, final)
        if budget.divergence is not None and divergence.high > budget.divergence:
            self.notes.append(f"uniform {outcome.uniform} was faster as a whole, but its divergence breaks the budget")
            return chosen, outcome
        self.notes.append(f"uniform {outcome.uniform} was {1 / ratio.value:.2f}x faster as a whole, and was taken")
        reason = "faster as a whole: see note"
        speedup = Estimate(*(value / ratio.value for value in (was.value, was.low, was.high)))
        taken = [replace(layer, reason=reason) for layer in uniform]
        return taken, replace(outcome, speedup=speedup, versus_uniform=None, divergence=divergence)

    def _veto(self, chosen: Sequence[LayerPlan], budget: Budget, outcome: Outcome) -> str | None:
        """Why the float model has to stay, or None."""
        speedup, limit = outcome.speedup, budget.divergence
        if limit is not None and outcome.divergence.low > limit and not self.pinned:
            return (
                f"on the final split the divergence is {outcome.divergence.value:.3g}, surely above the budget of "
                f"{limit:.3g}, so the float model is kept"
            )
        if not math.isfinite(outcome.divergence.value):
            return "the planned model's output is not finite on the final split, so the float model is kept"
        if speedup is not None and speedup.low <= 1 and not self.pinned and not self.request.wants_bytes:
            return (
                f"as a whole the planned model is not surely faster than the float model ({speedup.value:.2f}x, 95 % "
                f"interval {speedup.low:.2f} to {speedup.high:.2f}), so the float model is kept"
            )
        if self.request.judge is None:
            return None
        evaluate, tolerance = self.request.judge
        with undisturbed(self.model, eager=False):
            before = self._score(evaluate)
            with swapped(self.model, self._stand_ins(chosen)):
                after = self._score(evaluate)
        allowed = _EVALUATE_TOLERANCE * abs(before) if tolerance is None else tolerance
        if math.isnan(before) or math.isnan(after):
            return f"evaluate() gave {before:g} for the float model and {after:g} for the planned one: float is kept"
        if after >= before - allowed:
            return None
        return (
            f"evaluate() fell from {before:.6g} to {after:.6g}, by more than {allowed:.3g}, so the float model is kept"
        )

    def _score(self, evaluate: Callable[[nn.Module], float]) -> float:
        score = evaluate(self.model)
        try:
            return float(score)
        except (TypeError, ValueError):
            raise AutoplanError(f"evaluate() must return a number, and returned {type(score).__name__}") from None


def _finite(value: float) -> float | None:
    """Files hold finite numbers only: None stands for infinity."""
    return value if math.isfinite(value) else None


@contextmanager
def _progress(progress: Progress | bool | None) -> Iterator[Progress]:
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


class _FirstCall:
    """Lets the first call of a model record itself, eagerly and in float; the plan follows as it returns.

    Calls that other threads make meanwhile run the float model, and are not recorded.
    If planning fails, the float model stays, with a warning. A copy of the model waits for its own first call.
    """

    def __init__(self, model: nn.Module, request: Request) -> None:
        self.model, self.request = model, request
        self._lock = threading.Lock()
        model.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True)
        model.register_forward_hook(self.after, with_kwargs=True, always_call=True)

    @staticmethod
    def forget(model: nn.Module) -> None:
        """Take away the hooks of a model that waits for its first call."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), _FirstCall):
                    del hooks[key]

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._lock.acquire(blocking=False):
            return
        self.thread = threading.get_ident()
        root = unwrap(self.model)
        self.context = record(root, seed=self.request.seed)
        self.recording = self.context.__enter__()
        self.recording.only_thread = self.thread
        if module is root:  # the recording's own hook on it came too late for the call that is under way
            self.recording._keep(args, kwargs)

    def after(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if getattr(self, "thread", None) != threading.get_ident():
            return
        del self.thread
        self.context.__exit__(None, None, None)
        if result is None:  # the call raised: the next one records anew
            self._lock.release()
            return
        self.forget(self.model)
        try:
            apply_plan(self.model, _make_plan(self.model, self.recording, self.request), weights="skip")
        except Exception as error:
            _logger.warning("planning failed, the float model stays: %s: %s", type(error).__name__, error)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "request": self.request}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

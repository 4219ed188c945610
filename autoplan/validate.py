"""Do no harm: the whole planned model's output on held-out inputs, its speed, and what the user's own metric says."""

from __future__ import annotations

import logging
import math
import operator
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoplan import graphs, timing
from autoplan.apply import Swap
from autoplan.divergence import (
    OutputPicker,
    Reference,
    Terms,
    argument,
    call,
    compare,
    judged_output,
    kl_by_position,
    region_of,
    terms,
    undisturbed,
)
from autoplan.errors import AutoplanError
from autoplan.inside import everywhere
from autoplan.recorder import ModelInput, device_of_model
from autoplan.records import COMPILED, EAGER, NO_DIVERGENCE, Autocast, Estimate, LayerPlan, Outcome
from autoplan.region import enters
from autoplan.rescale import Measured, put_back
from autoplan.selection import Budget, best_uniform, explained, is_plain, keep_float

Layers = Mapping[str, nn.Module]
Evaluate = Callable[[nn.Module], float]

_logger = logging.getLogger("autoplan")

_MIN_ROUNDS, _MAX_ROUNDS = 8, 40
_GPU_WARM_UPS = 3  # calls that compile, that record a CUDA graph, and that replay it
_SECONDS = 10.0  # for timing the whole model
SHARE = 0.8  # of the float model's time: the rest could not turn the verdict, unless the plan were far slower there
OTHER_SIDE = "plan on the other side"  # a variant of the whole model: see `Outcome.other_side`
_TOLERANCE = 0.01  # of the float model's score, where the caller of `evaluate` names none


@dataclass(frozen=True)
class Whole:
    """The whole model, to try plans in: nothing of them stays. Call its methods inside `undisturbed`."""

    model: nn.Module
    stand_ins: Callable[[Sequence[LayerPlan]], Layers]  # the modules that a plan puts into the model
    inputs: Sequence[ModelInput]
    weights: Mapping[str, float]  # of workloads
    picker: OutputPicker | None
    mode: str
    seed: int
    region: Autocast | None = None  # that the planned model enters by itself

    def swapped(self, layers: Layers) -> Swap:
        """The model with a plan's modules; without any, as it is."""
        return Swap(self.model, layers, self.region if layers else None)

    def measure(self, plan: Sequence[LayerPlan], against: Sequence[Reference]) -> Measured:
        """The divergence of the planned model, with its one-sided 95 % upper bound."""
        with self.swapped(self.stand_ins(plan)):
            found = compare(self.model, against, self.picker)
        return Measured(found.divergence(), found.upper_bound(self.seed))

    def judged(self, outcome: Outcome, plan: Sequence[LayerPlan], against: Sequence[Reference]) -> Outcome:
        """The outcome with the planned model's figures on these inputs."""
        rows, kl, same, losses = [], [], [], []
        with self.swapped(self.stand_ins(plan)):
            for reference in against:
                output, _ = judged_output(self.model, reference.model_input, self.picker)
                rows.append(terms(reference, output))
                if reference.logits:
                    counts = _counted(reference)
                    kl.append(kl_by_position(reference, output)[counts].double().cpu())
                    same.append((reference.output.argmax(-1) == output.argmax(-1))[counts].double().cpu())
                    losses += _next_token_losses(self.model, reference, output)
        found = Terms(np.concatenate(rows))
        if not math.isfinite(found.divergence()):
            return replace(outcome, divergence=found.estimate(), divergence_bound=found.upper_bound())
        tail = np.concatenate(kl) if kl else found.values[:, 0] / np.where(found.values[:, 1], found.values[:, 1], 1.0)
        return replace(
            outcome,
            divergence=found.estimate(self.seed),
            divergence_bound=found.upper_bound(self.seed),
            divergence_p99=float(np.quantile(tail, 0.99)) if tail.size else None,
            top1_agreement=float(torch.cat(same).mean()) if kl and tail.size else None,
            perplexity_ratio=_perplexity_ratio(losses),
        )

    def score(self, evaluate: Evaluate, plan: Sequence[LayerPlan]) -> float:
        """What the user's metric says of the planned model. Raises AutoplanError where that is no number."""
        with self.swapped(self.stand_ins(plan)), region_of(self.inputs[0], self.model):
            score = evaluate(self.model)
        try:
            return float(score)
        except (TypeError, ValueError):
            raise AutoplanError(f"evaluate() must return a number, and returned {type(score).__name__}") from None


def _counted(reference: Reference) -> Tensor:
    """The positions of logits that count, bool [batch] or [batch, tokens]."""
    positions = reference.output.shape[:-1]
    return torch.ones(positions, dtype=torch.bool, device=reference.output.device) if reference.mask is None else (
        reference.mask
    )  # fmt: skip


class _Loss(NamedTuple):
    """Sums of cross entropies over an input's tokens, nats."""

    float_next: float  # the float model, of the token that comes next
    float_own: float  # the float model, of the token that it was given
    planned_next: float
    tokens: int


def _next_token_losses(model: nn.Module, reference: Reference, output: Tensor) -> list[_Loss]:
    """The losses, if the output has a class for every token of an input [batch, tokens]; else none."""
    ids = argument(model, reference.model_input, "decoder_input_ids")
    ids = argument(model, reference.model_input, "input_ids") if ids is None else ids
    y = reference.output
    if not isinstance(ids, Tensor) or ids.is_floating_point() or y.dim() != 3 or ids.shape != y.shape[:2]:
        return []
    ids, counts = ids.to(y.device).long(), _counted(reference)
    ids = torch.where(counts, ids, 0)
    both = counts[:, 1:] & counts[:, :-1]
    if not bool(both.any()) or int(ids.min()) < 0 or int(ids.max()) >= y.shape[-1]:
        return []

    def loss(logits: Tensor, labels: Tensor) -> float:
        return float(F.cross_entropy(logits[:, :-1][both].float(), labels[both], reduction="sum"))

    return [_Loss(loss(y, ids[:, 1:]), loss(y, ids[:, :-1]), loss(output, ids[:, 1:]), int(both.sum()))]


def _perplexity_ratio(losses: Sequence[_Loss]) -> float | None:
    """Perplexity planned / float; None for models that predict the token they are given, as masked ones do."""
    tokens = sum(loss.tokens for loss in losses)
    if not tokens or sum(loss.float_next for loss in losses) >= sum(loss.float_own for loss in losses):
        return None
    ratio = math.exp(min(sum(loss.planned_next - loss.float_next for loss in losses) / tokens, 700.0))
    return ratio if math.isfinite(ratio) else None


def do_no_harm(
    whole: Whole,
    plan: Sequence[LayerPlan],
    budget: Budget,
    outcome: Outcome,
    final: Sequence[Reference],
    *,
    judge: tuple[Evaluate, float | None] | None = None,
    pinned: Collection[str] = (),
    seconds_left: Callable[[], float] = lambda: math.inf,
    autocast: bool = False,
) -> tuple[Sequence[LayerPlan], Outcome]:
    """The plan with the reason of every choice, and what was measured of it; or the float model, and why.

    Where on the final split the divergence is surely above the budget, or the user's metric falls by more than its
    tolerance, the worst contributors are put back to none, until that split (by its upper bound) and the metric accept
    what is left. The float model is kept if they accept nothing, and if as a whole the plan is not surely faster
    (unless the caller pinned layers, or asked for fewer bytes). A uniform plan that is surely faster than the solver's
    as a whole is taken in its place. With `autocast`, the other side of a region of it is tried: `Outcome.other_side`.
    """
    name, uniform = best_uniform(plan, budget, outcome.kappa)
    outcome = replace(outcome, uniform=name)
    if all(map(is_plain, plan)):
        note = "nothing was switched: no candidate is faster, accurate enough and inside the budget"
        return _explained(plan, budget, outcome, pinned), noted(outcome, note)
    with undisturbed(whole.model):
        outcome = whole.judged(outcome, plan, final)
    jury = _Jury(whole, judge)
    too_far = _too_far(plan, budget, outcome, pinned)
    if too_far or not jury.accepts(plan):
        limit = sys.float_info.max if budget.divergence is None else budget.divergence

        def keeps(fewer: Sequence[LayerPlan]) -> bool:
            if seconds_left() <= 0:
                return False
            with undisturbed(whole.model):
                inside = not too_far or whole.measure(fewer, final).bound <= limit
            return inside and jury.accepts(fewer)

        accepted = put_back(plan, keeps)
        reason = too_far or jury.verdict
        if accepted is None or all(map(is_plain, accepted)):
            return _float_kept(plan, outcome, f"{reason}, so the float model is kept")
        back = sum(before.chosen != after.chosen for before, after in zip(plan, accepted, strict=True))
        outcome = noted(outcome, f"{reason}, so {back} layers were put back to none: that is accepted")
        plan = accepted
        with undisturbed(whole.model):
            outcome = whole.judged(outcome, plan, final)
    variants = {"float": whole.swapped({}), "plan": whole.swapped(whole.stand_ins(plan))}
    if [layer.chosen for layer in uniform] != [layer.chosen for layer in plan]:
        variants["uniform"] = whole.swapped(whole.stand_ins(uniform))
    if autocast and seconds_left() > 0:
        variants |= _other_side(whole, plan, budget, final)

    def race() -> WholeTimes:
        seconds, decisive = min(_SECONDS, max(seconds_left(), 0.0)), "float" if seconds_left() > _SECONDS else ""
        with undisturbed(whole.model, eager=False):
            return whole_model_times(whole, variants, baseline="plan", seconds=seconds, decisive=decisive, share=SHARE)

    try:
        times = race()
    except Exception as error:
        if variants.pop(OTHER_SIDE, None) is None:
            raise
        _logger.info("the plan does not run on the other side of autocast: %s: %s", type(error).__name__, error)
        times = race()
    outcome = times.told(outcome)
    speedup = times.ratios["float"]
    explained_plan = _explained(plan, budget, outcome, pinned)
    fastest_counts = budget.time is None  # else it is the most accurate plan inside that time
    if fastest_counts and outcome.versus_uniform is not None and outcome.versus_uniform.high < 1:
        explained_plan, outcome = _consider_uniform(whole, explained_plan, uniform, budget, outcome, final, jury)
    speedup = outcome.speedup or speedup
    if speedup.low <= 1 and not pinned and budget.nbytes is None:
        reason = (
            f"as a whole the planned model is not surely faster than the float model ({speedup.value:.2f}x, 95 % "
            f"interval {speedup.low:.2f} to {speedup.high:.2f}), so the float model is kept"
        )
        return _float_kept(plan, outcome, reason)
    return explained_plan, outcome


def _other_side(whole: Whole, plan: Sequence[LayerPlan], budget: Budget, final: Sequence[Reference]) -> dict[str, Swap]:
    """The variant of the planned model on the other side of a region of autocast, by its name, if it is worth a try.

    Of a plan for outside, that is where bfloat16 was seen to make a layer faster, and it keeps the budget in there.
    """
    if whole.region is not None:
        return {OTHER_SIDE: replace(whole, region=None).swapped(whole.stand_ins(plan))}
    if not any(
        option.candidate == "bf16" and (option.us_high or math.inf) < layer.baseline_us
        for layer in plan
        if layer.dtype == "float32"
        for option in layer.options
    ):
        return {}
    there = replace(whole, region=everywhere(whole.model))
    try:
        with undisturbed(whole.model):
            bound = there.measure(plan, final).bound
    except Exception as error:  # nobody said that the model can run there
        _logger.info("no plan inside autocast was tried: %s: %s", type(error).__name__, error)
        return {}
    kept = math.isfinite(bound) and (budget.divergence is None or bound <= budget.divergence)
    return {OTHER_SIDE: there.swapped(whole.stand_ins(plan))} if kept else {}


class _Jury:
    """The user's own metric, if there is one, asked about plans."""

    def __init__(self, whole: Whole, judge: tuple[Evaluate, float | None] | None) -> None:
        self._whole, self._judge = whole, judge
        self._before: float | None = None
        self.verdict = ""  # on the first plan that was not accepted

    def accepts(self, plan: Sequence[LayerPlan]) -> bool:
        if self._judge is None:
            return True
        evaluate, tolerance = self._judge
        with undisturbed(self._whole.model, eager=False):
            if self._before is None:
                self._before = self._whole.score(evaluate, ())
            before, after = self._before, self._whole.score(evaluate, plan)
        allowed = _TOLERANCE * abs(before) if tolerance is None else tolerance
        if after >= before - allowed:
            return True
        if not self.verdict and (math.isnan(before) or math.isnan(after)):
            self.verdict = f"evaluate() gave {before:g} for the float model and {after:g} for the planned one"
        elif not self.verdict:
            self.verdict = f"evaluate() fell from {before:.6g} to {after:.6g}, by more than {allowed:.3g}"
        return False


def _too_far(plan: Sequence[LayerPlan], budget: Budget, outcome: Outcome, pinned: Collection[str]) -> str | None:
    """Why the output on the final split forbids the plan, or None."""
    limit, divergence = budget.divergence, outcome.divergence
    if not math.isfinite(divergence.value):
        return "the planned model's output is not finite on the final split"
    exact = all(layer.chosen == "none" for layer in plan)  # but for rounding
    if limit is None or divergence.low <= limit or pinned or exact:
        return None
    return f"on the final split the divergence is {divergence.value:.3g}, surely above the budget of {limit:.3g}"


def _consider_uniform(
    whole: Whole,
    plan: list[LayerPlan],
    uniform: list[LayerPlan],
    budget: Budget,
    outcome: Outcome,
    final: Sequence[Reference],
    jury: _Jury,
) -> tuple[list[LayerPlan], Outcome]:
    """A uniform plan surely beat the solver's as a whole: take it, if it keeps the budget and the user's metric."""
    ratio, was = outcome.versus_uniform, outcome.speedup
    if ratio is None or was is None:
        return plan, outcome
    with undisturbed(whole.model):
        taken = whole.judged(outcome, uniform, final)
    if budget.divergence is not None and (taken.divergence_bound or 0.0) > budget.divergence:
        note = f"uniform {outcome.uniform} was faster as a whole, but its divergence breaks the budget"
        return plan, noted(outcome, note)
    if not jury.accepts(uniform):
        return plan, noted(outcome, f"uniform {outcome.uniform} was faster as a whole, but {jury.verdict}")
    speedup = Estimate(*(value / ratio.value for value in (was.value, was.low, was.high)))
    note = f"uniform {outcome.uniform} was {1 / ratio.value:.2f}x faster as a whole, and was taken"
    layers = [replace(layer, reason="faster as a whole: see note") for layer in uniform]
    return layers, noted(replace(taken, speedup=speedup, versus_uniform=None), note)


def _explained(plan: Sequence[LayerPlan], budget: Budget, outcome: Outcome, pinned: Collection[str]) -> list[LayerPlan]:
    return [explained(layer, budget, outcome.kappa, layer.name in pinned) for layer in plan]


def _float_kept(plan: Sequence[LayerPlan], outcome: Outcome, reason: str) -> tuple[Sequence[LayerPlan], Outcome]:
    kept = Outcome(
        None, outcome.uniform, None, NO_DIVERGENCE, outcome.logits, outcome.held_out, outcome.kappa,
        outcome.rounds, outcome.notes,
    )  # fmt: skip
    return keep_float(plan, "the float model is kept: see the notes"), noted(kept, reason)


def noted(outcome: Outcome, note: str) -> Outcome:
    return replace(outcome, notes=(*outcome.notes, note))


class WholeTimes(NamedTuple):
    """Times of variants of the whole model."""

    ratios: dict[str, Estimate]  # variant -> its time / the baseline's
    baseline_us: float  # in one forward of each workload that was timed, times its weight
    note: str = ""  # which workloads were timed, if not all

    def told(self, outcome: Outcome) -> Outcome:
        """The outcome of the variant "plan", with its speed against the others.

        What the float model takes is told only if all workloads were timed: that is what predictions are of.
        """
        speedup = self.ratios["float"]
        return replace(
            outcome,
            speedup=speedup,
            other_side=self.ratios.get(OTHER_SIDE),
            versus_uniform=self.ratios.get("uniform"),
            float_us=None if self.note else speedup.value * self.baseline_us,
            notes=(*outcome.notes, self.note) if self.note else outcome.notes,
        )


def whole_model_times(
    whole: Whole,
    variants: Mapping[str, Swap],
    *,
    baseline: str,
    seconds: float,
    decisive: str = "",
    share: float = 1.0,
) -> WholeTimes:
    """Time of each variant of the model, and over that of the variant `baseline`: paired, one input per workload.

    With several workloads the ratios are weighted by what each workload takes, and the largest come first, until what
    was timed takes this `share` of the float model's time. The variant `OTHER_SIDE` is timed in the workloads in which
    the region of `whole` is entered, whatever their share.

    Takes about `seconds` beside compiling, but never less than the rounds that an interval needs, and up to 40 rounds
    where the first ones leave open which is faster, the variant `decisive` or the baseline: on a machine that stalls
    now and then, few rounds tell nothing.
    """
    model, weights, mode, seed, region = whole.model, whole.weights, whole.mode, whole.seed, whole.region
    device = device_of_model(model).type
    by_workload = {item.workload: item for item in reversed(whole.inputs)}
    largest, note = _largest(model, by_workload, weights, share, timing.clock_of(device))
    racing = {workload: [name for name in variants if name != OTHER_SIDE] for workload in largest}
    inside = largest
    if region is not None:
        inside = {w: item for w, item in by_workload.items() if enters(region, item.args, item.kwargs)}
    for workload in inside if OTHER_SIDE in variants else ():
        racing[workload] = [*racing.get(workload, [baseline]), OTHER_SIDE]
    found: dict[str, dict[str, timing.Timing]] = {}
    for workload, names in racing.items():
        functions, before = {name: graphs.separate(model) for name in names}, graphs.written()
        try:
            runners = {name: _runner(functions[name], mode, device, len(racing) > 1) for name in names}
            calls = {name: _timed(model, variants[name], runners[name], by_workload[workload]) for name in names}
            found[workload] = _compared(calls, baseline, decisive, device, seconds / len(racing), seed)
        finally:
            graphs.forget(functions.values(), before)
    spent = {workload: weights.get(workload, 1.0) * timed[baseline].baseline_us for workload, timed in found.items()}

    def ratio(name: str) -> Estimate:
        among = [workload for workload in found if name in found[workload]]
        total = sum(spent[workload] for workload in among)
        bounds = [(r.ratio, r.ratio_low, r.ratio_high) for r in (found[workload][name] for workload in among)]
        shares = [spent[workload] / total for workload in among]
        return Estimate(*(sum(map(operator.mul, shares, bound)) for bound in zip(*bounds, strict=True)))

    return WholeTimes({name: ratio(name) for name in variants}, sum(spent[workload] for workload in largest), note)


def _compared(
    calls: Mapping[str, Callable[[], object]], baseline: str, decisive: str, device: str, seconds: float, seed: int
) -> dict[str, timing.Timing]:
    """The race of these calls, see `whole_model_times`, once they are warm."""
    for _ in range(_GPU_WARM_UPS if device == "cuda" else 1):
        for call_ in calls.values():
            call_()
    clock, batch_us = timing.clock_of(device), timing.MODEL_BATCH_US.get(device, timing.BATCH_US["cpu"])
    rounds = _affordable_rounds(calls.values(), seconds, clock)
    results = timing.compare(calls, baseline=baseline, max_rounds=rounds, min_batch_us=batch_us, seed=seed, clock=clock)
    is_open = decisive in results and results[decisive].ratio_low <= 1 <= results[decisive].ratio_high
    if rounds == _MAX_ROUNDS or not is_open:
        return results
    return timing.compare(
        calls, baseline=baseline, max_rounds=_MAX_ROUNDS, min_batch_us=batch_us, seed=seed, clock=clock
    )


def _largest(
    model: nn.Module,
    examples: Mapping[str, ModelInput],
    weights: Mapping[str, float],
    share: float,
    clock: Callable[[], int],
) -> tuple[dict[str, ModelInput], str]:
    """The workloads that take this share of the model's time, largest first; and which these are, if not all."""
    if len(examples) == 1 or share >= 1:
        return dict(examples), ""
    spent = {}
    for workload, example in examples.items():
        call(model, example)  # what is made on first use
        times = []
        for _ in range(2):
            began = clock()
            call(model, example)
            times.append(clock() - began)
        spent[workload] = weights.get(workload, 1.0) * min(times)
    total, timed = sum(spent.values()), 0.0
    chosen: dict[str, ModelInput] = {}
    for workload in sorted(spent, key=lambda name: -spent[name]):
        if timed < share * total:
            chosen[workload] = examples[workload]
            timed += spent[workload]
    if len(chosen) == len(examples):
        return chosen, ""
    percent = f"{100 * timed / total:.0f} % of the float model's time"
    return chosen, f"the whole model was timed in {', '.join(chosen)} only, which is about {percent}"


def _affordable_rounds(calls: Collection[Callable[[], object]], seconds: float, clock: Callable[[], int]) -> int:
    """How many rounds fit into `seconds`, at least 8, by one call of each."""
    began = clock()
    for call_ in calls:
        call_()
    a_round = (clock() - began) / 1e9
    return min(_MAX_ROUNDS, max(_MIN_ROUNDS, int(seconds / a_round)))


def _timed(model: nn.Module, swap: Swap, runner: Callable[..., Any], example: ModelInput) -> Callable[[], object]:
    def run() -> object:
        with swap:
            return call(model, example, runner)

    return run


def _runner(function: Callable[..., Any], mode: str, device: str, static: bool) -> Callable[..., Any]:
    """What is called to time a model: the function that calls it, compiled in the mode that times are for.

    It is for one workload: with others to come, Dynamo is told not to compile for all their sizes, which takes longer.
    """
    if mode == EAGER:
        return function
    with_graphs = "reduce-overhead" if mode == COMPILED and device == "cuda" else None  # CUDA graphs
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False if static else None, mode=with_graphs)
    return compiled

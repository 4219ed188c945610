"""A plan of another environment made one of this: its choices timed here against their best rivals, and kept or not."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoplan import benchmark, fusion, kernels, options, validate
from autoplan.apply import StandIns, check_match, environment_differences, stand_ins
from autoplan.arms import Contender
from autoplan.benchmark import Key, Progress, candidate_digest
from autoplan.cache import fingerprint
from autoplan.cache.store import PlanCache, resolve
from autoplan.candidates import Candidate, find_candidate
from autoplan.divergence import OutputPicker, references, undisturbed
from autoplan.errors import CandidateError, PlanMismatchError
from autoplan.kernels.ops import base_name
from autoplan.offload import execution_device
from autoplan.options import Menu, Rules
from autoplan.plan import Plan, revalidates
from autoplan.recorder import Recording, as_calls, device_of_model, record, refuse_planned, unwrap
from autoplan.records import NO_DIVERGENCE, LayerPlan, LayerProfile, Measurement, Option, Outcome, Shape
from autoplan.request import device_of, shown
from autoplan.selection import (
    PLAIN,
    Budget,
    choose,
    choosing,
    float_bytes,
    frontier,
    is_pinned,
    keep_float,
    kernel_names,
    total_us,
)
from autoplan.validate import Whole

_WHOLE_MODEL_SECONDS = 5.0


@revalidates
def revalidate(
    plan: Plan,
    model: nn.Module,
    inputs: Any = None,
    *,
    output: OutputPicker | None = None,
    cache: PlanCache | str | Path | bool | None = None,
    progress: Progress | bool | None = None,
    seed: int = 0,
) -> Plan:
    """`Plan.revalidate`; told there."""
    began = time.monotonic()
    root = unwrap(model)
    refuse_planned(root)
    check_match(root, plan, "check")
    device = device_of_model(root)
    if device.type == "meta":
        raise PlanMismatchError("the model is on the meta device, where nothing can be timed: load its weights first")
    where = torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # where kernels and clocks run
    with shown(progress) as told, where:
        revalidation = _Revalidation(plan, root, resolve(cache), told, seed)
        recording = None if inputs is None else revalidation.recording(inputs)
        with torch.autocast(device.type, enabled=False):  # replays enter theirs
            return revalidation.run(recording, output, began)


@dataclass
class _Revalidation:
    plan: Plan
    model: nn.Module
    cache: PlanCache | None
    progress: Progress
    seed: int

    def run(self, recording: Recording | None, output: OutputPicker | None, began: float) -> Plan:
        plan = self.plan
        device = execution_device(self.model.get_submodule(plan.layers[0].name)).type if plan.layers else "cpu"
        environment = fingerprint.environment(str(device), fingerprint.source_digest(kernels))
        gone: dict[str, str] = {}  # candidates that are not known here, and why
        menus = [self._menu(layer, str(device), gone) for layer in plan.layers]
        # What is smaller stays in, as for a budget of bytes: whether a choice falls is decided below, not by the gates.
        invariant = bool(plan.fingerprints.get("options", {}).get("batch_invariant"))
        rules = Rules(plan.mode, self._call_weights(), wants_bytes=True, batch_invariant=invariant)
        found = self._measure(options.to_time(menus, plan.mode, invariant), environment)
        timed = [
            self._evidence(layer, options.with_times(menu, found, rules), gone)
            for layer, menu in zip(plan.layers, menus, strict=True)
        ]
        layers = self._keeping(timed)
        fused = self._measure(fusion.to_time(layers, menus, rules), environment)
        layers = fusion.with_times(layers, menus, fused, rules)
        kappa = plan.outcome.kappa if plan.outcome else plan.kappa
        choice = choose(layers, self._budget(layers), kappa)
        chosen = [
            replace(layer, reason=self._reason(old, layer))
            for old, layer in zip(plan.layers, choosing(layers, choice.candidates), strict=True)
        ]
        outcome, notes = self._outcome(chosen, recording, output, kappa) if recording else (None, [])
        if notes:
            chosen = list(keep_float(chosen, "the float model is kept: see what was revalidated"))
        seconds = round(time.monotonic() - began, 3)
        return replace(
            plan,
            layers=tuple(chosen),
            fingerprints={**plan.fingerprints, "environment": environment},
            frontier=frontier(layers, kappa),
            gap=choice.gap,
            price_us=choice.price_us,
            outcome=outcome,
            kappa=kappa,
            planning_seconds={"revalidation": seconds, "total": seconds},
            stale=(),
            revalidated=(
                *self._told(chosen, len({shape for shape, *_ in found}), gone),
                *benchmark.disturbed(found),
                *notes,
            ),
        )

    def _measure(
        self, wanted: Mapping[Shape, Sequence[Contender]], environment: Mapping[str, Any]
    ) -> dict[Key, Measurement]:
        return benchmark.measure(
            wanted,
            environment,
            self.cache,
            seed=self.seed,
            model_bytes=sum(map(float_bytes, self.plan.layers)),
            progress=self.progress,
        )

    def recording(self, inputs: Any) -> Recording:
        calls = as_calls(inputs)
        with record(self.model, seed=self.seed) as recording, undisturbed(self.model):
            for args, kwargs in calls:
                self.model(*args, **kwargs)
        recording.require_inputs()
        return recording

    def _budget(self, layers: Sequence[LayerPlan]) -> Budget:
        """The plan's, widened to what its choices take here: they were measured to keep it, or to be worth it."""
        plan, budget = self.plan, self.plan.budget
        hair = 1 + 1e-9
        divergence, nbytes, share = budget.divergence, budget.nbytes, budget.time
        if divergence is not None:
            divergence = max(divergence, plan.predicted_divergence) * hair
        if nbytes is not None:
            nbytes = max(nbytes, sum(layer.choice.nbytes or 0 for layer in layers))
        if share is not None and layers:
            share = max(share, total_us(layers) / sum(layer.baseline_us for layer in layers)) * hair
        return replace(budget, divergence=divergence, nbytes=nbytes, time=share)

    def _call_weights(self) -> dict[str, float]:
        """What one recorded call counts; a plan that does not say how many forwards were recorded stands for one."""
        forwards: Any = self.plan.fingerprints.get("data", {}).get("forwards", {})
        return {name: weight / max(forwards.get(name, 1), 1) for name, weight in self.plan.workloads.items()}

    def _menu(self, layer: LayerPlan, device: str, gone: dict[str, str]) -> Menu:
        """What is timed for a layer: plain F.linear, the choice, and its best rival, on the kernels that they had.

        Where none of these works here, on all kernels that do.
        """
        profile = LayerProfile(
            layer.name, layer.aliases, layer.in_features, layer.out_features, layer.has_bias, layer.dtype, device,
            layer.calls, layer.siblings,
        )  # fmt: skip
        wanted = {option.candidate: option.program for option in (layer.option(layer.chosen), *_rival(layer))}
        candidates: list[Candidate] = []
        for name in {"none": "", **wanted}:
            try:
                candidates.append(find_candidate(name))
            except CandidateError as error:
                gone[name] = str(error)
        menu = options.screen(profile, candidates, device_of(profile))
        kept = {}
        for candidate, usable in menu.kernels.items():
            before = set(_families(wanted.get(candidate.name, PLAIN)))
            before |= {"linear"} if candidate.name == "none" else set()
            kept[candidate] = tuple(kernel for kernel in usable if kernel.name in before) or usable
        return replace(menu, kernels=kept)

    def _evidence(self, layer: LayerPlan, timed: LayerPlan, gone: Mapping[str, str]) -> LayerPlan:
        """The layer with the times of here, and what the plan knows of harms and bytes."""
        here = {option.candidate: option for option in timed.options}
        merged = []
        for option in layer.options:
            new = here.get(option.candidate)
            if new is None:
                why = gone.get(option.candidate) or option.rejected
                why = why or "not timed here: revalidate times the choice and its best rival"
                merged.append(replace(option, us=None, us_low=None, us_high=None, fused=None, rejected=why))
                continue
            nbytes = option.nbytes
            if not new.rejected and new.program != option.program:
                plain = (new.candidate, new.program) == ("none", PLAIN)
                nbytes = float_bytes(layer) if plain else self._nbytes(layer, new)
            rejected = option.rejected if option.candidate != layer.chosen else ""  # as by a pin
            merged.append(
                replace(new, nbytes=nbytes, sqnr_db=option.sqnr_db, harm=option.harm, rejected=rejected or new.rejected)
            )
        return replace(layer, options=tuple(merged), baseline_us=timed.baseline_us, runs_fused=False)

    def _nbytes(self, layer: LayerPlan, option: Option) -> int:
        return stand_ins(self.model, (layer.name,), option.candidate, option.program)[layer.name].nbytes()

    def _keeping(self, layers: Sequence[LayerPlan]) -> list[LayerPlan]:
        """The layers with all options closed that are not surely faster than the choice, where that can run here."""
        fallen = {layer.group or layer.name for layer in layers if layer.option(layer.chosen).rejected}
        kept = []
        for layer in layers:
            was = layer.option(layer.chosen)
            if is_pinned(layer) and was.rejected:
                raise CandidateError(
                    f"layer {layer.name!r} is pinned to {layer.chosen}, which cannot run here: {was.rejected}"
                )
            if (layer.group or layer.name) in fallen:
                kept.append(layer)
                continue
            kept.append(replace(layer, options=tuple(_against(was, option) for option in layer.options)))
        return kept

    def _reason(self, old: LayerPlan, new: LayerPlan) -> str:
        if new.chosen == old.chosen:
            return old.reason
        if why := new.option(old.chosen).rejected:
            return f"{old.chosen} cannot run here: {why}"
        return f"surely faster here than {old.chosen}"

    def _outcome(
        self, chosen: Sequence[LayerPlan], recording: Recording, output: OutputPicker | None, kappa: float
    ) -> tuple[Outcome, list[str]]:
        """The whole model's divergence and speed on these inputs, and why the float model has to stay, if it has to."""
        modules = StandIns(self.model)
        with undisturbed(self.model):
            against = references(self.model, recording.inputs, output)
            old = self.plan.outcome
            outcome = Outcome(
                None, "", None, NO_DIVERGENCE, against[0].logits, False, kappa, old.rounds if old else 0,
                ("the divergence is that of the inputs given to revalidate",),
            )  # fmt: skip
            whole = Whole(
                self.model, modules, recording.inputs, recording.weights, output, self.plan.mode, self.seed,
                self.plan.region,
            )  # fmt: skip
            outcome = whole.judged(outcome, chosen, against)
            divergence = outcome.divergence
        limit = self.plan.budget.divergence
        if limit is not None and divergence.low > limit:
            return replace(outcome, divergence=NO_DIVERGENCE), [
                f"here the divergence is {divergence.value:.3g}, surely above the budget of {limit:.3g}: the float "
                "model is kept. Plan anew"
            ]
        made = modules(chosen)
        if not made:
            return outcome, []
        with undisturbed(self.model, eager=False):
            times = validate.whole_model_times(
                whole, {"float": whole.swapped({}), "plan": whole.swapped(made)}, baseline="plan",
                seconds=_WHOLE_MODEL_SECONDS, share=validate.SHARE,
            )  # fmt: skip
        speedup = times.ratios["float"]
        if speedup.high < 1:
            return replace(outcome, divergence=NO_DIVERGENCE), [
                f"here the planned model is slower than the float model as a whole ({speedup.value:.2f}x): the float "
                "model is kept. Plan anew"
            ]
        return times.told(outcome), []

    def _told(self, chosen: Sequence[LayerPlan], shapes: int, gone: Mapping[str, str]) -> list[str]:
        """What has changed, in sentences."""
        plan = self.plan
        there = environment_differences(plan.fingerprints.get("environment", {}))
        told = [f"timed {shapes} shapes here; the plan was made where {'; '.join(there) or 'nothing is different'}"]
        sources: Any = plan.fingerprints.get("options", {}).get("candidates", {})
        for name in sorted({layer.chosen for layer in plan.layers} - gone.keys()):
            if sources.get(name) not in (None, candidate_digest(find_candidate(name))):
                told.append(f"{name} has other source than it was judged with: give inputs, to measure the divergence")
        for old, new in zip(plan.layers, chosen, strict=True):
            before, after = old.option(old.chosen), new.option(new.chosen)
            if new.chosen != old.chosen:
                told.append(f"{old.name}: {_in_words(old, before)} there, now {_in_words(new, after)}: {new.reason}")
            elif _families(after.program) != _families(before.program):
                told.append(
                    f"{old.name}: {new.chosen} stays, on {kernel_names(after.program)}, was on "
                    f"{kernel_names(before.program)}"
                )
        return told if len(told) > 1 else [*told, "every choice stands"]


def _against(was: Option, option: Option) -> Option:
    if option.candidate == was.candidate or option.rejected:
        return option
    if option.us_high is not None and was.us_low is not None and option.us_high < was.us_low:
        return option
    return replace(option, rejected=f"not surely faster here than {was.candidate}, which the plan had chosen")


def _rival(layer: LayerPlan) -> list[Option]:
    """The fastest option that the solver was free to choose beside the choice; none where there was none."""
    rivals = [o for o in layer.options if not o.rejected and o.candidate not in ("none", layer.chosen) and o.program]
    return sorted(rivals, key=lambda option: (option.us or 0.0, option.candidate))[:1]


def _families(program: str) -> list[str]:
    return [base_name(name) for name in kernel_names(program).split("/")]


def _in_words(layer: LayerPlan, option: Option) -> str:
    ratio = f" at {option.us / layer.baseline_us:.2f}x the plain time" if option.us and layer.baseline_us else ""
    return f"{option.candidate} on {kernel_names(option.program)}{ratio}"

"""Putting a plan into a model: planned layers take the place of Linears, in place."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from autoplan import kernels
from autoplan.cache.fingerprint import environment, source_digest, tensor_digest
from autoplan.candidates import find_candidate
from autoplan.errors import AutoplanError, PlanMismatchError
from autoplan.kernels.ops import base_name, parse_program
from autoplan.layers import PlannedLinear
from autoplan.offload import identity, is_offloaded, values
from autoplan.plan import Plan
from autoplan.recorder import dtype_name, refuse_planned, unwrap
from autoplan.records import Autocast, LayerPlan, label
from autoplan.region import Region
from autoplan.selection import fused_sets, is_plain
from autoplan.siblings import join

Model = TypeVar("Model", bound=nn.Module)
Weights = Literal["check", "strict", "skip"]

_logger = logging.getLogger("autoplan")


def apply_plan(model: Model, plan: Plan, *, weights: Weights = "check") -> Model:
    """Give every layer of `model` what `plan` chose for it, in place: no forward, no timing. Returns the same object.

    Names, shapes and dtypes must match those that were planned. `weights="check"` compares the weights' digests too:
    of a sample, or of every byte where the plan was made with `strict=True`; "strict" takes no plan that was not.
    "skip" does not compare them (for a twin that will load its weights, or a model on the meta device).

    Of a layer that accelerate offloads, the quantized weight stays on the device where the layer runs; one that `none`
    was chosen for is offloaded as before. What accelerate holds is not changed: while any module of the model still is
    offloaded, all its float weights stay in CPU memory (or in their files), those of planned layers too.

    A plan that was made in another environment, or chose kernels that this machine cannot run (those raise KernelError
    when they are called), is applied with a warning, and marked `stale`: see `Plan.revalidate`.

    Raises PlanMismatchError naming what differs, RecordingError when the model is planned already, CandidateError for
    a candidate that is not registered; the model is then unchanged.
    """
    if weights not in get_args(Weights):
        raise AutoplanError(f'weights must be "check", "strict" or "skip", not {weights!r}')
    if not isinstance(plan, Plan):
        raise AutoplanError(f"apply_plan wants a Plan, not a {type(plan).__name__}: see Plan.load and Plan.from_dict")
    root = unwrap(model)
    refuse_planned(root)
    check_match(root, plan, weights)
    planned = stand_ins_of(root, plan.layers)
    stale = (*environment_differences(plan.fingerprints.get("environment", {})), *_kernels_lacking(planned.values()))
    Swap(root, planned, plan.region).exchange()
    if stale:
        _logger.warning(
            "this plan was made in another environment, so its times may not hold: %s. plan.revalidate(float_model, "
            "inputs) times it here in seconds, and chooses what can run",
            "; ".join(stale),
        )
    vars(root)["_autoplan_plan"] = replace(plan, stale=stale)
    return model


def plan_of(model: nn.Module) -> Plan:
    """The plan that `model` runs. Raises AutoplanError when it has none (yet)."""
    plan = vars(unwrap(model)).get("_autoplan_plan")
    if not isinstance(plan, Plan):
        raise AutoplanError(
            "this model has no plan: call autoplan(model, inputs), or run a model from autoplan(model) once"
        )
    return plan


def stand_ins_of(model: nn.Module, layers: Sequence[LayerPlan]) -> dict[str, PlannedLinear]:
    """The modules that these layers' choices need, by name; plain layers stay as they are.

    So do offloaded ones that chose `none`, whatever its kernel: prepacked, all of a float weight would stay in memory.
    """
    made: dict[str, PlannedLinear] = {}
    for layer in layers:
        stays_offloaded = layer.chosen == "none" and is_offloaded(model.get_submodule(layer.name))
        if not (is_plain(layer) or stays_offloaded):
            program = layer.option(layer.chosen).program
            made.update(stand_ins(model, (layer.name, *layer.aliases), layer.chosen, program))
    for places in fused_sets(layers):
        members = [layers[i] for i in places]
        if all(layer.name in made for layer in members):
            names = [layer.name for layer in members]
            join(label(names), [made[name] for name in names], members[0].choice.program)
    return made


class StandIns:
    """The modules of any plan for `model`, as `stand_ins_of` makes them.

    Those of the last plan are kept: a plan is measured, judged and timed in turn, quantizing it takes long, and the
    next plan differs in few layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._made: dict[tuple[tuple[str, str, str], ...], dict[str, PlannedLinear]] = {}  # by the choices of a unit

    def __call__(self, layers: Sequence[LayerPlan]) -> Mapping[str, PlannedLinear]:
        units = {
            tuple((layer.name, layer.chosen, layer.choice.program) for layer in own): own for own in _units(layers)
        }
        # Before others are made: two plans at once may be too much.
        self._made = {choices: made for choices, made in self._made.items() if choices in units}
        for choices, own in units.items():
            if choices not in self._made:
                self._made[choices] = stand_ins_of(self._model, own)
        return {name: layer for choices in units for name, layer in self._made[choices].items()}


def _units(layers: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """The layers as they hold weights: those that run as one product together, and every other one by itself."""
    fused = {i: places for places in fused_sets(layers) for i in places}
    return [[layers[j] for j in places] for i in range(len(layers)) if (places := fused.get(i, [i]))[0] == i]


def stand_ins(model: nn.Module, names: tuple[str, ...], candidate: str, program: str) -> dict[str, PlannedLinear]:
    """Planned layers for the Linears of these names, which run one weight: it is quantized once and held once."""
    made: dict[int, PlannedLinear] = {}
    holders: dict[Hashable, PlannedLinear] = {}  # by where the weight lies
    for name in names:
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise AutoplanError(f"layer {name!r} is a {type(linear).__name__}, not an nn.Linear")
        if id(linear) not in made:
            weight = identity(linear, "weight")
            if holder := holders.get(weight):
                made[id(linear)] = holder.sharing_weight(name, linear)
            else:  # the first; or a twin that was tied when the plan was made, and is not here
                made[id(linear)] = PlannedLinear.from_linear(name, linear, find_candidate(candidate), program)
                holders[weight] = made[id(linear)]
    return {name: made[id(model.get_submodule(name))] for name in names}


class Swap:
    """`model` with these layers while inside a `with` block, as often as one likes, and as it was after it.

    With `autocast` it enters that region by itself, too. The layers' places are found once: for many layers that takes
    longer than a forward of a small model.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], autocast: Autocast | None = None) -> None:
        self._model = model
        self._forward = Region(model, autocast) if autocast else vars(model).get("forward")
        places: dict[tuple[int, str], tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
        for name, layer in layers.items():
            parent, _, attribute = name.rpartition(".")
            modules = model.get_submodule(parent)._modules  # which a parent of two names has once
            places[id(modules), attribute] = (modules, attribute, layer)
        self._places = [(modules, attribute) for modules, attribute, _ in places.values()]
        self._out: list[nn.Module | None] = [layer for *_, layer in places.values()]

    def exchange(self) -> None:
        """Put in what is out, and take out what was there."""
        for i, (modules, attribute) in enumerate(self._places):
            modules[attribute], self._out[i] = self._out[i], modules[attribute]
        forward, self._forward = self._forward, vars(self._model).pop("forward", None)
        if forward is not None:
            vars(self._model)["forward"] = forward

    def __enter__(self) -> None:
        self.exchange()

    def __exit__(self, *_: object) -> None:
        self.exchange()


def environment_differences(planned: Mapping[str, Any]) -> tuple[str, ...]:
    """How the environment here differs from the one that a plan was made in."""
    if not planned:
        return ()
    device_type = str(planned.get("device_type"))
    if device_type == "cuda" and not torch.cuda.is_available():
        return (f"there is no CUDA device here, it was made on {planned.get('device')}",)
    here = environment(device_type, source_digest(kernels))
    return tuple(
        f"{key} is {here.get(key)}, was {planned.get(key)}"
        for key in sorted({*here, *planned})
        if here.get(key) != planned.get(key)
    )


def _kernels_lacking(layers: Iterable[PlannedLinear]) -> tuple[str, ...]:
    """The kernels of these layers that this machine cannot run, and why; none where their device is not here."""
    used = {base_name(kernel.name): kernel for layer in layers for kernel in parse_program(layer.program)[1]}
    here = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    return tuple(
        f"{name} cannot run here: {reason}"
        for name, kernel in sorted(used.items())
        if here & set(kernel.devices) and (reason := kernel.lacks())
    )


def check_match(model: nn.Module, plan: Plan, weights: Weights) -> None:
    """Raise PlanMismatchError unless these are the layers that were planned, and (unless skipped) their weights."""
    wrong = []
    digests: dict[str, Any] = plan.fingerprints.get("model", {}).get("layers", {})
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer in plan.layers:
        for name in (layer.name, *layer.aliases):
            module = modules.get(name)
            planned = f"{layer.out_features}x{layer.in_features} {layer.dtype}"
            if not isinstance(module, nn.Linear):
                found = "is missing" if module is None else f"is a {type(module).__name__}, not an nn.Linear"
                wrong.append(f"{name} {found}")
                continue
            actual = f"{module.out_features}x{module.in_features} {dtype_name(module.weight.dtype)}"
            if actual != planned:
                wrong.append(f"{name} is {actual}, planned for {planned}")
            elif name == layer.name and (module.bias is not None) != layer.has_bias:  # of a tied twin it may differ
                wrong.append(f"{name} has {'a' if module.bias is not None else 'no'} bias, unlike the planned layer")
        if weights == "skip":
            continue
        planned_digests = {digests.get(layer.name, {}).get("digest"), *digests.get(layer.name, {}).get("shards", ())}
        planned_digests -= {None, ""}
        coverage = {str(digest).partition(":")[0] for digest in planned_digests}
        if weights == "strict" and coverage != {"strict"}:
            raise PlanMismatchError(
                f"the plan holds no digest of every byte of {layer.name!r}: make it with strict=True, or apply it with "
                'weights="check"'
            )
        if not planned_digests:
            continue
        seen: dict[Hashable, str] = {}  # a tied weight once
        for name in (layer.name, *layer.aliases):
            module = modules.get(name)
            if not isinstance(module, nn.Linear):
                continue
            weight = identity(module, "weight")
            if weight not in seen:
                seen[weight] = tensor_digest(values(module, "weight"), strict="strict" in coverage)
            if seen[weight] not in planned_digests:
                wrong.append(f"{name} has other weights")
    if wrong:
        listed = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        remedy = ' (weights="skip" applies it regardless)' if all(w.endswith("other weights") for w in wrong) else ""
        raise PlanMismatchError(f"this plan was made for another model: {listed}{remedy}. Plan this model anew")

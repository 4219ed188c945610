"""Which calls of a float32 model to plan inside a region of autocast, and what its layers are given there."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from autoplan import timing
from autoplan.divergence import OutputPicker, call, compare, copied, references, undisturbed
from autoplan.recorder import ModelInput, Recording, device_of_model, recorded
from autoplan.records import Autocast
from autoplan.region import enters, size
from autoplan.selection import Budget

DTYPE = "bfloat16"  # that regions are tried with

_logger = logging.getLogger("autoplan")

_ROUNDS, _SECONDS = 40, 2.0  # at most, to guess by: fewer than four rounds are enough where calls take that long
_SHARE = 0.25  # of the budget, at most: what the region alone may do to the output
_REST = 0.1  # of a call's time, at least: what is not spent in layers, which gain as much outside


def everywhere(model: nn.Module) -> Autocast:
    """The region that every call enters."""
    return Autocast(device_of_model(model).type, DTYPE, 0)


def promising(
    model: nn.Module, recording: Recording, budget: Budget | str, picker: OutputPicker | None
) -> Autocast | None:
    """The region that makes the float model's calls faster, as a few eager ones of each workload show.

    It is entered in the workloads that it makes faster, where the size of a call tells them from the others, else in
    all or none. None, too, where the model cannot run in it, it alone takes over a quarter of the budget, or there is
    little but layers to gain from.
    """
    examples: dict[str, ModelInput] = {}
    for item in recording.inputs:
        examples.setdefault(item.workload, item)
    try:
        with undisturbed(model):
            if all(_rest(model, recording, example) < _REST for example in examples.values()):
                return None
            times = {workload: _times(model, example) for workload, example in examples.items()}
            region = _separating(everywhere(model), times, recording)
            if region is None:
                return None
            outside = references(model, list(examples.values()), picker)
            items = entered([one.model_input for one in outside], region)
            inside = [replace(one, model_input=item) for one, item in zip(outside, items, strict=True)]
            rounding = compare(model, inside, picker).divergence()
    except Exception as error:  # nobody said that the model can run there
        _logger.info("no region of autocast was tried: %s: %s", type(error).__name__, error)
        return None
    limit = Budget.of(budget, outside[0].logits).divergence
    return region if limit is None or rounding <= _SHARE * limit else None


def _rest(model: nn.Module, recording: Recording, example: ModelInput) -> float:
    """The share of an eager call's time that is not spent in layers; on a GPU, that of the launches."""
    layers = {id(m): m for d in recording.decisions.values() for m in map(model.get_submodule, d.names)}.values()
    began, spent = [0], 0

    def before(*_: object) -> None:
        began[0] = time.perf_counter_ns()

    def after(*_: object) -> None:
        nonlocal spent
        spent += time.perf_counter_ns() - began[0]

    call(model, example)  # what is made on first use
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(before).remove)
            hooks.callback(layer.register_forward_hook(after, prepend=True).remove)
        start = time.perf_counter_ns()
        call(model, example)
        return 1 - spent / (time.perf_counter_ns() - start)


def _times(model: nn.Module, example: ModelInput) -> tuple[float, float]:
    """Microseconds of a call outside and inside: there with weights that are cast, as planned layers hold them so.

    Torch keeps those casts only that are of weights which want gradients: the guess is against the region without.
    """
    device = device_of_model(model).type
    region = everywhere(model)

    def inside() -> None:
        args, kwargs = copied(example)
        model(*args, **kwargs)

    def outside() -> None:
        with torch.autocast(device, enabled=False):
            inside()

    try:
        with torch.autocast(device, getattr(torch, region.dtype)):  # one for all calls, which keeps the casts
            found = timing.compare(
                {"outside": outside, "inside": inside}, baseline="outside", precision=0.05, min_rounds=4,
                max_rounds=_ROUNDS, max_seconds=_SECONDS, clock=timing.clock_of(device),
            )  # fmt: skip
    finally:
        torch.clear_autocast_cache()
    us = found["outside"].baseline_us
    return us, us * found["inside"].ratio


def _separating(region: Autocast, times: Mapping[str, tuple[float, float]], recording: Recording) -> Autocast | None:
    """The region for those calls that it makes faster: see `promising`."""
    faster = {workload for workload, (outside, inside) in times.items() if inside < outside}
    sizes: dict[bool, list[int]] = {True: [], False: []}
    for item in recording.inputs:
        sizes[item.workload in faster].append(size(item.args, item.kwargs))
    if not faster:
        return None
    if sizes[False] and min(sizes[True]) > max(sizes[False]):
        return replace(region, least=math.isqrt(min(sizes[True]) * max(sizes[False])) + 1)
    weighted = [(recording.weights[workload], *pair) for workload, pair in times.items()]
    gains = sum(weight * (outside - inside) for weight, outside, inside in weighted) > 0
    return region if gains else None


def entered(items: Sequence[ModelInput], region: Autocast | None) -> list[ModelInput]:
    """The inputs, those for which a model enters this region in it."""
    return [
        replace(item, autocast=region.dtype) if region and enters(region, item.args, item.kwargs) else item
        for item in items
    ]


def recorded_inside(model: nn.Module, recording: Recording, region: Autocast) -> Recording:
    """What the recorded inputs make layers see where the model enters this region; as inputs they stay outside of it.

    For a model in which the recording's layers have their names: that itself, or a copy.
    """
    there = Recording(model, recording.seed, only_thread=threading.get_ident())
    with recorded(there), undisturbed(model):
        for item in entered(recording.inputs, region):
            with there.workload(item.workload, recording.weights[item.workload]):
                call(model, item)
    there.inputs, there.inputs_dropped = list(recording.inputs), recording.inputs_dropped
    return there

"""Do no harm: the whole planned model's divergence on held-out inputs, and its speed against the float model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autoplan import timing
from autoplan.apply import swapped
from autoplan.divergence import OutputPicker, Reference, Terms, call, compare
from autoplan.recorder import ModelInput, device_of_model
from autoplan.records import COMPILED, EAGER, Estimate

Layers = Mapping[str, nn.Module]

_MIN_ROUNDS, _MAX_ROUNDS = 8, 40
_GPU_WARM_UPS = 3  # calls that compile, that record a CUDA graph, and that replay it


def divergence_of(
    model: nn.Module, layers: Layers, references: Sequence[Reference], picker: OutputPicker | None
) -> Terms:
    """The divergence terms of `model` with `layers` swapped in. Call inside `undisturbed`."""
    with swapped(model, layers):
        return compare(model, references, picker)


def whole_model_times(
    model: nn.Module,
    variants: Mapping[str, Layers],
    inputs: Sequence[ModelInput],
    weights: Mapping[str, float],
    *,
    baseline: str,
    mode: str,
    seconds: float,
    seed: int,
) -> dict[str, Estimate]:
    """Time of each variant of the model / time of the variant `baseline`: paired, one recorded input per workload.

    With several workloads the ratios are weighted by what each workload takes. Takes about `seconds` beside compiling,
    but never less than the rounds that an interval needs.
    """
    totals = {name: [0.0, 0.0, 0.0] for name in variants}
    share = 0.0
    examples = {item.workload: item for item in reversed(inputs)}
    device = device_of_model(model).type
    clock, batch_us = timing.clock_of(device), timing.BATCH_US.get(device, timing.BATCH_US["cpu"])
    runners = {name: _runner(model, mode) for name in variants}
    for workload, example in examples.items():
        calls = {name: _timed(model, layers, runners[name], example) for name, layers in variants.items()}
        for _ in range(_GPU_WARM_UPS if device == "cuda" else 1):
            for call_ in calls.values():
                call_()
        rounds = _affordable_rounds(calls.values(), seconds / len(examples), clock)
        results = timing.compare(
            calls, baseline=baseline, max_rounds=rounds, min_batch_us=batch_us, seed=seed, clock=clock
        )
        weight = weights.get(workload, 1.0) * results[baseline].baseline_us
        share += weight
        for name, result in results.items():
            for i, ratio in enumerate((result.ratio, result.ratio_low, result.ratio_high)):
                totals[name][i] += weight * ratio
    return {name: Estimate(*(total / share for total in sums)) for name, sums in totals.items()}


def _affordable_rounds(calls: Collection[Callable[[], object]], seconds: float, clock: Callable[[], int]) -> int:
    """How many rounds fit into `seconds`, at least 8, by one call of each."""
    began = clock()
    for call_ in calls:
        call_()
    a_round = (clock() - began) / 1e9
    return min(_MAX_ROUNDS, max(_MIN_ROUNDS, int(seconds / a_round)))


def _timed(model: nn.Module, layers: Layers, runner: nn.Module, example: ModelInput) -> Callable[[], object]:
    def run() -> object:
        with swapped(model, layers):
            return call(runner, example)

    return run


def _runner(model: nn.Module, mode: str) -> nn.Module:
    """What is called to time the model: itself, or a compiled wrapper that shares no cache with the user's own."""
    if mode == EAGER:
        return model
    options: dict[str, Any] = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    if mode == COMPILED and device_of_model(model).type == "cuda":
        options["mode"] = "reduce-overhead"  # CUDA graphs
    runner: nn.Module = torch.compile(model, **options)  # type: ignore[assignment]
    return runner

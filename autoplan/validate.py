"""Do no harm: the whole planned model's divergence on held-out inputs, and its speed against the float model."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from autoplan import timing
from autoplan.apply import swapped
from autoplan.divergence import OutputPicker, Reference, Terms, call, compare
from autoplan.recorder import ModelInput
from autoplan.records import Estimate

Layers = Mapping[str, nn.Module]

_MIN_ROUNDS, _MAX_ROUNDS = 8, 40


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
    compiled: bool,
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
    runners = {name: _runner(model, compiled) for name in variants}
    for workload, example in examples.items():
        calls = {name: _timed(model, layers, runners[name], example) for name, layers in variants.items()}
        rounds = _affordable_rounds(calls.values(), seconds / len(examples))
        results = timing.compare(calls, baseline=baseline, max_rounds=rounds, seed=seed)
        weight = weights.get(workload, 1.0) * results[baseline].baseline_us
        share += weight
        for name, result in results.items():
            for i, ratio in enumerate((result.ratio, result.ratio_low, result.ratio_high)):
                totals[name][i] += weight * ratio
    return {name: Estimate(*(total / share for total in sums)) for name, sums in totals.items()}


def _affordable_rounds(calls: Iterable[Callable[[], object]], seconds: float) -> int:
    """How many rounds fit into `seconds`, at least 8: one call each, after one that may compile."""
    for call_ in (calls := list(calls)):
        call_()
    began = time.perf_counter()
    for call_ in calls:
        call_()
    a_round = time.perf_counter() - began
    return min(_MAX_ROUNDS, max(_MIN_ROUNDS, int(seconds / a_round)))


def _timed(model: nn.Module, layers: Layers, runner: nn.Module, example: ModelInput) -> Callable[[], object]:
    def run() -> object:
        with swapped(model, layers):
            return call(runner, example)

    return run


def _runner(model: nn.Module, compiled: bool) -> nn.Module:
    """What is called to time the model: itself, or a compiled wrapper that shares no cache with the user's own."""
    if not compiled:
        return model
    apart = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    options = {"isolate_recompiles": True} if apart else {}
    runner: nn.Module = torch.compile(model, **options)  # type: ignore[call-overload]
    return runner

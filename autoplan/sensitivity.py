"""Predicted harm: what one candidate in one layer does to the model's output, and to the layer's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoplan.apply import stand_ins, swapped
from autoplan.divergence import OutputPicker, Reference, compare
from autoplan.options import SQNR_FLOOR_DB
from autoplan.recorder import Recording
from autoplan.records import LayerProfile, Sensitivity


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate, with the kernels it would run on, to be tried in one layer."""

    profile: LayerProfile
    candidate: str
    program: str


# A strategy predicts the harm of each trial whose layer passes the SQNR gate. More may be added to STRATEGIES.
Strategy = Callable[[nn.Module, Sequence[Trial], Recording, Sequence[Reference], OutputPicker | None],
                    Iterator[Sensitivity]]  # fmt: skip


def sweep(
    model: nn.Module,
    trials: Sequence[Trial],
    recording: Recording,
    references: Sequence[Reference],
    picker: OutputPicker | None,
) -> Iterator[Sensitivity]:
    """One at a time: swap the candidate into its layer, run the model, measure the divergence of its output.

    The layer runs the kernels that the plan would use. A trial whose layer falls below the SQNR floor is not run
    through the model: its harm is infinite. Call inside `undisturbed`.
    """
    for trial in trials:
        profile = trial.profile
        layers = stand_ins(model, (profile.name, *profile.aliases), trial.candidate, trial.program)
        linear = recording.decisions[profile.name].module
        sqnr = sqnr_db(linear, layers[profile.name], recording.rows(profile.name), profile.calls[0].dtype)
        harm = math.inf
        if sqnr >= SQNR_FLOOR_DB:
            with swapped(model, layers):
                harm = compare(model, references, picker).divergence()
        yield Sensitivity(profile.name, trial.candidate, harm, sqnr)


STRATEGIES: dict[str, Strategy] = {"sweep": sweep}


def sqnr_db(linear: nn.Linear, planned: nn.Module, rows: Tensor, dtype: str) -> float:
    """20 log10(norm(y) / norm(y - q)) of a layer's output on real input rows, dB.

    y is the float layer in float32, q what the planned layer gives for the same rows in the dtype that it will see.
    -inf when q is not finite; inf when they are equal.
    """
    weight, bias = linear.weight, linear.bias
    x = rows.to(weight.device)
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    low_precision = getattr(torch, dtype)
    with torch.autocast(x.device.type, low_precision, enabled=low_precision != weight.dtype):
        q = planned.forward(x.to(low_precision)).float()  # not the user's hooks: these are rows, not the model's shapes
    if not bool(torch.isfinite(q).all()):
        return -math.inf
    signal, noise = torch.linalg.vector_norm(y.double()).item(), torch.linalg.vector_norm((y - q).double()).item()
    if noise == 0:
        return math.inf
    return 20 * math.log10(signal / noise) if signal else -math.inf

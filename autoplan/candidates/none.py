"""The layer as it is. On its plain kernel it is the baseline; a prepacked weight is the same numbers, sooner."""

from __future__ import annotations

from torch import Tensor

from autoplan.candidates.base import Candidate, register_candidate
from autoplan.kernels.packing import Canonical
from autoplan.records import Device, LayerProfile


class NoQuantization(Candidate):
    """Weights and activations untouched."""

    name = "none"
    tensors = ("weight",)
    kernels = ("onednn", "linear")

    def rejects(self, profile: LayerProfile, device: Device) -> str | None:
        return None

    def quantize(self, weight: Tensor) -> Canonical:
        return {"weight": weight.detach()}


register_candidate(NoQuantization())

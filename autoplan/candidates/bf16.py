"""bfloat16 weights and products in a float32 model: float32 in and out."""

from __future__ import annotations

import torch
from torch import Tensor

from autoplan.candidates.base import Candidate, register_candidate
from autoplan.kernels.packing import Canonical
from autoplan.records import Device, LayerProfile


class BFloat16(Candidate):
    """Weights cast to bfloat16 once, activations at each call; float32 accumulation."""

    name = "bf16"
    tensors = ("weight",)
    kernels = ("onednn", "linear")

    def rejects(self, profile: LayerProfile, device: Device) -> str | None:
        return None if profile.dtype == "float32" else f"the weight is {profile.dtype}, and bf16 is for float32 models"

    def quantize(self, weight: Tensor) -> Canonical:
        return {"weight": weight.detach().to(torch.bfloat16)}

    def linear(self, x: Tensor, canonical: Canonical, bias: Tensor | None) -> Tensor:
        return super().linear(x.to(torch.bfloat16).to(x.dtype), canonical, bias)


register_candidate(BFloat16())

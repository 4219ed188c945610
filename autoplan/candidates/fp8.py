"""fp8 (e4m3) weights, one scale per output channel; activations left as they are, or fp8 with one scale per row."""

from __future__ import annotations

import torch
from torch import Tensor

from autoplan.candidates.base import Candidate, register_candidate
from autoplan.kernels.packing import Canonical, quantize_per_channel

_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


class Fp8WeightOnly(Candidate):
    """Per-channel e4m3 weights (OCP OFP8 specification), float activations."""

    name = "fp8_weight_only"
    tensors = ("codes", "scale")
    kernels: tuple[str, ...] = ("w8_gemv_fp8", "w8_gemm_small_fp8", "dequantize_fp8")

    def quantize(self, weight: Tensor) -> Canonical:
        return quantize_per_channel(weight, torch.float8_e4m3fn)


class Fp8Dynamic(Fp8WeightOnly):
    """Per-channel e4m3 weights, e4m3 activations whose scale is each row's absmax / 448, found at each call."""

    name = "fp8_dynamic"
    kernels = ("scaled_mm", "a8w8_fused_small_fp8", "a8w8_gemm_fp8", "scaled_mm_cuda")

    def linear(self, x: Tensor, canonical: Canonical, bias: Tensor | None) -> Tensor:
        scale = (x.abs().amax(dim=1, keepdim=True) / _E4M3_MAX).clamp_min(1e-30)
        return super().linear((x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale, canonical, bias)


register_candidate(Fp8WeightOnly())
register_candidate(Fp8Dynamic())

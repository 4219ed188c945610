"""int8 weights, one scale per output channel; activations left as they are, or int8 with one scale per row, or both."""

from __future__ import annotations

import torch
from torch import Tensor

from autoplan.candidates.base import Candidate, register_candidate
from autoplan.kernels.packing import Canonical, quantize_per_channel


def rounded_rows(x: Tensor) -> Tensor:
    """`x` [rows, in_features], each row rounded to multiples of its absmax / 127: what int8 activations stand for."""
    scale = (x.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-30)
    return (x / scale).round() * scale


class Int8WeightOnly(Candidate):
    """W8A16: per-channel int8 weights, float activations."""

    name = "int8_weight_only"
    tensors = ("codes", "scale")
    kernels: tuple[str, ...] = ("tiled_int8", "int8pack", "w8_gemv_int8", "w8_gemm_small_int8", "dequantize_int8")

    def quantize(self, weight: Tensor) -> Canonical:
        return quantize_per_channel(weight, torch.int8)


class Int8Dynamic(Int8WeightOnly):
    """W8A8: per-channel int8 weights, int8 activations whose scale is each row's absmax / 127, found at each call."""

    name = "int8_dynamic"
    kernels = ("fused_int8", "onednn_u8s8", "int_mm", "a8w8_fused_small_int8", "a8w8_gemm_int8", "int_mm_cuda")

    def linear(self, x: Tensor, canonical: Canonical, bias: Tensor | None) -> Tensor:
        return super().linear(rounded_rows(x), canonical, bias)


class Int8Dual(Int8WeightOnly):
    """The same codes, weight-only at few rows, where reading them is all the time, and dynamic at many."""

    name = "int8_dual"
    modes = ("int8_dynamic", "int8_weight_only")
    kernels = (*Int8Dynamic.kernels, *Int8WeightOnly.kernels)


register_candidate(Int8WeightOnly())
register_candidate(Int8Dynamic())
register_candidate(Int8Dual())

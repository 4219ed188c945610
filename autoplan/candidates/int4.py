"""int4 weights in groups along in_features; activations left as they are ("int4_grouped"), or int8 by row."""

from __future__ import annotations

from torch import Tensor

from autoplan.candidates.base import Candidate, register_candidate
from autoplan.candidates.int8 import rounded_rows
from autoplan.kernels.native import quantize_int4_fast
from autoplan.kernels.packing import Canonical

_GROUP_SIZES = (32, 64, 128)


class Int4Grouped(Candidate):
    """W4A16: asymmetric int4, a bfloat16 scale and an integer zero point per group, ranges clipped by search."""

    prefix, in_more_bits = "int4", "int8_weight_only"
    tensors = ("codes", "scale", "zero_point")
    kernels: tuple[str, ...] = ("tiled_int4", "int4pack", "w4_gemm_small", "tinygemm", "dequantize_int4")

    def __init__(self, group_size: int) -> None:
        self.name = f"{self.prefix}_g{group_size}"
        self.group_size = group_size
        self.finer = tuple(f"{self.prefix}_g{size}" for size in _GROUP_SIZES if size < group_size)

    def quantize(self, weight: Tensor) -> Canonical:
        return quantize_int4_fast(weight, self.group_size or weight.shape[1])


class Int4Dynamic(Int4Grouped):
    """W4A8: the same weights; int8 activations whose scale is each row's absmax / 127, found at each call."""

    prefix, in_more_bits = "int4_dynamic", "int8_dynamic"
    kernels = ("fused_int4",)

    def linear(self, x: Tensor, canonical: Canonical, bias: Tensor | None) -> Tensor:
        return super().linear(rounded_rows(x), canonical, bias)


for _group_size in _GROUP_SIZES:
    register_candidate(Int4Grouped(_group_size))
    register_candidate(Int4Dynamic(_group_size))

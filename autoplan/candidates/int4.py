"""int4 weights in groups along in_features ("int4_grouped"); activations left as they are."""

from __future__ import annotations

from torch import Tensor

from autoplan.candidates.base import Candidate, register_candidate
from autoplan.kernels.packing import Canonical, quantize_int4


class Int4Grouped(Candidate):
    """W4A16: asymmetric int4, a float32 scale and an integer zero point per group, ranges clipped by search."""

    tensors = ("codes", "scale", "zero_point")
    kernels = ("tiled_int4", "int4pack", "w4_gemm_small", "tinygemm", "dequantize_int4")

    def __init__(self, group_size: int) -> None:
        self.name = f"int4_g{group_size}"
        self.group_size = group_size

    def quantize(self, weight: Tensor) -> Canonical:
        return quantize_int4(weight, self.group_size or weight.shape[1])


for _group_size in (32, 64, 128):
    register_candidate(Int4Grouped(_group_size))

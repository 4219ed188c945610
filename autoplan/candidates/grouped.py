"""Weights of 4 to 6 bits in groups along in_features; activations left as they are ("int4_grouped"), or int8 by row."""

from __future__ import annotations

from torch import Tensor

from autoplan.candidates.base import Candidate, register_candidate
from autoplan.candidates.int8 import rounded_rows
from autoplan.kernels.native import quantize_grouped_fast
from autoplan.kernels.packing import Canonical

_GROUP_SIZES = {4: (32, 64, 128), 5: (64,), 6: (64,)}  # by bits


class Grouped(Candidate):
    """W4A16: asymmetric codes, a bfloat16 scale and an integer zero point per group, ranges clipped by search."""

    named, in_more_bits = "int{}_g{}", "int8_weight_only"
    group_size: int

    def __init__(self, bits: int, group_size: int, kernels: tuple[str, ...]) -> None:
        self.bits, self.group_size, self.kernels = bits, group_size, kernels
        self.name = self.named.format(bits, group_size)
        self.finer = tuple(self.named.format(bits, size) for size in _GROUP_SIZES[bits] if size < group_size)
        self.tensors = ("codes", "scale", "zero_point") + ("upper_bits",) * (bits > 4)

    def quantize(self, weight: Tensor) -> Canonical:
        return quantize_grouped_fast(weight, self.group_size, self.bits)


class GroupedDynamic(Grouped):
    """W4A8, W5A8, W6A8: asymmetric codes in groups; int8 activations, by each row's absmax / 127, at each call."""

    named, in_more_bits = "int{}_dynamic_g{}", "int8_dynamic"

    def __init__(self, bits: int, group_size: int) -> None:
        super().__init__(bits, group_size, (f"fused_int{bits}",))
        more = (self.named.format(b, size) for b, sizes in _GROUP_SIZES.items() if b > bits for size in sizes)
        self.finer = (*self.finer, *more)

    def linear(self, x: Tensor, canonical: Canonical, bias: Tensor | None) -> Tensor:
        return super().linear(rounded_rows(x), canonical, bias)


for _group_size in _GROUP_SIZES[4]:
    register_candidate(
        Grouped(4, _group_size, ("tiled_int4", "int4pack", "w4_gemm_small", "tinygemm", "dequantize_int4"))
    )
for _bits, _group_sizes in _GROUP_SIZES.items():
    for _group_size in _group_sizes:
        register_candidate(GroupedDynamic(_bits, _group_size))

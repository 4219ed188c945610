"""What the Triton kernels share: rounding, row scales, writing a tile of y, and adding up split-K's parts.

Every kernel computes a [BM, BN] tile of y = x W^T with `m`, `n`, `k` naming rows, out-features and in-features. With
split-K, programs leave float32 parts [split, m, n] in a workspace, and `add_parts` adds them in one fixed order: the
same bits on every run, without atomics, and without counters that two streams could trip over.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoplan.kernels.cuda.launch import Call, Launch

# 1.5 * 2^23: adding it leaves no bits below one, so the sum is rounded to nearest even, in one instruction.
ROUND = tl.constexpr(12582912.0)
TINY = tl.constexpr(1e-30)  # a scale for all-zero rows, as in `packing`
LARGEST_INT8 = tl.constexpr(127.0)
LARGEST_E4M3 = tl.constexpr(448.0)
SIGN_OFF = tl.constexpr(0x7FFFFFFF)


@triton.jit
def magnitude(x):
    """|x| as the bits of its float32: they order as the values do, with infinity and then NaN above all numbers."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & SIGN_OFF


@triton.jit
def row_scale(largest, LARGEST: tl.constexpr):
    """The scale of rows whose largest `magnitude` is given; NaN for a row with a NaN in it."""
    return tl.maximum(largest.to(tl.float32, bitcast=True) / LARGEST, TINY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def to_codes(x, scale, CODES: tl.constexpr):
    """x / scale, rounded to int8 or e4m3; both round to nearest even."""
    scaled = x.to(tl.float32) * (1.0 / scale)
    if CODES == tl.int8:
        return ((scaled + ROUND) - ROUND).to(tl.int8)
    else:
        return scaled.to(CODES)


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GM: tl.constexpr):
    """Which tile a program computes: GM row tiles take turns at each column tile, so that the L2 cache serves both."""
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GM * column_tiles) * GM
    height = tl.minimum(row_tiles - first, GM)
    within = pid % (GM * column_tiles)
    return first + within % height, within // height


@triton.jit
def write_tile(sums, row_scales, scale_ptr, bias_ptr, y_ptr, rows, columns, part, M, N, IS_PART: tl.constexpr):
    """Scale `sums` [BM, BN] by row and by column, add the bias, and write them; as part of a split, write bare sums."""
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    places = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if IS_PART:
        tl.store(y_ptr + part.to(tl.int64) * M * N + places, sums, mask=inside)
    else:
        if scale_ptr is not None:
            sums *= tl.load(scale_ptr + columns, mask=columns < N, other=0.0)[None, :]
        if row_scales is not None:
            sums *= row_scales[:, None]
        if bias_ptr is not None:
            sums += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + places, sums.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def add_parts(
    parts_ptr, row_scale_ptr, scale_ptr, bias_ptr, y_ptr, M, N, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """y = the sum of parts [SPLIT, M, N] in the order of splits, scaled and with bias."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    places = rows.to(tl.int64)[:, None] * N + columns[None, :]
    sums = tl.zeros((BM, BN), tl.float32)
    for part in tl.static_range(SPLIT):
        sums += tl.load(parts_ptr + tl.cast(part, tl.int64) * M * N + places, mask=inside, other=0.0)
    row_scales = None
    if row_scale_ptr is not None:
        row_scales = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    write_tile(sums, row_scales, scale_ptr, bias_ptr, y_ptr, rows, columns, 0, M, N, False)


def parts_of(call: Call, split: int) -> Tensor:
    """Where a product split among `split` programs a tile goes: straight to y, or to a workspace for `add_parts`."""
    if split == 1:
        return call.y
    m, n, _ = call.sizes
    return torch.empty((split, m, n), dtype=torch.float32, device=call.y.device)


def adding_up(call: Call, parts: Tensor, row_scales: Tensor | None, scale: Tensor | None) -> Launch:
    """The launch that turns the parts of `parts_of` into y."""
    m, n, _ = call.sizes
    block_rows, block_columns = 4, 256
    return Launch(
        function=add_parts,
        grid=(triton.cdiv(m, block_rows), triton.cdiv(n, block_columns)),  # only the first may exceed 65,535
        arguments={
            "parts_ptr": parts,
            "row_scale_ptr": row_scales,
            "scale_ptr": scale,
            "bias_ptr": call.bias,
            "y_ptr": call.y,
            "M": m,
            "N": n,
        },
        constants={"SPLIT": parts.shape[0], "BM": block_rows, "BN": block_columns},
    )

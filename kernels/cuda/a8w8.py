"""8-bit weights times 8-bit activations, int8 or e4m3: tensor cores multiply the codes, both scales come afterwards.

    y[m, n] = row_scale[m] * scale[n] * sum over k of xq[m, k] * codes[n, k]  (+ bias[n])

Many rows are quantized once, by `quantize_rows`, and then multiplied; few rows by each program for itself, in one
launch, since x is small then and stays in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoplan.kernels.cuda.launch import Call, Launch
from autoplan.kernels.cuda.space import Config
from autoplan.kernels.cuda.tiles import (
    LARGEST_E4M3,
    LARGEST_INT8,
    adding_up,
    magnitude,
    parts_of,
    row_scale,
    tile_of,
    to_codes,
    write_tile,
)

_WHOLE_ROW = 16_384  # in-features that one program keeps in registers between finding the scale and using it


@triton.jit(do_not_specialize=["M"])
def quantize(x_ptr, codes_ptr, scales_ptr, M, K, LARGEST: tl.constexpr, WHOLE: tl.constexpr, BK: tl.constexpr):
    """Codes [M, K] and scales [M] of x [M, K], one program a row: scale = absmax / LARGEST."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * K
    codes_ptr += row * K
    k = tl.arange(0, BK)
    if WHOLE:
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        scale = row_scale(tl.max(magnitude(x), axis=0), LARGEST)
        tl.store(codes_ptr + k, to_codes(x, scale, codes_ptr.dtype.element_ty), mask=k < K)
    else:
        largest = tl.zeros((BK,), tl.int32)
        for start in range(0, K, BK):
            largest = tl.maximum(largest, magnitude(tl.load(x_ptr + start + k, mask=start + k < K, other=0.0)))
        scale = row_scale(tl.max(largest, axis=0), LARGEST)
        for start in range(0, K, BK):
            x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0)
            tl.store(codes_ptr + start + k, to_codes(x, scale, codes_ptr.dtype.element_ty), mask=start + k < K)
    tl.store(scales_ptr + row, scale)


@triton.jit(do_not_specialize=["M"])
def gemm(
    xq_ptr, row_scale_ptr, codes_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GM: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """One tile of y from codes xq [M, K] and codes [N, K]; program_id(1) takes every SPLIT-th step along K."""
    tile_row, tile_column = tile_of(tl.program_id(0), M, N, BM, BN, GM)
    part = tl.program_id(1)
    rows, columns, k = tile_row * BM + tl.arange(0, BM), tile_column * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows and columns beyond the edge read the last one again: no mask in the loop, and `write_tile` leaves them out.
    x_ptrs = xq_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * K + (part * BK + k)[None, :]
    w_ptrs = codes_ptr + tl.minimum(columns, N - 1).to(tl.int64)[None, :] * K + (part * BK + k)[:, None]
    sums = tl.zeros((BM, BN), SUM)
    for start in range(part * BK, K, BK * SPLIT):
        if EVEN:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        else:
            inside = start + k < K
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        sums = tl.dot(x, w, sums, out_dtype=SUM)
        x_ptrs += BK * SPLIT
        w_ptrs += BK * SPLIT
    row_scales = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    write_tile(sums.to(tl.float32), row_scales, scale_ptr, bias_ptr, y_ptr, rows, columns, part, M, N, SPLIT > 1)


@triton.jit(do_not_specialize=["M"])
def gemm_fused(
    x_ptr, codes_ptr, scale_ptr, bias_ptr, y_ptr, row_scale_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    LARGEST: tl.constexpr, EVEN: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The same from x [M, K] in floats: every program first finds the scales of its rows over all of K."""
    part = tl.program_id(1)
    tile_row = tl.program_id(2)
    rows, columns, k = tile_row * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    x_rows = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * K + k[None, :]
    largest = tl.zeros((BM, BK), tl.int32)
    for start in range(0, K, BK):
        if EVEN:
            x = tl.load(x_rows + start)
        else:
            x = tl.load(x_rows + start, mask=(start + k < K)[None, :], other=0.0)
        largest = tl.maximum(largest, magnitude(x))
    row_scales = row_scale(tl.max(largest, axis=1), LARGEST)

    x_ptrs = x_rows + part * BK
    w_ptrs = codes_ptr + tl.minimum(columns, N - 1).to(tl.int64)[None, :] * K + (part * BK + k)[:, None]
    sums = tl.zeros((BM, BN), SUM)
    for start in range(part * BK, K, BK * SPLIT):
        if EVEN:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        else:
            inside = start + k < K
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        sums = tl.dot(to_codes(x, row_scales[:, None], codes_ptr.dtype.element_ty), w, sums, out_dtype=SUM)
        x_ptrs += BK * SPLIT
        w_ptrs += BK * SPLIT
    if SPLIT > 1 and part == 0 and tl.program_id(0) == 0:
        tl.store(row_scale_ptr + rows, row_scales, mask=rows < M)
    write_tile(sums.to(tl.float32), row_scales, scale_ptr, bias_ptr, y_ptr, rows, columns, part, M, N, SPLIT > 1)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Launch]:
    """Where the codes [m, k] (int8 or e4m3) and scales [m] of x will be, and the launch that fills them."""
    m, k = x.shape
    codes = torch.empty((m, k), dtype=dtype, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    whole = k <= _WHOLE_ROW
    block = triton.next_power_of_2(k) if whole else 4096
    launch = Launch(
        function=quantize,
        grid=(m,),
        arguments={"x_ptr": x, "codes_ptr": codes, "scales_ptr": scales, "M": m, "K": k},
        constants={"LARGEST": _largest(dtype), "WHOLE": whole, "BK": block},
        warps=min(max(block // 1024, 1), 8),
    )
    return codes, scales, launch


def multiply(call: Call, config: Config) -> Iterator[Launch]:
    """Quantize the rows, multiply the codes."""
    codes, scale = call.packed
    m, n, k = call.sizes
    xq, row_scales, quantizing = quantize_rows(call.x, codes.dtype)
    yield quantizing
    bm, bn, bk, split = config["BM"], config["BN"], config["BK"], config["SK"]
    target = parts_of(call, split)
    yield Launch(
        function=gemm,
        grid=(triton.cdiv(m, bm) * triton.cdiv(n, bn), split),
        arguments={
            "xq_ptr": xq,
            "row_scale_ptr": row_scales,
            "codes_ptr": codes,
            "scale_ptr": scale,
            "bias_ptr": call.bias,
            "y_ptr": target,
            "M": m,
            "N": n,
            "K": k,
        },
        constants={
            "BM": bm,
            "BN": bn,
            "BK": bk,
            "GM": 8,
            "SPLIT": split,
            "EVEN": k % (bk * split) == 0,
            "SUM": _sum(codes.dtype),
        },
        warps=config["w"],
        stages=config["s"],
        step_weights=bn * bk,
    )
    if split > 1:
        yield adding_up(call, target, row_scales, scale)


def multiply_fused(call: Call, config: Config) -> Iterator[Launch]:
    """Quantize and multiply in one launch."""
    codes, scale = call.packed
    m, n, k = call.sizes
    bm, bn, bk, split = config["BM"], config["BN"], config["BK"], config["SK"]
    target = parts_of(call, split)
    row_scales = None if split == 1 else torch.empty(m, dtype=torch.float32, device=call.x.device)
    yield Launch(
        function=gemm_fused,
        grid=(triton.cdiv(n, bn), split, triton.cdiv(m, bm)),
        arguments={
            "x_ptr": call.x,
            "codes_ptr": codes,
            "scale_ptr": scale,
            "bias_ptr": call.bias,
            "y_ptr": target,
            "row_scale_ptr": row_scales,
            "M": m,
            "N": n,
            "K": k,
        },
        constants={
            "BM": bm,
            "BN": bn,
            "BK": bk,
            "SPLIT": split,
            "LARGEST": _largest(codes.dtype),
            "EVEN": k % (bk * split) == 0,
            "SUM": _sum(codes.dtype),
        },
        warps=config["w"],
        stages=config["s"],
        step_weights=bn * bk,
    )
    if split > 1:
        yield adding_up(call, target, row_scales, scale)


def _largest(dtype: torch.dtype) -> float:
    return float((LARGEST_INT8 if dtype == torch.int8 else LARGEST_E4M3).value)


def _sum(dtype: torch.dtype) -> tl.dtype:
    return tl.int32 if dtype == torch.int8 else tl.float32

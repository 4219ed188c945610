"""8-bit weights, int8 or e4m3, times float activations: the weight is read as it is, and widened in registers.

    y[m, n] = scale[n] * sum over k of x[m, k] * codes[n, k]  (+ bias[n])

One row is a plain sum of products; a few rows go to the tensor cores, whose time they would waste otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from autoplan.kernels.cuda.launch import Call, Launch
from autoplan.kernels.cuda.space import Config
from autoplan.kernels.cuda.tiles import adding_up, parts_of, write_tile


@triton.jit
def widen(codes, FLOAT: tl.constexpr):
    """int8 or e4m3 codes as floats, exactly. From e4m3 by way of fp16: straight to bf16 takes a slow instruction."""
    if codes.dtype == tl.float8e4nv:
        return codes.to(tl.float16).to(FLOAT)
    else:
        return codes.to(FLOAT)


@triton.jit
def gemv_one_row(
    x_ptr, codes_ptr, scale_ptr, bias_ptr, y_ptr, N, K, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr
):
    """BN features of one row of y. The sums stay [BN, BK] until the end: one reduction, not one a step."""
    row, tile = tl.program_id(0) // tl.cdiv(N, BN), tl.program_id(0) % tl.cdiv(N, BN)
    x_ptr += row.to(tl.int64) * K
    y_ptr += row.to(tl.int64) * N
    columns, k = tile * BN + tl.arange(0, BN), tl.arange(0, BK)
    w_ptrs = codes_ptr + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    sums = tl.zeros((BN, BK), tl.float32)
    for start in range(0, K, BK):
        if EVEN:
            x = tl.load(x_ptr + start + k, eviction_policy="evict_last")
            w = tl.load(w_ptrs, eviction_policy="evict_first")
        else:
            inside = start + k < K
            x = tl.load(x_ptr + start + k, mask=inside, other=0.0, eviction_policy="evict_last")
            w = tl.load(w_ptrs, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        sums += widen(w, tl.float32) * x.to(tl.float32)[None, :]
        w_ptrs += BK
    y = tl.sum(sums, axis=1) * tl.load(scale_ptr + columns, mask=columns < N, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + columns, y.to(y_ptr.dtype.element_ty), mask=columns < N)


@triton.jit(do_not_specialize=["M"])
def gemm_small_rows(
    x_ptr, codes_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile of y; program_id(1) takes every SPLIT-th step along K."""
    part = tl.program_id(1)
    rows, columns = tl.program_id(2) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_ptrs = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * K + (part * BK + k)[None, :]
    w_ptrs = codes_ptr + tl.minimum(columns, N - 1).to(tl.int64)[None, :] * K + (part * BK + k)[:, None]
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(part * BK, K, BK * SPLIT):
        if EVEN:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs, eviction_policy="evict_first")
        else:
            inside = start + k < K
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None], other=0.0, eviction_policy="evict_first")
        sums = tl.dot(x, widen(w, x.dtype), sums)
        x_ptrs += BK * SPLIT
        w_ptrs += BK * SPLIT
    write_tile(sums, None, scale_ptr, bias_ptr, y_ptr, rows, columns, part, M, N, SPLIT > 1)


def gemv(call: Call, config: Config) -> Iterator[Launch]:
    """Each row by itself."""
    codes, scale = call.packed
    m, n, k = call.sizes
    bn, bk = config["BN"], config["BK"]
    yield Launch(
        function=gemv_one_row,
        grid=(triton.cdiv(n, bn) * m,),
        arguments={
            "x_ptr": call.x,
            "codes_ptr": codes,
            "scale_ptr": scale,
            "bias_ptr": call.bias,
            "y_ptr": call.y,
            "N": n,
            "K": k,
        },
        constants={"BN": bn, "BK": bk, "EVEN": k % bk == 0},
        warps=config["w"],
        stages=config["s"],
        step_weights=bn * bk,
    )


def gemm_small(call: Call, config: Config) -> Iterator[Launch]:
    """Tiles of rows on tensor cores."""
    codes, scale = call.packed
    m, n, k = call.sizes
    bm, bn, bk, split = config["BM"], config["BN"], config["BK"], config["SK"]
    target = parts_of(call, split)
    yield Launch(
        function=gemm_small_rows,
        grid=(triton.cdiv(n, bn), split, triton.cdiv(m, bm)),
        arguments={
            "x_ptr": call.x,
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
            "SPLIT": split,
            "EVEN": k % (bk * split) == 0,
        },
        warps=config["w"],
        stages=config["s"],
        step_weights=bn * bk,
    )
    if split > 1:
        yield adding_up(call, target, None, scale)

"""4-bit weights in groups times float activations, on tensor cores from one row on.

    y[m, n] = sum over groups g of scale[n, g] * sum over k in g of x[m, k] * (codes[n, k] - zero_point[n, g])

Codes minus zero point are integers within +-15, exact in bf16 and fp16, so the inner sum is one of exact products; the
scale then multiplies the group's float32 sum. The weight itself is never rounded.

A GPU has few instructions to spare per weight (an H200 at full bandwidth 3.4), so the unpacking is written in PTX, two
weights at a time: a `lop3` puts two codes into the low bits of a constant pair of floats whose last place is worth one,
and one subtraction takes constant and zero point away again ("magic numbers", https://arxiv.org/abs/2211.10017).
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from autoplan.kernels.cuda.launch import Call, Launch
from autoplan.kernels.cuda.layouts import CHUNK, SLOT
from autoplan.kernels.cuda.space import Config
from autoplan.kernels.cuda.tiles import adding_up, parts_of, write_tile

_CHUNK = tl.constexpr(CHUNK)
_SLOT = tl.constexpr(SLOT)
_SLOTS = tl.constexpr(CHUNK // SLOT)

# Pairs of 16-bit floats in a register, as the int32 of their bits.
_PAIR = tl.constexpr(0x0001_0001)  # a code below 16, times this, is in both halves
_MINUS_128 = tl.constexpr(0xC300_C300 - (1 << 32))  # bf16; its last place is worth 1, so or-ing in z gives -(128 + z)
_1024 = tl.constexpr(0x6400_6400)  # fp16; its last place is worth 1: 1024 + z
_MINUS_64 = tl.constexpr(0xD400_D400 - (1 << 32))  # fp16; its last place is worth 1/16: or-ing in 16 z gives -(64 + z)


@triton.constexpr_function
def unpacking(half: str, first: int, count: int) -> str:
    """PTX that unpacks slots `first` .. `first` + `count` - 1 of two words into as many registers.

    A register holds the pair (word 0, word 1) of one slot, each code less its own zero point. After the results come
    the two words, then for each what to subtract: a pair of -(128 + z) for bf16, of 1024 + z for fp16; and for fp16
    once more two, of -(64 + z).
    """
    word0, word1, base0, base1, far0, far1 = [f"${count + index}" for index in range(6)]
    code = [f"prmt.b32 z, {base0}, {base1}, 0x7610"]  # the lower half of the one, the upper of the other
    if half == "fp16":
        code.append(f"prmt.b32 far, {far0}, {far1}, 0x7610")
    loaded, shifted = -1, 0
    for result, slot in enumerate(range(first, first + count)):
        if loaded != slot // 4:  # four slots of both words
            loaded, shifted = slot // 4, 0
            code.append(f"prmt.b32 w, {word0}, {word1}, {('0x5410', '0x7632')[loaded]}")
        # In bf16 every slot is shifted to the lowest four bits. In fp16 an odd slot may stay four bits higher: there
        # its code counts 16 fold, and (1024 + 16 code) / 16 - (64 + z) takes the same one instruction.
        high = half == "fp16" and slot % 2 == 1
        shift = 4 * (slot % 4) - 4 * high
        if shift > shifted:
            code.append(f"shr.b32 w, w, {shift - shifted}")
            shifted = shift
        mask, magic = ("0x00f000f0" if high else "0x000f000f"), ("0x43004300" if half == "bf16" else "0x64006400")
        code.append(f"lop3.b32 t, w, {mask}, {magic}, 0xea")  # (w & mask) | magic
        if half == "bf16":
            code.append(f"fma.rn.bf16x2 ${result}, t, f, z")
        elif high:
            code.append(f"fma.rn.f16x2 ${result}, t, f, far")
        else:
            code.append(f"sub.f16x2 ${result}, t, z")
    factor = "0x3f803f80" if half == "bf16" else "0x2c002c00"  # 1, and 1/16
    return "{ .reg .b32 w, t, f, z, far; mov.b32 f, " + factor + "; " + "; ".join(code) + "; }"


@triton.constexpr_function
def registers(outputs: int, inputs: int) -> str:
    """The constraints of inline assembly whose operands are all 32-bit registers."""
    return ",".join(["=r"] * outputs + ["r"] * inputs)


@triton.constexpr_function
def repeated(kind: tl.dtype, count: int) -> tuple[tl.dtype, ...]:
    return (kind,) * count


@triton.jit
def unpack(words, zero, FIRST: tl.constexpr, COUNT: tl.constexpr, FLOAT: tl.constexpr):
    """codes - zero of slots FIRST.. of words, as a tuple of COUNT tiles of FLOAT."""
    if FLOAT == tl.bfloat16:
        return tl.inline_asm_elementwise(
            unpacking("bf16", FIRST, COUNT), registers(COUNT, 4), [words, zero * _PAIR | _MINUS_128],
            dtype=repeated(FLOAT, COUNT), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            unpacking("fp16", FIRST, COUNT), registers(COUNT, 6),
            [words, zero * _PAIR | _1024, zero * (_PAIR * 16) | _MINUS_64],
            dtype=repeated(FLOAT, COUNT), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def gemm_small_rows(
    x_ptr, words_ptr, scales_ptr, bias_ptr, y_ptr, M, N, K,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile of y; program_id(1) takes every SPLIT-th chunk of 128 in-features. For the layout see `layouts`."""
    PARTS: tl.constexpr = _CHUNK // G  # groups in a chunk
    SLOTS: tl.constexpr = _SLOTS // PARTS  # slots in a group
    FLOAT: tl.constexpr = x_ptr.dtype.element_ty
    part = tl.program_id(1)
    rows, columns = tl.program_id(2) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    n, j = tl.minimum(columns, N - 1), tl.arange(0, _SLOT)
    x_rows = x_ptr + tl.minimum(rows, M - 1).to(tl.int64) * K + part * _CHUNK
    word_rows = words_ptr + part.to(tl.int64) * N * _SLOT + n * _SLOT
    scale_ptrs = scales_ptr + part * PARTS * N + n
    x_ptrs, word_ptrs = x_rows[:, None] + j[None, :], word_rows[None, :] + j[:, None]
    scale_ptrs = scale_ptrs[None, :]
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(part * _CHUNK, K, SPLIT * _CHUNK):
        words = tl.load(word_ptrs, eviction_policy="evict_first")
        for group in tl.static_range(PARTS):
            scales = tl.load(scale_ptrs + group * N)
            weights = unpack(words, scales & 15, group * SLOTS, SLOTS, FLOAT)
            group_sums = tl.zeros(sums.shape, tl.float32)
            for slot in tl.static_range(SLOTS):
                k = (group * SLOTS + slot) * _SLOT
                if EVEN:
                    x = tl.load(x_ptrs + k)
                else:
                    inside = start + k + j < K
                    x = tl.load(x_ptrs + k, mask=inside[None, :], other=0.0)
                group_sums = tl.dot(x, weights[slot], group_sums)
            sums += group_sums * scales.to(tl.float32, bitcast=True)  # the zero point in it weighs 2^-19 at most
        x_ptrs += SPLIT * _CHUNK
        word_ptrs += SPLIT * N * _SLOT
        scale_ptrs += SPLIT * PARTS * N
    write_tile(sums, None, None, bias_ptr, y_ptr, rows, columns, part, M, N, SPLIT > 1)


def gemm_small(call: Call, config: Config) -> Iterator[Launch]:
    """Tiles of rows, down to one row, on tensor cores."""
    words, scales, _ = call.packed
    m, n, k = call.sizes
    bm, bn, split = config["BM"], config["BN"], config["SK"]
    target = parts_of(call, split)
    yield Launch(
        function=gemm_small_rows,
        grid=(triton.cdiv(n, bn), split, triton.cdiv(m, bm)),
        arguments={
            "x_ptr": call.x,
            "words_ptr": words,
            "scales_ptr": scales,
            "bias_ptr": call.bias,
            "y_ptr": target,
            "M": m,
            "N": n,
            "K": k,
        },
        constants={
            "G": words.shape[0] * CHUNK // scales.shape[0],
            "BM": bm,
            "BN": bn,
            "SPLIT": split,
            "EVEN": k % CHUNK == 0,
        },
        warps=config["w"],
        stages=config["s"],
        step_weights=bn * CHUNK,
    )
    if split > 1:
        yield adding_up(call, target, None, None)

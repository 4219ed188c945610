"""Makes Triton's CPU interpreter give the numbers a GPU gives, for what our kernels use.

Stock, it multiplies bfloat16 operands as if they were integers, truncates where a GPU rounds, and knows no inline
assembly; upstream does not support bfloat16 there (https://github.com/triton-lang/triton/issues/11584). So `install`
replaces its conversions, its dot and its inline assembly, and refuses the arithmetic that would still be wrong.
Triton must have been imported with TRITON_INTERPRET=1. What cannot be seen here: races, the order of programs, and how
many bits tensor cores keep while they sum e4m3 products.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from ptx import run_ptx
from triton.runtime import interpreter

# Types that numpy lacks: the interpreter keeps their bits in unsigned integers.
_TORCH = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
_BITS = {tl.bfloat16: torch.uint16, tl.float8e4nv: torch.uint8}
_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


def to_float(bits: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """What the interpreter's array of this type stands for; float32 for types that numpy lacks."""
    if dtype not in _TORCH:
        return bits
    values = torch.from_numpy(np.array(bits, order="C")).view(_TORCH[dtype]).float()
    return values.numpy()


def from_float(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Values as the interpreter holds them in this type: rounded to nearest even, e4m3 saturated as `cvt.satfinite`."""
    if dtype not in _TORCH:
        with np.errstate(all="ignore"):
            return np.asarray(values).astype(interpreter._get_np_dtype(dtype))
    tensor = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
    if dtype == tl.float8e4nv:
        tensor = tensor.clamp(-_E4M3_MAX, _E4M3_MAX)  # NaN stays NaN
    return tensor.to(_TORCH[dtype]).view(_BITS[dtype]).numpy()


def _cast(self: Any, source: Any, target: Any, *_: Any) -> Any:
    values = to_float(source.data, source.dtype.scalar)
    return interpreter.TensorHandle(from_float(values, target.scalar), target.scalar)


def _dot(self: Any, a: Any, b: Any, sums: Any, *_: Any) -> Any:
    """Products and sums in float64, rounded once to the type of `sums`: int32 comes out exact."""
    product = np.matmul(*(to_float(side.data, side.dtype.scalar).astype(np.float64) for side in (a, b)))
    kind = sums.dtype.scalar
    if kind not in (tl.int32, tl.float32):
        raise TypeError(f"sums in {kind}: our kernels add up in int32 or float32")
    return interpreter.TensorHandle((product + sums.data).astype(sums.data.dtype), kind)


def _inline_asm(self: Any, asm: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int) -> Any:
    """Run the very string that goes to the GPU: inputs of 32 bits, outputs of 32 bits or pairs of 16."""
    shape = values[0].data.shape
    registers = []
    for value in values:
        words = np.ascontiguousarray(np.broadcast_to(value.data, shape)).reshape(-1).view(np.uint32)
        registers += list(words.reshape(-1, pack).T)
    outputs = run_ptx(asm, sum(part.strip().startswith("=") for part in constraints.split(",")), registers)
    results, used = [], 0
    for kind in (entry.scalar for entry in types):
        count = kind.primitive_bitwidth * pack // 32
        packed = np.ascontiguousarray(np.stack(outputs[used : used + count], axis=1))
        used += count
        results.append(interpreter.TensorHandle(packed.view(interpreter._get_np_dtype(kind)).reshape(shape), kind))

    class Results:
        def get_result(self, index: int) -> Any:
            return results[index]

    return Results()


def _refusing(stock: Any) -> Any:
    """The interpreter's own arithmetic, where it is right: not on the bits of types that numpy lacks."""

    def checked(self: Any, first: Any, *rest: Any) -> Any:
        operation = rest[-1]
        if first.dtype.scalar in _TORCH and operation not in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            raise TypeError(f"arithmetic in {first.dtype.scalar}: convert to float32 first, which is also exact")
        return stock(self, first, *rest)

    return checked


def install() -> None:
    """Patch the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = _cast
    builder.create_fp_to_fp = _cast
    builder.create_dot = _dot
    builder.create_inline_asm = _inline_asm
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(builder, name, _refusing(getattr(builder, name)))

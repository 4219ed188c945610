"""CPU kernels of our own, in C++ with AVX-512 and AMX, where torch's leave much of the machine unused.

int8 weights lie in tiles (see product.h), one layout for both kernels that run them; int4 weights in lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from autoplan.errors import KernelError
from autoplan.kernels import activations, ops
from autoplan.kernels.native.build import library
from autoplan.kernels.packing import Canonical, quantize_int4, quantize_per_channel
from autoplan.kernels.reference import linear_float64, relative_error

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of simd.h
_ACTIVATIONS = {name: code for code, name in enumerate(activations.FUNCTIONS)}  # enum Activation of simd.h
_FEW_ROWS = 6  # up to so many, weight-only kernels compute in float32 and read the weights once

# Layouts. The last tensor of each is empty: its shape says out_features and in_features, which tiles are padded beyond.


def _padded(codes: Tensor, in_multiple: int) -> Tensor:
    """With zeros, to whole strips of 32 output channels and to a multiple of `in_multiple` along in_features."""
    out_features, in_features = codes.shape
    padded = codes.new_zeros(-(-out_features // 32) * 32, -(-in_features // in_multiple) * in_multiple)
    padded[:out_features, :in_features] = codes
    return padded


def _tiles(codes: Tensor) -> Tensor:
    """int8 [out, in] -> [out / 16, in / 64, 16, 64]: four codes of each of 16 channels, side by side."""
    padded = _padded(codes, 64)
    tiles = padded.view(padded.shape[0] // 16, 16, padded.shape[1] // 64, 16, 4).permute(0, 2, 3, 1, 4)
    return tiles.flatten(3).contiguous()


def _untile(tiles: Tensor, size: torch.Size) -> Tensor:
    columns, steps = tiles.shape[:2]
    rows = tiles.view(columns, steps, 16, 16, 4).permute(0, 3, 1, 2, 4).reshape(columns * 16, steps * 64)
    return rows[: size[1], : size[2]].contiguous()


def _pack_int8(canonical: Canonical) -> tuple[Tensor, ...]:
    codes, scale = canonical["codes"], canonical["scale"]
    start = codes.sum(dim=1, dtype=torch.int32).mul_(-128)  # what unsigned activations are too large by
    columns = (_padded(tensor[:, None], 1).flatten() for tensor in (scale, start))
    return _tiles(codes), *columns, codes.new_empty((0, *codes.shape))


def _unpack_int8(packed: ops.Packed) -> Canonical:
    tiles, scale, _, size = packed
    return {"codes": _untile(tiles, size.shape), "scale": scale[: size.shape[1]].clone()}


def _pack_int4(canonical: Canonical) -> tuple[Tensor, ...]:
    """Bytes [out / 16, in / 8, 16, 4]: eight codes of each of 16 channels, side by side, the first in the low half."""
    codes, scale, zero_point = canonical["codes"], canonical["scale"], canonical["zero_point"]
    padded = _padded(codes, 4)
    lines = padded.view(padded.shape[0] // 16, 16, padded.shape[1] // 4, 4).transpose(1, 2).contiguous()
    size = codes.new_empty((0, codes.shape[0], 2 * codes.shape[1]))
    return lines, _columns(scale), _columns(zero_point), size


def _columns(values: Tensor) -> Tensor:
    """[out, groups] -> [out / 16, groups, 16]: what one pass over the lines of 16 channels needs, side by side."""
    padded = _padded(values, 1)
    return padded.view(-1, 16, padded.shape[1]).transpose(1, 2).contiguous()


def _unpack_int4(packed: ops.Packed) -> Canonical:
    lines, scale, zero_point, size = packed
    codes = lines.transpose(1, 2).reshape(lines.shape[0] * 16, -1)
    out_features, in_features = size.shape[1:]
    return {
        "codes": codes[:out_features, : in_features // 2].contiguous(),
        "scale": scale.transpose(1, 2).flatten(0, 1)[:out_features].contiguous(),
        "zero_point": zero_point.transpose(1, 2).flatten(0, 1)[:out_features].contiguous(),
    }


_INT8_TILES = ops.Layout("int8_tiles", 4, _pack_int8, _unpack_int8)
_INT4_LINES = ops.Layout("int4_lines", 4, _pack_int4, _unpack_int4)


# Kernels


def _bias(bias: Tensor | None) -> tuple[int | None, int]:
    """Its address and its dtype, as the C++ takes them."""
    return (None, 0) if bias is None else (bias.data_ptr(), _CODES[bias.dtype])


def _int8_dynamic(
    x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype, activation: str = "none"
) -> Tensor:
    tiles, scale, start, size = packed
    x = x.to(dtype)
    y = torch.empty((x.shape[0], size.shape[1]), dtype=dtype)
    at, bias_dtype = _bias(bias)
    library().autoplan_int8_dynamic(
        x.data_ptr(), tiles.data_ptr(), scale.data_ptr(), start.data_ptr(), at, y.data_ptr(), *y.shape, size.shape[2],
        _CODES[dtype], bias_dtype, _ACTIVATIONS[activation], torch.get_num_threads(),
    )  # fmt: skip
    return y


def _int8_weight(
    x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype, activation: str = "none"
) -> Tensor:
    tiles, scale, _, size = packed
    x = x.to(dtype)
    y = torch.empty((x.shape[0], size.shape[1]), dtype=dtype)
    at, bias_dtype = _bias(bias)
    library().autoplan_int8_weight(
        x.data_ptr(), tiles.data_ptr(), scale.data_ptr(), at, y.data_ptr(), *y.shape, size.shape[2],
        _FEW_ROWS, _CODES[dtype], bias_dtype, _ACTIVATIONS[activation], torch.get_num_threads(),
    )  # fmt: skip
    return y


def _int4_weight(
    x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype, activation: str = "none"
) -> Tensor:
    lines, scale, zero_point, size = packed
    x = x.to(dtype)
    y = torch.empty((x.shape[0], size.shape[1]), dtype=dtype)
    at, bias_dtype = _bias(bias)
    library().autoplan_int4_weight(
        x.data_ptr(), lines.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), at, y.data_ptr(), *y.shape,
        size.shape[2], size.shape[2] // scale.shape[1], _FEW_ROWS, _CODES[dtype], bias_dtype,
        _ACTIVATIONS[activation], torch.get_num_threads(),
    )  # fmt: skip
    return y


class _Run(Protocol):
    def __call__(
        self, x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype, activation: str = "none"
    ) -> Tensor: ...


def _register(name: str, layout: ops.Layout, run: _Run, canonical: Callable[[Tensor], Canonical]) -> None:
    def supports(spec: ops.LinearSpec) -> str | None:
        return None if spec.dtype in _CODES else f"input dtype {spec.dtype} is not float32, bfloat16 or float16"

    def probe() -> str | None:
        """Few rows and many against float64; a KernelError says what this machine lacks."""
        generator = torch.Generator().manual_seed(0)
        stored = canonical(torch.randn(41, 96, generator=generator))
        x, bias = torch.randn(67, 96, generator=generator), torch.randn(41, generator=generator)
        try:
            library()
        except KernelError as missing:
            return str(missing)
        for rows in (3, 67):
            y = run(x[:rows], layout.pack(stored), bias, torch.float32)
            error = relative_error(y, linear_float64(x[:rows], stored, bias))
            if not error < 0.02:
                return f"its probe gave a relative error of {error:.2g} on this machine"
        return None

    ops.register_kernel(
        ops.Kernel(name=name, devices=("cpu",), layout=layout, supports=supports, probe=probe, run=run, activated=run)
    )


def _quantize_int8(weight: Tensor) -> Canonical:
    return quantize_per_channel(weight, torch.int8)


_register("fused_int8", _INT8_TILES, _int8_dynamic, _quantize_int8)
_register("tiled_int8", _INT8_TILES, _int8_weight, _quantize_int8)
_register("tiled_int4", _INT4_LINES, _int4_weight, lambda weight: quantize_int4(weight, 32))

"""CPU kernels of our own, in C++ with AVX-512 and AMX, where torch's leave much of the machine unused.

int8 weights lie in tiles (see product.h), one layout for both kernels that run them; weights in groups in lines.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autoplan.errors import KernelError
from autoplan.kernels import ops
from autoplan.kernels.native.build import library
from autoplan.kernels.native.entry import entry
from autoplan.kernels.packing import CLIP_RATIOS, Canonical, quantize_grouped, quantize_per_channel
from autoplan.kernels.reference import linear_float64, relative_error

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of simd.h
_ACTIVATIONS = {name: code for code, name in enumerate(ops.ACTIVATIONS)}  # enum Activation of simd.h

# Layouts: one tensor of bytes, as `struct Packed` of product.h says. So a call passes one address for a whole weight,
# and a compiled model has one tensor a layer to check and hand on.

_ALIGNMENT = 64  # bytes; so many take the header: out_features, in_features, group_size, bits; where the parts begin
_SIZES_END = 32


def _join(sizes: tuple[int, int, int, int], *parts: Tensor) -> tuple[Tensor]:
    """A header and these parts, in one tensor."""
    begins, end = [], _ALIGNMENT
    for part in parts:
        begins.append(end)
        end += _round_up(part.nbytes, _ALIGNMENT)
    joined = torch.zeros(end, dtype=torch.int8, device=parts[0].device)
    joined[: 8 * (len(sizes) + len(parts))].view(torch.int64).copy_(torch.tensor([*sizes, *begins], device="cpu"))
    for begin, part in zip(begins, parts, strict=True):
        joined[begin : begin + part.nbytes].copy_(part.contiguous().flatten().view(torch.int8))
    return (joined,)


def _sizes(packed: ops.Packed) -> tuple[int, int, int, int]:
    out_features, in_features, group_size, bits = packed[0][:_SIZES_END].view(torch.int64).tolist()
    return out_features, in_features, group_size, bits


def _part(packed: ops.Packed, place: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A part that has been joined: a view."""
    begin = int(packed[0][_SIZES_END:_ALIGNMENT].view(torch.int64)[place])
    return packed[0][begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _padded(codes: Tensor, in_multiple: int) -> Tensor:
    """With zeros, to whole strips of 32 output channels and to a multiple of `in_multiple` along in_features."""
    out_features, in_features = codes.shape
    padded = codes.new_zeros(_round_up(out_features, 32), _round_up(in_features, in_multiple))
    padded[:out_features, :in_features] = codes
    return padded


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pack_int8(canonical: Canonical) -> tuple[Tensor, ...]:
    """Codes [out / 16, in / 64, 16, 64]: four codes of each of 16 channels, side by side."""
    codes, scale = canonical["codes"], canonical["scale"]
    padded = _padded(codes, 64)
    tiles = padded.view(padded.shape[0] // 16, 16, padded.shape[1] // 64, 16, 4).permute(0, 2, 3, 1, 4)
    start = codes.sum(dim=1, dtype=torch.int32).mul_(-128)  # what unsigned activations are too large by
    return _join((*codes.shape, codes.shape[1], 8), tiles, _padded(scale[:, None], 1), _padded(start[:, None], 1))


def _unpack_int8(packed: ops.Packed) -> Canonical:
    out_features, in_features, *_ = _sizes(packed)
    columns, steps = _round_up(out_features, 32) // 16, _round_up(in_features, 64) // 64
    tiles = _part(packed, 0, (columns, steps, 16, 16, 4), torch.int8)
    codes = tiles.permute(0, 3, 1, 2, 4).reshape(columns * 16, steps * 64)[:out_features, :in_features]
    return {"codes": codes.contiguous(), "scale": _part(packed, 1, (out_features,), torch.float32).clone()}


def _pack_grouped(canonical: Canonical) -> tuple[Tensor, ...]:
    """Lines [out / 16, in / 8, 16, 4]: eight codes of each of 16 channels, side by side, the first in the low half.

    Of codes of more than 4 bits these are the lowest; after every four lines comes one for each upper bit: bit 2 i + h
    of its byte j belongs to half h of byte j of the i-th. Beside the scales of groups, one for each channel: that of
    int8 codes that hold whatever its codes stand for.
    """
    codes, scale, zero_point = canonical["codes"], canonical["scale"], canonical["zero_point"]
    padded = _padded(codes, 4)
    lines, bits = padded.view(padded.shape[0] // 16, 16, padded.shape[1] // 4, 4).transpose(1, 2), 4
    if "upper_bits" in canonical:
        upper = _swapped(canonical["upper_bits"])
        bits += upper.shape[1]
        upper = _padded(upper.flatten(1), 1).view(lines.shape[0], 16, bits - 4, -1, 4).permute(0, 3, 2, 1, 4)
        lines = torch.cat((lines.unflatten(1, (-1, 4)), upper), dim=2)
    sizes = (codes.shape[0], 2 * codes.shape[1], 2 * codes.shape[1] // scale.shape[1], bits)
    largest = torch.maximum(zero_point, 2**bits - 1 - zero_point) * scale.float()  # of a group's
    channel_scale = _padded((largest.amax(dim=1, keepdim=True) / 127).clamp_min_(1e-30), 1)
    return _join(sizes, lines, _columns(scale), _columns(zero_point), channel_scale)


def _swapped(bits: Tensor) -> Tensor:
    """Bytes [out, bits, in / 8]: of each four, bit 2 j + h of the i-th exchanged with bit 2 i + h of the j-th."""
    pairs = torch.arange(0, 8, 2, dtype=torch.uint8, device=bits.device)
    four = bits.unflatten(2, (-1, 4)).unsqueeze(4) >> pairs & 3
    swapped: Tensor = (four.transpose(3, 4) << pairs).sum(dim=4, dtype=torch.uint8).flatten(2)
    return swapped


def _columns(values: Tensor) -> Tensor:
    """[out, groups] -> [out / 16, groups, 16]: what one pass over the lines of 16 channels needs, side by side."""
    padded = _padded(values, 1)
    return padded.view(-1, 16, padded.shape[1]).transpose(1, 2)


def _unpack_grouped(packed: ops.Packed) -> Canonical:
    out_features, in_features, group_size, bits = _sizes(packed)
    columns, groups = _round_up(out_features, 32) // 16, in_features // group_size

    def rows(lines: Tensor, dims: int = 1) -> Tensor:
        return lines.flatten(0, 1)[:out_features].flatten(dims).clone(memory_format=torch.contiguous_format)

    def beside(place: int, dtype: torch.dtype) -> Tensor:
        return rows(_part(packed, place, (columns, groups, 16), dtype).transpose(1, 2))

    scales = {"scale": beside(1, torch.bfloat16), "zero_point": beside(2, torch.uint8)}
    if bits == 4:
        lines = _part(packed, 0, (columns, _round_up(in_features, 8) // 8, 16, 4), torch.uint8)
        return {"codes": rows(lines.transpose(1, 2))[:, : in_features // 2].contiguous(), **scales}
    lines = _part(packed, 0, (columns, in_features // 32, bits, 16, 4), torch.uint8).permute(0, 3, 2, 1, 4)
    codes, upper = lines.split((4, bits - 4), dim=2)
    return {"codes": rows(codes.transpose(2, 3)), **scales, "upper_bits": _swapped(rows(upper, 2))}


_INT8_TILES = ops.Layout("int8_tiles", 1, _pack_int8, _unpack_int8)
_GROUPED_LINES = ops.Layout("grouped_lines", 1, _pack_grouped, _unpack_grouped)


# Quantizing.


def quantize_grouped_fast(weight: Tensor, group_size: int, bits: int = 4) -> Canonical:
    """What `packing.quantize_grouped` finds, in C++ where this machine, the weight and the size of groups allow.

    Sums are rounded in another order, so where two ranges are equally good they may not choose the same one.
    """
    weight = weight.detach()
    plain = type(weight) is Tensor and weight.device.type == "cpu" and weight.dtype in CODES
    if not plain or group_size % 16 or weight.shape[1] % group_size or missing():
        return quantize_grouped(weight, group_size, bits)
    weight = weight.contiguous()
    (out_features, in_features), ratios = weight.shape, weight.new_tensor(CLIP_RATIOS, dtype=torch.float64)
    codes = weight.new_empty((out_features, in_features // 2), dtype=torch.uint8)
    upper_bits = weight.new_empty((out_features, bits - 4, in_features // 8), dtype=torch.uint8)
    scale = weight.new_empty((out_features, in_features // group_size), dtype=torch.bfloat16)
    zero_point = torch.empty_like(scale, dtype=torch.uint8)
    library().autoplan_quantize_grouped(
        weight.data_ptr(), CODES[weight.dtype], out_features, in_features, group_size, bits, ratios.data_ptr(),
        len(ratios), codes.data_ptr(), upper_bits.data_ptr(), scale.data_ptr(), zero_point.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    canonical = {"codes": codes, "scale": scale, "zero_point": zero_point}
    return canonical | {"upper_bits": upper_bits} if bits > 4 else canonical


@functools.cache
def missing() -> str:
    """What this machine lacks for the C++; "" if nothing."""
    try:
        library()
    except KernelError as missing:
        return str(missing)
    return ""


# Kernels.


class _Call(ctypes.Structure):
    """`struct Call` of product.h."""

    _fields_ = (
        ("x_dtype", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("bias_dtype", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("gated", ctypes.c_int),
        ("has_bias", ctypes.c_int),
        ("has_norm", ctypes.c_int),
        ("pieces", ctypes.POINTER(ctypes.c_int64)),
        ("eps", ctypes.c_float),
    )


def _call(
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    activation: str,
    pieces: tuple[int, ...] = (),
    eps: float | None = None,
) -> _Call:
    code = _ACTIVATIONS[ops.GATED.get(activation, activation)]
    dtypes = (CODES[own] for own in (x_dtype, dtype, bias_dtype or dtype))
    has = (bias_dtype is not None, eps is not None)
    call = _Call(*dtypes, code, activation in ops.GATED, *has, eps=eps or 0.0)
    if pieces:
        call.pieces = (ctypes.c_int64 * len(pieces))(*pieces)
    return call


@functools.cache
def _pair_into(
    dtypes: ops.Dtypes,
    activation: str,
    bias_dtypes: tuple[torch.dtype | None, torch.dtype | None],
    rows: int | None = None,
    eps: float | None = None,
) -> ops.Write:
    x_dtype, between, dtype = dtypes
    call = _call(x_dtype, between, bias_dtypes[0], activation)
    then_call = _call(between, dtype, bias_dtypes[1], "none", eps=eps)
    others = sum(bias_dtype is not None for bias_dtype in bias_dtypes) + (0 if eps is None else _NORM)
    return entry(library().autoplan_int8_pair, (_Call * 2)(call, then_call), 4 + others, rows)


def _pair_pays(rows: int, nbytes: int) -> bool:
    """Both weights stay in a core's second-level cache, and each thread has four blocks of 32 rows or more."""
    return nbytes <= 0.75 * int(library().autoplan_cache_bytes()) and rows >= 4 * 32 * torch.get_num_threads()


def _register(
    name: str,
    layout: ops.Layout,
    function: str,
    canonical: Callable[[Tensor], Canonical],
    pair: ops.Pair | None = None,
    most_in_features: float = math.inf,
    group_multiple: int = 16,
) -> None:
    @functools.cache
    def into(
        dtype: torch.dtype,
        bias_dtype: torch.dtype | None,
        activation: str,
        pieces: tuple[int, ...] = (),
        rows: int | None = None,
        eps: float | None = None,
        x_dtype: torch.dtype | None = None,
    ) -> ops.Write:
        call = _call(x_dtype or dtype, dtype, bias_dtype, activation, pieces, eps)
        others = (bias_dtype is not None) + (0 if eps is None else _NORM)
        return entry(getattr(library(), function), call, 3 + others, rows)

    def run(x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        out = x.new_empty((x.shape[0], _sizes(packed)[0]), dtype=dtype)
        write = into(dtype, None if bias is None else bias.dtype, "none", x_dtype=x.dtype)
        write(x, *packed, bias, out=out)
        return out

    def supports(spec: ops.LinearSpec) -> str | None:
        if spec.dtype not in CODES:
            return f"input dtype {spec.dtype} is not float32, bfloat16 or float16"
        if (spec.group_size or 0) % group_multiple:
            return f"group size {spec.group_size} is not a multiple of {group_multiple}"
        if spec.in_features > most_in_features:
            return f"in_features {spec.in_features} is more than {most_in_features}: sums in int32 could overflow"
        return None

    def probe() -> str | None:
        """Few rows and many against float64."""
        generator = torch.Generator().manual_seed(0)
        stored = canonical(torch.randn(41, 96, generator=generator))
        x, bias = torch.randn(67, 96, generator=generator), torch.randn(41, generator=generator)
        if lacks := missing():
            return lacks
        for rows in (3, 67):
            y = run(x[:rows], layout.pack(stored), bias, torch.float32)
            error = relative_error(y, linear_float64(x[:rows], stored, bias))
            if not error < 0.02:
                return f"its probe gave a relative error of {error:.2g} on this machine"
        return None

    ops.register_kernel(
        ops.Kernel(
            name=name, devices=("cpu",), layout=layout, supports=supports, probe=probe, run=run, into=into, pair=pair
        )
    )


def _quantize_int8(weight: Tensor) -> Canonical:
    return quantize_per_channel(weight, torch.int8)


def _quantize_grouped(bits: int) -> Callable[[Tensor], Canonical]:
    return lambda weight: quantize_grouped(weight, 32, bits)


_NORM = 3  # tensors of one: residual, weight, shift
_INT32_SUMS = (2**31 - 1) // 127**2  # products of two int8 codes that an int32 surely holds the sum of
_PAIR = ops.Pair(into=_pair_into, pays=_pair_pays)

_register("fused_int8", _INT8_TILES, "autoplan_int8_dynamic", _quantize_int8, _PAIR, _INT32_SUMS)
_register("tiled_int8", _INT8_TILES, "autoplan_int8_weight", _quantize_int8)
_register("tiled_int4", _GROUPED_LINES, "autoplan_int4_weight", _quantize_grouped(4))
for _bits in (4, 5, 6):
    _register(
        f"fused_int{_bits}", _GROUPED_LINES, "autoplan_grouped_dynamic", _quantize_grouped(_bits),
        most_in_features=_INT32_SUMS, group_multiple=16 if _bits == 4 else 32,
    )  # fmt: skip

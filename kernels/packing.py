"""The canonical form of a quantized weight: what is stored, saved and loaded, whatever kernel runs it.

A canonical weight is a dict of plain tensors, told apart by its keys and dtypes:

    float   weight      [out, in]            float32, bfloat16, float16
    int8    codes       [out, in]            int8,          scale [out] float32
    fp8     codes       [out, in]            float8_e4m3fn, scale [out] float32
    int4    codes       [out, in / 2]        uint8, two codes a byte: even column in the low half
            scale       [out, in / group]    bfloat16
            zero_point  [out, in / group]    uint8
    int5,   codes       [out, in / 2]        the lowest four bits, in the same way; beside these and the two above:
    int6    upper_bits  [out, bits - 4, in / 8]  uint8, a bit of eight columns a byte, the first column in its lowest

    weight ~ scale * (codes - zero_point), zero_point = 0 where there is none
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Canonical = dict[str, Tensor]

_TINY = 1e-30  # a scale for all-zero rows: its codes are zero, so any positive value gives exact zeros
CLIP_RATIOS = tuple(1.0 - 0.02 * step for step in range(26))


def quantize_per_channel(weight: Tensor, dtype: torch.dtype) -> Canonical:
    """Symmetric codes of `weight` [out, in] with one float32 scale per output channel: absmax / largest code.

    `dtype` is torch.int8 (codes within +-127) or torch.float8_e4m3fn.
    """
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    codes, scales = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format), []
    for own, part in zip(_slices(codes), _slices(weight), strict=True):
        values = part.float()
        scales.append((values.abs().amax(dim=1) / largest).clamp_min(_TINY))
        scaled = values / scales[-1][:, None]
        own.copy_(scaled.round_() if dtype == torch.int8 else scaled)
    return {"codes": codes, "scale": torch.cat(scales)}


def _slices(weight: Tensor) -> Sequence[Tensor]:
    """A few rows at a time, so that float32 scratch stays in a CPU's caches."""
    size = 1 << (24 if weight.is_cuda else 18)  # a GPU would wait for launches, on small ones
    slices: Sequence[Tensor] = weight.detach().split(max(1, size // max(weight.shape[1], 1)))
    return slices


def quantize_grouped(weight: Tensor, group_size: int, bits: int = 4) -> Canonical:
    """Asymmetric codes of `weight` [out, in], one bfloat16 scale and integer zero point per `group_size` columns.

    `bits` is 4, or 5 or 6: then in_features is a multiple of 8. The range of each group is shrunk by the ratio in
    1.00, 0.98 ... 0.50 that gives the least squared error (clip search, as in AWQ, https://arxiv.org/abs/2306.00978,
    section 3), of the codes that suit the rounded scale: a float32 one would be no better.
    """
    parts = [_quantize_grouped(part, group_size, 2**bits - 1) for part in _slices(weight)]
    codes, scale, zero_point = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    canonical = {"codes": pack_nibbles(codes & 15), "scale": scale, "zero_point": zero_point}
    return canonical | {"upper_bits": pack_bits(codes >> 4, bits - 4)} if bits > 4 else canonical


def _quantize_grouped(weight: Tensor, group_size: int, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = weight.float().reshape(weight.shape[0], -1, group_size)
    low = groups.amin(dim=2, keepdim=True).clamp_max(0)  # zero stays representable
    high = groups.amax(dim=2, keepdim=True).clamp_min(0)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for ratio in CLIP_RATIOS:
        scale = ((high - low) * (ratio / largest)).clamp_min(_TINY).bfloat16().float()
        zero = (-low * ratio / scale).round_().clamp_(0, largest)
        codes = (groups * scale.reciprocal()).round_().add_(zero).clamp_(0, largest)
        error = codes.sub_(zero).mul_(scale).sub_(groups).square_().sum(dim=2, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    codes = (groups * best_scale.reciprocal()).round_().add_(best_zero).clamp_(0, largest).to(torch.uint8)
    return codes.flatten(1), best_scale.squeeze(2).bfloat16(), best_zero.squeeze(2).to(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte: [out, in] uint8 below 16 -> [out, in / 2] uint8, even columns in the low half."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: [out, in / 2] uint8 -> [out, in] uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """The lowest `bits` of `values` [out, in], uint8, one after another -> [out, bits, in / 8] uint8."""
    each = values.unsqueeze(1) >> _places(bits, values)[:, None] & 1
    packed: Tensor = (each.unflatten(2, (-1, 8)) << _places(8, values)).sum(dim=3, dtype=torch.uint8)
    return packed


def unpack_bits(packed: Tensor) -> Tensor:
    """The inverse of `pack_bits`: [out, bits, in / 8] uint8 -> [out, in] uint8."""
    each = (packed.unsqueeze(3) >> _places(8, packed) & 1).flatten(2)
    return (each << _places(each.shape[1], packed)[:, None]).sum(dim=1, dtype=torch.uint8)


def _places(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=like.dtype, device=like.device)


def unpack_codes(canonical: Canonical) -> Tensor:
    """The codes [out, in] uint8 of a weight in groups."""
    codes = unpack_nibbles(canonical["codes"])
    return codes | (unpack_bits(canonical["upper_bits"]) << 4) if "upper_bits" in canonical else codes


def dequantize(canonical: Canonical, dtype: torch.dtype) -> Tensor:
    """The float weight [out, in] that a canonical weight stands for, computed in float32 and cast to `dtype`."""
    if "weight" in canonical:
        return canonical["weight"].to(dtype)
    scale = canonical["scale"].float()
    if "zero_point" not in canonical:
        return (canonical["codes"].float() * scale[:, None]).to(dtype)
    centred = unpack_codes(canonical).float().unflatten(1, (scale.shape[1], -1)) - canonical["zero_point"].unsqueeze(2)
    weight: Tensor = (centred * scale.unsqueeze(2)).flatten(1).to(dtype)
    return weight


def nbytes(tensors: list[Tensor]) -> int:
    """Bytes held by `tensors`, each counted once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())

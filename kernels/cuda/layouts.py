"""How CUDA kernels hold a weight, in plain torch: it packs on any device, and unpacks to the canonical form exactly.

8-bit weights are held as they are stored. int4 is held as the tensor cores will want it:

    words  [k' / 128, n, 16] int32    word j of a chunk holds in bits 4i..4i+3 the code of in-feature 16 i + j
    scales [k' / g, n]       int32    the scale in the upper 16 bits, as in a float32; the zero point in the lower 4
    groups [k / g]           uint8    nothing: its length says where k ends, for no kernel

k' is k rounded up to whole chunks of 128 and g the group size. One word j of a thread thus feeds eight products in
turn, one per 4-bit slot i, over the 16 consecutive in-features 16 i .. 16 i + 15 of x; a block of n features of one
chunk is one contiguous piece of memory; and a group costs one load, which read as a float32 is its scale up to 2^-19.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from autoplan.kernels.ops import Layout, Packed
from autoplan.kernels.packing import Canonical, pack_nibbles, unpack_nibbles

CHUNK = 128  # in-features of a chunk of words
SLOT = 16  # of those, the ones that one 4-bit slot of the words covers
_SLOTS = CHUNK // SLOT

CODES = Layout.canonical("codes", "scale")


def sizes(packed: Packed) -> tuple[int, int | None]:
    """out_features and group size (None: one scale per channel) of a weight in one of these layouts."""
    first, second = packed[:2]
    if first.ndim == 3:
        return first.shape[1], first.shape[0] * CHUNK // second.shape[0]
    return first.shape[0], None


def _pack_words(canonical: Canonical) -> tuple[Tensor, ...]:
    codes, scale, zero_point = unpack_nibbles(canonical["codes"]), canonical["scale"], canonical["zero_point"]
    n, k = codes.shape
    group_size = k // scale.shape[1]
    codes = F.pad(codes, (0, -k % CHUNK))
    slots = codes.reshape(n, -1, _SLOTS, SLOT).permute(1, 0, 3, 2).int()  # [chunk, n, j, i]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    words = (slots << shifts).sum(dim=3, dtype=torch.int32)  # the slots share no bit: a sum is an or
    scales = scale.float().view(torch.int32) | zero_point.int()
    scales = F.pad(scales, (0, codes.shape[1] // group_size - scale.shape[1]))
    return words.contiguous(), scales.t().contiguous(), zero_point.new_zeros(scale.shape[1])


def _unpack_words(packed: Packed) -> Canonical:
    words, scales, true_groups = packed
    group_size = words.shape[0] * CHUNK // scales.shape[0]
    groups = len(true_groups)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    slots = (words[..., None] >> shifts) & 15
    codes = slots.permute(1, 0, 3, 2).reshape(words.shape[1], -1)[:, : groups * group_size].to(torch.uint8)
    bits = scales.t()[:, :groups]
    return {
        "codes": pack_nibbles(codes),
        "scale": (bits & ~15).contiguous().view(torch.float32).bfloat16(),
        "zero_point": (bits & 15).to(torch.uint8),
    }


WORDS = Layout("int4_words", 3, _pack_words, _unpack_words)

"""Attention, in C++ (attention.cpp): what compiled models call between planned layers, not torch's own."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from autoplan.kernels import native, ops
from autoplan.kernels.native.build import library

_Strides = ctypes.c_int64 * 3  # `struct Strides`
DTYPES = (torch.float32, torch.bfloat16)


class _Attention(ctypes.Structure):
    """`struct Attention` of attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "rows", "keys", "features")),
        *((name, _Strides) for name in ("q", "k", "v", "out", "mask")),
        ("dtype", ctypes.c_int),
        ("mask_dtype", ctypes.c_int),
        ("causal", ctypes.c_int),
        ("scale", ctypes.c_float),
    )


def pays(rows: int, keys: int | None, features: int, sharing: int, dtype: torch.dtype) -> bool:
    """Whether it is faster than torch's, for `rows` of each of the heads that share keys (`sharing` of them).

    A few rows on any CPU that runs it; more on AMX tiles, where what a thread works on stays in its second-level cache,
    and where packing float32 keys is shared by enough. `keys` is None where it may be any number.
    """
    if native.missing():
        return False
    if library().autoplan_attends_rows(rows, sharing, native.CODES[dtype]):
        return rows <= 4 or (keys is not None and keys <= 64)
    if keys is None or not library().autoplan_attends_in_tiles():
        return False
    enough = dtype != torch.float32 or rows * sharing >= (16 if keys <= 256 else 32)
    nbytes: int = library().autoplan_attention_bytes(keys, features, native.CODES[dtype])
    return enough and nbytes <= int(library().autoplan_cache_bytes())


@functools.cache
def writer(causal: bool, scale: float) -> ops.Write:
    """A function of (q, k, v, *masks, out=...) that writes what `autoplan::attention` gives into `out`."""
    run, threads = library().autoplan_attention, torch.get_num_threads

    def write(q: Tensor, k: Tensor, v: Tensor, *masks: Tensor, out: Tensor) -> None:
        mask = masks[0] if masks else None
        call = _call(
            (*q.shape, *k.shape[1:3]), (q.stride(), k.stride(), v.stride(), out.stride(), _mask_strides(mask)),
            (native.CODES[q.dtype], 0 if mask is None else native.CODES[mask.dtype]), causal, scale,
        )  # fmt: skip
        if run(
            call, q.data_ptr(), k.data_ptr(), v.data_ptr(), None if mask is None else mask.data_ptr(), out.data_ptr(),
            threads(),
        ):  # fmt: skip
            raise MemoryError(f"no memory for attention from {list(q.shape)} to {k.shape[2]} keys")

    return write


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    if mask is None:
        return (0, 0, 0)
    return tuple(0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True))


@functools.lru_cache(256)
def _call(
    sizes: tuple[int, ...], strides: tuple[tuple[int, ...], ...], dtypes: tuple[int, int], causal: bool, scale: float
) -> Any:  # a reference, as ctypes hands it on
    batch, heads, rows, features, key_heads, keys = sizes
    own = (_Strides(*steps[:3]) for steps in strides)
    return ctypes.byref(_Attention(batch, heads, key_heads, rows, keys, features, *own, *dtypes, causal, scale))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    out = _attend_fake(q)
    if out.numel():
        masks = () if mask is None else (_features_side_by_side(mask),)
        writer(causal, scale)(*map(_features_side_by_side, (q, k, v)), *masks, out=out)
    return out


def _features_side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _attend_fake(q: Tensor, *_: object) -> Tensor:
    batch, heads, rows, features = q.shape
    return q.new_empty((batch, rows, heads, features)).transpose(1, 2)  # in this order a next layer is given it


# softmax(q k^T * scale + mask) v, in the shape of q [batch, heads, rows, features] and its dtype, one of DTYPES. k and
# v are [batch, key_heads, keys, features], and each of their heads serves as many heads of q, one after another. The
# mask is [batch or 1, heads or 1, rows or 1, keys], of any of FLOATS. Causal: row i is given the keys up to i.
ops.define_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> Tensor", _attend, _attend_fake
)

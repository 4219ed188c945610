"""Attention, in C++ (attention.cpp): what compiled models call between planned layers, not torch's own."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from autoplan.kernels import native, ops
from autoplan.kernels.native.build import library
from autoplan.kernels.native.entry import entry

_Strides = ctypes.c_int64 * 3  # `struct Strides`
DTYPES = (torch.float32, torch.bfloat16)
Strided = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # what a tensor is like: sizes, strides, dtype


class _Attention(ctypes.Structure):
    """`struct Attention` of attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "rows", "keys", "features")),
        *((name, _Strides) for name in ("q", "k", "v", "out", "mask")),
        ("dtype", ctypes.c_int),
        ("has_mask", ctypes.c_int),
        ("mask_dtype", ctypes.c_int),
        ("causal", ctypes.c_int),
        ("scale", ctypes.c_float),
    )


def pays(rows: int, keys: int | None, features: int, sharing: int, dtype: torch.dtype) -> bool:
    """Whether it is faster than torch's, for `rows` of each of the heads that share keys (`sharing` of them).

    A few rows always; more where what a thread works on stays in its second-level cache, and where packing float32 keys
    is shared by enough. `keys` is None where it may be any number.
    """
    if native.missing():
        return False
    if library().autoplan_attends_rows(rows, sharing, native.CODES[dtype]):
        return rows <= 4 or (keys is not None and keys <= 64)
    if keys is None:
        return False
    enough = dtype != torch.float32 or rows * sharing >= (16 if keys <= 256 else 32)
    nbytes: int = library().autoplan_attention_bytes(keys, features, native.CODES[dtype])
    return enough and nbytes <= int(library().autoplan_cache_bytes())


def writer(causal: bool, scale: float, *known: Strided) -> ops.Write:
    """A function of (q, k, v, *masks, out=...) that writes what `autoplan::attention` gives into `out`.

    What all of them are like, in this order, is looked at in each call, unless it is `known`.
    """
    if known:
        return _writer(causal, scale, known)

    def write(*tensors: Tensor, out: Tensor) -> None:
        every = (*tensors, out)
        _writer(causal, scale, tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in every))(*every)

    return write


@functools.lru_cache(256)
def _writer(causal: bool, scale: float, known: tuple[Strided, ...]) -> ops.Write:
    q, k, v, *masks, out = known
    (batch, heads, rows, features), (_, key_heads, keys, _) = q[0], k[0]
    strides, mask_dtype = [own[1] for own in (q, k, v, out)], 0
    for sizes, steps, dtype in masks:
        strides.append(tuple(0 if size == 1 else step for size, step in zip(sizes, steps, strict=True)))
        mask_dtype = native.CODES[dtype]
    call = _Attention(
        batch, heads, key_heads, rows, keys, features, *(_Strides(*steps[:3]) for steps in strides),
        dtype=native.CODES[q[2]], has_mask=bool(masks), mask_dtype=mask_dtype, causal=causal, scale=scale,
    )  # fmt: skip
    return entry(library().autoplan_attention, call, len(known), rows)


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

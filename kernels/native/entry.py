"""The kernels of this folder as functions of tensors (entry.cpp): a microsecond faster to call than ctypes is."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, cast

import torch

from autoplan.kernels import ops
from autoplan.kernels.native.build import library


class _Entry(ctypes.Structure):
    """`struct Entry` of entry.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("run", "how", "address", "get_num_threads")),
        ("rows", ctypes.c_int64),
        ("tensors", ctypes.c_int64),
    )


def entry(kernel: Any, how: Any, tensors: int, rows: int | None = None) -> ops.Write:
    """A kernel of `library` as a function of so many tensors, in the order in which it takes them, `out` the last.

    `how` is the ctypes structure that it takes beside them. `rows`: of every call; None if each has as many as its
    first tensor. A call raises MemoryError where the kernel had not enough, TypeError for another number of tensors
    and RuntimeError for what is none. A tensor that is None is left out.
    """
    get_num_threads = torch.get_num_threads
    made = _Entry(
        run=ctypes.cast(kernel, ctypes.c_void_p),
        how=ctypes.addressof(how),
        address=torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr,  # type: ignore[attr-defined]
        get_num_threads=id(get_num_threads),
        rows=-1 if rows is None else rows,
        tensors=tensors,
    )
    return cast("ops.Write", _maker()((bytes(made), how, get_num_threads)))  # which live as long as the function does


@functools.cache
def _maker() -> Any:
    native = library()
    make = ctypes.PyDLL(native._name, handle=native._handle).autoplan_entry
    make.argtypes, make.restype = (ctypes.py_object,), ctypes.py_object
    return make

"""Packed weights in pages of 2 MiB: what is read from end to end is read faster than from pages of 4 KiB.

There are few enough of them for the CPU's table of translations, and its prefetching stops at the end of each. Linux
gives out small ones, wherever it is set to `madvise`, to a process that does not ask.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

HUGE = 2 << 20  # bytes of a page; its address is a multiple
WORTH = 64 << 10  # bytes that a weight has to take: fewer are a few small pages
_COLLAPSE = 25  # MADV_COLLAPSE of linux/mman.h: make one page of these now, moving what they hold (Linux 6.1)

Tensors = TypeVar("Tensors", bound=Sequence[Tensor])


def settle(tensors: Tensors, least: int = WORTH) -> Tensors:
    """The same tensors, where they are; those of `least` bytes on the CPU in pages of 2 MiB, if the system grants them.

    What lies beside them in those pages is moved as well, and pages that had not been touched yet are taken.
    """
    if (collapse := _collapse()) is None:
        return tensors
    for tensor in tensors:
        if type(tensor) is Tensor and tensor.device.type == "cpu" and not tensor.is_mkldnn and tensor.nbytes >= least:
            start = tensor.data_ptr()
            for page in range(start // HUGE * HUGE, start + tensor.nbytes, HUGE):
                collapse(page, HUGE, _COLLAPSE)  # one by one: an end may share its page with no memory, and fail
    return tensors


@functools.cache
def _collapse() -> Callable[[int, int, int], int] | None:
    """The system's `madvise`; None where it has no such pages, or whoever runs it wants none."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if platform.system() != "Linux" or not setting.exists() or "[never]" in setting.read_text():
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return madvise

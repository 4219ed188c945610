"""The floor of a layer's time: what its bytes take from memory, or its products to compute, whichever is more.

Of a GPU the rates are known (kernels/cuda/gpus.py); those of a CPU are measured by peaks.cpp: products on registers
alone, and one pass over a buffer that no cache holds, each on as many threads as torch has. What a cache holds comes
faster than from memory: small layers can be below the floor.
"""

from __future__ import annotations

import ctypes
import functools
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from autoplan.candidates import Candidate
from autoplan.candidates.grouped import Grouped
from autoplan.coldness import last_level_cache_bytes
from autoplan.errors import KernelError
from autoplan.kernels.native import build
from autoplan.records import LayerProfile

KINDS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Rates:
    """What a device can do at most: bytes a second from its memory, and by kind operations a second (two a product).

    Activations that fit in `cached` bytes are taken to come from a cache, and do not count.
    """

    bandwidth: float
    operations: Mapping[str, float]
    cached: int = 0


def floor_us(candidate: Candidate, profile: LayerProfile, rates: Rates) -> float:
    """Microseconds of the layer's first call, where each byte of the quantized weight and of activations moves once.

    What quantizes activations multiplies in 8 bits; all else is counted in bfloat16, but for plain float32.
    """
    call, weights = profile.calls[0], profile.out_features * profile.in_features
    item = getattr(torch, call.dtype).itemsize
    if isinstance(candidate, Grouped):
        weight_bytes = weights * (candidate.bits / 8 + 3 / candidate.group_size)  # a scale of two bytes, a zero point
    elif candidate.name.startswith(("int8", "fp8")):
        weight_bytes = weights + 4 * profile.out_features
    else:
        weight_bytes = weights * (2 if candidate.name == "bf16" else item)
    activations = item * call.rows * (profile.in_features + profile.out_features)
    moved = weight_bytes + (activations if activations > rates.cached else 0)
    plain = candidate.name == "none" and call.dtype == "float32"
    kind = "int8" if "dynamic" in candidate.name else "float32" if plain else "bfloat16"
    return 1e6 * max(moved / rates.bandwidth, 2 * call.rows * weights / rates.operations[kind])


def rates_of_cpu() -> Rates:
    """The best of many runs of each; not a number where this CPU, or its compiler, cannot run peaks.cpp."""
    threads = torch.get_num_threads()
    try:
        peaks = _library()
    except KernelError as error:
        print(f"floors are not known: {error}")
        return Rates(math.nan, dict.fromkeys(KINDS, math.nan))
    operations = {kind: peaks.operations(place, threads) for place, kind in enumerate(KINDS)}
    return Rates(peaks.bandwidth(threads), operations, last_level_cache_bytes())


@functools.cache
def _library() -> ctypes.CDLL:
    build.library()  # it asks Linux for the AMX tiles; or raises what this machine lacks
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "peaks.so")
        build.compile_library([Path(__file__).with_name("peaks.cpp")], made)
        loaded = ctypes.CDLL(str(made))
    loaded.operations.argtypes, loaded.operations.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_double
    loaded.bandwidth.argtypes, loaded.bandwidth.restype = (ctypes.c_int,), ctypes.c_double
    return loaded

"""How cold weights are while their kernels are timed: as cold as the model makes them, by racing over copies.

On a CPU that depends on the candidate: a model that no cache holds in float may be held in int8 or int4.
"""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path

import torch

MAX_COPIES = 64
MAX_COPIES_ON_GPU = 1024  # its L2 cache holds 64 of a small model's
SETTLING = 3  # turns through its copies after which they stay: one or two do not displace what a cache holds
SLOW = 5e9  # bytes of the float weight in a second: what takes longer waits for something else than memory
ENTERED = 50e-6  # seconds: what a call may cost besides, whatever its weight
_MEMORY_SHARE = 0.5  # of what is available, for the copies of a race on CPU; one of each in any case
_LAYOUTS = 6  # all layouts of all candidates together take about so many times what the float weight takes
_OVERFLOW = 1.2  # times what a cache holds
_MOST_PACKED = 8  # times smaller than in float32, in 4 bits
_HALVINGS = 5  # sizes that are tried, from what is named down
_READINGS = 4  # of each, of which the quickest counts
_SURELY_FASTER = 1.5  # times as fast as memory: from a cache


def copies_on_gpu(weight_bytes: int) -> int:
    """So many copies that a turn through those of one arm overflows L2 three times, even in int4; less if memory is.

    One copy will do where it does so alone. `weight_bytes` counts the float weight.
    """
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    wanted, affordable = math.ceil(3 * cache / (weight_bytes / 4)), int(free / 4 / (weight_bytes * _LAYOUTS))
    return max(1, min(MAX_COPIES_ON_GPU, wanted, affordable))


def bytes_between(model_bytes: int | None) -> int:
    """The bytes of float weights that a CPU reads from when a layer's weight was used until it is used again.

    Those of the model, rounded up to a power of two for timings to be of use to models of about its size; if these
    overflow the last-level cache whatever the candidate, or are not known, what is enough to do so.
    """
    enough = int(_OVERFLOW * _MOST_PACKED * last_level_cache_bytes())
    return enough if model_bytes is None else min(enough, 1 << max(model_bytes - 1, 1).bit_length())


def copies(between: int, weight_bytes: int, bytes_a_round: float) -> int:
    """So many copies of each weight as a model of `between` bytes has of such layers: from 2 to 64.

    A batch of quick calls goes round an arm's copies by itself. There are fewer where these overflow the last-level
    cache, all arms' together, or where memory is short.
    """
    enough = _OVERFLOW * last_level_cache_bytes() / bytes_a_round
    found = max(2, min(MAX_COPIES, math.ceil(min(between / weight_bytes, enough))))
    return max(1, int(min(found, _MEMORY_SHARE * _available_bytes() / bytes_a_round)))


def stays(model_bytes: float) -> bool:
    """Whether a model whose weights take so many bytes finds them in the last-level cache at each call."""
    return model_bytes <= resident_bytes()


@functools.cache
def resident_bytes() -> int:
    """How much of what is read over and over stays in the last-level cache, as found by reading for some 0.4 seconds.

    A virtual machine gets less than what Linux names (an eighth was seen), and others use it at the same time. It is
    the largest of that and its halves that are surely read faster than memory; if none is, or if memory is too short
    to tell, what is named.
    """
    named = last_level_cache_bytes()
    beyond = int(_OVERFLOW * named)
    if beyond > _available_bytes() / 4:
        return named
    buffer = torch.ones(beyond // 4, dtype=torch.float32, device="cpu")

    def seconds_a_byte(size: int) -> float:
        part, seconds = buffer[: size // 4], []
        for _ in range(_READINGS):
            began = time.perf_counter()
            part.sum()
            seconds.append(time.perf_counter() - began)
        return min(seconds) / size

    memory = seconds_a_byte(beyond)
    sizes = (named >> halved for halved in range(_HALVINGS))
    return next((size for size in sizes if seconds_a_byte(size) < memory / _SURELY_FASTER), named)


def _available_bytes() -> float:
    """The memory that Linux can give out without swapping; no limit where the system does not tell."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    kib = next((float(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)
    return kib * 1024


def last_level_cache_bytes() -> int:
    """The largest cache of CPU 0 that Linux names; 32 MiB where it names none."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=32 << 20)

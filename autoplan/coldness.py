"""How cold weights are while their kernels are timed: as cold as the model makes them, by racing over copies."""

from __future__ import annotations

import math
from pathlib import Path

import torch

MAX_COPIES = 64
MAX_COPIES_ON_GPU = 1024  # its L2 cache holds 64 of a small model's
_MEMORY_SHARE = 0.5  # of what is available, for the copies of a race on CPU; one of each in any case
_LAYOUTS = 6  # all layouts of all candidates together take about so many times what the float weight takes


def copies_on_gpu(weight_bytes: int) -> int:
    """So many copies that a turn through those of one arm overflows L2 three times, even in int4; less if memory is.

    One copy will do where it does so alone. `weight_bytes` counts the float weight.
    """
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    wanted, affordable = math.ceil(3 * cache / (weight_bytes / 4)), int(free / 4 / (weight_bytes * _LAYOUTS))
    return max(1, min(MAX_COPIES_ON_GPU, wanted, affordable))


def bytes_between(model_bytes: int | None) -> int:
    """The bytes of weights that a CPU reads from when a layer's weight was used until it is used again.

    Those of the model, rounded up to a power of two for timings to be of use to models of about its size; if they
    overflow the last-level cache, or are not known, what is enough to overflow it.
    """
    enough = _enough_to_overflow()
    return enough if model_bytes is None else min(enough, 1 << max(model_bytes - 1, 1).bit_length())


def _enough_to_overflow() -> int:
    return int(1.2 * last_level_cache_bytes())


def copies(between: int, weight_bytes: int, bytes_a_round: float) -> int:
    """So many copies of each weight that it is as cold as in a model with `between` bytes of weights: from 2 to 64.

    A batch of quick calls goes round an arm's copies by itself, so there are as many as such layers fill the model
    with. But if the model stays in the last-level cache, so do the copies of all arms; else they overflow it. There are
    fewer where memory is short.
    """
    if between >= _enough_to_overflow():
        wanted = between / bytes_a_round
    else:
        wanted = min(between / weight_bytes, 0.5 * last_level_cache_bytes() / bytes_a_round)
    found = max(2, min(MAX_COPIES, math.ceil(wanted)))
    return max(1, int(min(found, _MEMORY_SHARE * _available_bytes() / bytes_a_round)))


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

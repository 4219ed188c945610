"""What is assumed of each generation of GPU: the limits a launch must keep to, and how fast its parts are.

The figures rank configurations before any is timed; what is chosen in the end is measured. Shared memory per block is
from the CUDA C++ Programming Guide (compute capabilities table); counts and rates are those of the generation's common
data-centre card (A100, L40S, H200, B200), bandwidth as a copy reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """Limits per block and per multiprocessor, and the card's rates."""

    shared_bytes: int  # a block may use at most this much
    processors: int
    bandwidth: float  # bytes per microsecond, from memory
    clock: float  # cycles per microsecond
    bf16_flops: float  # tensor cores, dense, operations per microsecond; 8-bit types run at twice this rate
    warps: int  # resident warps per multiprocessor

    @property
    def l2_bandwidth(self) -> float:
        """Bytes per microsecond out of the L2 cache: about 2.5 times what memory gives, on all of these."""
        return 2.5 * self.bandwidth


_GPUS: dict[tuple[int, int], Gpu] = {
    (8, 0): Gpu(166_912, 108, 1.75e6, 1410, 290e6, 64),
    (8, 6): Gpu(101_376, 84, 0.70e6, 1740, 130e6, 48),
    (8, 9): Gpu(101_376, 142, 0.80e6, 2520, 330e6, 48),
    (9, 0): Gpu(232_448, 132, 4.30e6, 1755, 790e6, 64),
    (10, 0): Gpu(232_448, 148, 7.00e6, 1920, 1900e6, 64),
    (12, 0): Gpu(101_376, 170, 1.60e6, 2400, 400e6, 48),
}


def gpu_of(capability: tuple[int, int]) -> Gpu:
    """The figures for a compute capability: its own, else those of the newest generation that is not newer."""
    older = [known for known in _GPUS if known <= capability]
    return _GPUS[max(older, default=(8, 0))]

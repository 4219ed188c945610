"""Tile sizes: what can be chosen, what fits a GPU, and which choice to try first.

The model that ranks configurations knows bytes, instructions and waves, and nothing was fitted to measurements: it
only decides which few are timed, and which one runs where nothing was timed.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from autoplan.errors import KernelError
from autoplan.kernels.cuda.gpus import Gpu, gpu_of

_LATENCY_US = 0.8  # from a load's issue to its data, in a busy memory system
_LAUNCH_US = 1.5  # one more kernel in a CUDA graph
_REGISTERS = 65_536  # of a multiprocessor, on every GPU here
_LANES = 128  # instructions that a multiprocessor issues per cycle, counted by thread


@dataclass(frozen=True, slots=True)
class Problem:
    """One product y [m, n] = x [m, k] W^T, as far as the choice of tile sizes depends on it."""

    m: int
    n: int
    k: int
    dtype: torch.dtype  # of x in the product
    group_size: int | None
    capability: tuple[int, int]

    @property
    def gpu(self) -> Gpu:
        return gpu_of(self.capability)


@dataclass(frozen=True)
class Config:
    """The tile sizes of a launch, by axis; as text the part of a kernel's name after "@": "BN8.BK512.w4.s2"."""

    values: tuple[tuple[str, int], ...]

    def __getitem__(self, axis: str) -> int:
        return dict(self.values)[axis]

    def get(self, axis: str, default: int) -> int:
        return dict(self.values).get(axis, default)

    def __str__(self) -> str:
        return ".".join(f"{axis}{value}" for axis, value in self.values)


class Space:
    """All combinations of the values on its axes.

    BM, BN, BK: rows, output features and input features of a tile; SK: programs that share out a tile's input features
    (split-K); w: warps; s: stages of the loads' pipeline.
    """

    def __init__(self, **axes: Iterable[int]) -> None:
        self.axes = {axis: tuple(values) for axis, values in axes.items()}

    def __iter__(self) -> Iterator[Config]:
        for values in itertools.product(*self.axes.values()):
            yield Config(tuple(zip(self.axes, values, strict=True)))

    def parse(self, text: str) -> Config:
        """The configuration that `text` writes. Raises KernelError when this space has none such."""
        found = re.findall(r"([A-Za-z]+)(\d+)(?:\.|$)", text)
        config = Config(tuple((axis, int(value)) for axis, value in found))
        if (
            str(config) != text
            or [axis for axis, _ in config.values] != list(self.axes)
            or any(value not in self.axes[axis] for axis, value in config.values)
        ):
            raise KernelError(f"{text!r} writes no tile sizes of this kernel; they are, in this order, {self}")
        return config

    def __str__(self) -> str:
        return ", ".join(f"{axis} {'|'.join(map(str, values))}" for axis, values in self.axes.items())


@dataclass(frozen=True, slots=True)
class Cost:
    """What one weight costs a kernel, for the model and for the limits of a block."""

    weight_bits: int
    instructions: Callable[[Problem, Config], float]  # per weight, in the main loop: the compile tests hold it to this
    activation_bits: int = 16  # as the main loop reads them
    accumulators: int = 1  # tiles of [BM, BN] that a block keeps in registers
    operand_bits: int = 16  # per weight, of what the loop unpacks into registers; 0 if tensor cores read it as stored
    speed: float = 1.0  # of the tensor cores, against bf16
    step: int = 0  # input features of a tile, where BK does not say

    def block_bytes(self, config: Config) -> int:
        """Shared memory of a block whose loads are pipelined: `s` tiles of activations and of weights."""
        bm, bn, bk = config.get("BM", 0), config["BN"], config.get("BK", self.step)
        from_shared = bm >= 64  # wgmma reads its second operand there, unpacked
        unpacked = bk * bn * self.operand_bits if from_shared else 0
        return (config["s"] * bk * (bm * self.activation_bits + bn * self.weight_bits) + unpacked) // 8

    def thread_registers(self, config: Config) -> int:
        """Registers that a thread's share of the tiles takes; addresses and indices come on top."""
        bm, bn, bk = config.get("BM", 1), config["BN"], config.get("BK", self.step)
        sums = bm * bn * self.accumulators if bm > 1 else bn * bk
        return (sums + bn * bk * self.operand_bits // 32) // (32 * config["w"])

    def fits(self, problem: Problem, config: Config) -> bool:
        """Whether a block stays within the GPU's shared memory, and a thread within its 255 registers."""
        return self.block_bytes(config) <= problem.gpu.shared_bytes and self.thread_registers(config) <= 190

    def predicted_us(self, problem: Problem, config: Config) -> float:
        """A guess at a launch's microseconds: the slowest of memory, L2, instructions and tensor cores, and some of the
        others, which overlap with it in part.
        """
        gpu, bm, bn = problem.gpu, config.get("BM", 1), config["BN"]
        row_tiles, column_tiles, split = math.ceil(problem.m / bm), math.ceil(problem.n / bn), config.get("SK", 1)
        blocks = row_tiles * column_tiles * split
        resident = max(
            min(
                gpu.warps // config["w"],
                gpu.shared_bytes // max(self.block_bytes(config), 1),
                _REGISTERS // (32 * config["w"] * (self.thread_registers(config) + 40)),
                16,
            ),
            1,
        )
        busy = min(1.0, blocks / gpu.processors)
        waves = blocks / (resident * gpu.processors)
        even = waves / math.ceil(waves) if waves > 1 else 1.0  # the last wave leaves processors idle

        weights = problem.n * problem.k
        weight_bytes = weights * self.weight_bits / 8
        input_bytes = problem.m * problem.k * self.activation_bits / 8
        pending = min(resident, blocks / gpu.processors) * self.block_bytes(config)
        needed = _LATENCY_US * gpu.bandwidth / gpu.processors  # Little's law: bytes under way that hide the latency
        memory = (weight_bytes + input_bytes) / (gpu.bandwidth * min(1.0, pending / needed) * busy)
        l2 = (weight_bytes * row_tiles + input_bytes * column_tiles) / (gpu.l2_bandwidth * busy)
        issued = row_tiles * weights * self.instructions(problem, config)
        issue = issued / (gpu.processors * _LANES * gpu.clock * busy * even)
        product = 2.0 * row_tiles * bm * column_tiles * bn * problem.k
        tensor_cores = 0.0 if bm == 1 else product / (gpu.bf16_flops * self.speed * busy * even)
        sums = 0.0 if split == 1 else _LAUNCH_US + 8 * split * problem.m * problem.n / gpu.l2_bandwidth
        parts = (memory, l2, issue, tensor_cores)
        return 0.8 * max(parts) + 0.2 * math.fsum(parts) + sums

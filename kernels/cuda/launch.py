"""What a Triton kernel of ours is: what it can run, the tile sizes it may use, and the launches that it makes.

A kernel describes its launches and does not make them itself, so that one description serves three readers: on a GPU
(and in Triton's interpreter) `submit` runs it; the compile tests translate it for GPUs that no machine at hand has; and
the tests of both kinds find every kernel in `triton_kernels()` without being told.

Nothing here imports Triton: `TritonKernel.source` names a function whose module does, and it is loaded on first use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoplan.kernels import ops
from autoplan.kernels.cuda import seeds
from autoplan.kernels.cuda.layouts import sizes
from autoplan.kernels.cuda.space import Config, Cost, Problem, Space
from autoplan.kernels.packing import Canonical, quantize_grouped, quantize_per_channel
from autoplan.kernels.reference import linear_float64, relative_error

MOST_VARIANTS = 6  # how many configurations a kernel names for one problem: no more are worth compiling
_TENSOR_CORE_FLOATS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Call:
    """The tensors of one call: x [m, k] contiguous, the packed weight, an optional bias [n], and y [m, n] to fill."""

    x: Tensor
    packed: ops.Packed
    bias: Tensor | None
    y: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """m, n, k."""
        return self.y.shape[0], self.y.shape[1], self.x.shape[1]


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of one `@triton.jit` function: enough to make it, and to compile it for another GPU."""

    function: Any  # triton.JITFunction
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | None]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 1
    step_weights: int = 0  # weights that a program reads in one pass of its main loop; 0 where there is no such loop


def submit(launch: Launch, device: torch.device) -> None:
    """Make the launch on `device`'s current stream."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):  # Triton launches on the current device, whatever its tensors' device is
            return submit(launch, torch.device("cuda"))
    launch.function[launch.grid](
        **launch.arguments, **launch.constants, num_warps=launch.warps, num_stages=launch.stages
    )
    return None


MOST_SPLIT_ROWS = 128  # that split-K is for: its workspace grows with them, and their tiles fill the GPU alone


@dataclass(frozen=True, eq=False)
class TritonKernel:
    """One kernel: what it supports, its space of tile sizes, what a weight costs it, and its launches."""

    name: str
    weight: str  # "int8", "fp8" or "int4"
    source: str  # "module.function" of this package: (Call, Config) -> Iterator[Launch]
    layout: ops.Layout
    space: Space
    cost: Cost
    fits: Callable[[Problem, Config], bool] = lambda problem, config: True  # beyond what `cost` says of any tile
    most_rows: int | None = None  # above, it is not worth timing (it still runs)
    quantizes_activations: bool = False

    def launches(self, call: Call, config: Config) -> Iterator[Launch]:
        """The launches that compute `call`, in order."""
        return _function(self.source)(call, config)

    def supports(self, spec: ops.LinearSpec) -> str | None:
        """None, or why a layer of `spec` cannot use this kernel."""
        return unsupported(self.weight, spec, self.quantizes_activations)

    def ranked(self, problem: Problem) -> tuple[Config, ...]:
        """The configurations for a problem, best guess first: measured ones, then by the model of `Cost`."""
        return _ranked(self, problem)

    def variants(self, spec: ops.LinearSpec, rows: int) -> tuple[str, ...]:
        """The configurations worth timing for a layer of `spec` on this many rows: none where the kernel never pays."""
        if (self.most_rows is not None and rows > self.most_rows) or self.supports(spec) is not None:
            return ()
        return tuple(map(str, self.ranked(problem_of(spec, rows))))

    def configured(self, config: str) -> ops.Run:
        """How to run with the tile sizes that `config` writes. Raises KernelError when it writes none."""
        return functools.partial(self._run, self.space.parse(config))

    def run(self, x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Run with the best guess for this many rows."""
        n, group_size = sizes(packed)
        capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
        spec = ops.LinearSpec(x.shape[1], n, x.dtype, group_size, capability)
        return self._run(self.ranked(problem_of(spec, x.shape[0]))[0], x, packed, bias, dtype)

    def _run(self, config: Config, x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if config.get("SK", 1) > 1 and x.shape[0] > MOST_SPLIT_ROWS:  # planned for few rows, and called with many
            return self.run(x, packed, bias, dtype)
        call = self.call(x, packed, bias, dtype)
        for launch in self.launches(call, config):
            submit(launch, x.device)
        return call.y

    def call(self, x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Call:
        """The tensors of a call, its output still to be filled."""
        if not self.quantizes_activations and x.dtype not in _TENSOR_CORE_FLOATS:
            x = x.to(torch.bfloat16)
        return Call(x, packed, bias, x.new_empty((x.shape[0], sizes(packed)[0]), dtype=dtype))

    def probe(self) -> str | None:
        """None, or why this machine cannot run it: 3 rows on the GPU, against float64."""
        return probe_on_gpu(self.weight, self.layout, self.run, 0.06 if self.quantizes_activations else 0.01)


@functools.cache
def _function(source: str) -> Callable[[Call, Config], Iterator[Launch]]:
    module, _, name = source.partition(".")
    function: Callable[[Call, Config], Iterator[Launch]] = getattr(
        importlib.import_module(f"{__package__}.{module}"), name
    )
    return function


@functools.cache
def _ranked(kernel: TritonKernel, problem: Problem) -> tuple[Config, ...]:
    fitting = {
        str(config): config
        for config in kernel.space
        if kernel.cost.fits(problem, config) and kernel.fits(problem, config)
    }
    measured = [fitting[text] for text in seeds.find(kernel.name, problem, gpu_name(problem)) if text in fitting]
    guessed = sorted(fitting.values(), key=lambda config: (kernel.cost.predicted_us(problem, config), str(config)))
    # The model knows least about pipelines: first the best depth of every tile, then the next best.
    depths: Counter[str] = Counter()
    by_depth: list[tuple[int, Config]] = []
    for config in guessed:
        tile = str(config).rpartition(".s")[0]
        by_depth.append((depths[tile], config))
        depths[tile] += 1
    ordered = [config for _, config in sorted(by_depth, key=lambda item: item[0])]
    return tuple(dict.fromkeys([*measured, *ordered]))[:MOST_VARIANTS]


def gpu_name(problem: Problem) -> str | None:
    """The name of this machine's GPU, if it has one of the problem's capability."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != problem.capability:
        return None
    return torch.cuda.get_device_name()


def problem_of(spec: ops.LinearSpec, rows: int) -> Problem:
    """The problem that decides the tile sizes: rows count by the next power of two, as they do in the seed table."""
    return Problem(
        m=1 << (rows - 1).bit_length(),
        n=spec.out_features,
        k=spec.in_features,
        dtype=spec.dtype if spec.dtype in _TENSOR_CORE_FLOATS else torch.bfloat16,
        group_size=spec.group_size,
        capability=spec.capability or (8, 0),
    )


def unsupported(weight: str, spec: ops.LinearSpec, quantizes_activations: bool = False) -> str | None:
    """None, or why no kernel of ours can run `weight` ("int8", "fp8", "int4") for a layer of `spec` on its GPU."""
    if spec.dtype not in (torch.float32, *_TENSOR_CORE_FLOATS):
        return f"input dtype {spec.dtype} is not float32, bfloat16 or float16"
    if spec.capability is None:
        return "it runs on CUDA GPUs, and no compute capability was given"
    needed = (8, 9) if weight == "fp8" else (8, 0)
    if spec.capability < needed:
        values = "e4m3 values need" if weight == "fp8" else "its tensor core instructions need"
        return "{} compute capability {}.{}, this GPU has {}.{}".format(values, *needed, *spec.capability)
    if weight == "int8" and quantizes_activations and spec.capability[0] in (10, 11):
        return "on this GPU only the old tensor core instructions multiply int8, more slowly than the new ones bf16"
    if weight == "int4" and spec.group_size not in (32, 64, 128):
        return f"group size {spec.group_size} is not 32, 64 or 128"
    return None


def quantized(weight: str, values: Tensor, group_size: int | None = None) -> Canonical:
    """The canonical weight of kind "int8", "fp8" or "int4" for `values` [n, k]: what probes and tests run."""
    if weight == "int4":
        return quantize_grouped(values, group_size or 32)
    return quantize_per_channel(values, torch.int8 if weight == "int8" else torch.float8_e4m3fn)


def probe_on_gpu(weight: str, layout: ops.Layout, run: ops.Run, tolerance: float) -> str | None:
    """None, or why this machine's GPU cannot run it: 3 rows of an odd shape, against float64."""
    if not torch.cuda.is_available():
        return "this machine has no CUDA GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    generator = torch.Generator().manual_seed(0)
    stored = quantized(weight, torch.randn(48, 384, generator=generator), 128)
    x, bias = torch.randn(3, 384, generator=generator).bfloat16(), torch.randn(48, generator=generator)
    packed = layout.pack({key: tensor.cuda() for key, tensor in stored.items()})
    if any(not torch.equal(tensor.cpu(), stored[key]) for key, tensor in layout.unpack(packed).items()):
        return "its probe did not get the weight back from the layout on this machine"
    y = run(x.cuda(), packed, bias.cuda(), torch.bfloat16).cpu()
    error = relative_error(y, linear_float64(x, stored, bias))
    return None if error < tolerance else f"its probe gave a relative error of {error:.2g} on this machine"


_TRITON_KERNELS: dict[str, TritonKernel] = {}


def register_triton_kernel(kernel: TritonKernel) -> None:
    """Make a kernel known to the planner, and to the interpreter and compile tests."""
    _TRITON_KERNELS[kernel.name] = kernel
    ops.register_kernel(
        ops.Kernel(
            name=kernel.name,
            devices=("cuda",),
            layout=kernel.layout,
            supports=kernel.supports,
            probe=kernel.probe,
            run=kernel.run,
            most_rows=kernel.most_rows,
            variants=kernel.variants,
            configured=kernel.configured,
        )
    )


def triton_kernels() -> tuple[TritonKernel, ...]:
    """Every Triton kernel, in the order of registration."""
    return tuple(_TRITON_KERNELS.values())

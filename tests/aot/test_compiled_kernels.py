"""Every configuration that `variants` offers compiles for its GPU, within limits, to the instructions we count on.

The layers are those of Llama-3-8B. A plain run takes the first choices; `-m slow` takes everything else.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

import aot
import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from autoplan.kernels import LinearSpec, cuda
from autoplan.kernels.cuda.launch import problem_of, triton_kernels
from autoplan.kernels.cuda.space import Config

KERNELS = {kernel.name: kernel for kernel in triton_kernels()}
CAPABILITIES = {80: (8, 0), 89: (8, 9), 90: (9, 0), 100: (10, 0)}
LAYERS = ((4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (128256, 4096))
ROWS = (1, 4, 16, 32, 64, 128, 512, 2048)
WGMMA = {"a8w8_gemm_int8": "IGMMA", "a8w8_gemm_fp8": "QGMMA"}  # of the others HGMMA, in 16-bit floats

assert cuda.registry


class Case(NamedTuple):
    """One configuration, at one of the problems that it is offered for."""

    kernel: str
    config: str
    architecture: int
    dtype: torch.dtype
    group_size: int | None
    rows: int
    layer: tuple[int, int]

    def __str__(self) -> str:
        group = f"g{self.group_size}-" if self.group_size else ""
        return f"sm_{self.architecture}-{self.kernel}-{group}{self.config}-{str(self.dtype).removeprefix('torch.')}"


def offered(
    architectures: Iterable[int], layers: Iterable[tuple[int, int]], rows: Iterable[int], choices: int,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,), group_sizes: Iterable[int] = (128,),
) -> dict[str, Case]:  # fmt: skip
    """What planning would time there, the first `choices` of each, every configuration once."""
    cases: dict[str, Case] = {}
    grid = itertools.product(architectures, KERNELS.values(), dtypes, layers, rows)
    for architecture, kernel, dtype, (n, k), m in grid:
        for group_size in group_sizes if kernel.weight == "int4" else (None,):
            spec = LinearSpec(k, n, dtype, group_size, CAPABILITIES[architecture])
            for config in kernel.variants(spec, m)[:choices]:
                case = Case(kernel.name, config, architecture, dtype, group_size, m, (n, k))
                cases.setdefault(re.sub(r"SK[248]", "SK2", str(case)), case)  # one way of splitting stands for all
    return cases


FIRST = {
    **offered([90], LAYERS[::4], [1, 16, 64, 2048], choices=1),
    **offered([80, 89, 100], [(14336, 4096)], [1, 64, 2048], choices=1),
    **offered([90], [(14336, 4096)], [1], choices=1, dtypes=[torch.float16], group_sizes=[32, 64, 128]),
}
ALL = offered(CAPABILITIES, LAYERS, ROWS, choices=99, group_sizes=[32, 64, 128])


def check(case: Case) -> None:
    """The limits of a block, no spilled register, wide loads, tensor cores, and few instructions for every weight."""
    kernel = KERNELS[case.kernel]
    n, k = case.layer
    config: Config = kernel.space.parse(case.config)
    problem = problem_of(LinearSpec(k, n, case.dtype, case.group_size, CAPABILITIES[case.architecture]), case.rows)
    (main,) = (
        aot.compile_launch(launch, case.architecture)
        for launch in aot.launches(kernel, config, case.rows, n, k, case.dtype, case.group_size)
        if launch.step_weights
    )
    print(f"{case}: {aot.summary(main)}")
    assert main.resources["STACK"] == 0, "registers are spilled"
    assert main.shared_bytes <= aot.SHARED_LIMIT[case.architecture]
    assert main.shared_bytes <= kernel.cost.block_bytes(config) + 4096, "the model of shared memory is off"
    assert main.loads_16_bytes, "weights are not loaded 16 bytes at a time"
    assert main.instructions_per_weight <= kernel.cost.instructions(problem, config)
    tall = config.get("BM", 1) >= 64
    if case.architecture == 90 and tall:
        assert main.contains(WGMMA.get(case.kernel, "HGMMA"))


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_first_choices_keep_to_the_limits(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for name, case in ALL.items() if name not in FIRST], ids=str)
def test_all_choices_keep_to_the_limits(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("architecture", CAPABILITIES)
def test_what_goes_before_and_after_the_product_compiles(architecture: int) -> None:
    """Quantizing rows, whole and in pieces, and adding up the parts of a split."""
    weight = "int8" if architecture < 89 else "fp8"
    kernel = KERNELS[f"a8w8_gemm_{weight}"]
    config = next(config for config in kernel.space if config["SK"] > 1)
    for k in (4096, 20480):
        before, _, after = aot.launches(kernel, config, 16, 4096, k, torch.bfloat16)
        for launch in (before, after):
            one = aot.compile_launch(launch, architecture)
            print(f"sm_{architecture} k {k}: {aot.summary(one)}")
            assert one.resources["STACK"] == 0
            assert one.loads_16_bytes


def test_first_choices_for_llama_stay_under_the_ceilings() -> None:
    """Performance, without a GPU: at full bandwidth an H200 has 3.4 instructions to spare for an int4 weight."""
    ceilings = {"w4_gemm_small": 2.9, "w8_gemv_int8": 4.3, "w8_gemv_fp8": 4.3, "w8_gemm_small_int8": 4.7}
    for name, ceiling in ceilings.items():
        spec = LinearSpec(4096, 14336, torch.bfloat16, 128, (9, 0))
        config = KERNELS[name].space.parse(KERNELS[name].variants(spec, 1)[0])
        (launch,) = aot.launches(KERNELS[name], config, 1, 14336, 4096, torch.bfloat16, 128)
        assert aot.compile_launch(launch, 90).instructions_per_weight <= ceiling, name


def test_what_a_gpu_cannot_run_is_rejected_and_does_not_compile() -> None:
    kernel = KERNELS["w8_gemv_fp8"]
    spec = LinearSpec(4096, 4096, torch.bfloat16, None, (8, 0))
    assert "need compute capability 8.9" in str(kernel.supports(spec))
    assert kernel.variants(spec, 1) == ()
    (launch,) = aot.launches(kernel, next(iter(kernel.space)), 1, 4096, 4096, torch.bfloat16)
    with pytest.raises(Exception, match="fp8e4nv not supported"):
        aot.compile_launch(launch, 80)


class NoGpu:
    """Stands in for Triton's driver, on an H200 that is not there: enough to compile by, not to launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.mark.parametrize("name", ["w8_gemv_int8", "w8_gemm_small_fp8", "w4_gemm_small", "a8w8_gemm_int8",
                                  "a8w8_fused_small_fp8"])  # fmt: skip
def test_a_launch_compiles_to_what_was_checked_here(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way a GPU's owner gets there: Triton itself reads the types of a launch's arguments."""
    config = KERNELS[name].space.parse(
        KERNELS[name].variants(LinearSpec(4096, 1024, torch.bfloat16, 128, (9, 0)), 1)[0]
    )
    monkeypatch.setattr(driver, "_active", NoGpu())
    for launch in aot.launches(KERNELS[name], config, 1, 1024, 4096, torch.bfloat16, 128):
        done = launch.function.warmup(
            **launch.arguments, **launch.constants, grid=launch.grid, num_warps=launch.warps, num_stages=launch.stages
        )
        if launch.step_weights:
            assert done.asm["cubin"] == aot.compile_launch(launch, 90).binary

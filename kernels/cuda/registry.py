"""The Triton kernels by name: where their code is, the tile sizes to choose from, and what a weight costs them.

A new kernel is a function in a module of this package and an entry here, with its line of tile sizes, `Space`; the
interpreter and compile tests then cover it. Tiles that no problem gains from are left out: those that need more
instructions per weight than others of their size, or spill registers. That, and `instructions`, was read off machine
code for compute capabilities 8.0 to 10.0; nothing here was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

from autoplan.kernels.cuda.launch import MOST_SPLIT_ROWS, TritonKernel, register_triton_kernel
from autoplan.kernels.cuda.layouts import CHUNK, CODES, WORDS
from autoplan.kernels.cuda.space import Config, Cost, Problem, Space


def _weights_per_thread(config: Config, step: int = 0) -> float:
    """Weights that a thread handles in one pass of the main loop."""
    return config["BN"] * config.get("BK", step) / (32 * config["w"])


def _low_enough(problem: Problem, config: Config) -> bool:
    """No tile twice as high as there are rows, save the smallest."""
    return config["BM"] == 16 or config["BM"] < 2 * problem.m


def _split_pays(problem: Problem, config: Config, step: int = 0) -> bool:
    """Split-K only at few rows, whose tiles leave processors idle, and with two steps at least for each program."""
    split = config["SK"]
    return split == 1 or (problem.m <= MOST_SPLIT_ROWS and problem.k >= 2 * split * config.get("BK", step))


def _w8_gemv(problem: Problem, config: Config) -> bool:
    return 32 <= _weights_per_thread(config) <= 64


def _w8_gemm(problem: Problem, config: Config) -> bool:
    spilled = (config["BM"], config["BN"], config["BK"]) == (32, 64, 256)  # of e4m3, two registers on 9.0
    return not spilled and _low_enough(problem, config) and _split_pays(problem, config)


def _a8w8_gemm(problem: Problem, config: Config) -> bool:
    bm, warps = config["BM"], config["w"]
    sums_per_thread = bm * config["BN"] // (32 * warps)
    if not _split_pays(problem, config) or sums_per_thread > 128 or (warps == 8 and bm < 64):
        return False
    if problem.capability[0] in (10, 11):  # other tiles move tensor memory clumsily, or spill registers
        if bm >= 64:
            return problem.m > 32 and bm == 64 and config["BN"] == 32 * warps
        if (bm, config["BN"], config["BK"]) == (16, 128, 128):
            return False
    # On 9.0 wgmma multiplies e4m3 as it is, from 64 rows on; lower tiles would have to widen it first.
    return _low_enough(problem, config) or (problem.capability == (9, 0) and bm == 64)


def _w4_gemm(problem: Problem, config: Config) -> bool:
    # Each warp takes 32 features: with fewer, the loads of x outweigh the weights.
    # On 9.0 wgmma could take the unpacked weight from registers, in the transposed product; but compilers were seen
    # to overwrite these too early (https://github.com/triton-lang/triton/issues/9433, and ptxas before CUDA 13.3).
    bm, warps = config["BM"], config["w"]
    return (
        config["BN"] == 32 * warps
        and (bm < 64 or warps == 1)
        and _low_enough(problem, config)
        and _split_pays(problem, config, CHUNK)
    )


def _w4_instructions(problem: Problem, config: Config) -> float:
    height, more_groups = config["BM"] / 16, CHUNK // (problem.group_size or CHUNK) - 1
    return 2.3 + 0.55 * height + more_groups * (0.25 + 0.15 * height)


def _a8w8_instructions(weight: str) -> Callable[[Problem, Config], float]:
    def instructions(problem: Problem, config: Config) -> float:
        height, share = config["BM"] / 16, _weights_per_thread(config)
        if weight == "fp8" and problem.capability >= (9, 0) and height < 4:
            return 1.1 + 60 / share + 0.6 * height  # mma.sync has no e4m3 there: codes become fp16 in registers
        return 0.4 + 45 / share + 0.25 * height

    return instructions


for _weight in ("int8", "fp8"):
    register_triton_kernel(
        TritonKernel(
            name=f"w8_gemv_{_weight}",
            weight=_weight,
            source="w8.gemv",
            layout=CODES,
            space=Space(BN=(4, 8, 16), BK=(256, 512, 1024), w=(2, 4, 8), s=(1,)),
            cost=Cost(
                weight_bits=8,
                operand_bits=0,
                instructions=lambda problem, config: 3.3 + 52 / _weights_per_thread(config),
            ),
            fits=_w8_gemv,
            most_rows=1,
        )
    )
    register_triton_kernel(
        TritonKernel(
            name=f"w8_gemm_small_{_weight}",
            weight=_weight,
            source="w8.gemm_small",
            layout=CODES,
            space=Space(BM=(16, 32, 64), BN=(64, 128), BK=(128, 256), SK=(1, 2, 4, 8), w=(4,), s=(3, 4, 5)),
            cost=Cost(weight_bits=8, instructions=lambda problem, config: 3.3 + 7.4 * config["BM"] / config["BN"]),
            fits=_w8_gemm,
            most_rows=128,
        )
    )
    register_triton_kernel(
        TritonKernel(
            name=f"a8w8_fused_small_{_weight}",
            weight=_weight,
            source="a8w8.multiply_fused",
            layout=CODES,
            space=Space(BM=(16,), BN=(32, 64, 128), BK=(128, 256), SK=(1, 2, 4), w=(4,), s=(3, 4)),
            cost=Cost(
                weight_bits=8,
                operand_bits=0,
                speed=2.0,
                # the second part is the quantization, which every program does for itself
                instructions=lambda problem, config: 1.6 + 9.5 * config["BM"] / config["BN"],
            ),
            fits=_split_pays,
            most_rows=16,
            quantizes_activations=True,
        )
    )
    register_triton_kernel(
        TritonKernel(
            name=f"a8w8_gemm_{_weight}",
            weight=_weight,
            source="a8w8.multiply",
            layout=CODES,
            space=Space(BM=(16, 32, 64, 128), BN=(64, 128, 256), BK=(128, 256), SK=(1, 2, 4), w=(4, 8), s=(3, 4)),
            cost=Cost(
                weight_bits=8,
                activation_bits=8,
                operand_bits=0,
                speed=2.0,
                instructions=_a8w8_instructions(_weight),
            ),
            fits=_a8w8_gemm,
            quantizes_activations=True,
        )
    )

register_triton_kernel(
    TritonKernel(
        name="w4_gemm_small",
        weight="int4",
        source="w4.gemm_small",
        layout=WORDS,
        space=Space(BM=(16, 32, 64), BN=(32, 64, 128), SK=(1, 2, 4, 8), w=(1, 2, 4), s=(3, 4, 5)),
        cost=Cost(weight_bits=4, accumulators=2, step=CHUNK, instructions=_w4_instructions),
        fits=_w4_gemm,
        most_rows=128,
    )
)

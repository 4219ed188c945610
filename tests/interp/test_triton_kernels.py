"""Every registered Triton kernel in the interpreter, against float64: shapes round and ragged, all kinds of tiles.

Tensors lie between guards that poison every sum they enter, and outputs and workspaces start out as NaN: what reads or
writes beside a tensor, or leaves an element out, shows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from autoplan.kernels import cuda, find_kernel
from autoplan.kernels.cuda.launch import Call, TritonKernel, quantized, submit, triton_kernels
from autoplan.kernels.cuda.space import Config
from autoplan.kernels.packing import Canonical, dequantize
from autoplan.kernels.reference import relative_error

KERNELS = {kernel.name: kernel for kernel in triton_kernels()}
TOLERANCE = 4e-3  # of the output as a whole, most of it the output's rounding to bfloat16
GUARD = 256  # elements before and after a tensor

assert cuda.registry


@pytest.fixture(autouse=True)
def poisoned_workspaces() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN, or the largest integer
    yield
    torch.use_deterministic_algorithms(False)


class Guarded:
    """Tensors with guards on both sides."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def hold(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` between guards; 16-byte aligned, as a GPU's allocator would have it."""
        buffer = torch.empty(tensor.numel() + 2 * GUARD, dtype=tensor.dtype)
        buffer.view(torch.uint8).fill_(0x7F)  # NaN in e4m3, huge elsewhere
        if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
            buffer.fill_(torch.nan)
        held = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
        held.copy_(tensor)
        self.buffers.append((buffer, buffer.clone()))
        return held

    def check(self) -> None:
        for buffer, before in self.buffers:
            for side in (slice(None, GUARD), slice(-GUARD, None)):
                assert torch.equal(buffer[side].view(torch.uint8), before[side].view(torch.uint8)), "wrote on a guard"


def expected(kernel: TritonKernel, x: Tensor, stored: Canonical, bias: Tensor | None) -> Tensor:
    """What the kernel's candidate means, in float64: activations quantized first where it does that."""
    if kernel.quantizes_activations:  # in float32 as the kernels do, so that no tie is broken another way
        largest = 127.0 if kernel.weight == "int8" else 448.0
        scale = (x.float().abs().amax(dim=1, keepdim=True) / largest).clamp_min(1e-30)
        codes = x.float() * scale.reciprocal()
        x = (codes.round() if kernel.weight == "int8" else codes.to(torch.float8_e4m3fn)).double() * scale
    y = x.double() @ dequantize(stored, torch.float64).T
    return y if bias is None else y + bias.double()


def run(
    name: str, config: Config, m: int, n: int, k: int, dtype: torch.dtype, biased: bool, group_size: int | None = None,
    x: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the kernel gives, and what it should."""
    kernel, guarded = KERNELS[name], Guarded()
    stored = quantized(kernel.weight, torch.randn(n, k) * 0.05, group_size)
    x = torch.randn(m, k).to(dtype) if x is None else x
    bias = torch.randn(n).to(dtype) if biased else None
    y = guarded.hold(torch.full((m, n), torch.nan, dtype=dtype))
    call = Call(
        x=guarded.hold(x),
        packed=[guarded.hold(tensor) for tensor in kernel.layout.pack(stored)],
        bias=None if bias is None else guarded.hold(bias),
        y=y,
    )
    for launch in kernel.launches(call, config):
        submit(launch, y.device)
    guarded.check()
    return y, expected(kernel, x, stored, bias)


def representative(kernel: TritonKernel) -> list[Config]:
    """The smallest tiles, and with them every other value of every axis that changes what is computed."""
    axes = {axis: values for axis, values in kernel.space.axes.items() if axis not in ("w", "s")}
    smallest = {axis: min(values) for axis, values in kernel.space.axes.items()}
    found = [smallest]
    for axis, values in axes.items():
        others = values[1:2] if axis == "SK" else values[1:]
        found += [smallest | {axis: value} for value in others]
    return [Config(tuple(values.items())) for values in found]


CASES = [(kernel.name, str(config)) for kernel in KERNELS.values() for config in representative(kernel)]


def shapes(kernel: TritonKernel, config: Config) -> list[tuple[int, int, int]]:
    """(m, n, k): whole tiles; and rows, features and in-features that leave the last tile of each kind part empty."""
    bm, bn, split = config.get("BM", 1), config["BN"], config.get("SK", 1)
    bk = config.get("BK", kernel.cost.step)
    return [(bm, bn, bk * split), (bm + 3, bn + 6, bk * split + 96)]


def group_sizes(kernel: TritonKernel) -> tuple[int | None, ...]:
    return (32, 64, 128) if kernel.weight == "int4" else (None,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("name", "config"), CASES)
def test_every_kind_of_tile_matches_float64(name: str, config: str, dtype: torch.dtype) -> None:
    kernel = KERNELS[name]
    tiles = kernel.space.parse(config)
    for group_size in group_sizes(kernel):
        for biased, (m, n, k) in enumerate(shapes(kernel, tiles)):
            k -= k % (group_size or 1)
            y, wanted = run(name, tiles, m, n, k, dtype, bool(biased), group_size)
            assert relative_error(y, wanted) <= TOLERANCE, (m, n, k, group_size)


@pytest.mark.parametrize("name", KERNELS)
def test_a_call_without_a_config_takes_the_best_guess(name: str) -> None:
    """Also with float32 in and out, a bias of another dtype, and more rows than the kernel is timed at."""
    kernel = KERNELS[name]
    stored = quantized(kernel.weight, torch.randn(40, 160) * 0.05)
    packed = kernel.layout.pack(stored)
    for rows, dtype in ((1, torch.float32), (5, torch.bfloat16)):
        x, bias = torch.randn(rows, 160).to(dtype), torch.randn(40)
        y = kernel.run(x, packed, bias, dtype)
        assert y.dtype == dtype
        wanted = expected(kernel, x if kernel.quantizes_activations else x.bfloat16(), stored, bias)
        assert relative_error(y, wanted) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in KERNELS if "SK" in KERNELS[name].space.axes])
def test_split_k_gives_the_same_bits_every_time(name: str) -> None:
    kernel = KERNELS[name]
    config = next(config for config in representative(kernel) if config["SK"] > 1)
    stored, x = quantized(kernel.weight, torch.randn(40, 1024)), torch.randn(3, 1024).bfloat16()
    run = kernel.configured(str(config))
    packed = kernel.layout.pack(stored)
    assert torch.equal(run(x, packed, None, torch.bfloat16), run(x, packed, None, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])
@pytest.mark.parametrize("k", [7, 640, 20_000])
def test_rows_are_quantized_by_their_largest_value(dtype: torch.dtype, k: int) -> None:
    """Whole rows and those too long for one program, in three input dtypes; a row of zeros stays zeros."""
    from autoplan.kernels.cuda import a8w8

    for x_dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(4, k).to(x_dtype)
        x[1] = 0
        x[2] *= 1e-3
        codes, scales, launch = a8w8.quantize_rows(x, dtype)
        submit(launch, x.device)
        wanted = (x.float().abs().amax(dim=1) / (127.0 if dtype == torch.int8 else 448.0)).clamp_min(1e-30)
        torch.testing.assert_close(scales, wanted, rtol=1e-6, atol=0)
        scaled = x.float() * wanted.reciprocal()[:, None]
        assert torch.equal(codes.float(), (scaled.round_() if dtype == torch.int8 else scaled.to(dtype)).float())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, on NaN
@pytest.mark.parametrize("name", [name for name in KERNELS if KERNELS[name].quantizes_activations])
def test_a_broken_row_shows_and_stays_alone(name: str) -> None:
    kernel = KERNELS[name]
    x = torch.randn(4, 160).bfloat16()
    x[0, 3], x[2, 159], x[3] = torch.nan, torch.inf, 0
    config = representative(kernel)[0]
    y, _ = run(name, config, 4, 40, 160, torch.bfloat16, biased=False, x=x)
    assert not y[0].isfinite().any()
    assert not y[2].isfinite().any()
    assert y[1].isfinite().all()
    assert y[3].count_nonzero() == 0


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize(("name", "weight"), [("int_mm_cuda", "int8"), ("scaled_mm_cuda", "fp8")])
def test_torch_kernels_between_ours(name: str, weight: str, rows: int) -> None:
    """Their products run on a CPU too; what is ours about them is the quantization, the scales and the bias."""
    kernel, like = find_kernel(name), KERNELS[f"a8w8_gemm_{weight}"]
    stored, x, bias = quantized(weight, torch.randn(48, 160)), torch.randn(rows, 160).bfloat16(), torch.randn(48)
    y = kernel.run(x, kernel.layout.pack(stored), bias.bfloat16(), torch.bfloat16)
    assert relative_error(y, expected(like, x, stored, bias.bfloat16())) <= TOLERANCE

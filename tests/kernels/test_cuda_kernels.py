"""What the CUDA kernels say of themselves: which layers they support and why not, their tile sizes, their layouts."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autoplan.candidates import registered
from autoplan.errors import KernelError
from autoplan.kernels import LinearSpec, find_kernel, ops, packing
from autoplan.kernels.cuda import launch, layouts, library, seeds, tiles
from autoplan.kernels.cuda.gpus import gpu_of
from autoplan.kernels.cuda.launch import problem_of, quantized, triton_kernels

KERNELS = {kernel.name: kernel for kernel in triton_kernels()}
LIBRARY = ("int_mm_cuda", "scaled_mm_cuda", "tinygemm")
H200 = (9, 0)


def spec(
    name: str, capability: tuple[int, int] | None = H200, k: int = 4096, n: int = 4096,
    dtype: torch.dtype = torch.bfloat16, group_size: int = 128,
) -> LinearSpec:  # fmt: skip
    grouped = name in ("w4_gemm_small", "tinygemm")
    return LinearSpec(k, n, dtype, group_size if grouped else None, capability)


# Support.


@pytest.mark.parametrize("name", [*KERNELS, *LIBRARY])
def test_support_by_gpu(name: str) -> None:
    supports = find_kernel(name).supports
    assert find_kernel(name).devices == ("cuda",)
    needed = (8, 9) if "fp8" in name or name == "scaled_mm_cuda" else (8, 0)
    dynamic_int8 = name in ("a8w8_gemm_int8", "a8w8_fused_small_int8", "int_mm_cuda")
    for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)):
        reason = supports(spec(name, capability))
        if capability < needed:
            assert "need compute capability {}.{}".format(*needed) in str(reason)
        elif dynamic_int8 and capability[0] == 10:
            assert "only the old tensor core instructions" in str(reason)
        else:
            assert reason is None, capability
    assert "no compute capability was given" in str(supports(spec(name, None)))
    assert "float64" in str(supports(spec(name, dtype=torch.float64)))


def test_support_by_size() -> None:
    assert "group size 256" in str(find_kernel("w4_gemm_small").supports(spec("w4_gemm_small", group_size=256)))
    assert "multiple of 16" in str(find_kernel("scaled_mm_cuda").supports(spec("scaled_mm_cuda", k=40)))
    assert "multiple of 128" in str(find_kernel("tinygemm").supports(spec("tinygemm", k=192, group_size=64)))
    assert "multiple of 8" in str(find_kernel("int_mm_cuda").supports(spec("int_mm_cuda", n=41)))


def test_without_a_gpu_every_probe_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    for name in (*KERNELS, *LIBRARY):
        assert find_kernel(name).rejects(spec(name)) == "this machine has no CUDA GPU"


def test_every_kernel_serves_a_candidate() -> None:
    served = {name for candidate in registered() for name in candidate.kernels}
    assert {*KERNELS, *LIBRARY} <= served
    assert not any("int8pack_mm" in name for name in served)


# Tile sizes.


@pytest.mark.parametrize("name", KERNELS)
def test_variants_fit_and_can_be_named(name: str) -> None:
    kernel = KERNELS[name]
    sizes = ((4096, 4096), (1024, 14336), (128256, 4096), (40, 96), (7, 32), (8, 128))
    for capability, (n, k), rows in itertools.product(((8, 0), (8, 9), H200, (12, 0)), sizes, (1, 3, 64, 2048)):
        layer = spec(name, capability, k, n, group_size=32)
        offered = kernel.variants(layer, rows)
        if kernel.supports(layer) or (kernel.most_rows and rows > kernel.most_rows):
            assert offered == ()
            continue
        assert 1 <= len(offered) == len(set(offered)) <= 6
        for config in offered:
            assert find_kernel(f"{name}@{config}").name == f"{name}@{config}"
            assert kernel.cost.block_bytes(kernel.space.parse(config)) <= gpu_of(capability).shared_bytes
        assert kernel.ranked(problem_of(layer, 100_000))  # what it is not timed at, it still runs


def test_first_variants_differ_in_more_than_the_pipeline() -> None:
    offered = KERNELS["w8_gemm_small_int8"].variants(spec("w8_gemm_small_int8"), 16)
    assert len({config.rpartition(".")[0] for config in offered[:4]}) == 4


def test_the_model_prefers_what_a_gpu_needs() -> None:
    def first(name: str, n: int, rows: int) -> dict[str, int]:
        kernel = KERNELS[name]
        return dict(kernel.space.parse(kernel.variants(spec(name, n=n), rows)[0]).values)

    assert first("w4_gemm_small", 1024, 1)["SK"] > 1  # few features: all processors have work only if they share it
    assert first("w4_gemm_small", 28672, 1)["SK"] == 1
    assert first("a8w8_gemm_int8", 14336, 2048)["BM"] == 128
    assert first("w8_gemm_small_int8", 14336, 4)["BM"] == 16


@pytest.mark.parametrize("config", ["", "BM16", "BM16.BN64.SK1.w2.s4.", "BM16.BN65.SK1.w2.s4",
                                    "BN64.BM16.SK1.w2.s4", "BM16,BN64", "warp"])  # fmt: skip
def test_what_writes_no_tile_sizes_is_refused(config: str) -> None:
    with pytest.raises(KernelError, match=r"writes no tile sizes of this kernel; they are, in this order, BM 16\|32"):
        KERNELS["w4_gemm_small"].configured(config)


# Measured configurations.


def test_the_seed_table_comes_first_and_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KERNELS["w4_gemm_small"]
    problem = problem_of(spec(kernel.name), 5)
    guessed = [str(config) for config in kernel.ranked(problem)]
    unlikely = "BM16.BN32.SK2.w1.s3"
    assert problem.m == 8
    assert unlikely != guessed[0]

    path = tmp_path / "seeds.json"
    seeds.write(path, [seeds.entry("sm_90", kernel.name, problem, ["BM16.BN128.SK1.w4.s4"])])
    seeds.write(path, [seeds.entry("NVIDIA H200", kernel.name, problem, [unlikely, "of another version"])])
    seeds.write(path, [seeds.entry("sm_90", kernel.name, problem, [guessed[1]])])
    table = seeds.read(path.read_text())
    assert seeds.find(kernel.name, problem, "NVIDIA H200", table) == [unlikely, "of another version"]
    assert seeds.find(kernel.name, problem, "NVIDIA H100", table) == [guessed[1]]
    assert seeds.find(kernel.name, problem_of(spec(kernel.name), 9), "NVIDIA H200", table) == []
    assert len(json.loads(path.read_text())["entries"]) == 2

    monkeypatch.setattr(seeds, "_shipped", lambda: table)
    launch._ranked.cache_clear()
    assert str(kernel.ranked(problem)[0]) == guessed[1]
    monkeypatch.setattr(launch, "gpu_name", lambda problem: "NVIDIA H200")
    launch._ranked.cache_clear()
    assert str(kernel.ranked(problem)[0]) == unlikely
    launch._ranked.cache_clear()


def test_the_seeds_that_ship_name_configurations_there_are() -> None:
    for key, configs in seeds._shipped().items():
        for config in configs:
            KERNELS[json.loads(key)[1]].space.parse(config)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2, "entries": []}', '{"format": 1, "entries": [{}]}'])
def test_a_broken_seed_file_is_refused(text: str) -> None:
    with pytest.raises(KernelError):
        seeds.read(text)


# Layouts.


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("k_groups", [1, 3, 4, 9])
def test_int4_words_come_back_exactly(group_size: int, k_groups: int) -> None:
    for n in (1, 17, 64):
        stored = packing.quantize_grouped(torch.randn(n, k_groups * group_size) * 0.05, group_size)
        packed = layouts.WORDS.pack(stored)
        assert layouts.sizes(packed) == (n, group_size)
        assert all(tensor.is_contiguous() for tensor in packed)
        found = layouts.WORDS.unpack(packed)
        assert found.keys() == stored.keys()
        for key, tensor in stored.items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key], tensor), key


def test_int4_words_are_laid_out_as_described() -> None:
    n, k, group_size = 3, 256, 32
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, k // group_size).bfloat16()
    zero_point = torch.randint(0, 16, (n, k // group_size), dtype=torch.uint8)
    stored = {"codes": packing.pack_nibbles(codes), "scale": scale, "zero_point": zero_point}
    words, scales, groups = layouts.WORDS.pack(stored)
    for chunk, row, j, i in itertools.product(range(2), range(n), range(16), range(8)):
        assert int(words[chunk, row, j]) >> 4 * i & 15 == codes[row, 128 * chunk + 16 * i + j]
    assert torch.equal((scales & 15).t(), zero_point.int())
    torch.testing.assert_close(scales.view(torch.float32).t(), scale.float(), rtol=2**-19, atol=0)
    assert len(groups) == k // group_size


def test_tinygemm_unpacks_by_products_with_unit_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ops run on GPUs only; a stand-in for them computes what they are documented to compute."""

    def convert(codes: torch.Tensor, inner: int) -> torch.Tensor:
        even, odd = codes >> 4, codes & 15
        held = torch.stack((even, odd), dim=2).flatten(1)  # [n, k]
        n, k = held.shape
        return held.reshape(n // 8, 8, k // (inner * 16), 32, inner // 2).permute(0, 2, 3, 4, 1).contiguous()

    def multiply(x: torch.Tensor, tiles: torch.Tensor, group: int, scale_and_zero: torch.Tensor) -> torch.Tensor:
        held = tiles.permute(0, 4, 1, 2, 3).reshape(tiles.shape[0] * 8, -1).float()
        scale, zero = (part.repeat_interleave(group, 0).t().float() for part in scale_and_zero.unbind(2))
        return (x.float() @ ((held - 8) * scale + zero).t()).to(torch.bfloat16)

    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", convert)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", multiply)
    kernel = find_kernel("tinygemm")
    stored = packing.quantize_grouped(torch.randn(16, 256), 64)
    packed = kernel.layout.pack(stored)
    assert all(torch.equal(tensor, stored[key]) for key, tensor in kernel.layout.unpack(packed).items())
    x = torch.randn(3, 256).bfloat16()
    wanted = x.float() @ packing.dequantize(stored, torch.float32).t()
    y = kernel.run(x, packed, None, torch.bfloat16).float()
    assert float((y - wanted).norm() / wanted.norm()) < 1e-2
    assert library.TINYGEMM.arity == len(packed)


# Behind the op, without running anything.


@pytest.mark.parametrize("name", KERNELS)
def test_the_op_knows_its_output_on_cuda(name: str) -> None:
    kernel = KERNELS[name]
    config = next(iter(kernel.space))
    program = f"1:{name}@{config}"
    n, k, group_size = 48, 256, 32
    stored = quantized(kernel.weight, torch.randn(n, k), group_size)
    shapes = [(tensor.shape, tensor.dtype) for tensor in ops.pack_program(program, stored)]
    with FakeTensorMode():
        packed = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in shapes]
        x = torch.empty(5, k, dtype=torch.bfloat16, device="cuda")
        y = torch.ops.autoplan.linear(x, packed, None, program, n, torch.bfloat16, "none", [], [], None)
        assert (y.shape, y.dtype, y.device.type) == ((5, n), torch.bfloat16, "cuda")


def test_naming_kernels_and_variants_does_not_import_triton() -> None:
    script = (
        "import sys, torch; from autoplan.kernels import LinearSpec, find_kernel;"
        "spec = LinearSpec(4096, 4096, torch.bfloat16, 128, (9, 0)); kernel = find_kernel('w4_gemm_small');"
        "find_kernel('w4_gemm_small@' + kernel.variants(spec, 1)[0]); print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Launches.


def test_split_k_is_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer planned for decoding is called with a prompt: its workspace would take gigabytes."""
    made: list[launch.Launch] = []
    monkeypatch.setattr(launch, "submit", lambda one, device: made.append(one))
    kernel = KERNELS["w4_gemm_small"]
    config = next(str(config) for config in kernel.space if config["SK"] == 4)
    packed = kernel.layout.pack(packing.quantize_grouped(torch.randn(64, 1024), 128))
    for rows, split in ((launch.MOST_SPLIT_ROWS, 4), (launch.MOST_SPLIT_ROWS + 1, 1)):
        made.clear()
        kernel.configured(config)(torch.randn(rows, 1024).bfloat16(), packed, None, torch.bfloat16)
        assert made[0].constants["SPLIT"] == split
        assert len(made) == (1 if split == 1 else 2)


def test_grids_have_room_for_any_number_of_rows() -> None:
    rows = 1_000_000
    x, y = torch.empty(rows, 64, device="meta"), torch.empty(rows, 4096, device="meta")
    parts = torch.empty(1, rows, 4096, device="meta")
    columns, *others = reversed(tiles.adding_up(launch.Call(x, (), None, y), parts, None, None).grid)
    assert columns <= 65_535
    assert others == [rows // 4]

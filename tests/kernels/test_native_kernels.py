"""The C++ kernels: every instruction set they can be compiled for here, every way through them, against float64."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from autoplan.errors import KernelError
from autoplan.kernels import find_kernel, native, ops, packing
from autoplan.kernels.native import build
from autoplan.kernels.reference import linear_float64, relative_error

FEW_ROWS = 6  # of weight_only.cpp
GROUPED = {"fused_int4": 4, "fused_int5": 5, "fused_int6": 6, "tiled_int4": 4}  # bits
DYNAMIC = ("fused_int8", "fused_int4", "fused_int5", "fused_int6")  # int8 activations
KERNELS = (*DYNAMIC, "tiled_int8", "tiled_int4")
NO_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
INSTRUCTION_SETS = {
    "all of this CPU's": (),
    "AVX-512": NO_AMX,
    "AVX-512 without bfloat16": (*NO_AMX, "-mno-avx512bf16"),
}
TOLERANCES = {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 1e-3}  # of rounding the output


def _missing() -> str:
    try:
        build.library()
    except KernelError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing())


@pytest.fixture(params=INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS.keys())
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: build.library(*request.param))


def canonical(name: str, out_features: int, in_features: int) -> packing.Canonical:
    weight = torch.randn(out_features, in_features) * 0.05
    if bits := GROUPED.get(name):
        return packing.quantize_grouped(weight, next(g for g in (128, 64, 32) if in_features % g == 0), bits)
    return packing.quantize_per_channel(weight, torch.int8)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_path_is_close_to_float64(name: str, dtype: torch.dtype) -> None:
    kernel = find_kernel(name)
    # one thread and several; blocks and panels that are full, part full and missing; more rows than one group holds;
    # columns enough to be read side by side, and some that are left
    sizes = [(1, 32), (17, 96), (33, 64), (40, 320), (96, 1024), (616, 256)]
    if name == "fused_int8":
        sizes += [(3, 4), (9, 20), (50, 100), (17, 65)]
    for out_features, in_features in sizes:
        stored, bias = canonical(name, out_features, in_features), torch.randn(out_features).to(dtype)
        packed = kernel.layout.pack(stored)
        for rows in (1, 2, 3, 6, 7, 8, 9, 16, 17, 31, 33, 200):
            x = torch.randn(rows, in_features).to(dtype)
            error = relative_error(kernel.run(x, packed, bias, dtype), linear_float64(x, stored, bias))
            # int8 activations; or bfloat16 ones, beyond a few rows, times int4 weights rounded to bfloat16
            bound = 0.02 if name in DYNAMIC else 5e-3 if rows > FEW_ROWS else 1e-6
            assert error <= bound + TOLERANCES[dtype], (out_features, in_features, rows, error)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_row_of_int8_products_does_not_depend_on_how_many_there_are(dtype: torch.dtype) -> None:
    kernel, stored = find_kernel("fused_int8"), canonical("fused_int8", 616, 300)
    packed, bias, x = kernel.layout.pack(stored), torch.randn(616), torch.randn(70, 300).to(dtype)
    y = kernel.run(x, packed, bias, dtype)
    for rows in (1, 2, 3, 4, 5, 16, 17, 33):
        assert torch.equal(kernel.run(x[:rows], packed, bias, dtype), y[:rows]), rows


@pytest.mark.usefixtures("compiled")
def test_many_rows_and_wide_layers() -> None:
    """Groups of rows, threads that share rows and threads that share channels."""
    for rows, out_features, in_features in ((2500, 40, 64), (700, 48, 4096), (70, 1100, 1024)):
        for name in KERNELS:
            kernel, stored = find_kernel(name), canonical(name, out_features, in_features)
            x = torch.randn(rows, in_features)
            y = kernel.run(x, kernel.layout.pack(stored), None, torch.float32)
            assert relative_error(y, linear_float64(x, stored, None)) < 0.02, (name, rows, out_features, in_features)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("out_features", [352, 350])  # full cache lines, and lines that two rows share
def test_outputs_larger_than_a_cache_have_the_same_values(name: str, dtype: torch.dtype, out_features: int) -> None:
    kernel, stored = find_kernel(name), canonical(name, out_features, 192)
    packed, bias, x = kernel.layout.pack(stored), torch.randn(out_features), torch.randn(960, 192).to(dtype)
    y = kernel.run(x, packed, bias, dtype)
    assert y.nbytes > 512 * 1024
    parts = [kernel.run(part.contiguous(), packed, bias, dtype) for part in x.split(128)]
    assert torch.equal(y, torch.cat(parts))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("name", "rows"), [("fused_int8", 90), ("fused_int4", 8), ("fused_int5", 8), ("fused_int6", 8)]
)
def test_int8_products_are_exact(name: str, rows: int) -> None:
    """Rows of codes with a largest code of 127 are quantized without error, so only float32 rounding is left."""
    kernel, stored = find_kernel(name), canonical(name, 70, 192)
    x = torch.randint(-127, 128, (rows, 192)).float()
    x[:, 7] = 127
    y = kernel.run(x, kernel.layout.pack(stored), None, torch.float32)
    assert relative_error(y, linear_float64(x, stored, None)) < 1e-6


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("bits", [4, 5, 6])
def test_weights_in_groups_lose_what_int8_ones_would(bits: int) -> None:
    """At many rows the groups of a channel give up their scales, and are rounded to steps of largest value / 127."""
    kernel, x = find_kernel(f"fused_int{bits}"), torch.randint(-127, 128, (40, 256)).float()
    x[:, 0] = 127
    middle, codes = 2 ** (bits - 1) - 1, torch.randint(0, 2**bits, (48, 256), dtype=torch.uint8)
    zero_point, scale = torch.full((48, 4), middle, dtype=torch.uint8), (torch.rand(48, 4) + 0.1).bfloat16()
    stored = {"codes": packing.pack_nibbles(codes & 15), "scale": scale, "zero_point": zero_point}
    if bits > 4:
        stored["upper_bits"] = packing.pack_bits(codes >> 4, bits - 4)
    y = kernel.run(x, kernel.layout.pack(stored), None, torch.float32)
    steps, weight = scale.amax(dim=1) * (middle + 1) / 127, packing.dequantize(stored, torch.float64)
    rounding = float((steps.square().mean() / 12 / weight.square().mean()).sqrt())
    assert 0.8 * rounding < relative_error(y, linear_float64(x, stored, None)) < 1.2 * rounding


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rows", [2, 40])
def test_not_a_number_stays_in_its_row(name: str, rows: int) -> None:
    kernel, stored = find_kernel(name), canonical(name, 40, 128)
    for dtype, bad in itertools.product(TOLERANCES, (torch.nan, torch.inf)):
        x = torch.randn(rows, 128).to(dtype)
        x[1, 100] = bad
        y = kernel.run(x, kernel.layout.pack(stored), None, dtype)
        assert not torch.isfinite(y[1]).any()
        assert torch.isfinite(y[0]).all()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("rows", [2, 8, 12, 40])
def test_an_infinity_is_not_turned_into_a_number(name: str, rows: int) -> None:
    kernel = find_kernel(name)
    packed = kernel.layout.pack(canonical(name, 64, 128))
    x = torch.randn(rows, 128)
    x[1, 100] = torch.inf
    assert kernel.into is not None
    for activation in ("none", "relu", "gelu", "silu"):
        y = torch.zeros(rows, 64)
        kernel.into(torch.float32, None, activation)(x, *packed, out=y)
        assert y[1].isnan().all()
        assert y[0].isfinite().all()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", DYNAMIC)
def test_large_inputs_give_large_outputs(name: str) -> None:
    kernel, stored = find_kernel(name), canonical(name, 40, 128)
    for rows in (3, 40):
        x = torch.rand(rows, 128) * 1e37
        y, exact = kernel.run(x, kernel.layout.pack(stored), None, torch.float32), linear_float64(x, stored, None)
        assert exact.abs().max() < torch.finfo(torch.float32).max
        assert relative_error(y / 1e37, exact / 1e37) < 0.02


@pytest.mark.usefixtures("compiled")
def test_what_lay_in_scratch_memory_is_no_weight() -> None:
    kernel = find_kernel("tiled_int4")
    before, stored = (packing.quantize_grouped(torch.randn(40, size), 48) for size in (2880, 144))
    kernel.run(torch.full((4, 2880), torch.nan), kernel.layout.pack(before), None, torch.float32)
    x = torch.randn(40, 144)
    y = kernel.run(x, kernel.layout.pack(stored), None, torch.float32)
    assert relative_error(y, linear_float64(x, stored, None)) < 0.005


@pytest.mark.parametrize("name", KERNELS)
def test_what_a_kernel_cannot_run_is_told(name: str) -> None:
    rejects = find_kernel(name).rejects
    assert rejects(ops.LinearSpec(4096, 64, torch.float32)) is None
    assert "float64" in (rejects(ops.LinearSpec(4096, 64, torch.float64)) or "")
    assert ("133144" in (rejects(ops.LinearSpec(133_145, 64, torch.float32)) or "")) == (name in DYNAMIC)
    assert rejects(ops.LinearSpec(133_144, 64, torch.float32)) is None
    assert "group size 24" in (rejects(ops.LinearSpec(96, 64, torch.float32, 24)) or "")
    assert ("group size 48" in (rejects(ops.LinearSpec(96, 64, torch.float32, 48)) or "")) == (GROUPED.get(name, 0) > 4)


@pytest.mark.parametrize("name", DYNAMIC)
def test_rows_that_no_memory_holds(name: str) -> None:
    kernel = find_kernel(name)
    packed, x = kernel.layout.pack(canonical(name, 32, 128)), torch.randn(1, 128)
    assert kernel.into is not None
    with pytest.raises(MemoryError, match=f"no memory for {1 << 50} rows: call the model with fewer rows at a time"):
        kernel.into(torch.float32, None, "none", rows=1 << 50)(x, *packed, out=torch.empty(1, 32))


def test_a_call_with_the_wrong_tensors() -> None:
    kernel = find_kernel("fused_int8")
    packed, x, out = kernel.layout.pack(canonical("fused_int8", 32, 128)), torch.randn(3, 128), torch.empty(3, 32)
    assert kernel.into is not None
    write = kernel.into(torch.float32, torch.float32, "none")
    for others in ((), (torch.zeros(32), torch.zeros(32)), (None,)):
        with pytest.raises(TypeError, match=f"takes 4 tensors, not {3 + len([x for x in others if x is not None])}"):
            write(x, *packed, *others, out=out)
    with pytest.raises(RuntimeError, match="non-tensor"):
        write(x, *packed, "bias", out=out)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KERNELS)
def test_several_threads_may_call_at_once(name: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    kernel, stored = find_kernel(name), canonical(name, 96, 256)
    packed, x = kernel.layout.pack(stored), torch.randn(64, 256)
    expected = kernel.run(x, packed, None, torch.float32)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: kernel.run(x, packed, None, torch.float32), range(64)):
            assert torch.equal(y, expected)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [(1, 32, 32), (37, 192, 64), (19, 288, 48)])
def test_weights_in_groups_are_quantized_as_torch_does(
    dtype: torch.dtype, bits: int, out_features: int, in_features: int, group_size: int
) -> None:
    weight = torch.randn(in_features, out_features).to(dtype).t()  # strided
    weight[0, :16], weight[-1] = 0, weight[-1].abs()  # parts of groups without a value, groups without a sign
    found, expected = (
        quantize(weight, group_size, bits) for quantize in (native.quantize_grouped_fast, packing.quantize_grouped)
    )
    assert {key: (t.dtype, t.shape) for key, t in found.items()} == {
        key: (t.dtype, t.shape) for key, t in expected.items()
    }
    for key in found:  # but for ranges that are equally good
        assert (found[key] == expected[key]).double().mean() > 0.97, key
    off, best = ((packing.dequantize(c, torch.float64) - weight).norm() for c in (found, expected))
    assert off == pytest.approx(float(best), rel=1e-5)


def test_weights_that_the_cpp_cannot_quantize_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: pytest.fail("called"))
    monkeypatch.setattr(native, "missing", lambda: "")
    for weight, group_size in ((torch.randn(3, 24), 24), (torch.randn(3, 32, dtype=torch.float64), 32)):
        for bits in (4, 6):
            expected = packing.quantize_grouped(weight, group_size, bits)
            for key, tensor in native.quantize_grouped_fast(weight, group_size, bits).items():
                assert torch.equal(tensor, expected[key])
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        native.quantize_grouped_fast(torch.randn(3, 80), 32)
    assert native.quantize_grouped_fast(torch.empty(4, 64, device="meta"), 32)["codes"].device.type == "meta"
    monkeypatch.setattr(native, "missing", lambda: "no compiler")
    assert native.quantize_grouped_fast(torch.randn(4, 64), 32)["codes"].shape == (4, 32)


def test_the_binary_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    features = build._cpu_features()
    made = build._binary(features, ())
    assert [made] == list(made.parent.iterdir())
    monkeypatch.setattr(build, "compiler", lambda: None)  # as where only the cache folder was copied to
    assert build._binary(features, ()) == made


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    with pytest.raises(KernelError, match="could not compile it"):
        build._binary(build._cpu_features(), ("-mno-avx512vnni", *NO_AMX))
    monkeypatch.setattr(build, "compiler", lambda: None)
    with pytest.raises(KernelError, match="no C\\+\\+ compiler was found"):
        build._binary(build._cpu_features(), ())
    monkeypatch.setattr(build, "_cpu_features", lambda: {"avx2"})
    with pytest.raises(KernelError, match="lacks avx512_vnni, avx512bw"):
        build.library.__wrapped__()

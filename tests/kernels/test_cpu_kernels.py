"""Every CPU kernel against the float64 oracle: odd shapes next to round ones, all dtypes, rows that hurt."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from autoplan.errors import KernelError
from autoplan.kernels import LinearSpec, find_kernel, ops, packing, register_kernel
from autoplan.kernels.reference import linear_float64, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(k, n) for k in (4, 20, 96, 100, 128, 300, 1000) for n in (1, 8, 17, 33)] + [(128, 48), (384, 64)]
ROWS = (1, 4, 129)

INT8 = ("int8pack", "dequantize_int8", "onednn_u8s8", "int_mm", "fused_int8", "tiled_int8")
GROUPED = {"int4pack": 4, "dequantize_int4": 4, "tiled_int4": 4, "fused_int4": 4, "fused_int5": 5, "fused_int6": 6}
FP8 = ("dequantize_fp8", "scaled_mm")
FLOAT = ("linear", "onednn")
QUANTIZES_ACTIVATIONS = {
    "onednn_u8s8": 0.012,
    "int_mm": 0.012,
    "fused_int8": 0.012,
    "fused_int4": 0.012,
    "fused_int5": 0.012,
    "fused_int6": 0.012,
    "scaled_mm": 0.05,
}  # error on N(0, 1) rows, K >= 96


def canonical(kernel: str, weight: torch.Tensor) -> packing.Canonical:
    if kernel in FLOAT:
        return {"weight": weight}
    if kernel in INT8:
        return packing.quantize_per_channel(weight, torch.int8)
    if kernel in FP8:
        return packing.quantize_per_channel(weight, torch.float8_e4m3fn)
    return packing.quantize_grouped(weight, 32, GROUPED[kernel])


def supported(kernel: str, k: int, n: int, dtype: torch.dtype) -> bool:
    if kernel in GROUPED and k % 32:
        return False
    return find_kernel(kernel).rejects(LinearSpec(k, n, dtype, 32 if kernel in GROUPED else None)) is None


@pytest.mark.parametrize("name", [*FLOAT, *INT8, *GROUPED, *FP8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close_to_float64_on_odd_shapes(name: str, dtype: torch.dtype) -> None:
    if (name, dtype) == ("onednn", torch.float16) and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        assert "float16" in (find_kernel(name).rejects(LinearSpec(64, 64, dtype)) or "")
        pytest.skip("oneDNN has no float16 on this CPU")
    kernel, ran = find_kernel(name), 0
    for (k, n), rows, biased in itertools.product(SIZES, ROWS, (True, False)):
        if not supported(name, k, n, dtype):
            continue
        ran += 1
        stored = canonical(name, (torch.randn(n, k) * 0.05).to(dtype))
        x = torch.randn(rows, k).to(dtype)
        bias = torch.randn(n).to(dtype) if biased else None
        y = kernel.run(x, kernel.layout.pack(stored), bias, dtype)
        assert y.shape == (rows, n)
        assert y.dtype == dtype
        # the error is held against the size of the sum's terms: a single output may cancel to nothing
        terms = {"weight": packing.dequantize(stored, torch.float64).abs()}
        scale = linear_float64(x.abs(), terms, bias.abs() if biased else None).norm()
        error = (y.double() - linear_float64(x, stored, bias)).norm() / scale.clamp_min(1e-9)
        bound = (
            0.02
            if name in QUANTIZES_ACTIVATIONS
            else {"int8pack": 4e-3, "int4pack": 4e-3, "tiled_int8": 4e-3, "tiled_int4": 4e-3}.get(name, 0.0)
        )
        output_rounding = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
        assert error <= bound + output_rounding, (name, k, n, rows, biased, error)
    assert ran, f"{name} ran on no shape"


@pytest.mark.parametrize("name", [*FLOAT, *INT8, *GROUPED, *FP8])
def test_unpack_gives_the_canonical_weight_back_exactly(name: str) -> None:
    kernel = find_kernel(name)
    for k, n in ((96, 48), (128, 16), (384, 64)):
        stored = canonical(name, torch.randn(n, k) * 0.05)
        found = kernel.layout.unpack(kernel.layout.pack(stored))
        assert found.keys() == stored.keys()
        for key, tensor in stored.items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key].to(torch.float64), tensor.to(torch.float64)), key
        assert len(kernel.layout.pack(stored)) == kernel.layout.arity


@pytest.mark.parametrize("name", [*FLOAT, *INT8, *GROUPED, *FP8])
def test_a_transposed_weight_is_not_read_as_another_matrix(name: str) -> None:
    kernel = find_kernel(name)
    weight = (torch.randn(64, 96) * 0.05).t()[:, :64]  # [96, 64], strided
    stored = canonical(name, weight)
    strided = {key: t.t().contiguous().t() if t.dim() == 2 else t for key, t in stored.items()}
    x = torch.randn(5, 64)
    expected = kernel.run(x, kernel.layout.pack(stored), None, torch.float32)
    assert torch.equal(kernel.run(x, kernel.layout.pack(strided), None, torch.float32), expected)


@pytest.mark.parametrize("name", ["onednn_u8s8", "int_mm", "scaled_mm"])
def test_activation_rows_are_scaled_one_by_one(name: str) -> None:
    kernel = find_kernel(name)
    weight = torch.randn(48, 128) * 0.05
    x = torch.randn(6, 128)
    x[1] = 0
    x[2] = 3.0
    x[3] *= 1e-41  # denormal
    x[4] *= 1e30
    x[5, 7] = 1e4  # one outlier: the rest of its row drowns, other rows must not
    y = kernel.run(x, kernel.layout.pack(canonical(name, weight)), None, torch.float32)
    expected = linear_float64(x, {"weight": weight}, None)
    assert bool(torch.isfinite(y).all())
    assert bool((y[1] == 0).all())
    assert bool((y[3].abs() < 1e-25).all())
    for row in (0, 2, 4):
        assert relative_error(y[row], expected[row]) < (0.06 if name == "scaled_mm" else 0.03), row


@pytest.mark.parametrize("name", [*INT8, *GROUPED, *FP8])
def test_hard_weights_stay_finite_and_exact_where_they_can(name: str) -> None:
    kernel = find_kernel(name)
    weight = torch.randn(48, 96) * 0.05
    weight[0] = 0
    weight[1] = 0.25
    weight[2] *= 1e-41
    weight[3, 5] = 1e4
    stored = canonical(name, weight)
    x = torch.randn(3, 96)
    y = kernel.run(x, kernel.layout.pack(stored), None, torch.float32)
    assert bool(torch.isfinite(y).all())
    assert bool((y[:, 0] == 0).all())
    assert relative_error(y[:, 1], linear_float64(x, {"weight": weight}, None)[:, 1]) < 0.06
    assert bool((y[:, 2].abs() < 1e-25).all())


@pytest.mark.parametrize(
    ("bits", "group_size", "bound"), [(4, 32, 0.079), (4, 64, 0.088), (4, 128, 0.096), (5, 64, 0.044), (6, 64, 0.022)]
)
def test_error_of_gaussian_weights_in_groups(bits: int, group_size: int, bound: float) -> None:
    weight = torch.randn(512, 4096) * 0.02
    stored = packing.quantize_grouped(weight, group_size, bits)
    assert relative_error(packing.dequantize(stored, torch.float32), weight) <= bound
    assert stored["codes"].dtype == stored["zero_point"].dtype == torch.uint8
    assert stored["scale"].dtype == torch.bfloat16


def test_codes_round_trip() -> None:
    codes = torch.randint(0, 64, (7, 40), dtype=torch.uint8)
    low, upper = packing.pack_nibbles(codes & 15), packing.pack_bits(codes >> 4, 2)
    assert torch.equal(packing.unpack_nibbles(low), codes & 15)
    assert torch.equal(packing.unpack_bits(upper), codes >> 4)
    assert torch.equal(packing.unpack_codes({"codes": low, "upper_bits": upper}), codes)


def test_int8pack_refuses_the_widths_that_crash_torch() -> None:
    for k in (4, 20, 100, 300, 1000):
        reason = find_kernel("int8pack").rejects(LinearSpec(k, 33, torch.bfloat16))
        assert reason is not None
        assert str(k) in reason


def test_the_linear_op_passes_opcheck() -> None:
    for name in ("linear", "dequantize_int8", "int8pack", "dequantize_int4"):
        kernel = find_kernel(name)
        packed = kernel.layout.pack(canonical(name, torch.randn(16, 64) * 0.05))
        args = (torch.randn(3, 64), list(packed), torch.randn(16), f"1:{name}", 16, torch.float32, "none", [], [], None)
        torch.library.opcheck(torch.ops.autoplan.linear.default, args, test_utils=("test_schema", "test_faketensor"))


def test_backward_is_that_of_the_dequantized_layer() -> None:
    stored = canonical("int_mm", torch.randn(24, 64) * 0.05)
    packed = find_kernel("int_mm").layout.pack(stored)
    x, bias = torch.randn(5, 64, requires_grad=True), torch.randn(24, requires_grad=True)
    y = torch.ops.autoplan.linear(x, packed, bias, "1:int_mm", 24, torch.float32, "none", [], [], None)
    seed = torch.randn_like(y)
    y.backward(seed)
    torch.testing.assert_close(x.grad, seed @ packing.dequantize(stored, torch.float32))
    torch.testing.assert_close(bias.grad, seed.sum(0))


def test_a_program_picks_the_kernel_by_rows() -> None:
    thresholds, kernels, slices = ops.parse_program("1:int8pack,24:dequantize_int8")
    assert thresholds == (1, 24)
    assert [kernel.name for kernel in kernels] == ["int8pack", "dequantize_int8"]
    assert slices == (slice(0, 4), slice(4, 6))


def test_unknown_and_duplicate_kernels_are_refused_by_name() -> None:
    with pytest.raises(KernelError, match=r"no kernel is named 'warp_drive'; there are .*onednn"):
        find_kernel("warp_drive")
    with pytest.raises(KernelError, match=r"'linear' is registered already"):
        register_kernel(find_kernel("linear"))


def test_kernels_with_the_same_layout_share_one_copy_of_the_weight() -> None:
    stored = canonical("int_mm", torch.randn(24, 64) * 0.05)
    program = "1:dequantize_int8,8:int8pack,32:int_mm"
    packed = ops.pack_program(program, stored)
    _, _, slices = ops.parse_program(program)
    assert slices[0] == slices[2] != slices[1]
    assert len(packed) == 2 + find_kernel("int8pack").layout.arity
    assert torch.equal(ops.unpack_program(program, packed)["codes"], stored["codes"])


def test_a_variant_of_a_kernel_is_a_kernel_of_its_own() -> None:
    def configured(config: str) -> ops.Run:
        if config != "double":
            raise KernelError(f"no such config: {config}")
        return lambda x, packed, bias, dtype: 2 * find_kernel("linear").run(x, packed, bias, dtype)

    base = dataclasses.replace(find_kernel("linear"), name="tests.with_variants", configured=configured)
    register_kernel(base)
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    packed = ops.pack_program("1:tests.with_variants@double", {"weight": weight})
    y = ops.run_linear(x, packed, None, "1:tests.with_variants@double", 5, torch.float32)
    torch.testing.assert_close(y, 2 * x @ weight.T)
    assert find_kernel("tests.with_variants@double").rejects(LinearSpec(8, 5, torch.float32)) is None
    with pytest.raises(KernelError, match="no such config: triple"):
        find_kernel("tests.with_variants@triple")
    with pytest.raises(KernelError, match="'onednn' has no variants"):
        find_kernel("onednn@x")

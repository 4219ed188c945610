"""What Inductor makes of planned layers: activation functions in them, and calls that go round the dispatcher."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.codecache import PyCodeCache

from autoplan.candidates import find_candidate
from autoplan.errors import KernelError
from autoplan.kernels import find_kernel, inductor, native, ops, packing
from autoplan.layers import PlannedLinear
from autoplan.siblings import join

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

_MISSING = find_kernel("fused_int8").probe()
pytestmark = pytest.mark.skipif(bool(_MISSING), reason=_MISSING or "")


def planned(out_features: int, in_features: int, program: str = "1:fused_int8") -> PlannedLinear:
    linear = nn.Linear(in_features, out_features).requires_grad_(False)
    return PlannedLinear.from_linear("layer", linear, find_candidate("int8_dynamic"), program)


class Block(nn.Module):
    def __init__(self, after: Callable[[Tensor], Tensor], program: str = "1:fused_int8") -> None:
        super().__init__()
        self.up, self.down, self.after = planned(64, 32, program), planned(32, 64), after

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.after(self.up(x)))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The activations of all layers that a compiled graph runs, in their order; of a norm after one, its eps."""
    found: list[Any] = []
    run_linear, writer = ops.run_linear, ops.writer

    def watched_run(*args: Any) -> Any:
        found.append(args[6] if len(args) > 6 else "none")
        return run_linear(*args)

    def watched_writer(*args: Any) -> ops.Write:
        write = writer(*args)

        def watched(*tensors: Tensor, out: Tensor) -> None:
            found.append(args[3] if args[6] is None else args[6])
            write(*tensors, out=out)

        return watched

    monkeypatch.setattr(ops, "run_linear", watched_run)
    monkeypatch.setattr(ops, "writer", watched_writer)
    torch.compiler.reset()
    PyCodeCache.cache_clear()  # what an earlier test has loaded was made by the writer itself
    return found


def compiled(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = torch.compile(block, fullgraph=True)(x)
    return y


@pytest.mark.parametrize("name", ["fused_int8", "fused_int4", "fused_int6", "tiled_int8", "tiled_int4"])
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_apply_them_to_what_they_return(name: str, rows: int, dtype: torch.dtype) -> None:
    kernel, weight = find_kernel(name), torch.randn(70, 128)
    stored = (
        packing.quantize_per_channel(weight, torch.int8)
        if name.endswith("int8")
        else packing.quantize_grouped(weight, 64, int(name[-1]))
    )
    packed, bias, x = kernel.layout.pack(stored), torch.randn(70), 0.3 * torch.randn(rows, 128).to(dtype)
    assert kernel.into is not None
    exact = kernel.run(x.float(), packed, bias, torch.float32)
    assert exact.abs().max() > 6  # into the tails
    for activation, function in ops.ACTIVATIONS.items():
        y = torch.full((rows, 70), torch.nan, dtype=dtype)
        kernel.into(dtype, bias.dtype, activation)(x, *packed, bias, out=y)
        atol = 2e-2 if dtype != torch.float32 else 6e-5 if activation == "gelu" else 4e-6
        rounding = 0.0 if dtype == torch.float32 else 2**-7  # to the next bfloat16
        torch.testing.assert_close(y, function(exact).to(dtype), atol=atol, rtol=rounding)


def test_not_a_number_stays_one() -> None:
    kernel = find_kernel("fused_int8")
    packed = kernel.layout.pack(packing.quantize_per_channel(torch.randn(64, 32), torch.int8))
    x = torch.randn(40, 32)
    x[1, 3] = torch.nan
    assert kernel.into is not None
    for activation in ops.ACTIVATIONS:
        y = torch.zeros(40, 64)
        kernel.into(torch.float32, None, activation)(x, *packed, out=y)
        assert y[1].isnan().all()
        assert y[0].isfinite().all()


@pytest.mark.parametrize(
    ("after", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (F.silu, "silu"),
        (nn.ReLU(), "relu"),
        (torch.relu, "relu"),
    ],
)
@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_has_them_in_its_layers(
    seen: list[str], after: Callable[[Tensor], Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    block, x = Block(after).to(dtype), torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        y = compiled(block, x)
        assert seen == [name, "none"]
        torch.testing.assert_close(y, block(x), atol=0.03, rtol=0)  # a code of the second layer may be another


@pytest.mark.parametrize(
    "after",
    [
        lambda y: y * torch.sigmoid(y + 1),
        lambda y: F.gelu(y) + y,  # the output itself is used too
        lambda y: F.gelu(y.mT).mT,
        lambda y: F.relu6(y),
        lambda y: F.gelu(y + 1),
        lambda y: y,
    ],
)
def test_other_uses_of_an_output_are_left_alone(seen: list[str], after: Callable[[Tensor], Tensor]) -> None:
    block, x = Block(after), torch.randn(5, 32)
    with torch.no_grad():
        y = compiled(block, x)
        assert seen == ["none", "none"]
        torch.testing.assert_close(y, block(x), atol=0.03, rtol=0)


def test_a_gate_has_its_activation_and_its_partner_none(seen: list[str]) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = planned(64, 32), planned(64, 32), planned(32, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    block, x = Gated(), torch.randn(2, 3, 32)
    with torch.no_grad():
        y = compiled(block, x)
        assert sorted(seen) == ["none", "none", "silu"]
        torch.testing.assert_close(y, block(x), atol=0.03, rtol=0)


def test_kernels_that_cannot_are_left_to_inductor(seen: list[str]) -> None:
    assert ops.writes_in_place("1:tiled_int8,7:fused_int8")
    assert not ops.writes_in_place("1:fused_int8,7:int_mm")
    block = Block(nn.GELU(), "1:fused_int8,7:int_mm")
    with torch.no_grad():
        compiled(block, torch.randn(5, 32))
    assert seen == ["none", "none"]


def test_an_op_with_an_activation_runs_on_every_kernel() -> None:
    layer, x = planned(64, 32, "1:fused_int8,7:int_mm"), torch.randn(8, 32)
    packed = layer._packed
    with torch.no_grad():
        y = torch.ops.autoplan.linear(x, packed, layer.bias, layer.program, 64, torch.float32, "gelu", [], [], None)
        torch.testing.assert_close(y, F.gelu(layer(x)))


def test_gradients_flow_as_ever(seen: list[str]) -> None:
    block, x = Block(nn.GELU()), torch.randn(5, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(compiled(block, x).sum(), x)
    assert seen == ["none", "none"]  # the output of the first is kept for its gradient
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    torch.testing.assert_close(gradient, expected, atol=0.03, rtol=0.03)


def test_gradients_through_an_activation_are_refused() -> None:
    layer, x = planned(64, 32), torch.randn(8, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="'gelu' is for graphs that need no gradients"):
        torch.ops.autoplan.linear(x, layer._packed, layer.bias, layer.program, 64, torch.float32, "gelu", [], [], None)


# Gates.


@pytest.mark.parametrize("name", ["fused_int8", "fused_int4", "fused_int6", "tiled_int8", "tiled_int4"])
@pytest.mark.parametrize("rows", [1, 3, 5, 12, 70, 700, 2100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [64, 320])
def test_kernels_multiply_one_half_with_the_other(name: str, rows: int, dtype: torch.dtype, features: int) -> None:
    kernel, weight = find_kernel(name), torch.randn(features, 128)
    stored = (
        packing.quantize_per_channel(weight, torch.int8)
        if name.endswith("int8")
        else packing.quantize_grouped(weight, 64, int(name[-1]))
    )
    packed, bias, x = kernel.layout.pack(stored), torch.randn(features), 0.1 * torch.randn(rows, 128).to(dtype)
    assert kernel.into is not None
    exact = kernel.run(x.float(), packed, bias, torch.float32)
    for activation in ops.GATED:
        y = torch.full((rows, features // 2), torch.nan, dtype=dtype)
        kernel.into(dtype, bias.dtype, activation)(x, *packed, bias, out=y)
        atol = 6e-5 * float(exact.abs().max()) if activation == "geglu" else 2e-5  # as above, times the other half
        rounding = 0.0 if dtype == torch.float32 else 2**-6  # of both factors
        expected = ops.activate(exact, activation).to(dtype)
        torch.testing.assert_close(y, expected, atol=max(atol, rounding), rtol=rounding)


class Gated(nn.Module):
    """Two siblings, one the gate of the other, and what comes after them."""

    def __init__(self, after: Callable[[Tensor, Tensor], Tensor], size: int = 64, bias: bool = False) -> None:
        super().__init__()
        linears = [nn.Linear(32, size, bias=bias).requires_grad_(False) for _ in range(2)]
        self.gate, self.up = (
            PlannedLinear.from_linear("layer", linear, find_candidate("int8_dynamic"), "1:fused_int8")
            for linear in linears
        )
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.gate(x), self.up(x))

    def joined(self) -> Gated:
        join("gate+up", [self.gate, self.up], "1:fused_int8")
        return self


@pytest.mark.parametrize(
    ("after", "name"),
    [
        (lambda gate, up: F.silu(gate) * up, "swiglu"),
        (lambda gate, up: up * F.silu(gate), "swiglu"),
        (lambda gate, up: F.gelu(gate) * up, "geglu"),
        (lambda gate, up: F.gelu(gate, approximate="tanh") * up, "geglu_tanh"),
        (lambda gate, up: torch.relu(gate) * up, "reglu"),
    ],
)
@pytest.mark.parametrize("shape", [(5, 32), (2, 35, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_and_its_partner_are_one_product(
    seen: list[str], after: Callable[[Tensor, Tensor], Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    block, x = Gated(after).to(dtype), torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        expected = block(x)
        seen.clear()
        y = compiled(block.joined(), x)
        assert seen == [name]
        tolerance = 2e-4 if dtype == torch.float32 else 2**-6
        torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "block",
    [
        Gated(lambda gate, up: F.silu(up) * gate),  # the second half is the gate
        Gated(lambda gate, up: F.silu(gate) * up + gate),
        Gated(lambda gate, up: F.silu(gate) * up + up),
        Gated(lambda gate, up: F.silu(gate) * (up + 1)),
        Gated(lambda gate, up: F.silu(gate) * F.silu(up)),
        Gated(lambda gate, up: F.silu(gate) * up, size=48),
        Gated(lambda gate, up: F.silu(gate) * up, bias=True),
        Gated(lambda gate, up: F.silu(gate) * gate + up),
    ],
)
def test_other_uses_of_two_halves_are_left_alone(seen: list[str], block: Gated) -> None:
    x = torch.randn(5, 32)
    with torch.no_grad():
        expected = block(x)
        seen.clear()
        torch.testing.assert_close(compiled(block.joined(), x), expected, atol=1e-5, rtol=1e-5)
    assert seen == ["none"]


@pytest.mark.parametrize("gated", [True, False])
def test_halves_of_two_rows_side_by_side_are_no_halves_of_a_layer(seen: list[str], gated: bool) -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = planned(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x).view(-1, 128)
            first, second = y[:, :32], y[:, 32:64]
            return F.silu(first) * second if gated else first.contiguous().sin().T @ second.contiguous().cos()

    block, x = Folded(), torch.randn(6, 32)
    with torch.no_grad():
        expected = block(x)
        seen.clear()
        torch.testing.assert_close(compiled(block, x), expected, atol=1e-5, rtol=1e-5)
    assert seen == ["none"]


def test_an_op_with_a_gate_runs_on_every_kernel() -> None:
    layer, x = planned(64, 32, "1:fused_int8,7:int_mm"), torch.randn(8, 32)
    for rows in (8, 5, 0):
        y = torch.ops.autoplan.linear(
            x[:rows], layer._packed, layer.bias, layer.program, 64, torch.float32, "geglu", [], [], None
        )
        torch.testing.assert_close(y, ops.activate(layer(x[:rows]), "geglu"), atol=1e-5, rtol=1e-5)


# Pieces.


@pytest.mark.parametrize("name", ["fused_int8", "fused_int4", "fused_int6", "tiled_int8", "tiled_int4"])
@pytest.mark.parametrize("rows", [3, 70, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_write_in_pieces(name: str, rows: int, dtype: torch.dtype) -> None:
    kernel, weight, sizes = find_kernel(name), torch.randn(192, 128), (64, 32, 96)
    stored = (
        packing.quantize_per_channel(weight, torch.int8)
        if name.endswith("int8")
        else packing.quantize_grouped(weight, 64, int(name[-1]))
    )
    packed, bias, x = kernel.layout.pack(stored), torch.randn(192), torch.randn(rows, 128).to(dtype)
    assert kernel.into is not None
    whole, memory = torch.empty(rows, 192, dtype=dtype), torch.full((rows, 192), torch.nan, dtype=dtype)
    kernel.into(dtype, bias.dtype, "relu")(x, *packed, bias, out=whole)
    kernel.into(dtype, bias.dtype, "relu", sizes)(x, *packed, bias, out=memory)
    pieces = memory.flatten().split([rows * size for size in sizes])
    for piece, expected in zip(pieces, whole.split(list(sizes), 1), strict=True):
        assert torch.equal(piece.view(expected.shape), expected)


class Attention(nn.Module):
    """Three siblings, whose outputs are used in ways that need them contiguous."""

    def __init__(self, sizes: Sequence[int], bias: bool = True, program: str = "1:fused_int8") -> None:
        super().__init__()
        layers = [nn.Linear(64, size, bias=bias).requires_grad_(False) for size in sizes]
        self.layers = nn.ModuleList(
            PlannedLinear.from_linear("layer", layer, find_candidate("int8_dynamic"), program) for layer in layers
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = torch.tanh(x)
        return [layer(x).view(x.shape[0], -1).cos() for layer in self.layers]

    def joined(self) -> Attention:
        join("layers", [*self.layers], self.layers[0].program)  # type: ignore[list-item]
        return self


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 64), (2, 9, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("freezing", [True, False])
def test_siblings_write_their_pieces(bias: bool, shape: tuple[int, ...], dtype: torch.dtype, freezing: bool) -> None:
    block, x = Attention([64, 32, 32], bias).to(dtype), torch.randn(shape, dtype=dtype)
    torch.compiler.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        expected = block(x)
        code = code_of(torch.compile(block.joined(), fullgraph=True), x)
        assert "'none', (64, 32, 32), " in code
        for y, alone in zip(torch.compile(block)(x), expected, strict=True):
            torch.testing.assert_close(y, alone, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("sizes", "program", "dynamic"),
    [([64, 48, 32], "1:fused_int8", False), ([64, 32], "1:int_mm", False), ([64, 32], "1:fused_int8", True)],
)
def test_other_siblings_have_their_pieces_cut_out(sizes: list[int], program: str, dynamic: bool) -> None:
    block, x = Attention(sizes, program=program), torch.randn(5, 64)
    torch.compiler.reset()
    with torch.no_grad():
        expected = block(x)
        for y, alone in zip(torch.compile(block.joined(), dynamic=dynamic)(x), expected, strict=True):
            torch.testing.assert_close(y, alone, atol=0.02, rtol=0)


def test_a_piece_that_is_all_that_a_model_returns() -> None:
    layer, x = planned(64, 32), torch.randn(1, 32)
    torch.compiler.reset()
    with torch.no_grad():
        y = torch.compile(lambda x: layer(x)[:, :16], fullgraph=True)(x)
        torch.testing.assert_close(y, layer(x)[:, :16])


def test_gradients_flow_through_siblings_as_ever() -> None:
    block, x = Attention([64, 32]), torch.randn(5, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(sum(y.sum() for y in block(x)), x)
    torch.compiler.reset()
    (gradient,) = torch.autograd.grad(sum(y.sum() for y in torch.compile(block.joined())(x)), x)
    torch.testing.assert_close(gradient, expected, atol=0.03, rtol=0.03)


# Norms.

ROUNDING = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 1e-2, "rtol": 2**-7},
    torch.float16: {"atol": 1e-3, "rtol": 2**-10},
}


def normalized(y: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    total = y.double() + residual.double()
    return F.layer_norm(total, y.shape[1:], weight.double(), bias.double(), eps).to(y.dtype)


@pytest.mark.parametrize("name", ["fused_int8", "fused_int4", "fused_int6", "tiled_int8", "tiled_int4"])
@pytest.mark.parametrize(("rows", "features"), [(1, 8), (3, 70), (12, 64), (70, 208), (2100, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_normalize_what_they_return(name: str, rows: int, features: int, dtype: torch.dtype) -> None:
    kernel, weight = find_kernel(name), torch.randn(features, 64)
    stored = (
        packing.quantize_per_channel(weight, torch.int8)
        if name.endswith("int8")
        else packing.quantize_grouped(weight, 64, int(name[-1]))
    )
    packed, x = kernel.layout.pack(stored), torch.randn(rows, 64).to(dtype)
    norm = [5 * torch.randn(rows, features).to(dtype), torch.randn(features).to(dtype), torch.randn(features).to(dtype)]
    assert kernel.into is not None
    for bias in (torch.randn(features), None):
        y, plain = torch.full((2, rows, features), torch.nan, dtype=dtype)
        given, own = (torch.float32, [bias]) if bias is not None else (None, [])
        kernel.into(dtype, given, "relu")(x, *packed, *own, out=plain)
        kernel.into(dtype, given, "relu", eps=1e-3)(x, *packed, *own, *norm, out=y)
        torch.testing.assert_close(y, normalized(plain, *norm, 1e-3), **ROUNDING[dtype])
        again = ops.run_linear(x, packed, bias, f"1:{name}", features, dtype, "relu", [], norm, 1e-3)
        assert torch.equal(again, y)


class AddNorm(nn.Module):
    """A layer, and what comes after it: of its output, what it is given, and a norm."""

    def __init__(self, after: Callable[[Tensor, Tensor, nn.Module], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.after, self.norm = planned(64, 64), after, norm or nn.LayerNorm(64, eps=1e-12)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(x), x, self.norm)


@pytest.mark.parametrize("after", [lambda y, x, norm: norm(y + x), lambda y, x, norm: norm(x + y)])
@pytest.mark.parametrize("shape", [(5, 64), (2, 30, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_compiled_model_adds_and_normalizes_in_its_layers(
    seen: list[float | str],
    after: Callable[[Tensor, Tensor, nn.Module], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    frozen: bool,
) -> None:
    model, x = AddNorm(after).to(dtype).requires_grad_(False), torch.randn(shape).to(dtype)
    with torch.no_grad(), inductor_config.patch(freezing=frozen):
        y = compiled(model, x)
        assert seen == [1e-12]
        torch.testing.assert_close(y, model(x), **({"atol": 0.06, "rtol": 2**-7} if dtype != torch.float32 else {}))


@pytest.mark.parametrize(
    "model",
    [
        AddNorm(lambda y, x, norm: norm(y + x) + y),
        AddNorm(lambda y, x, norm: (y + x) * norm(y + x)),  # pre-norm: the sum goes on
        AddNorm(lambda y, x, norm: norm(y + x[:, :1])),
        AddNorm(lambda y, x, norm: norm(y - x)),
        AddNorm(lambda y, x, norm: norm(y + y)),
        AddNorm(lambda y, x, norm: norm((y + x).mT).mT, nn.LayerNorm(5)),
        AddNorm(lambda y, x, norm: norm(y + x), nn.LayerNorm(64, elementwise_affine=False)),
        AddNorm(lambda y, x, norm: norm(y + x), nn.RMSNorm(64)),
        AddNorm(lambda y, x, norm: norm(y.view(5, 4, 16) + x.view(5, 4, 16)), nn.LayerNorm(16)),
        AddNorm(lambda y, x, norm: norm(y.flatten() + x.flatten()), nn.LayerNorm(320)),
        AddNorm(lambda y, x, norm: F.layer_norm(y + x, (5, 64), x[..., :1].expand(5, 64), None)),
    ],
)
def test_other_sums_and_norms_are_left_alone(seen: list[str], model: AddNorm) -> None:
    x = torch.randn(5, 64)
    with torch.no_grad():
        y = compiled(model.requires_grad_(False), x)
        assert seen == ["none"]
        torch.testing.assert_close(y, model(x), atol=1e-4, rtol=1e-4)


def test_sums_with_what_is_no_tensor_of_known_sizes_compile() -> None:
    model, x = AddNorm(lambda y, x, norm: y + x.shape[0]).requires_grad_(False), torch.randn(5, 64)
    torch.compiler.reset()
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True, dynamic=True)(x)
        torch.testing.assert_close(y, model(x))
        latents = torch.compile(lambda z, batch: (model.layer(z) + z).expand(batch.shape[0], -1, -1), dynamic=True)
        assert latents(x, torch.ones(3)).shape == (3, 5, 64)


def test_a_residual_in_other_strides(seen: list[str]) -> None:
    model, x = AddNorm(lambda y, x, norm: norm(y + x.T.contiguous().T)).requires_grad_(False), torch.randn(64, 64)
    with torch.no_grad():
        y = compiled(model, x)
        assert seen == [1e-12]
        torch.testing.assert_close(y, model(x))


def test_the_op_does_what_its_norm_says_with_any_kernel() -> None:
    stored = packing.quantize_per_channel(torch.randn(24, 64), torch.int8)
    x, norm = torch.randn(7, 64), [torch.randn(7, 24), torch.randn(24), torch.randn(24)]
    results = []
    for name in ("fused_int8", "int_mm"):
        packed = find_kernel(name).layout.pack(stored)
        args = (x, packed, None, f"1:{name}", 24, torch.float32, "none", [], norm, 1e-5)
        results.append(torch.ops.autoplan.linear(*args))
        torch.compiler.reset()
        results.append(torch.compile(lambda x, *rest: torch.ops.autoplan.linear(x, *rest) * 1.0)(*args))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-3, rtol=1e-3)


# Pairs.


@pytest.fixture
def pairs_pay(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the rows, the weights and the machine."""
    kernel = find_kernel("fused_int8")
    assert kernel.pair is not None
    monkeypatch.setitem(
        ops._KERNELS, kernel.name, replace(kernel, pair=kernel.pair._replace(pays=lambda rows, nbytes: True))
    )
    ops.parse_program.cache_clear()
    yield
    ops.parse_program.cache_clear()


@pytest.mark.usefixtures("pairs_pay")
def test_a_residual_from_between_two_layers_keeps_them_apart() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.norm = planned(64, 64), planned(64, 64), nn.LayerNorm(64)

        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.up(x))
            y: Tensor = self.norm(self.down(h) + h)
            return y

    model, x = Between().requires_grad_(False), torch.randn(70, 64)
    torch.compiler.reset()
    with torch.no_grad():
        code = code_of(torch.compile(model, fullgraph=True), x)
        assert "autoplan_inductor.joined_writer" not in code
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=0.03, rtol=0)


@pytest.mark.usefixtures("pairs_pay")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_after_two_layers_in_one_call(dtype: torch.dtype) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.norm = Block(nn.GELU()), nn.LayerNorm(64)
            self.block.up, self.block.down = planned(128, 64), planned(64, 128)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.block(x) + x)
            return y

    model, x = Normed().to(dtype).requires_grad_(False), torch.randn(3, 40, 64).to(dtype)
    torch.compiler.reset()
    with torch.no_grad():
        code = code_of(torch.compile(model, fullgraph=True), x)
        assert "autoplan_inductor.joined_writer" in code
        assert "native_layer_norm" not in code.partition("def call")[0]
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "dtypes",
    [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (F32, BF16, F32), (BF16, BF16, F32), (F16, BF16, BF16)],
)
@pytest.mark.parametrize(("rows", "sizes"), [(1, (8, 8, 8)), (33, (20, 70, 40)), (300, (384, 1536, 384))])
@pytest.mark.parametrize("bias", [True, False])
def test_a_pair_gives_what_two_calls_give(
    dtypes: ops.Dtypes, rows: int, sizes: tuple[int, int, int], bias: bool
) -> None:
    x_dtype, between_dtype, dtype = dtypes
    kernel, (before, between, after) = find_kernel("fused_int8"), sizes
    weights = torch.randn(between, before) / before**0.5, torch.randn(after, between) / between**0.5
    (first,), (then,) = (kernel.layout.pack(packing.quantize_per_channel(weight, torch.int8)) for weight in weights)
    biases = [torch.randn(between), torch.randn(after).to(dtype)] if bias else []
    own, then_own = biases or (None, None)
    bias_dtypes = (torch.float32, dtype) if bias else (None, None)
    x = torch.randn(rows, before).to(x_dtype)
    for activation in ops.ACTIVATIONS:
        middle = torch.empty(rows, between, dtype=between_dtype)
        expected, y = torch.empty(2, rows, after, dtype=dtype)
        assert kernel.into is not None
        kernel.into(between_dtype, bias_dtypes[0], activation, x_dtype=x_dtype)(x, first, own, out=middle)
        kernel.into(dtype, bias_dtypes[1], "none", x_dtype=between_dtype)(middle, then, then_own, out=expected)
        ops.pair_writer("fused_int8", dtypes, activation, bias_dtypes, rows, None)(x, first, then, *biases, out=y)
        assert torch.equal(y, expected)
    norm = [torch.randn(rows, after).to(dtype), torch.randn(after).to(dtype), torch.randn(after).to(dtype)]
    ops.pair_writer("fused_int8", dtypes, activation, bias_dtypes, rows, 1e-3)(x, first, then, *biases, *norm, out=y)
    torch.testing.assert_close(y, normalized(expected, *norm, 1e-3), **ROUNDING[dtype])
    with pytest.raises(KernelError, match="'tiled_int8' does not run two layers"):
        ops.pair_writer("tiled_int8", dtypes, "none", bias_dtypes, None, None)


@pytest.mark.usefixtures("pairs_pay")
@pytest.mark.parametrize("shape", [(70, 32), (2, 35, 32)])
@pytest.mark.parametrize("after", [nn.GELU(), nn.Identity()])
def test_two_layers_in_one_call(shape: tuple[int, ...], after: nn.Module) -> None:
    block, x = Block(after), torch.randn(shape)
    torch.compiler.reset()
    with torch.no_grad():
        code = code_of(torch.compile(block, fullgraph=True), x)
        assert "autoplan_inductor.joined_writer" in code
        assert "autoplan_inductor.linear_writer" not in code
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), atol=0.02, rtol=0)


@pytest.mark.usefixtures("pairs_pay")
@pytest.mark.parametrize("kind", ["used twice", "between", "another kernel", "dynamic"])
def test_layers_that_stay_two_calls(kind: str) -> None:
    after = (lambda y: torch.relu(y).cos()) if kind == "between" else torch.relu
    block, x = Block(after, "1:tiled_int8" if kind == "another kernel" else "1:fused_int8"), torch.randn(70, 32)

    def forward(x: Tensor) -> Tensor:
        y = torch.relu(block.up(x))
        return block.down(y).sum() + y.sum() if kind == "used twice" else block(x)

    torch.compiler.reset()
    with torch.no_grad():
        run = torch.compile(forward, fullgraph=True, dynamic=True if kind == "dynamic" else None)
        assert "joined_writer" not in code_of(run, x)
        torch.testing.assert_close(run(x), forward(x), atol=0.02, rtol=1e-3)


@pytest.mark.usefixtures("pairs_pay")
def test_weights_of_dynamic_size_stay_two_calls() -> None:
    linear, layout = torch.ops.autoplan.linear, find_kernel("fused_int8").layout

    def forward(x: Tensor, packed: Tensor, then: Tensor) -> Tensor:
        y = torch.relu(linear(x, [packed], None, "1:fused_int8", 64, x.dtype, "none", [], [], None))
        z: Tensor = linear(y, [then], None, "1:fused_int8", 32, x.dtype, "none", [], [], None)
        return z

    weights, x = (torch.randn(64, 32), torch.randn(32, 64)), torch.randn(70, 32)
    (packed,), (then,) = (layout.pack(packing.quantize_per_channel(weight, torch.int8)) for weight in weights)
    torch._dynamo.mark_dynamic(packed, 0)  # as Dynamo does by itself where several layers share a graph
    torch.compiler.reset()
    with torch.no_grad():
        assert "joined_writer" not in code_of(torch.compile(forward), x, packed, then)


def test_a_pair_pays_where_both_weights_stay_close_and_rows_are_many() -> None:
    pays, threads = native._pair_pays, torch.get_num_threads()
    assert not pays(1, 1000)
    assert not pays(128 * threads, 1 << 40)
    assert pays(128 * threads, 1000) == (native.library().autoplan_cache_bytes() > 1333)


# Autocast: what is read and written there differs in dtype.


@pytest.mark.parametrize("name", ["fused_int8", "fused_int4", "fused_int6", "tiled_int8", "tiled_int4"])
@pytest.mark.parametrize("rows", [1, 3, 5, 12, 70, 700])
@pytest.mark.parametrize(("x_dtype", "dtype"), [(F32, BF16), (BF16, F32), (F16, BF16), (F32, F16), (F16, F32)])
def test_kernels_read_one_dtype_and_write_another(
    name: str, rows: int, x_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    kernel, weight = find_kernel(name), torch.randn(70, 192)
    stored = (
        packing.quantize_per_channel(weight, torch.int8)
        if name.endswith("int8")
        else packing.quantize_grouped(weight, 64, int(name[-1]))
    )
    packed, bias, x = kernel.layout.pack(stored), torch.randn(70), torch.randn(rows, 192).to(x_dtype)
    exact = kernel.run(x.float(), packed, bias, torch.float32)
    y = torch.full((rows, 70), torch.nan, dtype=dtype)
    assert kernel.into is not None
    kernel.into(dtype, bias.dtype, "none", x_dtype=x_dtype)(x, *packed, bias, out=y)
    assert torch.equal(y, exact.to(dtype))
    assert torch.equal(kernel.run(x, packed, bias, dtype), y)
    assert torch.equal(
        ops.run_linear(x.double(), packed, bias, f"1:{name}", 70, dtype), kernel.run(x.to(dtype), packed, bias, dtype)
    )


class Encoder(nn.Module):
    """Attention's siblings, and two layers; after each a residual and a norm: before it, if that is `first`."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.attention = first, Attention([64, 64, 64]).joined()
        self.up, self.down = planned(128, 64), planned(64, 128)
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        def mixed(x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*[layer(x)[None] for layer in self.attention.layers])[0]

        def between(x: Tensor) -> Tensor:
            y: Tensor = self.down(F.gelu(self.up(x)))
            return y

        for part, norm in zip((mixed, between), self.norms, strict=True):
            x = x + part(norm(x)) if self.first else norm(x + part(x))
        return x


@pytest.mark.usefixtures("pairs_pay")
@pytest.mark.parametrize("first", [True, False])
def test_a_model_in_autocast_casts_nothing_for_its_layers(first: bool) -> None:
    model, x = nn.Sequential(Encoder(first), Encoder(first)).eval().requires_grad_(False), torch.randn(2, 35, 64)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = model(x)
        return y

    torch.compiler.reset()
    with torch.no_grad():
        code = code_of(torch.compile(run, fullgraph=True), x)
        calls = set(re.findall(r"autoplan_inductor\.(\w+)\(('.*)\)", code))
        low, wide = "'torch.bfloat16'", "'torch.float32'"
        own, norm = (low, "None") if first else (wide, "1e-05")  # a norm that comes first narrows what it gives
        pieces = {("linear_writer", f"'1:fused_int8', {low}, {wide}, 'none', (64, 64, 64), 70, None, {own}")}
        pairs = {("joined_writer", f"'fused_int8', ({own}, {low}, {own}), 'gelu', ({wide}, {wide}), 70, {norm}")}
        assert calls == pieces | pairs
        expected = run(x)
        torch.testing.assert_close(torch.compile(run, fullgraph=True)(x), expected, atol=0.1, rtol=0.02)
        assert (torch.compile(run)(x) - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["dynamic", "strided", "a head", "one layer that cannot", "the best of a piece"])
def test_models_in_autocast_of_other_kinds(kind: str, dtype: torch.dtype) -> None:
    encoder, head, other = (
        Encoder(first=False).eval().requires_grad_(False),
        planned(64, 64),
        planned(64, 64, "1:int_mm"),
    )
    bias = torch.randn(32)

    def forward(x: Tensor) -> Tensor:
        x = x[:, :20] if kind == "strided" else x
        with torch.autocast("cpu", dtype):
            x = encoder(x)
            if kind == "a head":
                return head(x)
            if kind == "one layer that cannot":
                return head(x) + other(x) + x
            if kind == "the best of a piece":
                return (head(x)[..., :32] + bias).topk(2).values
            return x

    torch.compiler.reset()
    with torch.no_grad():
        run = torch.compile(forward, fullgraph=True, dynamic=kind == "dynamic")
        for tokens in (35, 36):
            x = torch.randn(2, tokens, 64)
            expected = forward(x)
            assert (run(x) - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("kind", ["read by others", "read before", "float64"])
def test_other_casts_stay(kind: str) -> None:
    layer, x = planned(64, 64), torch.randn(70, 64)

    def forward(x: Tensor) -> Tensor:
        wide = torch.sin(x).double() if kind == "float64" else torch.sin(x)
        before = wide.amax() if kind == "read before" else 0.0
        narrow = wide.to(torch.bfloat16)
        y = torch.ops.autoplan.linear(
            narrow, layer._packed, layer.bias, layer.program, 64, torch.bfloat16, "none", [], [], None
        )
        y = y + narrow.cos() if kind == "read by others" else y
        return y + (before if kind == "read before" else wide)

    torch.compiler.reset()
    with torch.no_grad():
        run = torch.compile(forward, fullgraph=True)
        assert "None, 'torch.bfloat16')" in code_of(run, x)
        torch.testing.assert_close(run(x), forward(x), atol=0.05, rtol=0.02, check_dtype=False)


# Calls.


def code_of(model: Callable[..., Any], *args: Tensor) -> str:
    """The code that Inductor writes for it."""
    from torch._inductor.utils import run_and_get_code

    _, code = run_and_get_code(model, *args)
    return "\n".join(code)


@pytest.mark.parametrize(
    ("candidate", "program", "call"),
    [
        ("int8_dynamic", "1:fused_int8", "linear_writer("),
        ("int8_dynamic", "1:int_mm", "run_linear("),
        ("bf16", "1:linear,7:onednn", "run_linear("),  # oneDNN's opaque tensors
        ("int4_g32", "1:tiled_int4,7:dequantize", "run_linear("),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_graph_calls_kernels_and_not_the_op(candidate: str, program: str, call: str, bias: bool) -> None:
    kernel = find_kernel(program.partition(",")[0].partition(":")[2])
    if missing := kernel.probe():
        pytest.skip(missing)
    linear, x = nn.Linear(64, 48, bias=bias).requires_grad_(False), torch.randn(2, 5, 64)
    layer = PlannedLinear.from_linear("layer", linear, find_candidate(candidate), program)
    torch.compiler.reset()
    model = torch.compile(nn.Sequential(nn.Tanh(), layer, nn.Tanh()), fullgraph=True)
    with torch.no_grad():
        code = code_of(model, x)
        assert f"autoplan_inductor.{call}" in code
        assert "ops.autoplan.linear.default(" not in code
        torch.testing.assert_close(model(x), torch.tanh(layer(torch.tanh(x))), atol=1e-2, rtol=0)


def test_cached_graphs_of_another_version_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    with fresh_cache(), torch.no_grad():
        for version, taken in (("one", False), ("one", True), ("another", False)):
            monkeypatch.setattr(inductor, "_digest", lambda version=version: version)
            torch.compiler.reset()
            counters.clear()
            with torch.compiler.config.patch(cache_key_tag="the user's"):
                torch.compile(planned(64, 32, "1:tiled_int8"))(torch.randn(3, 32))
                assert torch.compiler.config.cache_key_tag == f"the user's autoplan {version}"
            assert bool(counters["inductor"]["fxgraph_cache_hit"]) == taken


def test_any_number_of_rows_runs_in_one_graph() -> None:
    torch.compiler.reset()
    layer = planned(64, 32, "1:tiled_int8,7:fused_int8")
    model = torch.compile(nn.Sequential(nn.Tanh(), layer), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (3, 40, 8, 0):
            x = torch.randn(rows, 32)
            torch.testing.assert_close(model(x), layer(torch.tanh(x)), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[:5],
        lambda x: x[5:],
        lambda x: x.view(5, 64)[:, :32],
        lambda x: x.view(32, 10).t(),
        lambda x: torch.tanh(x)[:5],
        lambda x: torch.tanh(x).view(2, 5, 32),
        lambda x: torch.tanh(x).view(2, 5, 32)[1:],
        lambda x: x[:0],
    ],
)
def test_a_graph_gives_a_layer_the_rows_that_it_asked_for(part: Callable[[Tensor], Tensor]) -> None:
    torch.compiler.reset()
    layer, x = planned(64, 32), torch.randn(10, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(lambda x: layer(part(x)), fullgraph=True)(x), layer(part(x)))


def test_where_the_graph_is_in_c_the_op_is_called() -> None:
    torch.compiler.reset()
    block, x = Block(nn.GELU()), torch.randn(5, 32)
    model = torch.compile(block, fullgraph=True, options={"cpp_wrapper": True})
    with torch.no_grad():
        torch.testing.assert_close(model(x), block(x), atol=0.03, rtol=0)


def test_a_graph_from_the_cache_of_an_earlier_process_runs(tmp_path: Path) -> None:
    script = """
import torch, torch._dynamo.utils
from torch import nn
from autoplan.candidates import find_candidate
from autoplan.layers import PlannedLinear
from autoplan.siblings import join
torch.manual_seed(0)
layer = PlannedLinear.from_linear("layer", nn.Linear(32, 64), find_candidate("int8_dynamic"), "1:fused_int8")
with torch.no_grad():
    y = torch.compile(nn.Sequential(layer, nn.GELU(), nn.Tanh()))(torch.ones(3, 32))
print(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"], float(y.sum()))
"""
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        said.append(done.stdout.split())
    assert [hits for hits, _ in said] == ["0", "1"]
    assert said[0][1] == said[1][1]

"""Attention in C++, for every instruction set it can be compiled for here, against float64; where graphs call it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoplan.candidates import find_candidate
from autoplan.kernels import native
from autoplan.kernels.native import attention, build
from autoplan.layers import PlannedLinear

BF16 = torch.bfloat16
NO_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
INSTRUCTION_SETS = {
    "all of this CPU's": (),
    "AVX-512": NO_AMX,
    "AVX-512 without bfloat16": (*NO_AMX, "-mno-avx512bf16"),
}

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())


@pytest.fixture(params=INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS.keys())
def compiled_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "library", lambda: build.library(*request.param))
    monkeypatch.setattr(attention, "_writer", functools.cache(attention._writer.__wrapped__))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    y: Tensor = torch.ops.autoplan.attention(q, k, v, mask, causal, q.shape[-1] ** -0.5)
    return y


def exactly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    mask = None if mask is None else mask.double()
    return F.scaled_dot_product_attention(q.double(), k, v, attn_mask=mask, is_causal=causal)


DTYPES = {BF16: 1e-5, torch.float32: 1e-9}  # the error of rounding weights and the output to bfloat16; of two bfloat16


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def heads(batch: int, count: int, rows: int, features: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(batch, rows, count, features, dtype=dtype).transpose(1, 2)


def error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).square().sum() / exact.square().sum())


FEW = (4, 1)  # rows that are attended where they lie, in float32; and in bfloat16, too

# batch, heads, heads of keys, rows, keys, features: blocks, strips and tiles that are full, and not
SIZES = [
    (1, 1, 1, 1, 1, 8),
    (2, 3, 3, 37, 53, 40),
    (1, 4, 2, 70, 200, 64),
    (3, 8, 8, 16, 33, 33),
    (2, 6, 1, 96, 96, 128),
    (3, 8, 2, 1, 200, 80),
    (2, 4, 1, 4, 66, 24),
    (1, 3, 3, 8, 40, 144),
]


@pytest.mark.usefixtures("compiled_for")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_close_to_float64(sizes: tuple[int, ...], causal: bool, dtype: torch.dtype) -> None:
    batch, count, key_count, rows, keys, features = sizes
    q = heads(batch, count, rows, features, dtype)
    k, v = (heads(batch, key_count, keys, features, dtype) for _ in range(2))
    y = attend(q, k, v, causal=causal)
    assert y.dtype == dtype
    assert error(y, exactly(q, k, v, causal=causal)) < DTYPES[dtype]
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.usefixtures("compiled_for")
@pytest.mark.parametrize("mask_dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 1, False), (1, 1, True), (2, 3, True), (1, 3, False)], ids=str)
@pytest.mark.parametrize("rows", [37, *FEW])
def test_a_mask_is_added(dtype: torch.dtype, mask_dtype: torch.dtype, shape: tuple[int, int, bool], rows: int) -> None:
    q, k, v = heads(2, 3, rows, 32, dtype), heads(2, 3, 45, 32, dtype), heads(2, 3, 45, 32, dtype)
    batch, count, by_row = shape
    mask = torch.randn(batch, count, rows if by_row else 1, 45).to(mask_dtype)
    mask[..., 7:20] = -torch.inf
    assert error(attend(q, k, v, mask), exactly(q, k, v, mask)) < DTYPES[dtype]
    mask_and_more = mask.double() + above_diagonal(rows, 45)
    assert error(attend(q, k, v, mask, True), exactly(q, k, v, mask_and_more)) < DTYPES[dtype]


def above_diagonal(rows: int, keys: int) -> Tensor:
    return torch.full((rows, keys), -torch.inf).triu(1)


@pytest.mark.usefixtures("compiled_for")
@pytest.mark.parametrize("rows", [40, *FEW])
def test_values_that_a_mask_leaves_out_do_not_count(dtype: torch.dtype, rows: int) -> None:
    q, k, v = heads(2, 2, rows, 32, dtype), heads(2, 2, 64, 32, dtype), heads(2, 2, 64, 32, dtype)
    mask = torch.zeros(2, 1, rows, 64)
    mask[..., 50:] = -torch.inf
    mask[1, :, -1] = -torch.inf  # nothing is left
    v[:, :, 50:] = 3e38
    y = attend(q, k, v, mask)
    assert (y[1, :, -1] == 0).all()
    assert error(y[0], exactly(q, k[:, :, :50], v[:, :, :50])[0]) < DTYPES[dtype]


@pytest.mark.usefixtures("compiled_for")
@pytest.mark.parametrize("mask_dtype", [torch.float32, BF16])
@pytest.mark.parametrize("rows", [40, *FEW])
def test_a_mask_of_the_least_numbers(dtype: torch.dtype, mask_dtype: torch.dtype, rows: int) -> None:
    """As many models have it, so that rows that see nothing stay numbers: those get the mean of all values."""
    q, k, v = heads(2, 2, rows, 32, dtype), heads(2, 2, 64, 32, dtype), heads(2, 2, 64, 32, dtype)
    mask = torch.zeros(2, 1, rows, 64, dtype=mask_dtype)
    mask[..., 50:] = torch.finfo(mask_dtype).min
    mask[1, :, -1] = torch.finfo(mask_dtype).min
    y = attend(q, k, v, mask)
    assert error(y[1, :, -1], v[1].double().mean(dim=1)) < DTYPES[dtype]
    assert error(y[0], exactly(q, k[:, :, :50], v[:, :, :50])[0]) < DTYPES[dtype]


@pytest.mark.usefixtures("compiled_for")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [40, *FEW])
def test_scores_of_any_size(masked: bool, dtype: torch.dtype, rows: int) -> None:
    q, k, v = heads(1, 2, rows, 32, dtype), heads(1, 2, 70, 32, dtype), heads(1, 2, 70, 32, dtype)
    mask = torch.zeros(1, 1, 1, 70) if masked else None
    # One key's weight is about 1; scores of some 1,700 are then off by some hundredths, and with them the others'
    assert error(attend(300 * q, k, v, mask), exactly(300 * q, k, v)) < 1e-5
    assert error(attend(0 * q, k, v, mask), exactly(0 * q, k, v)) < DTYPES[dtype]  # all are equal
    q[0, 1, -1, 3] = torch.nan
    y = attend(q, k, v, mask)
    assert y[0, 1, -1].isnan().all()
    assert y.isnan().sum() == 32


@pytest.mark.usefixtures("compiled_for")
@pytest.mark.parametrize("rows", [40, *FEW])
def test_no_keys_give_zeros(dtype: torch.dtype, rows: int) -> None:
    none = heads(2, 3, 0, 32, dtype)
    assert (attend(heads(2, 3, rows, 32, dtype), none, none) == 0).all()


@pytest.mark.usefixtures("compiled_for")
@pytest.mark.parametrize("rows", [50, *FEW])
def test_strides(dtype: torch.dtype, rows: int) -> None:
    q, k, v = torch.randn(3, 2, 50, 2, 40, dtype=dtype).unbind(0)
    q, k, v = (x.transpose(1, 2) for x in (q[:, :rows], k, v))
    k, v = k.contiguous(), v[..., ::2].repeat(1, 1, 1, 2)
    mask = torch.randn(1, rows, 2, 50).transpose(1, 2)
    assert error(attend(q, k, v, mask), exactly(q, k, v, mask)) < DTYPES[dtype]
    assert error(attend(q.mT.contiguous().mT, k, v), exactly(q, k, v)) < DTYPES[dtype]
    assert attend(q[:, :, :0], k, v).shape == (2, 2, 0, 40)


def test_where_it_pays() -> None:
    for dtype in DTYPES:
        assert attention.pays(1, 128, 64, 1, dtype)
        assert attention.pays(1, 1_000_000, 64, 8, dtype)
        assert attention.pays(1, None, 64, 1, dtype)
    assert attention.pays(4, None, 64, 1, torch.float32)
    assert attention.pays(8, 64, 64, 1, torch.float32)
    assert not attention.pays(8, None, 64, 1, torch.float32)
    for dtype in DTYPES:
        assert attention.pays(64, 64, 32, 1, dtype)
        assert not attention.pays(64, 1_000_000, 64, 1, dtype)
        assert not attention.pays(64, None, 64, 1, dtype)
    assert attention.pays(2, 128, 64, 1, BF16)
    assert attention.pays(16, 128, 64, 1, torch.float32)
    assert not attention.pays(16, 512, 64, 1, torch.float32)
    assert attention.pays(16, 512, 64, 2, torch.float32)


class Attending(nn.Module):
    """A layer, attention between its thirds, and another layer."""

    def __init__(self, attends: Callable[..., Tensor], dtype: torch.dtype = BF16) -> None:
        super().__init__()
        self.attends = attends
        self.into, self.out_of = (
            PlannedLinear.from_linear(
                "layer", nn.Linear(64, features).requires_grad_(False), find_candidate("int8_dynamic"), "1:fused_int8"
            ).to(dtype)
            for features in (192, 64)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(2, (2, 32)).transpose(1, 2) for part in self.into(x).chunk(3, dim=-1))
        y: Tensor = self.out_of(self.attends(q, k, v, mask).transpose(1, 2).flatten(2))
        return y


def plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])


class Call(NamedTuple):
    causal: bool
    scale: float
    key_heads: int
    is_known: bool  # what its tensors are like


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What compiled graphs have asked for, here taken to pay on any CPU."""
    found: list[Call] = []
    writer = attention.writer

    def watched(causal: bool, scale: float, *known: attention.Strided) -> Callable[..., None]:
        def write(q: Tensor, k: Tensor, *others: Tensor, out: Tensor) -> None:
            found.append(Call(causal, scale, k.shape[1], bool(known)))
            writer(causal, scale, *known)(q, k, *others, out=out)

        return write

    monkeypatch.setattr(attention, "writer", watched)
    monkeypatch.setattr(attention, "pays", lambda *_: True)
    torch.compiler.reset()
    return found


def alone(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


@pytest.mark.parametrize(
    ("attends", "causal", "scale"),
    [
        (plainly, False, 32**-0.5),
        (lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, is_causal=True), True, 32**-0.5),
        (lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, scale=0.3), False, 0.3),
        (alone, False, 32**-0.5),
    ],
    ids=["plain", "causal", "scaled", "grouped"],
)
def test_a_compiled_model_calls_it(
    calls: list[Call], attends: Callable[..., Tensor], causal: bool, scale: float, dtype: torch.dtype
) -> None:
    model, x = Attending(attends, dtype), torch.randn(2, 21, 64, dtype=dtype)
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        y = torch.compile(model, fullgraph=True)(x)
        key_heads = 1 if attends is alone else 2
        assert calls == [Call(causal, scale, key_heads, is_known=True)]
        assert error(y, model(x).double()) < 1e-3  # a code of the second layer may be another


@pytest.mark.parametrize("dynamic", [False, True])
def test_with_a_mask(calls: list[Call], dynamic: bool) -> None:
    model, x, mask = Attending(plainly), torch.randn(3, 21, 64, dtype=BF16), torch.ones(3, 21, dtype=torch.bool)
    mask[1, 5:] = False
    torch._dynamo.mark_dynamic(x, 0) if dynamic else None
    torch._dynamo.mark_dynamic(mask, 0) if dynamic else None
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        y = torch.compile(model, fullgraph=True)(x, mask)
        assert [call.is_known for call in calls] == [not dynamic]
        assert error(y, model(x, mask).double()) < 1e-3


def test_one_row_and_keys_of_any_number(calls: list[Call]) -> None:
    """As when a language model writes: a compiled graph serves all lengths of its cache."""

    class Writing(Attending):
        def forward(self, x: Tensor, keys: Tensor) -> Tensor:  # type: ignore[override]
            q = self.into(x).unflatten(2, (6, 32)).transpose(1, 2)[:, :2]
            y: Tensor = self.out_of(self.attends(q, keys, 2 * keys, None).transpose(1, 2).flatten(2))
            return y

    model = Writing(plainly)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        for length in (30, 31, 600):
            x, keys = torch.randn(3, 1, 64, dtype=BF16), heads(3, 2, length, 32)
            torch._dynamo.mark_dynamic(keys, 2)
            assert error(compiled(x, keys), model(x, keys).double()) < 1e-3
    assert [call.is_known for call in calls] == [False] * 3


def repeated(heads: Tensor, times: int) -> Tensor:
    """As models have it that were written before `enable_gqa`."""
    batch, count, *sizes = heads.shape
    return heads[:, :, None].expand(batch, count, times, *sizes).reshape(batch, count * times, *sizes)


@pytest.mark.parametrize(
    ("attends", "key_heads"),
    [
        (lambda q, k, v, mask: plainly(q, repeated(k[:, :1], 2), repeated(v[:, :1], 2), mask), 1),
        (lambda q, k, v, mask: plainly(q, repeated(k[:, :1], 2), v, mask), 2),  # not both
        (lambda q, k, v, mask: plainly(q, k[:, :1].repeat(1, 2, 1, 1), v[:, :1].repeat(1, 2, 1, 1), mask), 2),
    ],
)
def test_heads_that_were_copied_for_others_are_read_once(
    calls: list[Call], attends: Callable[..., Tensor], key_heads: int
) -> None:
    model, x = Attending(attends), torch.randn(2, 21, 64, dtype=BF16)
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        y = torch.compile(model, fullgraph=True)(x)
        assert error(y, model(x).double()) < 1e-3
    assert [call.key_heads for call in calls] == [key_heads]


def test_in_autocast(calls: list[Call]) -> None:
    model, x = Attending(plainly, torch.float32), torch.randn(2, 21, 64)
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False), torch.autocast("cpu", BF16):
        y = torch.compile(model, fullgraph=True)(x)
        assert len(calls) == 1
        assert error(y, model(x).double()) < 1e-3


@pytest.mark.parametrize("kind", ["float16", "gradients", "it does not pay", "rows and keys of any number"])
def test_others_are_left_to_torch(calls: list[Call], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Attending(plainly), torch.randn(2, 21, 64, dtype=BF16)
    if kind == "float16":
        model, x = Attending(plainly, torch.float16), x.half()
    if kind == "it does not pay":
        monkeypatch.setattr(attention, "pays", lambda *_: False)
    if kind == "rows and keys of any number":
        torch._dynamo.mark_dynamic(x, 1)
    x.requires_grad_(kind == "gradients")
    with torch.set_grad_enabled(kind == "gradients"), torch._inductor.config.patch(fx_graph_cache=False):
        y = torch.compile(model, fullgraph=True)(x)
        assert calls == []
        assert error(y.detach(), model(x).detach().double()) < 1e-3
    if kind == "gradients":
        y.float().sum().backward()
        assert x.grad is not None

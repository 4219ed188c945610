"""The shim itself: after an upgrade of Triton, these say which patch no longer takes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def convert(x_ptr, y_ptr, B: tl.constexpr):
    place = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y_ptr + place, tl.load(x_ptr + place).to(y_ptr.dtype.element_ty))


@triton.jit
def product(a_ptr, b_ptr, y_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    places = i[:, None] * B + i[None, :]
    sums = tl.dot(tl.load(a_ptr + places), tl.load(b_ptr + places), out_dtype=y_ptr.dtype.element_ty)
    tl.store(y_ptr + places, sums)


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    convert[(x.numel() // 256,)](x, y, B=256)
    return y


def every_bfloat16() -> torch.Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def test_every_bfloat16_becomes_the_right_float32_and_e4m3() -> None:
    x = every_bfloat16()
    assert torch.equal(converted(x, torch.float32).nan_to_num(0.5), x.float().nan_to_num(0.5))
    expected = x.float().clamp(-448, 448).to(torch.float8_e4m3fn).float()
    for source in (x, x.float()):
        found = converted(source, torch.float8_e4m3fn).float()
        assert torch.equal(found.nan_to_num(0.5), expected.nan_to_num(0.5))


def test_every_e4m3_becomes_the_right_float() -> None:
    x = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(converted(x, dtype).float().nan_to_num(0.5), x.float().nan_to_num(0.5))


def test_float32_rounds_to_nearest_even() -> None:
    x = torch.cat([torch.randn(512) * scale for scale in (1e-6, 1.0, 1e4)])
    x = torch.cat(
        [x, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 2**-9, 2**-10]).repeat(64)]
    )  # ties, and e4m3's subnormals
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        expected = x.clamp(-448, 448).to(dtype) if dtype == torch.float8_e4m3fn else x.to(dtype)
        assert torch.equal(converted(x, dtype).float(), expected.float())


def test_int8_becomes_the_right_float() -> None:
    x = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.int8)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(converted(x, dtype).double(), x.double())


def test_products_are_those_of_the_values() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        a, b = (torch.randn(32, 32).to(dtype) for _ in range(2))
        y = torch.empty(32, 32)
        product[(1,)](a, b, y, B=32)
        torch.testing.assert_close(y.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)
    a, b = (torch.randint(-127, 128, (32, 32)).to(torch.int8) for _ in range(2))
    y = torch.empty(32, 32, dtype=torch.int32)
    product[(1,)](a, b, y, B=32)
    assert torch.equal(y.double(), a.double() @ b.double())


def test_emulated_ptx_does_what_its_manual_says() -> None:
    import numpy as np
    from ptx import run_ptx

    a, b = np.array([0x76543210], np.uint32), np.array([0xFEDCBA98], np.uint32)
    asm = "{ .reg .b32 t; prmt.b32 $0, $2, $3, 0x5410; shr.b32 t, $2, 4; lop3.b32 $1, t, 0xff, 0x100, 0xea; }"
    first, second = run_ptx(asm, 2, [a, b])
    assert (int(first[0]), int(second[0])) == (0xBA983210, 0x121)  # 0xea: (a & b) | c

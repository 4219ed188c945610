"""CPU kernels: the best that torch ships, with their traps guarded.

Most are private torch ops that may change between releases, so each is probed once, on first use, against float64
on a small odd shape; a kernel that fails its probe is reported as unsupported and never chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from autoplan.kernels import ops
from autoplan.kernels.packing import Canonical, dequantize, quantize_grouped, quantize_per_channel, unpack_nibbles
from autoplan.kernels.reference import linear_float64, relative_error

_TINY = 1e-30


def _float_input(spec: ops.LinearSpec) -> str | None:
    return None if spec.dtype in ops.FLOATS else f"input dtype {spec.dtype} is not float32, bfloat16 or float16"


def _multiple(spec: ops.LinearSpec, in_features: int = 1, out_features: int = 1) -> str | None:
    """Sizes that a kernel needs: their absence crashes or raises inside torch, so it is told here."""
    if spec.in_features % in_features:
        return f"in_features {spec.in_features} is not a multiple of {in_features}"
    if spec.out_features % out_features:
        return f"out_features {spec.out_features} is not a multiple of {out_features}"
    return _float_input(spec)


def _probe(name: str, canonical: Callable[[Tensor], Canonical], tolerance: float = 0.05, in_features: int = 20,
           out_features: int = 9) -> Callable[[], str | None]:  # fmt: skip
    """A probe: 3 rows through the kernel `name` on a small odd weight, against float64."""

    def probe() -> str | None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(out_features, in_features, generator=generator)
        x = torch.randn(3, in_features, generator=generator)
        bias = torch.randn(out_features, generator=generator)
        stored = canonical(weight)
        kernel = ops.find_kernel(name)
        dtype = stored["weight"].dtype if "weight" in stored else torch.bfloat16
        y = kernel.run(x.to(dtype), kernel.layout.pack(stored), bias, dtype)
        error = relative_error(y, linear_float64(x, stored, bias))
        return None if error < tolerance else f"its probe gave a relative error of {error:.2g} on this machine"

    return probe


# Float weights: plain F.linear, and oneDNN with a weight it has laid out beforehand (exact up to summation order).


def _float_linear(x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    (weight,) = packed
    return F.linear(x.to(weight.dtype), weight, _cast(bias, weight.dtype)).to(dtype)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


ops.register_kernel(
    ops.Kernel(
        name="linear",
        devices=("cpu", "cuda"),
        layout=ops.Layout.canonical("weight"),
        supports=_float_input,
        probe=lambda: None,
        run=_float_linear,
        inline=_float_linear,
    )
)


def _onednn_matmul(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty((0, out_features))
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


ops.define_op(
    "onednn_matmul(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor",
    _onednn_matmul,
    lambda x, packed, bias, out_features: x.new_empty((x.shape[0], out_features)),
)


def _onednn(x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    (weight,) = packed
    bias = _cast(bias, weight.dtype)
    y: Tensor = torch.ops.autoplan.onednn_matmul(x.to(weight.dtype), weight, bias, weight.shape[0])
    return y.to(dtype)


def _onednn_input(spec: ops.LinearSpec) -> str | None:
    """oneDNN takes halves where the CPU computes with them: many have bfloat16, few float16."""
    takes = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if spec.dtype in takes and not takes[spec.dtype]():
        return f"oneDNN has no {spec.dtype} on this CPU"
    return _float_input(spec)


ops.register_kernel(
    ops.Kernel(
        name="onednn",
        devices=("cpu",),
        layout=ops.Layout(
            name="onednn",
            arity=1,
            pack=lambda canonical: (torch.ops.mkldnn._reorder_linear_weight(canonical["weight"].contiguous(), None),),
            unpack=lambda packed: {"weight": packed[0].to_dense()},
        ),
        supports=_onednn_input,
        probe=_probe("onednn", lambda weight: {"weight": weight}),
        run=_onednn,
        inline=_onednn,
    )
)


# int8 weights, float activations.


def _int8pack(x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    codes, _, rounded, correction = packed
    # bfloat16 in: with float32 input this op is 10 to 50 times slower than F.linear. Its scales are bfloat16 too;
    # multiplying by scale / rounded scale takes that rounding out again.
    y = torch._weight_int8pack_mm(x.to(torch.bfloat16), codes, rounded)
    return _scale_and_bias(y, correction, bias, dtype)


def _scale_and_bias(y: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (torch.mul(y, scale) if bias is None else torch.addcmul(bias.float(), y.float(), scale)).to(dtype)


def _pack_int8(canonical: Canonical) -> tuple[Tensor, ...]:
    codes, scale = canonical["codes"].contiguous(), canonical["scale"]
    rounded = scale.to(torch.bfloat16)
    return codes, scale, rounded, scale / rounded


ops.register_kernel(
    ops.Kernel(
        name="int8pack",
        devices=("cpu",),
        layout=ops.Layout("int8pack", 4, _pack_int8, lambda packed: {"codes": packed[0], "scale": packed[1]}),
        # K % 16: below that, torch's kernel reads out of bounds (segmentation fault at 4 rows, NaN at 1).
        supports=lambda spec: _multiple(spec, in_features=16),
        probe=_probe("int8pack", lambda weight: quantize_per_channel(weight, torch.int8), in_features=48),
        run=_int8pack,
        most_rows=128,
    )
)


def _register_dequantize(name: str, keys: tuple[str, ...]) -> None:
    """Dequantize the whole weight, then F.linear: the way that always works, and pays at many rows only."""

    def run(x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        weight = dequantize(dict(zip(keys, packed, strict=True)), x.dtype)
        return F.linear(x, weight, _cast(bias, x.dtype)).to(dtype)

    ops.register_kernel(
        ops.Kernel(
            name=name,
            devices=("cpu", "cuda"),
            layout=ops.Layout.canonical(*keys),
            supports=_float_input,
            probe=lambda: None,
            run=run,
        )
    )


_register_dequantize("dequantize_int8", ("codes", "scale"))
_register_dequantize("dequantize_fp8", ("codes", "scale"))
_register_dequantize("dequantize_int4", ("codes", "scale", "zero_point"))


# int8 weights, int8 activations: one scale per row, found as the call comes in.


def _u8s8_matmul(
    xq: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, out_features: int, dtype: torch.dtype
) -> Tensor:
    if xq.shape[0] == 0:
        return xq.new_empty((0, out_features), dtype=dtype)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        xq, 1.0, 128, packed, scale, zero, None, 1.0, 0, dtype, "none", [], ""
    )
    return y


ops.define_op(
    "u8s8_matmul(Tensor xq, Tensor packed, Tensor scale, Tensor zero, int out_features, ScalarType dtype) -> Tensor",
    _u8s8_matmul,
    lambda xq, packed, scale, zero, out_features, dtype: xq.new_empty((xq.shape[0], out_features), dtype=dtype),
)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of each row plus 128 as uint8 [rows, in], and float32 scales [rows, 1]: absmax / 127 per row.

    The passes are chosen by measurement: amax and amin beat abs or a norm, and a float turns into int8 three times
    faster than into uint8.
    """
    largest = torch.maximum(x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True).neg_())
    scale = largest.float().mul_(1 / 127).clamp_min_(_TINY)
    codes = (x.float() * scale.reciprocal()).round_().to(torch.int8)
    return codes.view(torch.uint8).bitwise_xor_(128), scale


def _onednn_u8s8(x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    weight, scale, zero = packed
    xq, row_scale = quantize_rows(x)
    y: Tensor = torch.ops.autoplan.u8s8_matmul(xq, weight, scale, zero, weight.shape[1], torch.float32)
    y = y.mul_(row_scale) if bias is None else torch.addcmul(bias.float(), y, row_scale, out=y)
    return y.to(dtype)


def _onednn_u8s8_inline(x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same for Inductor, which makes one pass of the quantization, fused into what produced `x`."""
    weight, scale, zero = packed
    row_scale = (x.abs().amax(dim=1, keepdim=True).float() * (1 / 127)).clamp_min(_TINY)
    xq = (x * row_scale.reciprocal() + 128.5).to(torch.uint8)  # positive, so the conversion rounds to nearest
    # bfloat16 out: half the bytes to write and read again, and its rounding (54 dB) drowns in that of int8 (38 dB)
    y: Tensor = torch.ops.autoplan.u8s8_matmul(xq, weight, scale, zero, weight.shape[1], torch.bfloat16)
    y = y.float() * row_scale
    return (y if bias is None else y + bias).to(dtype)


def _pack_u8s8(canonical: Canonical) -> tuple[Tensor, ...]:
    # contiguous: qlinear_prepack ignores strides, and would read another matrix without a word
    codes = canonical["codes"].contiguous()
    zero = codes.new_zeros(codes.shape[0], dtype=torch.int64)
    return torch.ops.onednn.qlinear_prepack(codes, None), canonical["scale"], zero


ops.register_kernel(
    ops.Kernel(
        name="onednn_u8s8",
        devices=("cpu",),
        layout=ops.Layout(
            name="onednn_u8s8",
            arity=3,
            pack=_pack_u8s8,
            unpack=lambda packed: {"codes": packed[0].to_dense().t().contiguous(), "scale": packed[1]},
        ),
        supports=_float_input,
        probe=_probe("onednn_u8s8", lambda weight: quantize_per_channel(weight, torch.int8)),
        run=_onednn_u8s8,
        inline=_onednn_u8s8_inline,
    )
)


def _int_mm(x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    codes, scale = packed
    xq, row_scale = quantize_rows(x)
    y = torch._int_mm(xq.bitwise_xor_(128).view(torch.int8), codes.t()).float().mul_(row_scale)
    return _scale_and_bias(y, scale, bias, dtype)


ops.register_kernel(
    ops.Kernel(
        name="int_mm",
        devices=("cpu",),
        layout=ops.Layout.canonical("codes", "scale"),
        supports=_float_input,
        probe=_probe("int_mm", lambda weight: quantize_per_channel(weight, torch.int8)),
        run=_int_mm,
    )
)


# int4 weights, float activations.


def _int4pack(x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    tiles, scale_and_zero, _, scale, _ = packed
    group_size = x.shape[1] // scale.shape[1]
    # bfloat16 in: with float32 input this op is 5 to 100 times slower than F.linear.
    y = torch._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), tiles, group_size, scale_and_zero)
    return (y if bias is None else y + bias).to(dtype)


def _pack_int4(canonical: Canonical) -> tuple[Tensor, ...]:
    codes, scale, zero_point = canonical["codes"], canonical["scale"], canonical["zero_point"]
    tiles = torch._convert_weight_to_int4pack_for_cpu(unpack_nibbles(codes).int(), 1)
    offset = (8 - zero_point.float()) * scale.float()  # torch's int4 stands for scale * (code - 8) + offset
    scale_and_zero = torch.stack((scale, offset.to(scale.dtype)), dim=2).transpose(0, 1).contiguous()
    return tiles, scale_and_zero, codes, scale, zero_point


ops.register_kernel(
    ops.Kernel(
        name="int4pack",
        devices=("cpu",),
        layout=ops.Layout(
            name="int4pack",
            arity=5,
            pack=_pack_int4,
            unpack=lambda packed: {"codes": packed[2], "scale": packed[3], "zero_point": packed[4]},
        ),
        supports=lambda spec: _multiple(spec, in_features=spec.group_size or 32, out_features=16),
        probe=_probe("int4pack", lambda weight: quantize_grouped(weight, 32), in_features=96, out_features=48),
        run=_int4pack,
        most_rows=512,
    )
)


# fp8 weights, fp8 activations.


def _scaled_mm(x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    codes, scale = packed
    largest = torch.finfo(codes.dtype).max
    row_scale = (x.abs().amax(dim=1, keepdim=True).float() / largest).clamp_min(_TINY)
    xq = (x.float() / row_scale).to(codes.dtype)
    y: Tensor = torch._scaled_mm(xq, codes.t(), scale_a=row_scale, scale_b=scale[None, :], out_dtype=torch.float32)
    return (y if bias is None else y + bias).to(dtype)


ops.register_kernel(
    ops.Kernel(
        name="scaled_mm",
        devices=("cpu",),
        layout=ops.Layout.canonical("codes", "scale"),
        supports=lambda spec: _multiple(spec, in_features=16, out_features=16),
        probe=_probe("scaled_mm", lambda weight: quantize_per_channel(weight, torch.float8_e4m3fn),
                     in_features=48, out_features=16, tolerance=0.1),
        run=_scaled_mm,
    )
)  # fmt: skip

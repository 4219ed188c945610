"""The best CUDA kernels that torch ships, beside our own. Timing decides; private ops are probed before use.

Not among them: `torch._weight_int8pack_mm`, which on CUDA is one thread per output that reads uncoalesced bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from autoplan.kernels import ops
from autoplan.kernels.cuda.launch import Call, probe_on_gpu, submit, unsupported
from autoplan.kernels.cuda.layouts import CODES
from autoplan.kernels.packing import Canonical

_INT_MM_ROWS = 17  # torch._int_mm wants more than 16
_INNER_TILES = 8  # of tinygemm: 8 tiles of 16 in-features together make 16-byte loads


def _int_mm(x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    from autoplan.kernels.cuda import a8w8, tiles

    codes, scale = packed
    rows = x.shape[0]
    xq, row_scales, quantizing = a8w8.quantize_rows(x, torch.int8)
    submit(quantizing, x.device)
    if rows < _INT_MM_ROWS:
        xq = F.pad(xq, (0, 0, 0, _INT_MM_ROWS - rows))
    sums = torch._int_mm(xq, codes.t())  # a transposed view: contiguous [in, out] is several times slower
    call = Call(x, packed, bias, x.new_empty((rows, codes.shape[0]), dtype=dtype))
    submit(tiles.adding_up(call, sums[None, :rows], row_scales, scale), x.device)
    return call.y


def _scaled_mm(x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    from autoplan.kernels.cuda import a8w8

    codes, scale = packed
    xq, row_scales, quantizing = a8w8.quantize_rows(x, codes.dtype)
    submit(quantizing, x.device)
    y: Tensor = torch._scaled_mm(
        xq,
        codes.t(),
        scale_a=row_scales[:, None],
        scale_b=scale[None, :],
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,  # all that it gives with a scale per row
        use_fast_accum=True,  # without, it is much slower (pytorch issue 147971)
    )
    return y.to(dtype)


def _tinygemm(x: Tensor, packed: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    tiles, scale_and_zero = packed[:2]
    group_size = x.shape[1] // scale_and_zero.shape[0]
    y: Tensor = torch._weight_int4pack_mm(x.to(torch.bfloat16), tiles, group_size, scale_and_zero)
    return (y if bias is None else y + bias).to(dtype)


def _pack_tiles(canonical: Canonical) -> tuple[Tensor, ...]:
    codes, scale, zero_point = canonical["codes"], canonical["scale"], canonical["zero_point"]
    swapped = (codes << 4) | (codes >> 4)  # torch wants the even column in the upper half
    offset = (8 - zero_point.float()) * scale.float()  # torch's int4 stands for scale * (code - 8) + offset
    scale_and_zero = torch.stack((scale, offset.to(scale.dtype)), dim=2).transpose(0, 1).contiguous()
    return torch._convert_weight_to_int4pack(swapped, _INNER_TILES), scale_and_zero, scale, zero_point


def _unpack_tiles(packed: ops.Packed) -> Canonical:
    """Codes are read back as products with unit rows, which leave one code less 8 of every sum: exact in bfloat16."""
    tiles, _, scale, zero_point = packed
    n, groups = scale.shape
    k = tiles.shape[1] * _INNER_TILES * 16
    group_size = k // groups
    plain = torch.tensor([1.0, 0.0], dtype=torch.bfloat16, device=tiles.device).expand(groups, n, 2).contiguous()
    parts = []
    for start in range(0, k, 1024):
        columns = torch.arange(start, min(start + 1024, k), device=tiles.device)
        units = F.one_hot(columns, k).to(torch.bfloat16)
        parts.append(torch._weight_int4pack_mm(units, tiles, group_size, plain).t() + 8)
    codes = torch.cat(parts, dim=1).to(torch.uint8)
    return {"codes": codes[:, ::2] | (codes[:, 1::2] << 4), "scale": scale, "zero_point": zero_point}


TINYGEMM = ops.Layout("tinygemm", 4, _pack_tiles, _unpack_tiles)


def register(name: str, weight: str, layout: ops.Layout, run: ops.Run, tolerance: float, **needs: int) -> None:
    """Register one of torch's kernels; `needs` are the sizes that must divide in_features and out_features."""

    def supports(spec: ops.LinearSpec) -> str | None:
        for what, size in (("in_features", spec.in_features), ("out_features", spec.out_features)):
            if size % needs[what]:
                return f"{what} {size} is not a multiple of {needs[what]}"
        return unsupported(weight, spec, quantizes_activations=weight != "int4")

    def probe() -> str | None:
        return probe_on_gpu(weight, layout, run, tolerance)

    ops.register_kernel(ops.Kernel(name, ("cuda",), layout, supports, probe, run))


register("int_mm_cuda", "int8", CODES, _int_mm, 0.06, in_features=8, out_features=8)
register("scaled_mm_cuda", "fp8", CODES, _scaled_mm, 0.06, in_features=16, out_features=16)
register("tinygemm", "int4", TINYGEMM, _tinygemm, 0.02, in_features=128, out_features=8)

"""The float64 oracle of tests and probes: what a linear layer gives when nothing but its weight is rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from autoplan.kernels.packing import Canonical, dequantize


def linear_float64(x: Tensor, canonical: Canonical, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias in float64 on the dequantized weight; `x` [rows, in_features], y [rows, out_features]."""
    y = x.double() @ dequantize(canonical, torch.float64).T
    return y if bias is None else y + bias.double()


def relative_error(y: Tensor, expected: Tensor) -> float:
    """norm(y - expected) / norm(expected), in float64; 0 when both are zero."""
    difference = float(torch.linalg.vector_norm(y.double() - expected.double()))
    norm = float(torch.linalg.vector_norm(expected.double()))
    return difference / norm if norm else difference

"""Kernels: every implementation of a candidate's linear, with what it supports and how it stores the weight."""

from __future__ import annotations

from autoplan.kernels import cpu, cuda, inductor, native  # noqa: F401  (register what they have)
from autoplan.kernels.ops import Kernel, LinearSpec, find_kernel, register_kernel

__all__ = ["Kernel", "LinearSpec", "find_kernel", "register_kernel"]

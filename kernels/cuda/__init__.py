"""CUDA kernels: Triton's, and the best that torch ships. Importing this touches no GPU and does not import Triton."""

from __future__ import annotations

from autoplan.kernels.cuda import library, registry  # noqa: F401  (register their kernels)

"""Kernels in Triton's interpreter: only in a process that was started with TRITON_INTERPRET=1.

Triton reads the variable when it is first imported, and cannot compile in such a process. So a plain `pytest` leaves
this folder out, and `tests/kernels/test_cuda_interpreter.py` runs it in a process of its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.path.insert(0, str(Path(__file__).parent))
    import shim

    shim.install()
else:
    collect_ignore_glob = ["*.py"]

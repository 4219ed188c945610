"""Compiles the C++ of this folder for the CPU at hand, once, on first use, and loads it.

A plain C interface: no headers of torch or Python, so that compiling takes seconds and one binary serves every version
of both. It is kept in the user's cache folder under a digest of the source, the flags and the CPU's features: where it
is, no compiler is needed any more.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from autoplan.errors import KernelError

_SOURCES = ("dynamic.cpp", "weight_only.cpp", "quantize.cpp", "attention.cpp", "attention_rows.cpp", "entry.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_P, _N, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
# The weight, its dtype, rows, in_features, group size, bits; ratios and their count; codes, upper bits, scale, zero
# point; threads
_QUANTIZE_TAKES = (_P, _I, _N, _N, _N, _N, _P, _N, _P, _P, _P, _P, _I)


@functools.cache
def library(*flags: str) -> ctypes.CDLL:
    """The kernels, which `entry` makes functions of, and what tells about them, compiled with more `flags` if any.

    Raises KernelError saying what this machine lacks.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise KernelError(f"it is written for Linux on x86-64, and this is {platform.system()} on {platform.machine()}")
    features = _cpu_features()
    if missing := {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"} - features:
        raise KernelError(f"this CPU lacks {', '.join(sorted(missing))}")
    loaded = ctypes.CDLL(str(_binary(features, flags)))
    quantize = loaded.autoplan_quantize_grouped
    quantize.argtypes, quantize.restype = _QUANTIZE_TAKES, None
    loaded.autoplan_cache_bytes.restype = _N
    loaded.autoplan_attends_rows.argtypes = (_N, _N, _I)
    loaded.autoplan_attention_bytes.argtypes, loaded.autoplan_attention_bytes.restype = (_N, _N, _I), _N
    if not loaded.autoplan_available():
        raise KernelError("the operating system does not grant the AMX tile registers")
    return loaded


def compiler() -> str | None:
    """The C++ compiler that is used: $CXX, else g++, else c++."""
    names = (os.environ.get("CXX", ""), "g++", "c++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _cpu_features() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _binary(features: set[str], flags: tuple[str, ...]) -> Path:
    folder = Path(__file__).resolve().parent
    digest = hashlib.sha256(repr((os.environ.get("CXX"), _FLAGS, flags, sorted(features))).encode())
    for source in sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]):
        digest.update(source.read_bytes())
    kept = platformdirs.user_cache_path("autoplan") / "native" / f"{digest.hexdigest()[:32]}.so"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        made = Path(scratch) / kept.name
        compile_library([folder / source for source in _SOURCES], made, flags)
        made.replace(kept)  # whole or not at all, also with other processes at it
    return kept


def compile_library(sources: Sequence[Path], made: Path, flags: Sequence[str] = ()) -> None:
    """Compile C++ for the CPU at hand to the file `made`. Raises KernelError with the compiler's first error."""
    path = compiler()
    if path is None:
        raise KernelError("no C++ compiler was found: install g++, or name one in CXX")
    command = [path, *_FLAGS, *flags, *map(str, sources), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise KernelError(f"{path} could not compile it: {error}")

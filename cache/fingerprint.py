"""Fingerprints: everything a result depends on, as plain data that people can read, and the digests of it."""

from __future__ import annotations

import ctypes
import dis
import hashlib
import importlib.metadata
import inspect
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoplan.cache.codec import Plain, digest
from autoplan.errors import CacheError

__all__ = [
    "data_digest",
    "digest",
    "environment",
    "function_digest",
    "model_fingerprint",
    "source_digest",
    "structure_digest",
    "tensor_digest",
]

# Instruction sets that kernels for Linear are chosen by, as /proc/cpuinfo spells them.
_X86 = ("avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16")
_AMX = ("amx_tile", "amx_int8", "amx_bf16", "amx_fp16")
_ARM = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme")
_COLUMNS = 4093  # prime, so that exchanging two rows of a weight also moves its words to other columns
_SAMPLES = 4096
_CHUNK_BYTES = 64 << 20
_SOURCE = {".py", ".cpp", ".h"}
_KINDS_OF_CODE = (
    inspect.CO_VARARGS
    | inspect.CO_VARKEYWORDS
    | inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)
_READS_ELSEWHERE = {"LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME"}


def environment(device_type: str, kernels_digest: str) -> dict[str, Plain]:
    """What a timing depends on besides the shape and the kernel: the device and the versions of what runs on it.

    `device_type` is "cpu" or "cuda" (the current device; no CUDA call is made for "cpu"); `kernels_digest` is the
    `source_digest` of our kernels.
    """
    return {
        "device_type": device_type,
        **(_cuda() if device_type == "cuda" else _cpu()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": str(torch.__version__),  # a TorchVersion
        "triton": _version("triton"),
        "kernels": kernels_digest,
    }


def source_digest(*sources: str | os.PathLike[str] | ModuleType) -> str:
    """The sha256 of the Python and C++ source in folders, files, modules or packages, wherever they are installed.

    Raises:
        CacheError: a source holds no Python file.
    """
    files: dict[str, str] = {}
    for position, source in enumerate(sources):
        folder = _source_path(source)
        found = sorted(p for p in folder.rglob("*") if p.suffix in _SOURCE) if folder.is_dir() else [folder]
        if not found or not found[0].is_file():
            raise CacheError(f"there is no Python source at {folder}, so nothing would tell one version from another")
        for file in found:
            name = file.relative_to(folder).as_posix() if folder.is_dir() else file.name
            files[f"{position}/{name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return digest(files)


def tensor_digest(tensor: Tensor, strict: bool = False) -> str:
    """A digest of a tensor's dtype, shape and values, equal for equal values whatever strides or device hold them.

    The part before the colon says what it covers:

    - `sampled:` a hash of 4096 evenly spaced elements and of 4093 sums over all 64-bit words, modulo 2^64 so that
      neither the order of addition nor the number of threads counts. Any change of one word shows; changes that cancel
      exactly may not. About 0.2 s per GB on one CPU core.
    - `strict:` a hash of all bytes, 1 to 3 s per GB: also proof against changes made on purpose.
    - `shape:` a tensor on the meta device has no values, only dtype and shape count.

    Raises:
        CacheError: the tensor does not give access to its values (oneDNN's).
    """
    tensor = tensor.detach()
    coverage = "shape" if tensor.is_meta else "strict" if strict else "sampled"
    state = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if coverage != "shape":
        for values in _values(tensor):
            raw = _bytes(values)
            for part in _all_bytes(raw) if strict else _sample(raw, values.element_size()):
                state.update(part.contiguous().cpu().numpy().data)
    return f"{coverage}:{state.hexdigest()[:32]}"


def model_fingerprint(entries: Iterable[tuple[str, Tensor]], strict: bool = False) -> dict[str, Plain]:
    """Per name the shape, dtype and `tensor_digest` of its tensor, and one digest of all, whatever their order.

    Returns `{"tensors": {name: {"shape", "dtype", "digest"}}, "digest"}`.

    Raises:
        CacheError: a name comes twice, or a tensor has no digest.
    """
    tensors: dict[str, Plain] = {}
    for name, tensor in entries:
        if name in tensors:
            raise CacheError(f"two tensors are named {name!r}")
        tensors[name] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "digest": tensor_digest(tensor, strict),
        }
    return {"tensors": tensors, "digest": digest(tensors)}


def data_digest(data: object) -> str:
    """The digest of a model's input: tensors and arrays (every byte) in nested mappings, lists and tuples, and scalars.

    Lists and tuples count as the same, and so do the kinds of mapping and the order of keys.

    Raises:
        CacheError: something else is in it; the message names its type.
    """
    return digest(_describe(data))


def function_digest(function: object) -> str:
    """The digest of a Python function that depends on its code and arguments alone, as `lambda y: y[0]` does.

    Raises:
        CacheError: it reads globals or imports, closes over variables, or has defaults; or is no Python function.
    """
    if not isinstance(function, FunctionType) or any(
        (function.__closure__, function.__defaults__, function.__kwdefaults__)
    ):
        raise CacheError(f"{function!r} has no digest: more than its code says what it does")
    _check_reads_nothing(function.__code__)
    return digest(_described_code(function.__code__))


def structure_digest(model: nn.Module) -> str:
    """What a model computes with its tensors, as far as its modules show it.

    That is each one's name, `repr`, plain attributes and class, with the code of the class's own forward: not that of
    functions which it calls.
    """
    modules: list[Plain] = []
    code: dict[str, Plain] = {}
    for name, module in model.named_modules():
        plain: dict[str, Plain] = {key: repr(value) for key, value in vars(module).items() if _is_plain(key, value)}
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        modules.append([name, kind, plain])
        forward = inspect.unwrap(type(module).forward)
        if kind not in code and isinstance(forward, FunctionType):
            code[kind] = list(_described_code(forward.__code__))
    return digest([repr(model), modules, code])


def _is_plain(key: str, value: object) -> bool:
    return not key.startswith("_") and key != "training" and isinstance(value, bool | int | float | str)


def _check_reads_nothing(code: CodeType) -> None:
    if elsewhere := [i.argval for i in dis.get_instructions(code) if i.opname in _READS_ELSEWHERE]:
        raise CacheError(f"{code.co_name} has no digest: it reads {', '.join(map(str, elsewhere))}")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _check_reads_nothing(constant)


def _described_code(code: CodeType) -> list[Plain]:
    return [
        code.co_code.hex(),
        getattr(code, "co_exceptiontable", b"").hex(),  # since Python 3.11
        [code.co_flags & _KINDS_OF_CODE, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount],
        [list(names) for names in (code.co_names, code.co_varnames, code.co_cellvars, code.co_freevars)],
        [_described_constant(value) for value in code.co_consts],
    ]


def _described_constant(value: object) -> Plain:
    if isinstance(value, CodeType):
        return _described_code(value)
    if isinstance(value, frozenset):  # in an order that differs between processes
        return ["frozenset", *sorted(map(repr, value))]
    return repr(value)


# -- the machine -----------------------------------------------------------------------------------------------------


def _cpu() -> dict[str, Plain]:
    fields = _cpu_fields()
    flags = set((fields[0].get("flags") or fields[0].get("Features") or "").split()) if fields else set()
    cores = {(core.get("physical id"), core["core id"]) for core in fields if "core id" in core}
    logical = os.cpu_count() or 1
    return {
        "device": _cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": [*(name for name in _X86 + _AMX + _ARM if name in flags)],
        "threads": torch.get_num_threads(),
        "float32_matmul": _precision(torch.backends.mkldnn.matmul),  # type: ignore[attr-defined]
        "physical_cores": len(cores) or logical,
        "logical_cores": logical,
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical,
    }


def _cuda() -> dict[str, Plain]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "host": _cpu_model(),  # short kernels wait for the host to launch them
        "capability": [properties.major, properties.minor],
        "sm_count": properties.multi_processor_count,  # tells one MIG slice from another
        "memory_mib": properties.total_memory >> 20,
        "driver": _nvidia_driver(),
        "cuda": torch.version.cuda,
        "float32_matmul": _precision(torch.backends.cuda.matmul),
    }


def _precision(matmul: Any) -> str:
    """How a user lets float32 products be computed: "ieee", or faster as "tf32" or "bf16"."""
    return "ieee" if matmul.fp32_precision == "none" else str(matmul.fp32_precision)


def _nvidia_driver() -> str | None:
    """The driver's version by NVML, which comes with every driver; torch knows only the CUDA version it supports."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1" if os.name == "posix" else "nvml.dll")
        version = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() != 0:
            return None
        try:
            return version.value.decode() if nvml.nvmlSystemGetDriverVersion(version, 96) == 0 else None
        finally:
            nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return None


def _cpu_fields() -> list[dict[str, str]]:
    """The fields of /proc/cpuinfo per logical CPU; none where there is no such file."""
    try:
        blocks = Path("/proc/cpuinfo").read_text(errors="replace").strip().split("\n\n")
    except OSError:
        return []
    return [
        {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in block.splitlines())}
        for block in blocks
    ]


def _cpu_model() -> str:
    fields = _cpu_fields()
    first = fields[0] if fields else {}
    arm = " ".join(first[name] for name in ("CPU implementer", "CPU part") if name in first)
    return first.get("model name") or arm or platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_path(source: str | os.PathLike[str] | ModuleType) -> Path:
    if not isinstance(source, ModuleType):
        return Path(source)
    if not source.__file__:
        raise CacheError(f"the module {source.__name__} has no source file")
    file = Path(source.__file__)
    return file.parent if hasattr(source, "__path__") else file


# -- tensors and data ------------------------------------------------------------------------------------------------


def _values(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that say all there is to say of one of known dtype and shape."""
    if tensor.is_quantized:
        return (tensor.dequantize(),)
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return tensor.indices(), tensor.values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    if tensor.layout != torch.strided:
        raise CacheError(f"a {tensor.layout} tensor of shape {tuple(tensor.shape)} has no digest: pass its parts")
    return (tensor,)


def _bytes(tensor: Tensor) -> Tensor:
    """The values of a dense tensor as a uint8 vector that starts on a 64-bit word."""
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return flat.clone() if flat.storage_offset() % 8 else flat


def _all_bytes(values: Tensor) -> Iterable[Tensor]:
    for start in range(0, len(values), _CHUNK_BYTES):
        yield values[start : start + _CHUNK_BYTES]


def _sample(values: Tensor, element_size: int) -> Iterable[Tensor]:
    elements = values.view(-1, element_size)
    yield elements[:: max(1, len(elements) // _SAMPLES)]
    whole = len(values) // (8 * _COLUMNS) * (8 * _COLUMNS)
    yield _column_sums(values[:whole].view(torch.int64).view(-1, _COLUMNS))
    yield values[whole:]


def _column_sums(words: Tensor) -> Tensor:
    """The sum of each column modulo 2^64. Any order of addition gives the same, unlike with floats."""
    if words.device.type != "cpu":
        return words.sum(dim=0)
    return torch.from_numpy(words.numpy().sum(axis=0))  # faster than torch, which waits for its threads


def _describe(data: object) -> Plain:
    if isinstance(data, Tensor):
        return {"tensor": tensor_digest(data, strict=True)}
    if isinstance(data, np.ndarray | np.generic):
        array = np.ascontiguousarray(data)
        if array.dtype.hasobject:
            raise CacheError(f"an array of {array.dtype} has no digest")
        return {"array": hashlib.sha256(f"{array.dtype} {np.shape(data)}".encode() + array.tobytes()).hexdigest()}
    if isinstance(data, Mapping):
        return {"mapping": {digest(_describe(key)): _describe(value) for key, value in data.items()}}
    if isinstance(data, list | tuple):
        return [_describe(item) for item in data]
    if data is None or isinstance(data, bool | int | str):
        return data
    if isinstance(data, float):
        return {"float": repr(data)}  # may be nan
    if isinstance(data, bytes):
        return {"bytes": data.hex()}
    if isinstance(data, torch.dtype | torch.device):
        return {"torch": str(data)}
    raise CacheError(f"a {type(data).__module__}.{type(data).__qualname__} in the input has no digest")

"""Fingerprints: equal for equal things in any process, different for any difference that counts."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict, UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import autoplan.cache
from autoplan.cache import codec, fingerprint
from autoplan.errors import CacheError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool]


def _bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bit pattern of `dtype`, NaNs too."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    size = torch.empty(0, dtype=dtype).element_size()
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), generator=generator, dtype=torch.uint8)
    return codes.view(dtype)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_digest_sees_values_and_not_strides(dtype: torch.dtype, strict: bool) -> None:
    tensor = _bits((37, 65), dtype)
    digest = fingerprint.tensor_digest(tensor, strict)
    assert digest.startswith("strict:" if strict else "sampled:")
    assert fingerprint.tensor_digest(tensor.clone(), strict) == digest
    assert fingerprint.tensor_digest(tensor.t().contiguous().t(), strict) == digest
    padded = torch.cat([tensor[:1], tensor])[1:]  # starts in the middle of a 64-bit word
    assert fingerprint.tensor_digest(padded, strict) == digest
    assert fingerprint.tensor_digest(tensor.view(65, 37), strict) != digest
    assert fingerprint.tensor_digest(tensor.t(), strict) != digest
    for position in (0, 1000, tensor.numel() - 1):
        changed = tensor.clone()
        byte = changed.view(-1)[position : position + 1].view(torch.uint8)
        byte[0] ^= 1
        assert fingerprint.tensor_digest(changed, strict) != digest


def test_tensor_digest_sees_one_bit_anywhere_in_a_large_tensor() -> None:
    tensor = _bits((3, 500_009), torch.bfloat16)
    digests = {fingerprint.tensor_digest(tensor)}
    positions = [1, 4097, 777_777, 1_000_003, tensor.numel() - 1]
    for position in positions:
        changed = tensor.clone()
        changed.view(-1)[position : position + 1].view(torch.uint8)[1] ^= 128
        digests.add(fingerprint.tensor_digest(changed))
    assert len(digests) == 1 + len(positions)


def test_tensor_digest_sees_rows_that_change_places() -> None:
    tensor = _bits((300, 4096), torch.float32)
    order = torch.arange(300)
    order[[7, 8]] = order[[8, 7]]
    assert fingerprint.tensor_digest(tensor[order]) != fingerprint.tensor_digest(tensor)
    assert fingerprint.tensor_digest(tensor.flip(0)) != fingerprint.tensor_digest(tensor)


def test_tensor_digest_tells_dtypes_with_equal_bytes_apart() -> None:
    codes = torch.zeros(16, dtype=torch.uint8)
    dtypes = [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
    assert len({fingerprint.tensor_digest(codes.view(dtype)) for dtype in dtypes}) == len(dtypes)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (4093 * 8,), (4093 * 8 + 1,)], ids=str)
def test_tensor_digest_of_edge_shapes(shape: tuple[int, ...]) -> None:
    for strict in (False, True):
        zeros, ones = torch.zeros(shape, dtype=torch.int8), torch.ones(shape, dtype=torch.int8)
        same = fingerprint.tensor_digest(zeros, strict) == fingerprint.tensor_digest(ones, strict)
        assert same == (zeros.numel() == 0)


def test_tensor_digest_does_not_depend_on_threads_or_grad() -> None:
    tensor = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    digest = fingerprint.tensor_digest(tensor)
    assert fingerprint.tensor_digest(torch.nn.Parameter(tensor)) == digest
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert fingerprint.tensor_digest(tensor) == digest
    finally:
        torch.set_num_threads(threads)


def test_column_sums_are_the_same_on_every_device() -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (50, 7), generator=torch.Generator().manual_seed(0))  # they overflow
    assert torch.equal(fingerprint._column_sums(words), words.sum(dim=0))


def test_tensor_digest_says_when_there_are_no_values() -> None:
    digest = fingerprint.tensor_digest(torch.empty(3, 4, device="meta"))
    assert digest.startswith("shape:")
    assert digest != fingerprint.tensor_digest(torch.empty(4, 3, device="meta"))
    assert digest != fingerprint.tensor_digest(torch.empty(3, 4, device="meta", dtype=torch.float16))


def test_tensor_digest_refuses_what_it_cannot_read() -> None:
    with pytest.raises(CacheError, match="_mkldnn"):
        fingerprint.tensor_digest(torch.eye(3).to_mkldnn())


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC)", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("strict", [False, True])
def test_tensor_digest_reads_sparse_and_quantized_tensors(strict: bool) -> None:
    def digests(dense: torch.Tensor) -> list[str]:
        sparse = [dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc(), dense.to_sparse_bsr((2, 2)),
                  dense.to_sparse_bsc((2, 2)), torch.quantize_per_tensor(dense, 0.5, 3, torch.qint8)]  # fmt: skip
        return [fingerprint.tensor_digest(tensor, strict) for tensor in sparse]

    moved = torch.eye(4)
    moved[0, 0], moved[0, 1] = 0, 1
    assert digests(torch.eye(4)) == digests(torch.eye(4))
    for others in (digests(moved), digests(2 * torch.eye(4))):
        assert all(one != other for one, other in zip(digests(torch.eye(4)), others, strict=True))


def test_model_fingerprint() -> None:
    entries = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4, dtype=torch.bfloat16)}
    found = fingerprint.model_fingerprint(entries.items())
    assert codec.plain(found) == found
    assert found["tensors"]["a.weight"] == {  # type: ignore[index, call-overload]
        "shape": [2, 3],
        "dtype": "float32",
        "digest": fingerprint.tensor_digest(torch.ones(2, 3)),
    }
    assert fingerprint.model_fingerprint(reversed(entries.items())) == found
    for changed in ({"a.weight": torch.zeros(2, 3)}, {"c.weight": torch.ones(1)}):
        assert fingerprint.model_fingerprint((entries | changed).items())["digest"] != found["digest"]
    assert fingerprint.model_fingerprint(entries.items(), strict=True)["digest"] != found["digest"]
    with pytest.raises(CacheError, match=r"a\.weight"):
        fingerprint.model_fingerprint([*entries.items(), ("a.weight", torch.ones(1))])


def test_data_digest_follows_nesting() -> None:
    ids = torch.arange(6).view(2, 3)
    data = ((ids, 1.5), {"mask": ids > 2, "flags": [True, None, "x", b"y"], "dtype": torch.float16, 3: float("nan")})
    digest = fingerprint.data_digest(data)
    same = [
        [(ids.clone(), 1.5), OrderedDict(reversed(data[1].items()))],
        ((ids.t().contiguous().t(), 1.5), UserDict(data[1])),
    ]
    assert {fingerprint.data_digest(item) for item in same} == {digest}
    different = [
        ((ids + 1, 1.5), data[1]),
        ((ids, 1.25), data[1]),
        ((ids.int(), 1.5), data[1]),
        ((ids, 1.5, None), data[1]),
        ((ids, 1.5), {**data[1], "mask": ids > 3}),
        ((ids, 1.5), {**data[1], "3": 0}),
        ((ids.numpy(), 1.5), data[1]),
        (([ids], 1.5), data[1]),
    ]
    assert len({digest, *map(fingerprint.data_digest, different)}) == len(different) + 1


def test_function_digest_follows_the_code() -> None:
    def nested(y: Any) -> Any:
        return [part for part in y if part is not None]

    def minus(y: Any) -> Any:
        difference = lambda a, b: a - b  # noqa: E731
        return difference(a=y[0], b=y[1])

    def reversed_minus(y: Any) -> Any:
        difference = lambda b, a: b - a  # noqa: E731
        return difference(a=y[0], b=y[1])

    def captures_first(y: Any) -> Any:
        return (lambda a, b: (lambda: a)())(*y)

    def captures_second(y: Any) -> Any:
        return (lambda a, b: (lambda: b)())(*y)

    assert fingerprint.function_digest(lambda y: y[0]) == fingerprint.function_digest(lambda y: y[0])
    functions: list[Any] = [
        nested, minus, reversed_minus, captures_first, captures_second, lambda y: y[0], lambda y: y[1],
        lambda y: y[True], lambda y: y.a, lambda y: y.b, lambda y: {"logits": y}, lambda y: y, lambda *y: y,
        lambda **y: y, lambda *, y: y,
    ]  # fmt: skip
    assert len({fingerprint.function_digest(function) for function in functions}) == len(functions)


def test_function_digest_refuses_what_reads_more_than_its_arguments() -> None:
    which = 0

    def imports(y: Any) -> Any:
        import json

        return json.loads(y)

    for function in (lambda y: y[which], lambda y: len(y), lambda y, at=0: y[at], imports, str.upper, Path, [].append):
        with pytest.raises(CacheError, match="no digest"):
            fingerprint.function_digest(function)


def test_data_digest_of_arrays() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    digest = fingerprint.data_digest(array)
    assert fingerprint.data_digest(np.asfortranarray(array)) == digest
    others = [array.T, array + 1, array.astype(np.float64), array[0, 0], array[:1, 0]]
    assert len({digest, *map(fingerprint.data_digest, others)}) == len(others) + 1


def test_data_digest_refuses_what_has_no_bytes() -> None:
    for data in ({"image": object()}, [np.array([object()])], [{1, 2}]):
        with pytest.raises(CacheError, match="no digest"):
            fingerprint.data_digest(data)


# -- environment and sources -----------------------------------------------------------------------------------------


def test_environment_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("CUDA was touched")

    for name in ("current_device", "get_device_properties", "is_available", "init"):
        monkeypatch.setattr(torch.cuda, name, fail)
    found = fingerprint.environment("cpu", "kernels-1")
    assert codec.plain(found) == found
    assert found["device"]
    assert found["threads"] == torch.get_num_threads()
    assert found["capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["torch"] == torch.__version__
    assert found["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert fingerprint.environment("cpu", "kernels-2") == {**found, "kernels": "kernels-2"}


def test_environment_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = fingerprint.environment("cuda", "k")
    assert codec.plain(found) == found
    assert (found["device"], found["capability"], found["sm_count"]) == ("NVIDIA H200", [9, 0], 132)
    assert {"driver", "cuda", "host"} <= set(found)
    assert "threads" not in found  # a GPU's time does not depend on it


def test_a_cpu_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_cpu_fields", list)
    found = fingerprint.environment("cpu", "k")
    assert found["features"] == []
    assert found["physical_cores"] == found["logical_cores"]
    assert found["device"]


def test_an_arm_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"processor": "0", "Features": "fp asimd i8mm bf16", "CPU implementer": "0x41", "CPU part": "0xd40"}
    monkeypatch.setattr(fingerprint, "_cpu_fields", lambda: [fields])
    found = fingerprint.environment("cpu", "k")
    assert found["device"] == "0x41 0xd40"
    assert found["features"] == ["asimd", "i8mm", "bf16"]


def test_source_digest_sees_files_and_not_where_they_are(tmp_path: Path) -> None:
    for place in ("here", "there"):
        folder = tmp_path / place / "kernels"
        (folder / "cuda").mkdir(parents=True)
        (folder / "a.py").write_text("A = 1\n")
        (folder / "cuda" / "b.py").write_text("B = 2\n")
    here, there = tmp_path / "here" / "kernels", tmp_path / "there" / "kernels"
    digest = fingerprint.source_digest(here)
    assert fingerprint.source_digest(str(there)) == digest
    (there / "notes.txt").write_text("not source")
    assert fingerprint.source_digest(there) == digest
    (there / "a.py").rename(there / "c.py")
    assert fingerprint.source_digest(there) != digest
    (there / "c.py").rename(there / "a.py")
    (there / "tiles.h").write_text("// C++ is source too")
    assert fingerprint.source_digest(there) != digest
    (there / "tiles.h").unlink()
    (there / "cuda" / "b.py").write_text("B = 3\n")
    assert fingerprint.source_digest(there) != digest
    assert fingerprint.source_digest(here, there) != fingerprint.source_digest(there, here)
    for missing in (tmp_path / "nowhere", tmp_path):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(CacheError, match="no Python source"):
            fingerprint.source_digest(missing if missing != tmp_path else tmp_path / "empty")


def test_source_digest_of_packages_and_modules() -> None:
    package = fingerprint.source_digest(autoplan.cache)
    assert package == fingerprint.source_digest(Path(codec.__file__).parent)
    assert len({package, fingerprint.source_digest(codec), fingerprint.source_digest(fingerprint)}) == 3


SCRIPT = """
import torch
from autoplan.cache import fingerprint
tensor = torch.arange(100_000).view(100, 1000).to(torch.float32)
print(fingerprint.tensor_digest(tensor))
print(fingerprint.tensor_digest(tensor, strict=True))
print(fingerprint.data_digest({"ids": tensor, "names": ["a", "b"]}))
print(fingerprint.function_digest(lambda y: "b" in {"a", "b", "c", "d"}))
print(fingerprint.digest(fingerprint.environment("cpu", fingerprint.source_digest(fingerprint))))
"""


def test_fingerprints_are_the_same_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(autoplan.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    there = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    exec(SCRIPT, {})
    assert capsys.readouterr().out == there.stdout

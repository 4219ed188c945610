"""What is asked for is found only where nothing that it depends on differs: every field of every fingerprint counts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from autoplan import Budget, PlanCache, autoplan, benchmark, kernels
from autoplan.arms import Contender
from autoplan.benchmark import measure
from autoplan.cache import codec, fingerprint
from autoplan.candidates import find_candidate
from autoplan.kernels.ops import find_kernel
from autoplan.records import Part, Shape

SHAPE = Shape(4, 16, 16, True, "float32", "float32", "cpu", "eager")
PLAIN = [Contender(find_candidate("none"), find_kernel("linear"))]
EVERYWHERE = ["device_type", "device", "capability", "float32_matmul", "system", "python", "torch", "triton", "kernels"]
ON_CPU = ["features", "threads", "physical_cores", "logical_cores", "usable_cores"]
ON_CUDA = ["host", "sm_count", "memory_mib", "driver", "cuda"]


def different(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, list):
        return [*value, "more"] if not value or isinstance(value[0], str) else [value[0] + 1, *value[1:]]
    return f"{value} changed" if isinstance(value, str) else 1 if value is None else value + 1


def here() -> dict[str, Any]:
    return fingerprint.environment("cpu", fingerprint.source_digest(kernels))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The environment of a machine with a GPU."""
    properties = SimpleNamespace(name="Some GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return fingerprint.environment("cuda", fingerprint.source_digest(kernels))


@pytest.fixture
def cache(timer: Any) -> PlanCache:
    """Holds one timing, of plain F.linear here."""
    cache = PlanCache()
    measure({SHAPE: PLAIN}, here(), cache)
    assert timer.races == 1
    measure({SHAPE: PLAIN}, here(), cache)
    assert timer.races == 1, "the same question is answered"
    return cache


# -- timings ---------------------------------------------------------------------------------------------------------


def test_no_field_is_forgotten_here(gpu: dict[str, Any]) -> None:
    assert set(here()) == {*EVERYWHERE, *ON_CPU}
    assert set(gpu) == {*EVERYWHERE, *ON_CUDA}


@pytest.mark.parametrize("name", EVERYWHERE + ON_CPU)
def test_a_difference_in_the_cpu_environment_makes_a_timing_a_miss(cache: PlanCache, timer: Any, name: str) -> None:
    changed = here()
    changed[name] = different(changed[name])
    measure({SHAPE: PLAIN}, changed, cache)
    assert timer.races == 2
    measure({SHAPE: PLAIN}, here(), cache)
    assert timer.races == 2


@pytest.mark.parametrize("name", EVERYWHERE + ON_CUDA)
def test_a_difference_in_the_gpu_environment_makes_a_timing_a_miss(gpu: dict[str, Any], timer: Any, name: str) -> None:
    cache = PlanCache()
    measure({SHAPE: PLAIN}, gpu, cache)
    measure({SHAPE: PLAIN}, gpu, cache)
    assert timer.races == 1
    measure({SHAPE: PLAIN}, gpu | {name: different(gpu[name])}, cache)
    assert timer.races == 2


@pytest.mark.parametrize("name", EVERYWHERE + ON_CPU)
def test_a_field_that_is_missing_makes_a_timing_a_miss(cache: PlanCache, timer: Any, name: str) -> None:
    measure({SHAPE: PLAIN}, {key: value for key, value in here().items() if key != name}, cache)
    assert timer.races == 2


SETTINGS: dict[str, Any] = {
    "threads": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 99),
    "torch": lambda patch: patch.setattr(torch, "__version__", "99.0"),
    "triton": lambda patch: patch.setattr(fingerprint, "_version", lambda name: "99.0"),
    "device": lambda patch: patch.setattr(fingerprint, "_cpu_model", lambda: "another CPU"),
    "features": lambda patch: patch.setattr(fingerprint, "_cpu_fields", lambda: [{"flags": "avx2 fma"}]),
    "capability": lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NONE"),
    "usable_cores": lambda patch: patch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False),
    "logical_cores": lambda patch: patch.setattr("os.cpu_count", lambda: 99),
    "system": lambda patch: patch.setattr("platform.machine", lambda: "another"),
    "python": lambda patch: patch.setattr("sys.version_info", SimpleNamespace(major=9, minor=9)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_environment_sees_what_changes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    before = here()
    with monkeypatch.context() as patch:
        SETTINGS[name](patch)
        assert here()[name] != before[name]
    assert here() == before


def test_the_environment_sees_the_precision_of_float32_products() -> None:
    before, precision = here(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest" if precision != "highest" else "medium")
        assert here()["float32_matmul"] != before["float32_matmul"]
    finally:
        torch.set_float32_matmul_precision(precision)
    assert here() == before


def test_a_change_in_any_kernel_source_makes_a_timing_a_miss(cache: PlanCache, timer: Any, tmp_path: Path) -> None:
    source = tmp_path / "kernels"
    shutil.copytree(Path(kernels.__file__).parent, source, ignore=shutil.ignore_patterns("__pycache__"))
    assert fingerprint.environment("cpu", fingerprint.source_digest(source)) == here()
    files = sorted(source.rglob("*.py"))
    assert files
    for races, file in enumerate(files, start=2):
        text = file.read_text()
        file.write_text(f"{text} ")
        measure({SHAPE: PLAIN}, fingerprint.environment("cpu", fingerprint.source_digest(source)), cache)
        assert timer.races == races, file.name
        file.write_text(text)
    measure({SHAPE: PLAIN}, fingerprint.environment("cpu", fingerprint.source_digest(source)), cache)
    assert timer.races == len(files) + 1


@pytest.mark.parametrize("name", [field.name for field in fields(Shape) if field.name != "device"])
def test_another_shape_is_a_miss(cache: PlanCache, timer: Any, name: str) -> None:
    other = {
        "dtype": "bfloat16", "weight_dtype": "bfloat16", "mode": "compiled", "has_bias": False,
        "parts": (Part("none", SHAPE.out_features, True, "linear"),),
    }.get(name, 32)  # fmt: skip
    measure({replace(SHAPE, **{name: other}): PLAIN}, here(), cache)
    assert timer.races == 2


@pytest.mark.parametrize("setting", ["benchmark.MARGIN", "coldness.MAX_COPIES"])
def test_another_timer_setting_is_a_miss(
    cache: PlanCache, timer: Any, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setattr(f"autoplan.{setting}", 3)
    measure({SHAPE: PLAIN}, here(), cache)
    assert timer.races == 2


def test_weights_colder_in_another_model_are_a_miss(cache: PlanCache, timer: Any) -> None:
    measure({SHAPE: PLAIN}, here(), cache, model_bytes=3 << 20)
    assert timer.races == 2
    measure({SHAPE: PLAIN}, here(), cache, model_bytes=4 << 20)  # about as cold
    assert timer.races == 2
    measure({SHAPE: PLAIN}, here(), cache, model_bytes=5 << 20)
    assert timer.races == 3


def test_another_candidate_source_is_a_miss(cache: PlanCache, timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "candidate_digest", lambda candidate: "another")
    measure({SHAPE: PLAIN}, here(), cache)
    assert timer.races == 2


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every place in plain data that holds no more places, and what it holds."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))
    if not items:
        yield path, data


def test_every_leaf_of_a_timings_fingerprint_is_in_its_key(cache: PlanCache) -> None:
    (key,) = cache.keys("timings")
    record: Any = cache.get("timings", key)
    assert {"environment", "shape", "candidate", "kernel", "timer"} <= set(record["fingerprint"])
    places = list(leaves(record["fingerprint"]))
    assert len(places) > 25
    for path, value in places:
        changed = where = codec.plain(record["fingerprint"])
        for step in path[:-1]:
            where = where[step]  # type: ignore[index, call-overload]
        where[path[-1]] = "other" if value is None or isinstance(value, list | dict) else different(value)  # type: ignore
        assert cache.get("timings", codec.digest(changed)) is None, path


# -- sensitivities ---------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Two layers, and a buffer that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 32)
        self.register_buffer("shift", torch.zeros(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(torch.relu(self.first(x)) + self.shift)
        return y


def nudge(name: str, position: int) -> Any:
    def change(model: nn.Module) -> None:
        tensor = model.get_parameter(name) if name != "shift" else model.get_buffer(name)
        with torch.no_grad():
            tensor.view(-1)[position] += 1e-3

    return change


CHANGES: dict[str, Any] = {
    "a weight of the layer": nudge("first.weight", 0),
    "its last weight": nudge("first.weight", 64 * 64 - 1),
    "a weight of another layer": nudge("last.weight", 100),
    "a bias": nudge("first.bias", 3),
    "a buffer": nudge("shift", 5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_weight_makes_another_model(name: str) -> None:
    def digest(model: nn.Module) -> Any:
        return fingerprint.model_fingerprint([*model.named_parameters(), *model.named_buffers()])["digest"]

    other = Model()
    assert digest(other) == digest(Model())
    CHANGES[name](other)
    assert digest(other) != digest(Model())


def test_a_changed_weight_or_other_data_make_a_sensitivity_a_miss(timer: Any) -> None:
    cache, x = PlanCache(), torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    arguments: Any = {"budget": Budget(divergence=0.1), "candidates": ["none", "int8_dynamic"], "cache": cache}
    autoplan(Model(), x, **arguments)
    races = timer.races
    assert len(cache.keys("sensitivities")) == 4, "two layers, by fisher, and audited by kl"
    other = Model()
    nudge("last.weight", 100)(other)
    autoplan(other, x, **arguments)
    assert len(cache.keys("sensitivities")) == 8, "every score is for one model as a whole"
    x[3, 5] += 1e-3
    autoplan(Model(), x, **arguments)
    assert len(cache.keys("sensitivities")) == 12
    assert timer.races == races, "but what was timed depends on shapes alone"
    for key in cache.keys("sensitivities"):
        record: Any = cache.get("sensitivities", key)
        assert {"model", "data", "environment", "layer", "program", "candidate"} <= set(record["fingerprint"])

"""What every test starts from: a seed, no cache but its own, and the promise that no global setting stays changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: two workers' threads on two cores, each spinning while it waits, keep each other from work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def global_settings() -> dict[str, Any]:
    """The settings of torch, dynamo and inductor that a planner might be tempted to change."""
    settings: dict[str, Any] = {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
    }
    if "torch._dynamo.eval_frame" in sys.modules:  # imported by the first compile, and not before for our sake
        settings["compile stance"] = torch._dynamo.eval_frame._stance
    for name in ("torch._dynamo.config", "torch._inductor.config"):
        if name in sys.modules:
            settings |= {f"{name}.{key}": value for key, value in sys.modules[name].get_config_copy().items()}
    return settings


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seeds torch, hides the user's cache folder, and fails the test that leaves a global setting changed."""
    monkeypatch.setattr("autoplan.contention.waited_ns", lambda: 0)  # tests beside this one take the CPUs
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.delenv("AUTOPLAN_CACHE", raising=False)
    torch.manual_seed(0)
    before = global_settings()
    yield
    after = global_settings()
    changed = {name: (value, after[name]) for name, value in before.items() if after[name] != value}
    assert not changed, f"global settings left changed (before, after): {changed}"


@pytest.fixture(scope="session")
def pyproject() -> dict[str, Any]:
    """pyproject.toml, read."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


class FakeTimer:
    """Stands in for the clock: kernels take the ratios they are given, and every race is counted.

    `ratios` maps "candidate/kernel" (or "candidate") to time / plain time; what is not named takes 1.5 times as long.
    `model_ratio` is the planned model's time / float time as a whole; `uniform_ratio` that of the best uniform plan.
    """

    def __init__(self) -> None:
        self.ratios: dict[str, float] = {}
        self.width = 0.01
        self.baseline_us = 100.0
        self.model_ratio = 0.5
        self.uniform_ratio = 1.0  # time of the uniform plan / time of the plan
        self.inside_ratio = 1.0  # time of the float model in a region of autocast / outside of it
        self.other_side_ratio = 1.0  # time of the plan on the other side of a region / on its own
        self.raced: list[set[str]] = []  # the arms of every race, in turn
        self.comparisons = 0

    @property
    def races(self) -> int:
        return len(self.raced)

    def race(self, arms: Any, *, baseline: str, **_: Any) -> dict[str, Any]:
        self.raced.append({arm.name for arm in arms})
        timings = {}
        for arm in arms:
            arm.calls[0]()
            ratio = 1.0 if arm.name == baseline else self.ratios.get(arm.name, self.ratios.get(arm.group, 1.5))
            timings[arm.name] = self._timing(arm.name, arm.group, ratio, exact=arm.name == baseline)
        return timings

    def compare(self, calls: Any, *, baseline: str, **_: Any) -> dict[str, Any]:
        from autoplan.validate import OTHER_SIDE

        self.comparisons += "plan" in calls
        for call in calls.values():
            call()
        ratios = {"plan": 1.0, "float": 1 / self.model_ratio, "uniform": self.uniform_ratio,
                  OTHER_SIDE: self.other_side_ratio, "outside": 1.0, "inside": self.inside_ratio}  # fmt: skip
        return {name: self._timing(name, name, ratios[name], exact=name == baseline) for name in calls}

    def _timing(self, name: str, group: str, ratio: float, exact: bool) -> Any:
        from autoplan.timing import Timing

        width = 0.0 if exact else self.width
        return Timing(name, group, self.baseline_us, ratio, ratio * (1 - width), ratio * (1 + width), 8, "")


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> FakeTimer:
    """Planning with given times instead of measured ones: fast, and the same everywhere."""
    from autoplan import inside, timing

    fake = FakeTimer()
    monkeypatch.setattr(inside, "_rest", lambda *_: 1.0)
    fake.ratios = {"none/onednn": 1.0, "bf16/onednn": 0.8, "int8_dynamic/onednn_u8s8": 0.4, "int8_weight_only": 0.7}
    monkeypatch.setattr(timing, "race", fake.race)
    monkeypatch.setattr(timing, "compare", fake.compare)
    return fake

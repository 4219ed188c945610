"""What every test starts from: a seed, no cache but its own, and the promise that no global setting stays changed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

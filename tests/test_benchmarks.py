"""The GPU benchmarks work as scripts: on a CPU, tiny, and of no use as measurements."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from autoplan import planner, timing
from autoplan.timing import compare

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--device", "cpu", "--small", "--mode", "eager", "--rows", "2", "--shapes", "96x64", "--candidates",
        "int8_dynamic"]  # fmt: skip


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of benchmarks/, imported."""
    name = f"autoplan_benchmark_{request.param}"
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{request.param}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_every_kernel(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], timer: Any) -> None:
    assert script.main([*TINY, "--out", str(tmp_path)]) == 0
    assert "0 wrong" in capsys.readouterr().out
    rows = rows_of(tmp_path / "gpu.csv")
    assert {("none", "linear"), ("int8_dynamic", "int_mm")} <= {(row["name"], row["kernel"]) for row in rows}
    for row in rows:
        if row["shape"] == "96x64":
            assert float(row["us"]) > 0
            assert row["torch"] == torch.__version__
        else:
            assert row["note"].startswith("not run: ")  # a library that is not here


@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_a_kernel_that_is_wrong_is_told_and_not_timed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "_TOLERANCE_DYNAMIC", 1e-9)
    assert script.main([*TINY, "--no-peers", "--out", str(tmp_path)]) == 1
    assert "WRONG: Trial(candidate='int8_dynamic'" in capsys.readouterr().out
    assert {row["name"] for row in rows_of(tmp_path / "gpu.csv")} == {"none"}


@pytest.mark.parametrize("script", ["decode"], indirect=True)
def test_a_decoder(script: ModuleType, tmp_path: Path, timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "compare", compare)  # planning's timer stays the fake one
    monkeypatch.setattr(planner, "_WHOLE_MODEL_SECONDS", 0.1)
    arguments = ["--device", "cpu", "--small", "--mode", "eager", "--scenarios", "decode-32", "--layers", "1"]
    assert script.main([*arguments, "--candidates", "int8_dynamic", "--out", str(tmp_path)]) == 0
    rows = {row["variant"]: row for row in rows_of(tmp_path / "decode.csv")}
    assert {"bf16", "uniform int8_dynamic", "autoplan"} <= set(rows)
    for name in ("bf16", "uniform int8_dynamic", "autoplan"):
        assert float(rows[name]["tokens_per_s"]) > 0, rows[name]
    assert rows["bf16"]["layers"] == "none 8"


@pytest.mark.parametrize("script", ["decode"], indirect=True)
def test_decoding_token_by_token_gives_what_the_whole_prompt_gives(script: ModuleType) -> None:
    config = script.Config(64, 2, 4, 2, 128, 256, 64)
    model = script.Decoder.random(config, "cpu", 0).float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(5)  # attention matters
    tokens = torch.randint(256, (3, 16))
    whole = model(tokens, torch.arange(16), 16)
    for position in range(16):
        stepped = model(tokens[:, position : position + 1], torch.tensor([position]), 16)
    torch.testing.assert_close(stepped, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu", "decode"], indirect=True)
def test_without_a_gpu_they_say_so(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([]) == 2
    assert "--device cpu --small" in capsys.readouterr().err

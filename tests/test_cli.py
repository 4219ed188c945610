"""The command: what it prints, where errors go, and the exit codes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import autoplan
from autoplan import cli, demo
from autoplan.cache.store import PlanCache
from autoplan.candidates import find_candidate, registered
from autoplan.kernels import LinearSpec, find_kernel
from autoplan.plan import Plan
from autoplan.records import Call, LayerPlan, Option
from autoplan.selection import Budget


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    option = Option("none", "1:linear", 10.0, 9.0, 11.0, 4096, None, 0.0)
    layer = LayerPlan(
        "fc", (), 32, 32, True, "float32", (Call("default", 8, "float32", 1),), 10.0, "none", "as it was", (option,)
    )
    plan = Plan((layer,), (), Budget(divergence=0.01), {"default": 1.0}, "eager", {}, (), 0.0, 0.0, None, {})
    plan.save(tmp_path / "a.plan.json")
    return tmp_path / "a.plan.json"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"autoplan {autoplan.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["report", "--help"], ["doctor", "--help"]])
def test_help_documents_the_exit_codes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 0
    assert "exit codes:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["report"],
        ["report", "x.json", "--format", "html"],
        ["demo", "--dtype", "int8"],
        ["demo", "--batch", "0"],
        ["demo", "--batch", "many"],
        ["demo", "--cache", "x.json", "--fresh"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert "usage: autoplan" in capsys.readouterr().err


def test_report_prints_a_saved_plan(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(plan_file)]) == 0
    assert "NOTHING WAS SWITCHED" in capsys.readouterr().out
    assert cli.main(["report", str(plan_file), "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("layer,")
    assert cli.main(["report", str(plan_file), "--json"]) == 0
    assert Plan.from_dict(json.loads(capsys.readouterr().out)) == Plan.load(plan_file)


def test_an_error_is_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "missing.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("autoplan: cannot read")
    assert "Traceback" not in captured.err


def test_an_interrupt_exits_with_130(plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: str) -> Plan:
        raise KeyboardInterrupt

    monkeypatch.setattr(Plan, "load", interrupt)
    assert cli.main(["report", str(plan_file)]) == 130


def test_a_reader_that_closes_early_is_no_error(plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert cli.main(["report", str(plan_file)]) == 0


# -- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_lists_every_candidate_on_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    cpu = found["devices"][0]
    assert cpu["environment"]["device_type"] == "cpu"
    expected = {(c.name, k) for c in registered() for k in c.kernels if "cpu" in find_kernel(k).devices}
    assert {(row["candidate"], row["kernel"]) for row in cpu["candidates"]} == expected
    rows = {(row["candidate"], row["kernel"]): row for row in cpu["candidates"]}
    assert all(rows["none", "linear"]["available"].values())
    assert rows["bf16", "linear"]["available"] == {"float32": True, "bfloat16": False, "float16": False}
    assert "float32 models" in rows["bf16", "linear"]["reasons"]["bfloat16"]
    assert rows["int4_g64", "dequantize_int4"]["in_features_multiple_of"] == 64
    assert rows["int4_g64", "dequantize_int4"]["out_features_multiple_of"] == 1


def test_doctor_shows_why_a_kernel_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = replace(find_kernel("int_mm"), probe=lambda: "its probe gave a relative error of 7 on this machine")
    monkeypatch.setitem(find_kernel.__globals__["_KERNELS"], "int_mm", broken)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "int8_dynamic on int_mm: its probe gave a relative error of 7 on this machine" in text
    assert "bf16 on linear (bfloat16): the weight is bfloat16" in text
    assert max(map(len, text.splitlines())) <= 200


ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]


def test_doctor_shows_every_cuda_kernel_by_architecture_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def supports(spec: LinearSpec) -> str | None:
        assert spec.dtype == torch.bfloat16
        return None if spec.capability and spec.capability >= (8, 9) else "e4m3 needs compute capability 8.9"

    def probe() -> str | None:
        raise AssertionError("the matrix is about GPUs that are not here")

    kernel = replace(
        find_kernel("dequantize_fp8"), name="tests_e4m3", devices=("cuda",), supports=supports, probe=probe
    )
    monkeypatch.setitem(find_kernel.__globals__["_KERNELS"], "tests_e4m3", kernel)
    monkeypatch.setattr(find_candidate("fp8_dynamic"), "kernels", ("tests_e4m3",))
    assert cli.main(["doctor", "--json"]) == 0
    rows = {row["kernel"]: row for row in json.loads(capsys.readouterr().out)["cuda_kernels"]}
    assert {"linear", "tests_e4m3"} <= set(rows)
    assert "onednn" not in rows
    assert all(list(row["supported"]) == ARCHITECTURES for row in rows.values())
    assert rows["linear"]["supported"] == dict.fromkeys(ARCHITECTURES, True)
    assert rows["linear"]["candidates"] == ["none", "bf16"]
    assert [name for name, supported in rows["tests_e4m3"]["supported"].items() if not supported] == ["sm_80", "sm_86"]
    assert rows["tests_e4m3"]["reasons"]["sm_86"] == "e4m3 needs compute capability 8.9"
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "CUDA kernels by architecture" in text
    assert "  tests_e4m3 (sm_80, sm_86): e4m3 needs compute capability 8.9" in text
    assert max(map(len, text.splitlines())) <= 200


# -- demo ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def demo_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def run(**options: Any) -> dict[str, Any]:
        calls.append(options)
        options["say"]("working")
        return {"planned": {dtype: {"within_budget": dtype == "float32"} for dtype in options["dtypes"]}}

    monkeypatch.setattr(demo, "run", run)
    return calls


def test_demo_passes_its_options_on(demo_calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", "--dtype", "float32", "--batch", "8", "--budget", "0.02", "--cache", "x.json"]
    assert cli.main(arguments) == 0
    (call,) = demo_calls
    assert (call["dtypes"], call["batch"], call["cache"]) == (("float32",), 8, "x.json")
    assert call["budget"] == Budget(divergence=0.02)
    assert capsys.readouterr().out == "working\n"


def test_demo_exits_with_1_when_a_budget_is_exceeded(demo_calls: list[dict[str, Any]]) -> None:
    assert cli.main(["demo"]) == 1
    assert demo_calls[0]["dtypes"] == ("float32", "bfloat16")
    assert demo_calls[0]["budget"] == "high"
    assert demo_calls[0]["cache"] is None


def test_demo_json_is_alone_on_stdout(demo_calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--dtype", "float32", "--fresh", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"planned": {"float32": {"within_budget": True}}}
    assert captured.err == "working\n"
    assert isinstance(demo_calls[0]["cache"], PlanCache)
    assert demo_calls[0]["cache"].path is None


@pytest.mark.parametrize(("budget", "complaint"), [("highest", "lossless, high, balanced"), ("-1", "positive")])
def test_demo_refuses_a_budget_that_makes_no_sense(
    budget: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", f"--budget={budget}"]) == 2
    assert complaint in capsys.readouterr().err

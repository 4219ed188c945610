"""The benchmarks work as scripts: on a CPU, tiny, and of no use as measurements."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import math
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from autoplan import timing, validate
from autoplan.candidates import base, find_candidate
from autoplan.kernels import ops
from autoplan.kernels.cuda.gpus import gpu_of
from autoplan.records import Device
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
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("script", ["result_files"], indirect=True)
def test_every_row_says_what_it_was_measured_on(script: ModuleType, tmp_path: Path) -> None:
    gpu = {"device": "GPU (a) 100", "host": "x", "driver": "1.2", "cuda": "13.0", "python": "3.10", "torch": "2.9",
           "triton": None, "kernels": "ab"}  # fmt: skip
    assert script.folder_of(gpu) == ROOT / "benchmarks" / "results" / "gpu-a-100"
    file = tmp_path / "new" / "rows.csv"
    about = script.measured_on(gpu, mode="eager", **script.versions("pytest", "no-such-package"))
    script.write_csv(file, [{"us": 1.5}, {"note": "not run: é"}], about)
    first, second = rows_of(file)
    known = {"device": "GPU (a) 100", "driver": "1.2", "cuda": "13.0", "python": "3.10", "torch": "2.9"}
    known |= {"triton": "", "kernels": "ab", "threads": str(torch.get_num_threads()), "mode": "eager"}
    known |= {"pytest": pytest.__version__, "no-such-package": "none"}
    for row in (first, second):
        assert known.items() <= row.items()
        assert datetime.date.fromisoformat(row["date"]) <= datetime.date.today()
    assert (first["us"], first["note"], second["us"], second["note"]) == ("1.5", "", "", "not run: é")
    on_a_cpu = script.measured_on({key: value for key, value in gpu.items() if key not in ("driver", "cuda")})
    assert list(on_a_cpu) == ["device", "python", "torch", "triton", "kernels", "threads", "date"]


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
def test_what_tells_most_is_measured_first(script: ModuleType) -> None:
    def cases(**given: Any) -> list[tuple[str, int]]:
        return script._cases(SimpleNamespace(**{"shapes": None, "rows": None, "small": False} | given))

    every = cases()
    first = 3 * len(script.SHAPES)
    assert len(every) == len(set(every)) == len(script.SHAPES) * len(script.ROWS) + len(script.IMAGES)
    assert every[first : first + len(script.IMAGES)] == list(script.IMAGES)
    assert cases(shapes=["8x16"], rows=[3]) == [("8x16", 3)]
    assert cases(small=True) == [("96x64", 1), ("48x128", 1), ("96x64", 16), ("48x128", 16)]


@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_the_floor_on_a_gpu(script: ModuleType) -> None:
    bench = SimpleNamespace(
        device=Device("cuda", "H100", (9, 0)),
        profile=partial(script.Bench.profile, SimpleNamespace(device=Device("cuda", "H100", (9, 0)))),
    )
    floor = partial(script._floor_us, size=(4096, 4096), bench=bench)
    gpu = gpu_of((9, 0))
    weights = 4096 * 4096
    assert floor(find_candidate("int8_weight_only"), rows=1) == pytest.approx(
        (weights + 4 * 4096 + 2 * 2 * 4096) / gpu.bandwidth
    )
    assert floor(find_candidate("int4_g128"), rows=1) == pytest.approx(
        (weights / 2 + 3 * weights / 128 + 2 * 2 * 4096) / gpu.bandwidth
    )
    assert floor(find_candidate("fp8_dynamic"), rows=8192) == pytest.approx(2 * 8192 * weights / (2 * gpu.bf16_flops))


@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_a_kernel_that_is_wrong_is_told_and_not_timed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "_TOLERANCE_DYNAMIC", 1e-9)
    assert script.main([*TINY, "--no-peers", "--out", str(tmp_path)]) == 1
    assert "WRONG: Trial(candidate='int8_dynamic'" in capsys.readouterr().out
    assert {row["name"] for row in rows_of(tmp_path / "gpu.csv")} == {"none"}


@pytest.mark.parametrize("script", ["linear"], indirect=True)
def test_single_layers(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timer: Any) -> None:
    rates = script.floor.Rates(1e9, {"float32": 1e9, "bfloat16": 2e9, "int8": 4e9}, cached=1024)
    monkeypatch.setattr(script.floor, "rates_of_cpu", lambda: rates)
    arguments = ["--shapes", "96x64", "--rows", "1", "512", "--dtypes", "float32", "--candidates", "int8_dynamic"]
    assert script.main([*arguments, "--out", str(tmp_path / "linear.csv")]) == 0
    few, many = rows_of(tmp_path / "linear.csv")
    for row, plain_us, us in (
        (few, 4 * 96 * 64 / 1e3, (96 * 64 + 4 * 96) / 1e3),  # bytes of the weight, at one a nanosecond
        (many, 2 * 512 * 96 * 64 / 1e3, 2 * 512 * 96 * 64 / 4e3),  # or operations, at one and four
    ):
        baseline_us, ratio = float(row["baseline_us"]), float(row["ratio"])
        assert row["best"] == "int8_dynamic"
        assert float(row["plain_of_floor"]) == pytest.approx(plain_us / baseline_us, rel=0.01)
        assert float(row["of_floor"]) == pytest.approx(us * ratio / baseline_us, rel=0.01)
        assert (row["read_gb_per_s"], row["int8_tops"]) == ("1.0", "0.004")


@pytest.mark.slow  # it reads a gigabyte
@pytest.mark.parametrize("script", ["linear"], indirect=True)
def test_what_this_cpu_can_do_at_most(script: ModuleType) -> None:
    rates = script.floor.rates_of_cpu()
    every = [rates.bandwidth, *rates.operations.values()]
    assert all(map(math.isnan, every)) or all(1e8 < rate < 1e16 for rate in every)


@pytest.mark.parametrize("script", ["overhead"], indirect=True)
def test_overhead(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "PROGRAMS", (("int8_dynamic", "dequantize_int8"), ("int4_g32", "dequantize_int4")))
    assert script.main(["--seconds", "0.2", "--out", str(tmp_path)]) == 0
    rows = {row["layer"]: row for row in rows_of(tmp_path / "overhead.csv")}
    assert set(rows) == {"nn.Linear", "planned, none", "int8_dynamic", "int4_g32"}
    assert all(0 < float(row["us"]) < math.inf for row in rows.values())
    assert all(math.isfinite(float(row["beside its kernel"])) for row in rows.values())


@pytest.mark.parametrize("script", ["int4_error"], indirect=True)
def test_errors_of_int4(script: ModuleType, tmp_path: Path) -> None:
    assert script.main(["--layers", "2", "--out", str(tmp_path)]) == 0
    ours = [row for row in rows_of(tmp_path / "int4_error.csv") if row["library"] == "autoplan"]
    assert [float(row["bits"]) for row in ours] == [4 + 24 / size for size in (16, 32, 64, 128)]
    assert [float(row["error"]) for row in ours] == sorted(float(row["error"]) for row in ours)
    assert all(float(row["autoplan_there"]) == pytest.approx(1) for row in ours)
    assert script.on_line(5, [(2, 1.0), (4, 2.0), (8, 6.0)]) == 3
    assert script.on_line(1, [(2, 1.0), (4, 2.0), (8, 6.0)]) == 0.5
    assert script.on_line(9, [(2, 1.0), (4, 2.0), (8, 6.0)]) == 7


def first_shown(script: ModuleType) -> Path:
    """The results of the machine that the README shows first."""
    (picture,) = re.findall(r"\((\S+)/scoreboard\.png\)", script.README.read_text())
    return ROOT / picture


@pytest.mark.parametrize("script", ["readme"], indirect=True)
def test_the_readme_shows_what_the_results_say(script: ModuleType, tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    shutil.copy(script.README, copy)
    assert script.main([str(first_shown(script)), "--readme", str(copy)]) == 0
    assert (
        copy.read_text() == script.README.read_text()
    )  # else: python benchmarks/readme.py benchmarks/results/<device>


@pytest.mark.parametrize("script", ["readme"], indirect=True)
def test_what_the_demo_printed_is_shown(script: ModuleType, tmp_path: Path) -> None:
    copy, demo = tmp_path / "README.md", tmp_path / "demo.txt"
    shutil.copy(script.README, copy)
    demo.write_text(
        "== Planning\nautoplan: 2 layers\nlayer\na.layer.0\nx 1\na.layer.1\nx 2\n\nshare: of\n\nmore\n\n"
        "== Planning again\nautoplan: 3\n\n== Speed: fast\nA 1\n\n== Fidelity: high\nB 2\n\n== Plans\nnone\n"
    )
    script.main([str(first_shown(script)), "--readme", str(copy), "--demo", str(demo)])
    text = copy.read_text()
    assert "```\nautoplan: 2 layers\nlayer\na.layer.0\nx 1\n... (1 more blocks)\n\nshare: of\n\nmore\n```\n<!--" in text
    assert "```\n== Speed: fast\nA 1\n\n== Fidelity: high\nB 2\n```\n<!-- demo: end -->" in text
    with pytest.raises(ValueError, match="no block 'other'"):
        script.filled(text, "other", "")


@pytest.mark.parametrize("script", ["decode"], indirect=True)
def test_a_decoder(script: ModuleType, tmp_path: Path, timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "compare", compare)  # planning's timer stays the fake one
    monkeypatch.setattr(validate, "_SECONDS", 0.1)
    arguments = ["--device", "cpu", "--small", "--mode", "eager", "--scenarios", "decode-32", "--layers", "1"]
    assert script.main([*arguments, "--candidates", "int8_dynamic", "--out", str(tmp_path)]) == 0
    rows = {row["variant"]: row for row in rows_of(tmp_path / "decode.csv")}
    assert {"bf16", "uniform int8_dynamic", "autoplan"} <= set(rows)
    for name in ("bf16", "uniform int8_dynamic", "autoplan"):
        assert float(rows[name]["per_s"]) > 0, rows[name]
    assert (rows["bf16"]["layers"], rows["bf16"]["unit"]) == ("none 8", "tokens")
    assert rows["torchao autoquant"]["note"].startswith("failed: ")  # a library that is not here


@pytest.mark.parametrize("script", ["diffusion"], indirect=True)
def test_a_diffusion_transformer(
    script: ModuleType, tmp_path: Path, timer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "compare", compare)  # planning's timer stays the fake one
    monkeypatch.setattr(validate, "_SECONDS", 0.1)
    arguments = ["--device", "cpu", "--small", "--mode", "eager", "--layers", "1", "--no-peers"]
    assert script.main([*arguments, "--candidates", "int8_dynamic", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "diffusion.csv")
    assert [row["variant"] for row in rows] == 2 * ["bf16", "uniform int8_dynamic", "autoplan"]
    assert {row["scenario"]: row["blocks"] for row in rows} == {"1024-pixels": "1", "512-pixels": "1"}
    assert all(float(row["per_s"]) > 0 for row in rows)
    assert rows[0]["layers"] == "none 5"


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


@pytest.mark.parametrize("script", ["planners"], indirect=True)
def test_planners(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_CANDIDATES", dict(base._CANDIDATES))
    monkeypatch.setattr(ops, "_KERNELS", dict(ops._KERNELS))
    monkeypatch.setattr(script.sys.modules["planner_peers"], "modelopt", None)
    monkeypatch.setitem(sys.modules, "auto_round", None)
    assert script.main(["--quick", "--turns", "1", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "planners.csv")
    assert {row["planner"] for row in rows} == set(script.PLANNERS)
    for row in rows:
        if row["planner"].startswith(("modelopt", "autoround")):
            assert row["note"].startswith("not run: ")  # a library that is not here
        else:
            assert float(row["bits"]) <= float(row["budget"]) + 1e-6
            assert float(row["kl"]) > 0
            assert row["torch"] == torch.__version__
        if row["planner"] == script.OURS:
            assert float(row["ours/it"]) == 1
    quality = {(row["model"], row["strategy"]): row for row in rows_of(tmp_path / "planners_prediction.csv")}
    assert set(quality) == {(model, strategy) for model in ("plain", "outliers") for strategy in ("fisher", "kl")}
    assert all(float(row["spearman"]) > 0.9 for row in quality.values())  # 8 plans of a model that has hardly learned


@pytest.mark.parametrize("script", ["planners"], indirect=True)
def test_outlier_channels_leave_the_function_as_it_is(script: ModuleType) -> None:
    tokens = torch.randint(256, (3, 17))
    model = script.trained(replace(script.QUICK, steps=2), tokens.flatten().repeat(9), 0)
    changed = script.with_outliers(model, 0)
    largest = changed.model.layers[0].input_layernorm.weight.max() / model.model.layers[0].input_layernorm.weight.max()
    assert 20 < largest < 30
    torch.testing.assert_close(changed(input_ids=tokens).logits, model(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", ["planners"], indirect=True)
def test_fake_quantizers_round_to_their_formats(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = script.sys.modules["planner_peers"]
    monkeypatch.setattr(peers, "modelopt", None)
    weight = torch.randn(7, 48)
    for name, levels in {"int3_b16": 3, "int4_b16": 7, "int6_b16": 31, "int8": 127}.items():
        rounded = peers.FakeQuantized(name, peers.FORMATS[name]).quantize(weight)["weight"]
        blocks, of_blocks = (t.view(-1, 48 if name == "int8" else 16) for t in (weight, rounded))
        scale = blocks.abs().amax(1, keepdim=True) / levels
        torch.testing.assert_close(of_blocks, (blocks / scale).round() * scale, rtol=1e-5, atol=1e-6)
    x = torch.randn(5, 48) * torch.logspace(-2, 2, 5)[:, None]
    fp8 = peers.FakeQuantized("fp8", peers.FORMATS["fp8"])
    y = fp8.linear(x, {"weight": torch.eye(48)}, None)
    scale = x.abs().amax(1, keepdim=True) / 448
    torch.testing.assert_close(y, (x / scale).to(torch.float8_e4m3fn).float() * scale, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu", "decode", "diffusion"], indirect=True)
def test_without_a_gpu_they_say_so(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([]) == 2
    assert "--device cpu --small" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["scoreboard"], indirect=True)
def test_the_scoreboard(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timer: Any) -> None:
    monkeypatch.setattr(timing, "compare", compare)  # planning's races stay the fake ones
    monkeypatch.setattr(validate, "_SECONDS", 0.1)
    monkeypatch.setattr(script, "TOO_SLOW", 1000.0)
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    monkeypatch.setattr(script, "batches", lambda peers, size: [[peer] for peer in peers])  # groups of one
    arguments = ["--quick", "--workloads", "layers", "--peers", "bfloat16 eager", "bfloat16 compiled", "quanto int8"]
    assert script.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = {row["peer"]: row for row in rows_of(tmp_path / "scoreboard-layers.csv")}
    assert set(rows) == {"float32 eager", "autoplan balanced", "bfloat16 eager", "bfloat16 compiled", "quanto int8"}
    assert rows.pop("quanto int8")["note"].startswith("not run: ModuleNotFoundError")  # a library that is not here
    for row in rows.values():
        assert float(row["ms"]) > 0
        assert float(row["speedup_low"]) <= float(row["speedup"]) <= float(row["speedup_high"])
        assert row["torch"] == torch.__version__
    second, ours = rows["bfloat16 compiled"], rows["autoplan balanced"]  # the second group's, and who was raced with it
    assert float(second["speedup"]) == pytest.approx(float(ours["speedup"]) / float(second["ours"]), rel=1e-3)
    assert float(rows["float32 eager"]["relative_error"]) == 0
    assert 1e-7 < float(rows["bfloat16 eager"]["relative_error"]) < 1e-4  # 8 bits of mantissa, in a product of 64
    assert float(rows["bfloat16 eager"]["mib"]) == float(rows["float32 eager"]["mib"]) / 2
    page = (tmp_path / "scoreboard.md").read_text()
    assert all(f"| {peer}" in page for peer in rows)


@pytest.mark.parametrize("script", ["scoreboard"], indirect=True)
def test_a_peer_that_kills_the_process_is_a_row(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trying = {"workload": "w", "peer": "deadly", "scenarios": ["s", "t"]}

    def child(command: list[str], **_: Any) -> Any:
        journal = Path(command[command.index("--journal") + 1])
        if journal.exists():  # the second time: it goes on
            script.note(journal, row={"workload": "w", "scenario": "s", "peer": "next"})
            return SimpleNamespace(returncode=0)
        script.note(journal, row={"workload": "w", "scenario": "s", "peer": "deadly"})
        script.note(journal, trying=trying)
        return SimpleNamespace(returncode=-11)

    def runs_short_of_memory(command: list[str], **_: Any) -> Any:
        called.append(1)
        return SimpleNamespace(returncode=script.GO_ON if len(called) < 3 else 0)

    monkeypatch.setattr(script.subprocess, "run", child)
    arguments = argparse.Namespace(journal=tmp_path / "j", seconds=1.0, patience=1.0, full=False, peers=None)
    rows = script.in_a_child("layers", arguments, str(tmp_path))
    assert [(row["peer"], row["scenario"]) for row in rows] == [("deadly", "s"), ("deadly", "t"), ("next", "s")]
    assert [row.get("note") for row in rows] == [None, "killed the process: SIGSEGV", None]
    called: list[int] = []
    monkeypatch.setattr(script.subprocess, "run", runs_short_of_memory)
    assert script.in_a_child("layers", arguments, str(tmp_path)) == rows
    assert len(called) == 3


@pytest.mark.parametrize("script", ["scoreboard"], indirect=True)
def test_turns_of_different_lengths_are_compared_by_the_call(script: ModuleType) -> None:
    called: list[int] = []
    script.turn(script.Made({"s": called.append}, 0), "s", 7, 3)()
    assert called == [7, 7, 7]
    raced = timing.Timing("fast", "fast", 600.0, 2.0, 1.5, 3.0, 20, "")  # turns: 20 calls in 1200 us beside 2 in 600
    found = script.a_call(raced, 20, 2)
    assert (found.baseline_us, found.ratio, found.ratio_low, found.ratio_high) == pytest.approx((300, 0.2, 0.15, 0.3))


@pytest.mark.parametrize("script", ["scoreboard"], indirect=True)
def test_garbage_is_no_match_however_fast(script: ModuleType) -> None:
    row = {"scenario": "s", "ms": 1.0, "kl": 0.1, "divergence": 0.1}
    wrong = {**row, "peer": "wrong", "speedup": 9, "divergence": 1e4, "note": "57 layers"}
    others = [{**row, "peer": "absent"}, {**row, "peer": "slow", "speedup": 1}, {**row, "peer": "fast", "speedup": 2}]
    page = script.tables.markdown([wrong, *others]).splitlines()
    assert [line.split()[1] for line in page[2:]] == ["fast", "slow", "absent", "wrong"]
    assert "57 layers; its output is garbage" in page[-1]

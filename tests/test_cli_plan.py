"""`autoplan plan` and `autoplan apply`: models and inputs in every form, the files they write, errors, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoplan import Plan, apply_plan, cli, cli_plan, plan_of

Run = Callable[..., tuple[int, str, str]]

FEW = ("--candidates", "int8_dynamic")

MODELS = """
import torch
from torch import nn

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x, scale=None):
        y = self.second(torch.relu(self.first(x)))
        return y if scale is None else y * scale

def build():
    torch.manual_seed(5)
    return Named()

def tied():
    made = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))
    made[2].weight = made[0].weight
    return made

def broken():
    raise OSError("no weights here")

number = 3

def text():
    return "no model"
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `autoplan ...` in a folder with a module of models; gives the exit code, stdout and stderr."""
    name = f"models_{abs(hash(str(tmp_path)))}"  # each test imports its own
    (tmp_path / f"{name}.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument).replace("models:", f"{name}:") for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def rows(count: int = 24) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(2))


def model() -> nn.Module:
    made: dict[str, Any] = {}
    exec(MODELS, made)
    built: nn.Module = made["build"]()
    return built


@pytest.fixture
def planned(run: Run, timer: Any) -> Plan:
    """plan.json, made of `models:build`, with both layers in int8."""
    torch.save(rows(), "rows.pt")
    code, out, err = run("plan", "models:build", "--inputs", "rows.pt", "--out", "plan.json", "--fresh", *FEW)
    assert (code, err) == (0, "")
    assert "saved to plan.json" in out
    assert "first" in out
    return Plan.load("plan.json")


def write_inputs(file: str) -> None:
    x = rows(6)
    if file.endswith(".pt"):
        torch.save([{"x": x}, {"x": x[:3], "scale": torch.ones(1)}], file)
    elif file.endswith(".safetensors"):
        save_file({"x": x}, file)
    elif file.endswith(".npz"):
        np.savez(file, x=x.numpy())
    elif file.endswith(".npy"):
        np.save(file, x.numpy())
    elif file == "batches.json":
        Path(file).write_text(json.dumps([{"x": x.tolist(), "scale": 2.0}, {"x": x[:3].tolist()}]))
    else:
        Path(file).write_text(json.dumps(x.tolist()))


@pytest.mark.parametrize("file", ["x.pt", "x.safetensors", "x.npz", "x.npy", "x.json", "batches.json"])
def test_inputs_in_every_format(run: Run, timer: Any, file: str) -> None:
    write_inputs(file)
    code, out, err = run("plan", "models:build", "--inputs", file, "--out", "p.pkl", "--fresh", "--json", *FEW)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["plan"] == "p.pkl"
    assert (found["layers"], found["switched"], found["candidates"]) == (2, 2, {"int8_dynamic": 2})
    assert found["divergence"]["value"] < found["budget"]["divergence"] == 0.01
    assert {call.rows for call in Plan.load("p.pkl").layers[0].calls} <= {6, 3}


def test_options_reach_the_planner(run: Run, timer: Any, tmp_path: Path) -> None:
    torch.save(rows(), "rows.pt")
    common = ["plan", "models:build", "--inputs", "rows.pt", "--out", "p.json", "--cache", tmp_path / "cache/"]
    options = ["--budget", "0.3", "--candidates", "bf16,int8_weight_only", "--exclude", "sec*", "--strict", "--seed", 3]
    assert run(*common, *options)[0] == 0
    plan = Plan.load("p.json")
    assert [layer.name for layer in plan.layers] == ["first"]
    assert plan.layers[0].chosen == "int8_weight_only"
    assert plan.budget.divergence == 0.3
    assert plan.fingerprints["options"]["seed"] == 3
    assert plan.fingerprints["model"]["layers"]["first"]["digest"].startswith("strict:")
    assert (tmp_path / "cache" / "plans").is_dir()
    timer.raced.clear()
    assert run(*common, *options)[0] == 0
    assert timer.races == 0
    torch.save(rows().bfloat16(), "rows.pt")
    assert run(*common, "--dtype", "bfloat16", "--include", "first", "--device", "cpu")[0] in (0, 1)
    assert [layer.dtype for layer in Plan.load("p.json").layers] == ["bfloat16"]


def test_a_plan_that_switches_nothing_exits_with_1(run: Run, timer: Any) -> None:
    torch.save(rows(), "rows.pt")
    timer.ratios.clear()
    code, out, _ = run("plan", "models:build", "--inputs", "rows.pt", "--out", "p.json", "--fresh", "--json", *FEW)
    assert code == 1
    assert json.loads(out)["switched"] == 0
    assert Path("p.json").exists()


@pytest.mark.parametrize("out", ["planned", "planned.safetensors"])
def test_planned_weights_load_into_a_model_that_was_never_quantized(run: Run, planned: Plan, out: str) -> None:
    code, text, err = run("apply", "models:build", "plan.json", "--out", out)
    assert (code, err) == (0, "")
    assert "2 of 2 layers changed" in text
    folder = Path("planned") if out == "planned" else Path()
    weights, plan = ("model.safetensors", "plan.json") if out == "planned" else (out, "planned.plan.json")
    assert Plan.load(folder / plan) == planned
    state = load_file(folder / weights)
    assert state["first.weight"].dtype == torch.int8 if "first.weight" in state else len(state) > 4
    expected = apply_plan(model(), planned)(rows())
    with torch.device("meta"):  # as a server does
        served = model()
    apply_plan(served, Plan.load(folder / plan), weights="skip")
    served.load_state_dict(load_file(folder / weights), assign=True)
    assert torch.equal(served(rows()), expected)
    assert plan_of(served) == planned
    assert not list(Path().rglob(".*.tmp"))


def test_apply_says_what_it_did_as_json(run: Run, planned: Plan) -> None:
    code, out, _ = run("apply", "models:build", "plan.json", "--out", "a/b", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["weights"], found["plan"], found["copied"]) == ("a/b/model.safetensors", "a/b/plan.json", [])
    assert found["nbytes"] == Path("a/b/model.safetensors").stat().st_size
    assert (found["switched"], found["stale"]) == (2, [])


def test_a_folder_may_have_a_dot_in_its_name(run: Run, planned: Plan) -> None:
    assert run("apply", "models:build", "plan.json", "--out", "Llama-3.2-1B")[0] == 0
    assert Path("Llama-3.2-1B/model.safetensors").exists()
    code, _, err = run("apply", "models:build", "plan.json", "--out", "weights.pt")
    assert (code, Path("weights.pt").exists()) == (2, False)
    assert "a folder, or to a file ending in .safetensors" in err


@pytest.mark.parametrize("out", ["own", "own/", "../{}/own", "own/model.safetensors"])
def test_the_float_model_is_not_written_over(run: Run, planned: Plan, out: str) -> None:
    Path("own").mkdir()
    save_file({"weight": rows()}, "own/model.safetensors")
    before = Path("own/model.safetensors").read_bytes()
    code, _, err = run("apply", "own", "plan.json", "--out", out.format(Path.cwd().name))
    assert code == 2
    assert "would write over the float model" in err
    assert Path("own/model.safetensors").read_bytes() == before


def test_a_plan_goes_into_a_folder_that_is_made_before_anything_is_measured(run: Run, timer: Any) -> None:
    torch.save(rows(), "rows.pt")
    assert run("plan", "models:build", "--inputs", "rows.pt", "--out", "new/folder/p.json", "--fresh", *FEW)[0] == 0
    assert Plan.load("new/folder/p.json").layers
    Path("file").touch()
    timer.raced.clear()
    code, _, err = run("plan", "models:build", "--inputs", "rows.pt", "--out", "file/p.json", "--fresh", *FEW)
    assert code == 2
    assert "cannot write to file" in err
    assert not timer.raced


def test_modules_in_the_folder_are_found_when_the_function_runs(run: Run, planned: Plan) -> None:
    Path("net.py").write_text(MODELS)
    Path("late.py").write_text("def build():\n    from net import build\n    return build()\n")
    assert run("apply", "late:build", "plan.json", "--out", "late")[0] == 0
    Path("broken.py").write_text("def build(:\n")
    for name, expected in (("broken:build", "SyntaxError"), ("./models.py:build", "cannot import ./models.py:build")):
        code, _, err = run("apply", name, "plan.json", "--out", "late")
        assert code == 2
        assert expected in err


def test_what_nobody_expected_is_a_traceback_and_no_answer(
    run: Run, planned: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_plan, "_save_weights", lambda *_: 1 / 0)
    code, _, err = run("apply", "models:build", "plan.json", "--out", "x")
    assert code == 2
    assert "ZeroDivisionError" in err


def test_tied_weights_are_written_under_each_name(run: Run, timer: Any) -> None:
    torch.save(rows(), "rows.pt")
    assert run("plan", "models:tied", "--inputs", "rows.pt", "--out", "p.json", "--fresh", *FEW)[0] == 0
    assert run("apply", "models:tied", "p.json", "--out", "w.safetensors", "--weights", "skip")[0] == 0
    assert {name.partition(".")[0] for name in load_file("w.safetensors")} == {"0", "2"}


def test_other_weights_are_refused(run: Run, planned: Plan) -> None:
    Path("other.py").write_text(MODELS.replace("manual_seed(5)", "manual_seed(6)"))
    code, _, err = run("apply", "other:build", "plan.json", "--out", "w.safetensors")
    assert code == 2
    assert "first has other weights" in err
    assert not Path("w.safetensors").exists()
    assert run("apply", "other:build", "plan.json", "--out", "w.safetensors", "--weights", "skip")[0] == 0
    code, _, err = run("apply", "models:build", "plan.json", "--out", "w.safetensors", "--weights", "strict")
    assert code == 2
    assert "strict=True" in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere"], "neither a folder nor module:function"),
        (["no_such_module:build"], "No module named 'no_such_module'"),
        (["models:nothing"], "no attribute 'nothing'"),
        (["models:number"], "must be a function"),
        (["models:text"], "gave a str, not an nn.Module"),
        (["models:broken"], "no weights here"),
        (["."], "holds no config.json"),
        (["models:build", "--device", "cuda:77"], "cannot put the model on cuda:77"),
        (["models:build", "--inputs", "missing.pt"], "cannot read the inputs in missing.pt"),
        (["models:build", "--inputs", "rows.yaml"], "its suffix must be one of .pt"),
        (["models:build", "--inputs", "bad.json"], "cannot read the inputs in bad.json"),
        (["models:build", "--inputs", "texts.txt"], "need the tokenizer"),
        (["models:build", "--inputs", "narrow.pt"], "the model does not run on the inputs in narrow.pt"),
        (["models:build", "--inputs", "pickled.pt"], "cannot read the inputs in pickled.pt"),
        (["models:build", "--out", "p.yaml"], "its suffix must be one of .json, .pkl"),
        (["models:build", "--candidates", "int3"], "no candidate is named 'int3'"),
        (["models:build", "--budget", "highest"], "lossless, high, balanced"),
        (["models:build", "--budget", "-1"], "must be a positive number"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run: Run, timer: Any, arguments: list[str], complaint: str) -> None:
    torch.save(rows(), "rows.pt")
    torch.save(rows()[:, :60], "narrow.pt")
    torch.save(Path("code"), "pickled.pt")
    Path("bad.json").write_text('{"x": [1, [2]]}')
    Path("texts.txt").write_text("A sentence.\n")
    given = {"--inputs": "rows.pt", "--out": "p.json"}
    given |= dict(zip(arguments[1::2], arguments[2::2], strict=True))
    code, out, err = run("plan", arguments[0], *(word for pair in given.items() for word in pair), "--fresh")
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("\n") <= 3 or "weights_only" in err
    assert not Path("p.json").exists()


def test_a_transformers_folder_and_a_file_of_texts(run: Run, timer: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from autoplan import demo

    folder = tmp_path / "bert"
    config = transformers.BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(demo._packages()[1]).save_pretrained(folder)
    Path("texts.txt").write_text("The first sentence.\n\nAnother, which is longer.\nA third.\n")
    code, out, err = run(
        "plan",
        folder,
        "--inputs",
        "texts.txt",
        "--out",
        "p.json",
        "--fresh",
        "--batch",
        2,
        "--json",
        "--budget",
        0.5,
        *FEW,
    )
    assert code == 0, err
    assert json.loads(out)["layers"] >= 6
    code, out, err = run("apply", folder, "p.json", "--out", "served", "--json")
    assert code == 0, err
    assert {"config.json", "tokenizer.json"} <= set(json.loads(out)["copied"])
    config = transformers.AutoConfig.from_pretrained("served")
    served = transformers.BertModel(config).eval()
    apply_plan(served, Plan.load("served/plan.json"), weights="skip")
    served.load_state_dict(load_file("served/model.safetensors"), assign=True)
    expected = apply_plan(transformers.BertModel.from_pretrained(folder).eval(), Plan.load("p.json"))
    ids = torch.tensor([[101, 2023, 102]])
    with torch.no_grad():
        assert torch.equal(served(ids).last_hidden_state, expected(ids).last_hidden_state)


def test_both_have_help_with_json_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("plan", "apply"):
        with pytest.raises(SystemExit) as exit:
            cli.main([command, "--help"])
        assert exit.value.code == 0
        text = capsys.readouterr().out
        assert "--json" in text
        assert "exit codes:" in text
        assert "module:function" in text

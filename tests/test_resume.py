"""A process that is killed while it plans leaves what it has measured: the next one takes it from there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent

# Children are forked one after another, before the parent runs anything of torch: importing it takes the longest.
SCRIPT = """
import json, os, signal, sys
import torch
from torch import nn
import torch._dynamo
from autoplan import Budget, PlanCache, autoplan, contention, plan_of, timing
from conftest import FakeTimer

folder, gradients = sys.argv[1], sys.argv[2] == "gradients"

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        sizes = (64, 96, 80, 48, 33)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:]))

    def forward(self, x):
        if not gradients:
            x = x.numpy(force=True)  # no way back from here
            x = torch.from_numpy(x)
        for layer in self.layers:
            x = layer(x).relu()
        return x if gradients else x.detach()

def plan(cache, kill_at=None):
    timer = FakeTimer()
    timer.ratios = {"bf16": 0.8, "fp8_weight_only": 0.5}
    timing.race, timing.compare = timer.race, timer.compare
    contention.waited_ns = lambda: 0  # tests beside this one take the CPUs
    seen = []

    def progress(stage, done, total):
        seen.append((stage, done))
        if kill_at == (stage, done):
            os.kill(os.getpid(), signal.SIGKILL)

    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    model = autoplan(Model(), x, candidates=["bf16", "fp8_weight_only"], budget=Budget(divergence=0.1), cache=cache,
                     progress=progress)
    return [layer.chosen for layer in plan_of(model).layers], plan_of(model).outcome, timer.races, seen

def killed(stage, done):
    if pid := os.fork():
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, "it ended before it was killed"
        cache = PlanCache(folder)
        return [len(cache.keys("timings")), len(cache.keys("sensitivities")), len(cache.keys("plans"))]
    plan(folder, (stage, done))
    os._exit(0)

after = [killed(*kill_at) for kill_at in json.loads(sys.argv[3])]
chosen, outcome, races, seen = plan(folder)
again = plan(False)
assert again[:2] == (chosen, outcome), "another plan than one that was never killed"
print(json.dumps({"after": after, "races": races, "all races": again[2], "seen": seen}))
"""


def resumed(folder: Path, gradients: str, kill_at: list[tuple[str, int]]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), gradients, json.dumps(kill_at)],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{HERE.parent}:{HERE}")


def test_killed_while_timing_and_while_scoring_one_at_a_time(tmp_path: Path) -> None:
    """Four shapes are timed and eight pairs scored: each once, whichever process does it."""
    found = resumed(tmp_path, "none", [("timing", 1), ("timing", 3), ("scoring", 3)])
    per_race = found["after"][0][0]
    assert found["all races"] == 4
    assert found["after"] == [[per_race, 0, 0], [3 * per_race, 0, 0], [4 * per_race, 3, 0]]
    assert found["races"] == 0
    assert [done for stage, done in found["seen"] if stage == "scoring"] == [3, 4, 5, 6, 7]


def test_killed_after_scoring_by_gradients_nothing_is_scored_again(tmp_path: Path) -> None:
    found = resumed(tmp_path, "gradients", [("validation", 0)])
    timings, scores, plans = found["after"][0]
    assert found["races"] == 0
    assert timings > 0
    assert scores >= 8
    assert plans == 0
    assert "scoring" not in [stage for stage, _ in found["seen"]]

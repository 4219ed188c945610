"""What planning holds in memory at once, of models that are large for their machine.

Run as a script, with a depth, this file plans a stack of layers and prints the memory it took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoplan import Budget

DEPTH, WIDTH, ROWS = 24, 1024, 32
LAYER_BYTES = WIDTH * WIDTH * 4  # of a float layer
CANDIDATES = ["bf16", "int8_dynamic", "int8_weight_only"]  # of a layer, together as large as the float layer


class Stack(nn.Module):
    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 32)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        y: Tensor = self.head(x)
        return y


# What planning holds.


def resident(kind: str) -> int:
    """Bytes of this process in memory: now ("VmRSS"), or at most since the last reset ("VmHWM")."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) << 10


def measure(depth: int) -> dict[str, int]:
    """Bytes that each stage of planning held at most above the float model and its recording, and those of the plan."""
    from conftest import FakeTimer

    from autoplan import coldness, make_plan, record, timing

    torch.set_num_threads(1)
    fake = FakeTimer()
    fake.ratios = {"int8_dynamic": 0.5, "bf16": 0.6}
    timing.race, timing.compare = fake.race, fake.compare  # type: ignore[assignment]
    coldness.MAX_COPIES = 2  # type: ignore[attr-defined]
    peaks: dict[str, int] = {}
    stage, before = "", 0

    def watch(entered: str, done: int, total: int) -> None:
        nonlocal stage
        peaks[stage] = max(peaks.get(stage, 0), resident("VmHWM") - before)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        stage = entered

    for layers, width in ((1, 64), (depth, WIDTH)):  # the first loads what every planning loads
        torch.manual_seed(0)
        model = Stack(layers, width)
        with torch.no_grad(), record(model) as recording:
            for _ in range(3):
                model(torch.randn(ROWS, width))
        peaks.clear()
        stage, before = "before", resident("VmRSS")
        watch("fingerprints", 0, 0)
        budget = Budget(divergence=1e-5)  # too tight for int8 everywhere: the plan is a mixture
        plan = make_plan(model, recording, candidates=CANDIDATES, budget=budget, cache=False, progress=watch)
        watch("after", 0, 0)
    return peaks | {"plan": plan.nbytes, "float": plan.baseline_nbytes}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells how much memory was used at most")
def test_planning_holds_one_layers_candidates_at_a_time_and_whole_plans_only_to_validate_them() -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(DEPTH)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back at once
        capture_output=True,
        text=True,
        check=True,
    )
    held: dict[str, int] = json.loads(done.stdout)
    assert held["float"] >= DEPTH * LAYER_BYTES
    assert 0 < held["plan"] < held["float"]
    assert held["scoring"] < 10 * LAYER_BYTES  # all candidates of all layers would be 24 times that of a layer
    assert held["timing"] < 16 * LAYER_BYTES  # two copies of the float weight and of every layout, at any depth
    # The plan, and the best uniform plan that it is raced against: bf16 at most, so half of the float model.
    # In a call inside autocast, torch holds such copies of what stays float.
    assert held["validation"] < held["plan"] + 4 * LAYER_BYTES
    assert held["whole model"] < held["plan"] + 2 * held["float"] / 2 + 4 * LAYER_BYTES


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))

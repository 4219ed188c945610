"""Models that are large for their machine: what planning holds in memory at once, and models that accelerate spreads.

Run as a script, with a depth, this file plans a stack of layers and prints the memory it took.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoplan import Budget, apply_plan, autoplan, plan_of
from autoplan.layers import PlannedLinear

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

    from autoplan import benchmark, make_plan, record, timing

    torch.set_num_threads(1)
    fake = FakeTimer()
    fake.ratios = {"int8_dynamic": 0.5, "bf16": 0.6}
    timing.race, timing.compare = fake.race, fake.compare  # type: ignore[assignment]
    benchmark._MAX_COPIES = 2  # type: ignore[attr-defined]
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
    assert held["validation"] < held["plan"] + 4 * LAYER_BYTES
    assert held["whole model"] < held["plan"] + held["float"] / 2 + 4 * LAYER_BYTES


# Models that accelerate spreads over devices and files.


QUICK: dict[str, Any] = {"candidates": ["int8_dynamic"], "budget": Budget(divergence=0.1), "cache": False}


@pytest.fixture
def accelerate() -> Any:
    return pytest.importorskip("accelerate")


def dispatched(accelerate: Any, model: nn.Module, folder: Path) -> nn.Module:
    """Its second layer lies in a file, all else on its device."""
    places = {"layers.0": "cpu", "layers.1": "disk", "layers.2": "cpu", "head": "cpu"}
    spread: nn.Module = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))
    return spread


def in_files(accelerate: Any, model: nn.Module, folder: Path) -> nn.Module:
    spread: nn.Module = accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    return spread


def in_memory(accelerate: Any, model: nn.Module, folder: Path) -> nn.Module:
    spread: nn.Module = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return spread


@pytest.mark.parametrize(
    ("spread", "planned"),
    [(dispatched, ["layers.0", "layers.2", "head"]), (in_files, []), (in_memory, [])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_of_a_model_that_accelerate_spreads_the_layers_that_keep_their_weights_are_planned(
    timer: Any, accelerate: Any, spread: Callable[..., nn.Module], planned: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 64)
    model = spread(accelerate, Stack(3, 64), tmp_path)
    expected = model(x).detach()
    places = {name: parameter.device.type for name, parameter in model.named_parameters()}
    autoplan(model, x, **QUICK)
    plan = plan_of(model)
    assert [layer.name for layer in plan.layers] == planned
    assert [name for name, module in model.named_modules() if isinstance(module, PlannedLinear)] == planned
    assert all("forward was replaced" in item.reason for item in plan.left_alone)
    assert len(plan.left_alone) == 4 - len(planned)
    error = float(((model(x).detach() - expected).norm() / expected.norm()) ** 2)
    assert error < 0.1
    assert (error > 0) == bool(planned)
    assert places.items() >= {name: p.device.type for name, p in model.named_parameters()}.items()


def test_a_planned_layer_keeps_the_hook_that_brings_its_inputs(timer: Any, accelerate: Any, tmp_path: Path) -> None:
    moved = []

    class Watching(accelerate.hooks.AlignDevicesHook):  # type: ignore[misc, name-defined]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            moved.append(type(module))
            return super().pre_forward(module, *args, **kwargs)

    torch.manual_seed(0)
    model, x = Stack(1, 64), torch.randn(12, 64)
    accelerate.hooks.add_hook_to_module(model.layers[0], Watching(execution_device="cpu"))
    autoplan(model, x, **QUICK)
    for twin in (model, copy.deepcopy(model), apply_plan(Stack(1, 64), plan_of(model), weights="skip")):
        moved.clear()
        twin(x)
        assert moved == ([PlannedLinear] if hasattr(twin.layers[0], "_hf_hook") else [])


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))

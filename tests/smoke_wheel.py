"""What someone who installed the wheel relies on. tests/test_packaging.py runs this where there is no checkout."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import autoplan
import autoplan.cache
import autoplan.kernels

for package in (autoplan, autoplan.kernels, autoplan.cache):
    assert Path(package.__file__ or "").is_relative_to(sys.prefix), f"not from the wheel: {package.__file__}"

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).eval()
x = torch.randn(16, 64)
with torch.no_grad():
    expected = model(x)
    planned = autoplan.autoplan(model, x, cache=False)
    error = ((planned(x) - expected).square().sum() / expected.square().sum()).item()

assert planned is model
assert "torch._inductor.compile_fx" not in sys.modules, "planning for eager execution must not need a compiler"
assert error <= 1e-2, f"relative squared error {error}, the budget was 1e-2"
print(autoplan.plan_of(planned).report())

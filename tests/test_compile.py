"""Planned models under torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from autoplan import Budget, PlanCache, autoplan, plan_of
from autoplan.apply import Swap, stand_ins
from autoplan.candidates import registered
from autoplan.layers import PlannedLinear

LOOSE = Budget(divergence=0.1)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """These tests compile more variants of one class than any user: none may count against the next test's limit."""
    torch._dynamo.reset()  # noqa: TID251
    yield
    torch._dynamo.reset()  # noqa: TID251


class Block(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Tower(nn.Module):
    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def rows(count: int = 24) -> Tensor:
    return torch.randn(count, 128, generator=torch.Generator().manual_seed(1))


def planned(candidate: str, program: str) -> Block:
    model = Block()
    for name in ("up", "down"):
        Swap(model, stand_ins(model, (name,), candidate, program)).exchange()
    return model


PROGRAMS = [
    pytest.param(candidate.name, program, id=f"{candidate.name}-{program}")
    for candidate in registered()
    for program in (*(f"1:{kernel}" for kernel in candidate.kernels),
                    *([f"1:{candidate.kernels[0]},8:{candidate.kernels[1]}"] if len(candidate.kernels) > 1 else []))
]  # fmt: skip


@pytest.mark.parametrize(("candidate", "program"), PROGRAMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_traces_what_a_layer_computes(candidate: str, program: str) -> None:
    if "onednn" in program:
        pytest.skip("TorchScript refuses oneDNN's opaque tensors, and says so")
    model = planned(candidate, program)
    with torch.no_grad():
        traced = torch.jit.trace(model, rows())
        torch.testing.assert_close(traced(rows(24) + 1), model(rows(24) + 1))


@pytest.mark.parametrize(("candidate", "program"), PROGRAMS)
def test_every_candidate_traces_as_one_graph_with_dynamic_rows(candidate: str, program: str) -> None:
    model = planned(candidate, program)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for count in (24, 3, 40):
            torch.testing.assert_close(compiled(rows(count)), model(rows(count)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("candidate", "program"), PROGRAMS)
def test_every_candidate_exports(candidate: str, program: str) -> None:
    model = planned(candidate, program)
    count = torch.export.Dim("rows", min=2, max=4096)
    with torch.no_grad():
        exported = torch.export.export(model, (rows(),), dynamic_shapes={"x": {0: count}})
        torch.testing.assert_close(exported.module()(rows(40)), model(rows(40)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("candidate", ["none", "bf16", "int8_dynamic"])
def test_inline_kernels_through_inductor(candidate: str) -> None:
    program = {"int8_dynamic": "1:onednn_u8s8"}.get(candidate, "1:onednn")
    model = planned(candidate, program)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(rows()), model(rows()), rtol=2e-2, atol=2e-2)


def test_gradients_flow_through_a_compiled_planned_model() -> None:
    model = planned("int8_dynamic", "1:onednn_u8s8")
    x, y = rows().requires_grad_(), rows().requires_grad_()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    model(y).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=2e-2, atol=2e-2)


def test_wrapping_before_and_after_planning_gives_one_plan(timer: Any) -> None:
    cache, x = PlanCache(), rows()
    before = autoplan(torch.compile(Tower()), x, budget=LOOSE, cache=cache)
    races = timer.races
    after = torch.compile(autoplan(Tower(), x, budget=LOOSE, cache=cache, compiled=True))
    assert timer.races == races
    assert plan_of(before) == plan_of(after)
    assert plan_of(before).mode == "compiled"
    assert plan_of(before).layers[0].chosen == "int8_dynamic"
    with torch.no_grad():
        assert torch.equal(before(x), after(x))


def test_the_lazy_form_of_a_compiled_model(timer: Any) -> None:
    model, x = Tower(), rows()
    with torch.no_grad():
        expected = model(x)
        compiled = autoplan(torch.compile(model), budget=LOOSE, cache=False)
        assert torch.equal(compiled(x), expected)  # recorded eagerly, in float
        assert isinstance(model.blocks[0].up, PlannedLinear)
        y = compiled(x)
    assert not torch.equal(y, expected)
    assert ((y - expected).norm() / expected.norm()) < 0.1


def test_after_twenty_swaps_everything_still_runs_compiled(timer: Any) -> None:
    """Trying candidates in 24 layers must neither exhaust the recompile limit nor leave anyone silently eager."""
    other, x = Tower(12), rows()
    with torch.no_grad():
        compiled_other = torch.compile(other)
        compiled_other(x)
        model = autoplan(torch.compile(Tower(12)), x, budget=LOOSE, cache=False)
        assert sum(isinstance(module, PlannedLinear) for module in model.modules()) == 24
        counters.clear()
        model(x)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        with torch.compiler.set_stance("fail_on_recompile"):
            model(x)  # compiled now, and nothing is left to compile
            compiled_other(x)  # what was compiled before planning still is
        counters.clear()
        third = torch.compile(Tower(12))
        third(x)
        assert counters["stats"]["unique_graphs"] <= 1
        with torch.compiler.set_stance("fail_on_recompile"):
            third(x)

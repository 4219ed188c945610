"""On a GPU: planning a model as a user does, the clock and the graphs it is timed with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoplan import Budget, PlanCache, autoplan, benchmark, plan_of, timing
from autoplan.arms import Contender
from autoplan.candidates import find_candidate, registered
from autoplan.candidates.base import Candidate
from autoplan.kernels import find_kernel
from autoplan.kernels.ops import Kernel
from autoplan.kernels.reference import linear_float64, relative_error
from autoplan.layers import PlannedLinear
from autoplan.records import COMPILED, EAGER, Call, LayerProfile, Shape
from autoplan.request import device_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LOOSE = Budget(divergence=0.1)


def void(*results: object) -> None:
    """For calls whose result does not matter."""


def profile(n: int, k: int) -> LayerProfile:
    return LayerProfile("x", (), k, n, True, "bfloat16", "cuda", (Call("default", 1, "bfloat16", 1),))


def runnable(candidate: Candidate, n: int, k: int, rows: int) -> list[Kernel]:
    """Every kernel of a candidate on this GPU, as it is and under its two best guesses."""
    layer = profile(n, k)
    device = device_of(layer)
    if candidate.rejects(layer, device):
        return []
    found = []
    for kernel in candidate.usable_kernels(layer, device)[0]:
        found.append(kernel)
        if kernel.variants:
            configs = kernel.variants(candidate.spec(layer, "bfloat16", device), rows)
            found += [find_kernel(f"{kernel.name}@{config}") for config in configs[:2]]
    return found


@pytest.mark.parametrize("name", [candidate.name for candidate in registered()])
@pytest.mark.parametrize(("n", "k"), [(256, 512), (272, 1024), (48, 384), (1000, 4096)])
@pytest.mark.parametrize("rows", [1, 3, 17, 64, 300])
def test_every_kernel_against_float64(name: str, n: int, k: int, rows: int) -> None:
    candidate = find_candidate(name)
    torch.manual_seed(0)
    weight, x, bias = (torch.randn(size, device="cuda").bfloat16() for size in ((n, k), (rows, k), (n,)))
    for kernel in runnable(candidate, n, k, rows):
        canonical = candidate.quantize(weight * 0.05)
        meant = candidate.linear(x.double(), canonical, bias.double())
        dynamic = relative_error(meant, linear_float64(x, canonical, bias)) > 1e-6
        packed = kernel.layout.pack(canonical)
        y = kernel.run(x, packed, bias, torch.bfloat16)
        assert y.shape == (rows, n)
        assert relative_error(y, meant) < (1e-2 if dynamic else 4e-3), kernel.name
        again = kernel.run(x, packed, bias, torch.bfloat16)
        assert torch.equal(y, again), f"{kernel.name} is not deterministic"
        unpacked = kernel.layout.unpack(packed)
        assert all(torch.equal(unpacked[key].float(), canonical[key].float()) for key in canonical), kernel.name


@pytest.mark.parametrize("mode", [EAGER, COMPILED])
def test_a_race_finds_what_is_faster(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that reads and writes the whole weight before it begins is slower, with and without graphs."""
    monkeypatch.setattr(benchmark, "_RACE_SECONDS", 5.0)
    shape = Shape(1, 4096, 4096, False, "bfloat16", "bfloat16", "cuda", mode)
    contenders = [
        Contender(find_candidate("none"), find_kernel("linear")),
        Contender(find_candidate("int8_weight_only"), find_kernel("dequantize_int8")),
    ]
    state = torch.cuda.get_rng_state()
    found = {m.candidate: m for m in benchmark._race(benchmark._arms(shape, 0), contenders, 0, 0, 5.0)}
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert 1 < found["none"].baseline_us < 1000
    assert found["int8_weight_only"].ratio > 1.2


def test_a_graph_replays_what_was_called_and_a_failed_one_leaves_nothing_behind() -> None:
    x, y = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
    replay = benchmark._captured(lambda: void(*(y.add_(x) for _ in range(3))))
    before = float(y[0])  # the warm-up added, the recording did not
    replay()
    assert float(y[0]) == before + 3

    with pytest.raises(Exception, match=r"capturing|CUDA"):
        benchmark._captured(lambda: void(x.sum().item()))
    torch.manual_seed(3)
    first = torch.randn(5, device="cuda")  # raises where a failed recording was left open
    torch.manual_seed(3)
    assert torch.equal(first, torch.randn(5, device="cuda"))
    replay = benchmark._captured(lambda: void(y.zero_()))
    replay()
    assert float(y.sum()) == 0


def test_the_clock_sees_work_that_is_still_under_way() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    a @ a
    clock = timing.clock_of("cuda")
    began = clock()
    for _ in range(20):
        a @ a
    busy = clock() - began
    began = clock()
    assert busy > 20 * 2 * 4096**3 / 2000e12 * 1e9  # no GPU is faster than 2 PFLOP/s in float32
    assert clock() - began < busy


class Block(nn.Module):
    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_is_planned_without_a_further_line(compiled: bool) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(Block(), Block()).cuda().bfloat16().eval()
    x = torch.randn(48, 512, device="cuda").bfloat16()
    with torch.no_grad():
        expected = model(x).float()
        state = torch.cuda.get_rng_state()
        cache = PlanCache()
        wrapped = torch.compile(model, mode="reduce-overhead") if compiled else model
        planned = autoplan(wrapped, x, budget=LOOSE, cache=cache)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        plan = plan_of(model)
        assert plan.mode == (COMPILED if compiled else EAGER)
        assert len(plan.layers) == 4
        assert not plan.left_alone
        reasons = [option.rejected for layer in plan.layers for option in layer.options]
        assert not [reason for reason in reasons if "failed" in reason or "not timed" in reason]
        y = planned(x).float()
        assert float((y - expected).norm() / expected.norm()) ** 2 < 0.1


def test_every_candidate_can_be_pinned_moved_and_moved_back() -> None:
    for name in ("int8_weight_only", "int4_g128"):
        torch.manual_seed(3)
        model = nn.Sequential(Block()).cuda().bfloat16().eval()
        x = torch.randn(16, 512, device="cuda").bfloat16()
        autoplan(model, x, candidates=[name], pin={"*": name}, budget=Budget(divergence=10.0),
                 cache=False)  # fmt: skip
        layers = [module for module in model.modules() if isinstance(module, PlannedLinear)]
        assert len(layers) == 2
        with torch.no_grad():
            y = model(x)
            model.cpu()
            there = model(x.cpu())
            model.cuda()
            assert torch.equal(model(x), y)
        assert relative_error(there, y.cpu()) < 0.05

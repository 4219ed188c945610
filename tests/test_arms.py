"""What runs in a race computes what the layers compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoplan.arms import Arms, Contender
from autoplan.candidates import find_candidate
from autoplan.kernels.ops import find_kernel
from autoplan.records import COMPILED, Part, Shape

SIZES = (64, 32, 96)


def arms(kernel: str, biases: tuple[bool, bool, bool], sizes: tuple[int, ...] = SIZES) -> Arms:
    parts = tuple(Part("int8_dynamic", size, bias, kernel) for size, bias in zip(sizes, biases, strict=True))
    shape = Shape(5, 128, sum(sizes), any(biases), "bfloat16", "bfloat16", "cpu", COMPILED, parts)
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(*size).bfloat16() for size in ((sum(sizes), 128), (sum(sizes),), (5, 128)))
    return Arms(shape, weight, bias, x, shared=False)


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
@pytest.mark.parametrize("name", ["fused_int8", "onednn_u8s8"])
def test_siblings_as_graphs_run_them(name: str, biases: tuple[bool, bool, bool]) -> None:
    kernel = find_kernel(name)
    if reason := kernel.lacks():
        pytest.skip(reason)
    made = arms(name, biases)
    with torch.no_grad():
        apart: Any = made.apart()()()
        together: Any = made.fused(Contender(find_candidate("int8_dynamic"), kernel))()()
    assert [own.shape for own in apart] == [(5, size) for size in SIZES]
    if isinstance(together, Tensor):  # one after another in memory
        together = [own.view(5, -1) for own in together.flatten().split([5 * size for size in SIZES])]
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.1)


def test_what_writes_pieces_is_called_without_a_graph_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = find_kernel("fused_int8")
    if reason := kernel.lacks():
        pytest.skip(reason)
    contender, lowered = Contender(find_candidate("int8_dynamic"), kernel), list[object]()
    monkeypatch.setattr("autoplan.arms._lowered", lambda graph, *_: lowered.append(graph) or graph)
    made = arms("fused_int8", (True, True, True))
    made.apart()
    made.fused(contender)
    assert not lowered
    arms("fused_int8", (True, False, True)).fused(contender)  # in a graph, some pieces get a bias and some do not
    arms("fused_int8", (True, True, True), (64, 31, 97)).fused(contender)
    assert len(lowered) == 2

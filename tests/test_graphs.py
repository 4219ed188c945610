"""Graphs of a trial: apart from the user's own, and gone when it is over."""

from __future__ import annotations

import gc
import sys
import weakref

import torch
from torch import Tensor, nn

from autoplan import graphs


def test_a_trials_graphs_are_freed_with_the_weights_frozen_into_them() -> None:
    model, x = nn.Linear(64, 64).eval().requires_grad_(False), torch.randn(3, 64)
    own = torch.compile(model, dynamic=False)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        expected = own(x)
        before = graphs.written()
        function = graphs.separate(model)
        compiled = torch.compile(function, dynamic=False)
        torch.testing.assert_close(compiled(x), expected)
        new = [module for module in graphs._modules() if id(module) not in before]
        names = {module.__name__ for module in new}
        held = [value for module in new for value in vars(module).values() if isinstance(value, Tensor)]
        frozen = [
            weakref.ref(value) for value in held if not isinstance(value, nn.Parameter)
        ]  # packed, not the model's
        assert frozen
        assert names <= set(sys.modules)
        graphs.forget([compiled], before)
        del function, compiled, new, held
        gc.collect()
        assert [reference() for reference in frozen] == [None] * len(frozen)
        assert graphs.written() == before
        assert not names & set(sys.modules)
        with torch.compiler.set_stance("fail_on_recompile"):  # the user's graph is still there
            torch.testing.assert_close(own(x), expected)


def test_each_trial_has_graphs_of_its_own() -> None:
    model = nn.Linear(8, 8).requires_grad_(False)
    first, second = graphs.separate(model), graphs.separate(model)
    assert first.__code__ is not second.__code__
    assert first.__code__ is not model.forward.__code__
    before = graphs.written()
    graphs.forget([first, second], before)  # nothing was compiled
    assert torch.equal(first(torch.ones(2, 8)), second(torch.ones(2, 8)))

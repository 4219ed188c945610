"""Models that enter a region of autocast by themselves."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from autoplan.apply import Swap
from autoplan.records import Autocast
from autoplan.region import size

EVERYWHERE = Autocast("cpu", "bfloat16", 0)


class Output(NamedTuple):
    y: Tensor
    rest: dict[str, Any]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(32, 48), nn.LayerNorm(48)

    def forward(self, x: Tensor, scale: float = 1.0, *, more: bool = False) -> Output:
        y = self.layer(x)
        return Output(scale * self.norm(y), {"y": [y], "more": more, "indices": y.argmax(-1)})


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 32)


def test_what_goes_in_and_comes_out_is_as_before(model: Model, x: Tensor) -> None:
    outside, signature = model(x), inspect.signature(model.forward)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(x)
    with Swap(model, {}, EVERYWHERE):
        found = model(x, more=True)
        assert inspect.signature(model.forward) == signature
        assert [*model.state_dict()] == ["layer.weight", "layer.bias", "norm.weight", "norm.bias"]
    assert type(found) is Output
    assert found.rest["more"] is True
    assert found.rest["indices"].dtype == torch.int64
    assert found.y.dtype == found.rest["y"][0].dtype == torch.float32
    assert torch.equal(found.rest["y"][0], inside.rest["y"][0].float())
    assert not torch.equal(found.y, outside.y)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(model(x).y, outside.y)
    assert "forward" not in vars(model)


def test_copies_and_pickles_enter_theirs(model: Model, x: Tensor) -> None:
    Swap(model, {}, EVERYWHERE).exchange()
    expected = model(x).y
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x).y, expected)
        other.layer.weight.zero_()
        assert not torch.equal(other(x).y, expected)  # it is its own layer that is called
    assert torch.equal(model(x).y, expected)


def test_graphs_have_it_in_them(model: Model, x: Tensor) -> None:
    outside = torch.compile(model, fullgraph=True)
    assert torch.allclose(outside(x).y, model(x).y, atol=1e-5)
    Swap(model, {}, EVERYWHERE).exchange()
    expected = model(x).y
    torch.testing.assert_close(outside(x).y, expected, atol=0.03, rtol=0)
    assert not torch.allclose(outside(x).y, torch.func.functional_call(Model(), model.state_dict(), x).y, atol=1e-5)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x).y, expected, atol=0.03, rtol=0)


def test_a_forward_that_somebody_else_has_put_there_is_called(model: Model, x: Tensor) -> None:
    own, calls = model.forward, []

    def counted(*args: Any, **kwargs: Any) -> Output:
        calls.append(torch.is_autocast_enabled("cpu"))
        return own(*args, **kwargs)

    model.forward = counted  # type: ignore[method-assign]
    with Swap(model, {}, EVERYWHERE):
        model(x)
    model(x)
    assert calls == [True, False]
    assert vars(model)["forward"] is counted


def test_small_calls_stay_outside_and_as_they_are(model: Model, x: Tensor) -> None:
    outside, compiled = model(x[:2]), torch.compile(model, fullgraph=True, dynamic=False)
    with Swap(model, {}, Autocast("cpu", "bfloat16", 3 * 32)):
        assert torch.equal(model(x[:2]).y, outside.y)
        assert not torch.equal(model(x).y[:2], outside.y)
        torch.testing.assert_close(compiled(x[:2]).y, outside.y)
        torch.testing.assert_close(compiled(x).y, model(x).y, atol=0.03, rtol=0)
        with torch.autocast("cpu", torch.float16):  # that of the caller
            assert model.layer(x[:2]).dtype == torch.float16
            assert torch.equal(model(x[:2]).y, Model.forward(model, x[:2]).y)


def test_the_size_of_a_call() -> None:
    ids, mask = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, 1, 90)
    assert size((ids, mask), {"cache_position": torch.zeros(1), "past": [torch.zeros(2, 4, 0, 8), mask]}) == 2
    assert size((), {"x": [mask], "y": 3.0}) == 180
    assert size((torch.zeros(7), 1), {}) == 0

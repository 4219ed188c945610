"""Layers fed by one tensor, run as one product: right whoever is called, one product in every graph, modules still."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from autoplan.apply import Swap, stand_ins
from autoplan.errors import AutoplanError
from autoplan.layers import PlannedLinear
from autoplan.siblings import Siblings, join

CASES = [
    ("int8_dynamic", "1:onednn_u8s8"),
    ("int8_weight_only", "1:int8pack,24:dequantize_int8"),
    ("int4_g64", "1:int4pack"),
    ("fp8_weight_only", "1:dequantize_fp8"),
    ("bf16", "1:onednn"),
]
NAMES = ("q", "k", "v")
OUT = {"q": 96, "k": 48, "v": 48}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """These tests compile more variants of one class than any user: none may count against the next test's limit."""
    torch._dynamo.reset()  # noqa: TID251
    yield
    torch._dynamo.reset()  # noqa: TID251


class Three(nn.Module):
    """Sizes differ, and one has no bias, as in Whisper."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.k, self.v = (nn.Linear(128, OUT[name], bias=name != "k") for name in NAMES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


def planned(candidate: str, program: str, fuse: bool = True, seed: int = 0) -> Three:
    model = Three(seed)
    for name in NAMES:
        Swap(model, stand_ins(model, (name,), candidate, program)).exchange()
    if fuse:
        join("q+k+v", layers(model), program)
    return model


def layers(model: Any) -> list[PlannedLinear]:
    return [model.q, model.k, model.v]


def group(model: Any) -> Siblings:
    (siblings,) = {layer._siblings for layer in layers(model)}
    assert siblings is not None
    return siblings


def as_one(model: Any) -> bool:
    return group(model).whole is not None


def rows(*shape: int) -> Tensor:
    return torch.randn(*(shape or (5, 7)), 128, generator=torch.Generator().manual_seed(1))


def close(found: Any, expected: Any, tolerance: float = 2e-2) -> None:
    """To 2 % of the largest value: kernels may round in bfloat16 before a bias or after it."""
    for y, z in zip(found, expected, strict=True):
        assert y.shape == z.shape
        assert y.dtype == z.dtype
        if z.numel():
            assert (y - z).abs().max().item() <= tolerance * z.abs().max().item()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the out_features of every product that a layer computes itself."""
    from autoplan import layers as room

    made: list[int] = []
    call = room.call_linear

    def counted(x: Tensor, packed: Any, bias: Any, running: str, out_features: int, dtype: torch.dtype) -> Tensor:
        made.append(out_features)
        return call(x, packed, bias, running, out_features, dtype)

    monkeypatch.setattr(room, "call_linear", counted)
    return made


# One product, and the same numbers.


@pytest.mark.parametrize(("candidate", "program"), CASES)
@pytest.mark.parametrize("shape", [(5, 7), (1,), (), (0,), (2, 3, 4)], ids=str)
def test_the_pieces_are_what_each_would_give_alone(
    candidate: str, program: str, shape: tuple[int, ...], products: list[int]
) -> None:
    model, apart = planned(candidate, program), planned(candidate, program, fuse=False)
    x = rows(*shape) if shape else rows(1)[0]
    with torch.no_grad():
        found = model(x)
        assert products == [192]
        close(found, apart(x))
    assert all(y.is_contiguous() for y in found)
    assert [y.shape for y in found] == [(*x.shape[:-1], size) for size in OUT.values()]
    assert group(model)._waiting is None


@pytest.mark.parametrize("order", ["vkq", "qqkv", "q", "kvkvq"])
def test_any_order_and_number_of_calls_is_right(order: str) -> None:
    model, apart = planned(*CASES[0]), planned(*CASES[0], fuse=False)
    with torch.no_grad():
        for x in (rows(5), rows(5), rows(3)):
            for name in order:
                close([getattr(model, name)(x)], [getattr(apart, name)(x)])


def test_other_values_in_the_same_tensor_are_another_input(products: list[int]) -> None:
    model, apart = planned(*CASES[0]), planned(*CASES[0], fuse=False)
    with torch.no_grad():
        x = rows(5)
        model.q(x)
        x.mul_(-3)
        close([model.k(x)], [apart.k(x)])
        close([model.v(x.clone())], [apart.v(x)])
    assert products.count(192) == 3


def test_nothing_is_kept_of_an_input_that_is_gone() -> None:
    model = planned(*CASES[0])
    with torch.no_grad():
        x = rows(5)
        model.q(x)
        product = weakref.ref(group(model)._waiting[2])  # type: ignore[index]
        del x
        gc.collect()
    assert group(model)._waiting is None
    assert product() is None


def test_outputs_may_be_changed_in_place() -> None:
    model, apart = planned(*CASES[0]), planned(*CASES[0], fuse=False)
    for x in (rows(1), rows(4).requires_grad_()):
        q = model.q(x)
        q.zero_()
        k = model.k(x).exp()
        model.v(x).zero_()
        close([k], [apart.k(x).exp()])
        if x.requires_grad:
            k.sum().backward()  # exp wants its output as it was


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (torch.no_grad, torch.enable_grad),
        (torch.inference_mode, torch.enable_grad),
        (torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)),
    ],
)
def test_a_piece_serves_only_the_mode_it_was_made_in(first: Callable[[], Any], then: Callable[[], Any]) -> None:
    model, apart = planned(*CASES[1]), planned(*CASES[1], fuse=False)
    x = rows(5).requires_grad_()
    with first():
        model.q(x)
    with then():
        found, expected = model.k(x), apart.k(x)
    close([found], [expected])
    (gradient,) = torch.autograd.grad(found.sum(), x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    close([gradient], [wanted])


def test_inference_tensors_and_autocast() -> None:
    model, apart = planned(*CASES[0]), planned(*CASES[0], fuse=False)
    with torch.inference_mode():
        x = rows(5)
        close(model(x), apart(x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        close(model(rows(5)), apart(rows(5)))


@pytest.mark.parametrize(("candidate", "program"), CASES)
def test_gradients_pass_straight_through(candidate: str, program: str) -> None:
    model, apart = planned(candidate, program), planned(candidate, program, fuse=False)
    x, y = rows(5).requires_grad_(), rows(5).requires_grad_()
    sum(out.pow(2).sum() for out in model(x)).backward()  # type: ignore[union-attr]
    sum(out.pow(2).sum() for out in apart(y)).backward()  # type: ignore[union-attr]
    close([x.grad, model.q.bias.grad], [y.grad, apart.q.bias.grad])


def test_threads_that_share_the_layers() -> None:
    model, apart = planned(*CASES[0]), planned(*CASES[0], fuse=False)
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with torch.no_grad():
                for count in range(60):
                    x = torch.randn(1 + count % 3, 128, generator=torch.Generator().manual_seed(seed + count))
                    close(model(x), apart(x))
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_wrong_inputs_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"'q\+k\+v' takes torch\.float32 inputs \[\.\.\., 128\].*\[3, 64\]"):
        planned(*CASES[0]).k(torch.randn(3, 64))


# Graphs.


class Tower(nn.Module):
    """Two such blocks, so that a graph meets the second with what the first left."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            q, k, v = block(x.relu())
            x = x + q.mean(-1, keepdim=True) * k.amax(-1, keepdim=True) - v.mean(-1, keepdim=True)
        return x


def count_products(graph: torch.fx.Graph) -> int:
    return sum(node.op == "call_function" and "autoplan" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize(("candidate", "program"), CASES)
def test_one_product_in_a_compiled_graph_and_no_recompiles(candidate: str, program: str) -> None:
    towers = [Tower([planned(candidate, program, fuse, seed) for seed in (0, 1)]) for fuse in (True, False)]
    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(count_products(module.graph))
        return module.forward

    compiled = torch.compile(towers[0], fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        close([compiled(rows(24))], [towers[1](rows(24))])
        with torch.compiler.set_stance("fail_on_recompile"):
            for count in (24, 3, 40):
                towers[0](rows(count))  # eager calls in between disturb nothing
                close([compiled(rows(count))], [towers[1](rows(count))])
    assert graphs == [2]
    assert all(group(block)._traced is None for block in towers[0].blocks)


def test_through_inductor() -> None:
    model, apart = planned(*CASES[0]), planned(*CASES[0], fuse=False)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        found = compiled(rows())
        close(found, apart(rows()))
    assert all(y.is_contiguous() for y in found)


def test_compiled_gradients() -> None:
    model = planned(*CASES[2])
    x, y = rows(5).requires_grad_(), rows(5).requires_grad_()
    sum(out.sum() for out in torch.compile(model, fullgraph=True, backend="aot_eager")(x)).backward()
    sum(out.sum() for out in model(y)).backward()  # type: ignore[union-attr]
    close([x.grad], [y.grad])


def test_one_layer_compiled_by_itself_is_right() -> None:
    model, apart = planned(*CASES[0]), planned(*CASES[0], fuse=False)
    compiled = torch.compile(model.k, fullgraph=True, backend="eager")
    with torch.no_grad():
        for x in (rows(5), rows(5) + 1, rows(5) - 1):
            close([model.q(x), compiled(x)], [apart.q(x), apart.k(x)])


@pytest.mark.parametrize(("candidate", "program"), CASES)
def test_export_has_one_product(candidate: str, program: str) -> None:
    model = planned(candidate, program)
    with torch.no_grad():
        exported = torch.export.export(
            model, (rows(24),), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2, max=4096)}}
        )
        close(exported.module()(rows(40)), model(rows(40)))
    assert count_products(exported.graph) == 1
    assert group(model)._waiting is None


# Still modules of their own.


@pytest.mark.parametrize(("candidate", "program"), CASES)
def test_every_layer_shows_its_own_state(candidate: str, program: str, tmp_path: Path) -> None:
    model, apart = planned(candidate, program), planned(candidate, program, fuse=False)
    state = model.state_dict()
    for key, tensor in apart.state_dict().items():
        assert torch.equal(state[key].view(torch.uint8), tensor.view(torch.uint8)), key
        assert state[key].untyped_storage().nbytes() == tensor.nbytes
    assert state.keys() == apart.state_dict().keys()
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers(model), layers(apart), strict=True))
    assert sum(layer.nbytes() for layer in layers(model)) == pytest.approx(
        sum(b.nbytes() for b in layers(apart)), abs=3
    )
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    other = planned(candidate, program, seed=9)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert as_one(other)
    assert all(torch.equal(a, b) for a, b in zip(other(rows()), model(rows()), strict=True))


def test_one_that_is_loaded_alone() -> None:
    model, other = planned(*CASES[0]), planned(*CASES[0], seed=9)
    expected = [other.q(rows()), model.k(rows()), other.v(rows())]
    other.k.load_state_dict(model.k.state_dict())
    assert as_one(other)
    close(other(rows()), expected, tolerance=1e-5)


@pytest.mark.parametrize(("candidate", "program"), CASES)
def test_one_that_moves_alone_leaves_until_the_others_follow(candidate: str, program: str) -> None:
    model, apart = planned(candidate, program), planned(candidate, program, fuse=False)
    expected = apart(rows())
    model.k.to(torch.float64 if candidate == "bf16" else torch.float16)
    assert not as_one(model)
    close([model.q(rows()), model.v(rows())], [expected[0], expected[2]])
    model.k.to(torch.float32)
    assert as_one(model)
    close(model(rows()), [apart.q(rows()), model.k(rows()), apart.v(rows())])
    model.to(torch.bfloat16), apart.to(torch.bfloat16)
    assert as_one(model)
    close(model(rows().bfloat16()), apart(rows().bfloat16()))


@pytest.mark.parametrize(("candidate", "program"), CASES)
def test_a_meta_model_loads(candidate: str, program: str) -> None:
    model = planned(candidate, program)
    hollow = copy.deepcopy(model).to("meta")
    with pytest.raises(RuntimeError, match="is on the meta device"):
        hollow.q(rows())
    hollow.load_state_dict(model.state_dict(), assign=True)
    assert as_one(hollow)
    assert all(torch.equal(a, b) for a, b in zip(hollow(rows()), model(rows()), strict=True))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
@pytest.mark.parametrize(("candidate", "program"), CASES)
def test_copies(candidate: str, program: str, way: Any) -> None:
    model = planned(candidate, program)
    expected = model(rows())
    twin = way(model)
    assert as_one(twin)
    assert group(twin) is not group(model)
    assert all(torch.equal(a, b) for a, b in zip(twin(rows()), expected, strict=True))
    single = way(model.v)
    assert single._siblings.whole is None
    assert single.nbytes() < group(model).whole.nbytes() / 2  # type: ignore[union-attr]
    close([single(rows())], [expected[2]])
    shallow = copy.copy(model.q)
    assert shallow._siblings is None
    model.to(torch.bfloat16)
    close([shallow(rows())], [expected[0]])
    del model
    gc.collect()
    assert all(torch.equal(a, b) for a, b in zip(twin(rows()), expected, strict=True))


def test_hooks_train_flag_and_replaced_layers() -> None:
    model, apart = planned(*CASES[0]), planned(*CASES[0], fuse=False)
    seen: list[int] = []
    model.k.register_forward_hook(lambda *_: seen.append(1))
    model(rows())
    assert seen == [1]
    assert "as one with q+k+v" in repr(model.q)
    model.q = nn.Linear(128, 96)  # somebody takes one out: the others go on
    gc.collect()
    close([model.k(rows()), model.v(rows())], apart(rows())[1:])
    close([model.k(rows())], [apart.k(rows())])
    model.to(torch.bfloat16)
    assert not as_one(nn.ModuleDict({"q": model.k, "k": model.k, "v": model.v}))
    assert "as one" not in repr(model.k)


def test_what_cannot_be_one_is_told() -> None:
    model = planned("int4_g64", "1:int4pack", fuse=False)
    with pytest.raises(AutoplanError, match=r"layers q\+k\+v cannot run as one int4_g64 product on 1:nothing"):
        join("q+k+v", layers(model), "1:nothing")
    assert all(layer._siblings is None for layer in layers(model))

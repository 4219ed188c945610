"""The shape-recording pass: what is logged, what is kept, what is refused, and that nothing of it stays behind."""

from __future__ import annotations

import gc
import weakref
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoplan import make_plan, record, recorder
from autoplan.errors import RecordingError
from autoplan.recorder import _Reservoir, as_calls, find_layers, match, unwrap
from autoplan.records import Call, label


class Net(nn.Module):
    """Takes its input in any way that a caller may give it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, scale: float = 1.0, *, extra: Any = None) -> Tensor:
        return self.b(input=self.a(x).relu()) * scale


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def stance() -> Any:
    return torch._dynamo.eval_frame._stance


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((torch.ones(3, 8),), {}), ((), {"x": torch.ones(3, 8)}), ((torch.ones(3, 8), 2.0), {"extra": {"ids": [1]}})],
)
def test_positional_and_keyword_inputs_are_logged_and_kept(args: Any, kwargs: Any) -> None:
    model = Net()
    with record(model) as recording:
        model(*args, **kwargs)
    assert [profile.name for profile in recording.profiles()] == ["a", "b"]  # b takes its input by keyword
    assert all(p.calls == (Call("default", 3, "float32", 1),) for p in recording.profiles())
    (kept,) = recording.inputs
    assert kept.kwargs.keys() == kwargs.keys()
    assert len(kept.args) == len(args)
    torch.testing.assert_close(model(*kept.args, **kept.kwargs), model(*args, **kwargs))


def test_kept_inputs_are_copies() -> None:
    model, x, extra = Net(), torch.ones(3, 8), {"list": [1]}
    with record(model) as recording:
        model(x, extra=extra)
    x.zero_()
    extra["list"].append(2)
    assert torch.equal(recording.inputs[0].args[0], torch.ones(3, 8))
    assert recording.inputs[0].kwargs["extra"] == {"list": [1]}
    assert torch.equal(recording.rows("a"), torch.ones(3, 8))


def test_rows_are_the_product_of_the_leading_dimensions() -> None:
    model = Net()
    with record(model) as recording:
        for shape in [(8,), (2, 8), (2, 3, 8), (2, 3, 5, 8), (5, 2, 3, 8)]:
            model(torch.ones(shape))
        model(torch.ones(8, 6).T)  # not contiguous
    assert [(call.rows, call.count) for call in recording.profiles()[0].calls] == [(1, 1), (2, 1), (6, 2), (30, 2)]


def test_the_dtype_under_autocast_is_the_one_that_reaches_the_kernel() -> None:
    model = Net()
    with record(model) as recording, torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(3, 8))
    assert recording.profiles()[0].calls == (Call("default", 3, "bfloat16", 1),)
    assert recording.profiles()[0].dtype == "float32"


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (torch.ones(2), [(1, 0)]),
        ((torch.ones(2), 3), [(2, 0)]),
        ({"x": torch.ones(2)}, [(0, 1)]),
        (UserDict(x=torch.ones(2), y=1), [(0, 2)]),  # as a BatchEncoding is
        ([torch.ones(2), (torch.ones(2), 1), {"x": 1}, [torch.ones(2), 1, 2]], [(1, 0), (2, 0), (0, 1), (3, 0)]),
        ((torch.ones(2) for _ in range(3)), [(3, 0)]),
    ],
)
def test_example_inputs_in_every_form(example: Any, expected: list[tuple[int, int]]) -> None:
    if not isinstance(example, tuple | list | dict | UserDict | Tensor):  # a generator gives batches
        expected = [(1, 0)] * 3
    assert [(len(args), len(kwargs)) for args, kwargs in as_calls(example)] == expected


@pytest.mark.parametrize("example", ["text", 3, ["text"], [3], []])
def test_example_inputs_that_are_none(example: Any) -> None:
    with pytest.raises(RecordingError):
        as_calls(example)


def test_workloads_count_apart_and_weigh_per_forward() -> None:
    model = Net()
    with record(model) as recording:
        with recording.workload("decode", weight=8):
            for _ in range(4):
                model(torch.ones(1, 8))
        with recording.workload("outer"), recording.workload("inner"):
            model(torch.ones(2, 8))
        model(torch.ones(5, 8))
    assert recording.weights == {"decode": 8.0, "outer": 1.0, "inner": 1.0, "default": 1.0}
    assert recording.call_weights()["decode"] == 2.0
    assert recording.profiles()[0].calls == (
        Call("decode", 1, "float32", 4),
        Call("default", 5, "float32", 1),
        Call("inner", 2, "float32", 1),
    )


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "2", None])
def test_a_workload_of_no_sensible_weight_is_refused(weight: Any) -> None:
    with (
        record(Net()) as recording,
        pytest.raises(RecordingError, match="weight must be a positive number"),
        recording.workload("x", weight=weight),
    ):
        pass


def test_a_workload_has_one_weight_and_ends_with_an_exception() -> None:
    model = Net()
    with record(model) as recording:
        with pytest.raises(ZeroDivisionError), recording.workload("w", weight=2):
            raise ZeroDivisionError
        with pytest.raises(RecordingError, match=r"has weight 2\.0 already"), recording.workload("w", weight=3):
            pass
        model(torch.ones(1, 8))
    assert recording.forwards == {"default": 1}


def test_hooks_and_stance_are_gone_after_the_block_and_after_an_exception() -> None:
    model = Net()
    model.a.register_forward_pre_hook(lambda module, args: None)
    torch.compile(model)  # imports dynamo
    before = stance()
    with record(model):
        assert hooks(model) == 4
        assert stance().stance == "force_eager"
    assert hooks(model) == 1
    assert stance() == before
    with pytest.raises(ZeroDivisionError), record(model):
        raise ZeroDivisionError
    assert hooks(model) == 1
    assert stance() == before


def test_recording_runs_eagerly_where_a_graph_is_compiled_already() -> None:
    model = Net().eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = compiled(torch.ones(3, 8))
        with record(compiled) as recording:
            assert torch.equal(compiled(torch.ones(3, 8)), expected)
    assert unwrap(compiled) is model
    assert [profile.name for profile in recording.profiles()] == ["a", "b"]
    assert len(recording.inputs) == 1


def test_a_call_that_fails_leaves_no_rows_of_a_wrong_width() -> None:
    model = Net()
    with record(model) as recording:
        with pytest.raises(RuntimeError):
            model(torch.ones(3, 7))
        model(torch.ones(3, 8))
    assert recording.rows("a").shape == (3, 8)


def test_a_layer_that_was_given_no_rows_was_not_called() -> None:
    model = Net()
    with record(model) as recording:
        model.a(torch.ones(0, 8))  # an expert that no token was sent to
        model.b(torch.ones(2, 16))
        model.b(torch.ones(0, 16))
    assert [profile.name for profile in recording.profiles()] == ["b"]
    assert recording.profiles()[0].calls == (Call("default", 2, "float32", 1),)
    assert [item.name for item in recording.not_called()] == ["a"]
    with pytest.raises(RecordingError, match="no rows"):
        recording.rows("a")


def test_the_models_own_hooks_see_the_same_input_in_a_replay() -> None:
    model = Net()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.a.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with record(model) as recording:
        model(torch.ones(3, 8))
    assert torch.equal(recording.inputs[0].args[0], torch.ones(3, 8))  # the hook will double it again
    assert torch.equal(recording.rows("a"), torch.full((3, 8), 3.0))  # what the kernel was given


# Memory.


class Box:
    """A tensor inside an object that torch cannot look into, as in a key-value cache."""

    def __init__(self, numel: int) -> None:
        self.held = [torch.ones(numel)]


def test_kept_inputs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_MAX_INPUT_BYTES", 3 * 4 * 8 * 2)
    model = Net()
    with record(model) as recording:
        for rows in (3, 100, 3, 1):
            model(torch.ones(rows, 8))
    assert [item.args[0].shape[0] for item in recording.inputs] == [3, 3]
    assert recording.inputs_dropped == 2
    assert recording.forwards["default"] == 4
    assert len(recording.rows("a")) == 107


def test_tensors_inside_objects_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_MAX_INPUT_BYTES", 1000)
    model = Net()
    with record(model) as recording:
        for _ in range(4):
            model(torch.ones(1, 8), extra=Box(100))
    assert (len(recording.inputs), recording.inputs_dropped) == (2, 2)


# The sample of rows.


def test_the_sample_is_bounded_seeded_and_keeps_the_order() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    rows = torch.arange(5000.0).unsqueeze(1)

    def sample(seed: int) -> Tensor:
        with record(model, seed=seed) as recording:
            for part in rows.split(700):
                model(part)
        return recording.rows("0")

    first = sample(0)
    assert first.shape == (1024, 1)
    assert torch.equal(first, first.unique(dim=0))  # without replacement, in the order seen
    assert torch.equal(first, sample(0))
    assert not torch.equal(first, sample(1))


def test_every_row_is_as_likely_to_be_kept() -> None:
    counts = torch.zeros(200)
    for seed in range(300):
        reservoir = _Reservoir(50, seed)
        for part in torch.arange(200.0).unsqueeze(1).split([1, 30, 49, 100, 20]):
            reservoir.add(part)
        assert len(reservoir.rows()) == 50
        counts[reservoir.rows().squeeze(1).long()] += 1
    assert counts.sum() == 300 * 50
    chi_squared = ((counts - 75).square() / (75 * 0.75)).sum().item()
    assert chi_squared < 270  # 199 degrees of freedom: mean 199, 99.9 % below 267
    assert counts.split([80, 120])[0].mean() == pytest.approx(75, rel=0.05)  # early rows as well as late ones


def test_the_sample_takes_what_comes() -> None:
    reservoir = _Reservoir(4, 0)
    reservoir.add(torch.zeros(0, 3))
    reservoir.add(torch.ones(2, 3, dtype=torch.bfloat16))
    reservoir.add(torch.ones(1, 3, dtype=torch.bfloat16))
    assert reservoir.rows().shape == (3, 3)
    reservoir.add(torch.full((9, 3), 2.0))
    assert reservoir.rows().shape == (4, 3)


def test_the_sample_does_not_draw_from_the_users_generator() -> None:
    model = Net()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with record(model, seed=3):
        model(torch.ones(3, 8))
    assert torch.equal(torch.rand(2), expected)


# Layers and names.


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.same = self.a
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.a.weight
        self.apart = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.apart(self.tied(self.same(self.a(x))))


def test_shared_and_tied_layers_are_one_decision() -> None:
    model = Shared()
    decisions, left_alone = find_layers(model)
    assert [decision.names for decision in decisions] == [["a", "same", "tied"], ["apart"]]
    assert not left_alone
    with record(model) as recording:
        model(torch.ones(2, 8))
    first, second = recording.profiles()
    assert (first.name, first.aliases, first.calls[0].count) == ("a", ("same", "tied"), 3)
    assert second.calls[0].count == 1


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(8, 8, dtype=torch.float64), "its weight is float64"),
        (nn.Linear(8, 8, device="meta"), "meta device"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "parametrized"),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8), "NonDynamicallyQuantizableLinear"),
        (type("Own", (nn.Linear,), {"forward": lambda self, x: x})(8, 8), "a Own, a Linear with a forward of its own"),
        (type("Conv1D", (nn.Module,), {})(), "Conv1D"),
    ],
)
def test_what_is_left_alone_says_why(layer: nn.Module, reason: str) -> None:
    decisions, left_alone = find_layers(nn.Sequential(layer))
    assert not decisions
    assert [item.name for item in left_alone] == ["0"]
    assert reason in left_alone[0].reason


def test_a_forward_replaced_on_the_instance_is_left_alone() -> None:
    model = Net()
    model.a.forward = lambda x: x.repeat(1, 2)  # type: ignore[method-assign]
    assert "replaced on the instance" in find_layers(model)[1][0].reason


def test_fused_encoder_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    decisions, left_alone = find_layers(model)
    assert not decisions
    assert {item.name for item in left_alone} == {"0.self_attn.out_proj", "0.linear1", "0.linear2"}


def test_patterns() -> None:
    names = ["encoder.0.q", "encoder.1.q", "head"]
    assert match(names, "encoder.*", "include") == set(names[:2])
    assert match(names, ["head", "*.0.*"], "include") == {"head", "encoder.0.q"}
    with pytest.raises(RecordingError, match=r"include: the pattern 'x' matches no layer; there are encoder\.0\.q"):
        match(names, ["head", "x"], "include")
    with pytest.raises(RecordingError, match="there are none"):
        match([], "x", "pin")


def test_a_recording_of_nothing_is_refused() -> None:
    model = Net()
    with record(model) as recording:
        pass
    assert not recording.profiles()
    with pytest.raises(RecordingError, match="nothing was recorded"):
        make_plan(model, recording, cache=False)


# Layers that are fed by one tensor.


class Attention(nn.Module):
    """`way` of feeding q, k and v."""

    def __init__(self, way: str = "same") -> None:
        super().__init__()
        self.way, self.calls = way, 0
        self.q, self.k, self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 8)
        if way == "tied":
            self.v.weight = self.k.weight
        if way == "dtype":
            self.v.half()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x.relu()
        q = self.q(x)
        if self.way == "between":
            q = self.o(q)
        if self.way == "in place":
            x.mul_(2)
        again = x.clone() if self.way == "copy" else x
        k = self.k(again)
        v = k if self.way == "sometimes" and self.calls == 2 else self.v(x.half() if self.way == "dtype" else x).float()
        if self.way == "twice":
            v = v + self.q(x)[..., :4]
        return self.o(q + torch.cat((k, v), dim=-1))


def siblings_of(model: nn.Module, *inputs: Tensor, among: Any = None) -> list[tuple[str, ...]]:
    with record(model) as recording:
        for x in inputs:
            model(x)
    return recording.siblings(recording.decisions if among is None else among)


@pytest.mark.parametrize(
    ("way", "found"),
    [
        ("same", [("q", "k", "v")]),
        ("between", [("k", "v")]),
        ("in place", [("k", "v")]),
        ("copy", []),
        ("sometimes", []),
        ("twice", []),
        ("tied", []),
        ("dtype", [("q", "k")]),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_siblings_are_found_by_the_tensor_they_are_given(way: str, found: list[tuple[str, ...]], mode: Any) -> None:
    with mode():
        assert siblings_of(Attention(way), torch.randn(3, 8), torch.randn(2, 8)) == found


def test_siblings_of_the_models_own_input_called_again_and_again() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.a(x), self.b(x)), dim=-1)

    x = torch.randn(3, 8)
    assert siblings_of(Heads(), x, x, x) == [("a", "b")]
    assert siblings_of(nn.Sequential(Heads(), Heads()), x) == [("0.a", "0.b"), ("1.a", "1.b")]


def test_siblings_among_the_layers_that_are_planned() -> None:
    assert siblings_of(Attention(), torch.randn(3, 8), among={"q", "v", "o"}) == [("q", "v")]
    assert siblings_of(Attention(), torch.randn(3, 8), among={"q", "o"}) == []
    assert label(["layers.0.q", "layers.0.k"]) == "layers.0.q+k"
    assert label(["q", "k"]) == "q+k"
    assert label(["a.q", "b.q"]) == "a.q+b.q"


def test_recording_keeps_no_activation_alive() -> None:
    seen: list[weakref.ref[Tensor]] = []

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            seen.append(weakref.ref(x))
            return self.a(x)

    model = Last()
    with torch.no_grad(), record(model):
        model(torch.randn(3, 8))
        gc.collect()
        assert seen[0]() is None

"""Models that accelerate spreads over devices, CPU memory and files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from autoplan import Budget, apply_plan, autoplan, offload, plan_of
from autoplan.errors import PlanMismatchError
from autoplan.layers import PlannedLinear
from autoplan.planner import _replica
from autoplan.recorder import device_of_model

accelerate = pytest.importorskip("accelerate")

QUICK: dict[str, Any] = {"candidates": ["int8_dynamic"], "budget": Budget(divergence=0.1), "cache": False}
CPU = torch.device("cpu")

Spread = Callable[[nn.Module, Path], nn.Module]


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    """One of its layers lies in a file, all else on its device."""
    places: dict[str, Any] = {"layers.0": "cpu", "layers.1": "disk", "layers.2": "cpu", "head": "cpu"}
    spread: nn.Module = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))
    return spread


def in_files(model: nn.Module, folder: Path) -> nn.Module:
    spread: nn.Module = accelerate.disk_offload(model, str(folder), execution_device=CPU)
    return spread


def in_memory(model: nn.Module, folder: Path) -> nn.Module:
    spread: nn.Module = accelerate.cpu_offload(model, execution_device=CPU)
    return spread


def two_hooks(model: nn.Module, folder: Path) -> nn.Module:
    """Every layer has a hook in front of the one that brings its weights."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(CPU, io_same_device=True))
    return in_memory(model, folder)


def as_one(model: nn.Module, folder: Path) -> nn.Module:
    """The whole model is brought before each call: a hook on it, none on its layers."""
    spread: nn.Module = accelerate.cpu_offload(model, CPU, preload_module_classes=["Stack"])
    return spread


every_spread = pytest.mark.parametrize("spread", [dispatched, in_files, in_memory, two_hooks])


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        self.head = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        y: Tensor = self.head(x)
        return y


class WithoutGradients(Stack):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


def llama(tied: bool = False) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def stack(depth: int = 3, kind: type[Stack] = Stack) -> nn.Module:
    torch.manual_seed(0)
    return kind(depth)


def held_elsewhere(model: nn.Module) -> list[tuple[Mapping[str, Tensor], str]]:
    """The maps of accelerate's hooks, each with a key."""
    return [
        (hook.weights_map, key)
        for module in model.modules()
        for hook in offload.hooks(module)
        if hook.offload
        for key, _ in module.named_parameters(recurse=False)
    ]


def on_meta(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


def output_of(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        y = model(**inputs).logits if isinstance(inputs, dict) else model(inputs)
    assert isinstance(y, Tensor)
    return y


@every_spread
@pytest.mark.parametrize("kind", [Stack, WithoutGradients])
def test_a_model_that_accelerate_spreads_is_planned_as_the_one_it_was_made_of(
    timer: Any, spread: Spread, kind: type[Stack], tmp_path: Path
) -> None:
    x = torch.randn(12, 64)
    model, whole = spread(stack(kind=kind), tmp_path), stack(kind=kind)
    before = {(id(held), key): held[key].clone() for held, key in held_elsewhere(model)}
    held, away = held_elsewhere(model), on_meta(model)
    autoplan(model, x, **QUICK, exclude=["layers.1"])
    plan = plan_of(model)
    autoplan(whole, x, **QUICK, exclude=["layers.1"])
    assert {layer.chosen for layer in plan.layers} == {"int8_dynamic"}
    assert plan.layers == plan_of(whole).layers  # the same times were given, and the same harms were found
    assert ("(kl)" in str(plan.outcome)) == (kind is WithoutGradients)
    assert [item.reason for item in plan.left_alone] == ["excluded by the caller"]
    kept = {name for name in away if name.startswith("layers.1.")}
    assert kept
    for twin in (model, copy.deepcopy(model), apply_plan(spread(stack(kind=kind), tmp_path), plan)):
        assert on_meta(twin) == kept
        assert torch.equal(output_of(twin, x), output_of(whole, x))
        assert on_meta(twin) == kept
        assert [hook.offload for hook in offload.hooks(twin.layers[0])] == [False] * len(offload.hooks(model.layers[0]))
        assert [hook.io_same_device for hook in offload.hooks(twin.layers[0])] == (
            [True, False] if spread is two_hooks else [False]
        )
    assert all(torch.equal(weights[key], before[id(weights), key]) for weights, key in held)


@pytest.mark.parametrize("spread", [in_files, in_memory])
def test_a_language_model_that_is_offloaded_is_planned_as_the_one_it_was_made_of(
    timer: Any, spread: Spread, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    batches = [{"input_ids": torch.randint(96, (4, 12))} for _ in range(3)]
    model, whole = spread(llama(), tmp_path), llama()
    autoplan(model, batches, **QUICK, exclude=["*.v_proj"])
    autoplan(whole, batches, **QUICK, exclude=["*.v_proj"])
    plan = plan_of(model)
    assert sum(layer.chosen == "int8_dynamic" for layer in plan.layers) == 13
    assert plan.layers == plan_of(whole).layers
    assert torch.equal(output_of(model, batches[0]), output_of(whole, batches[0]))
    kept = {name for name, _ in whole.named_parameters() if "v_proj" in name or "norm" in name or "embed" in name}
    assert on_meta(model) == kept
    own = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    assert len(own) == 2 * 13  # codes and scales
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in own.items())


def test_of_offloaded_weights_that_are_tied_the_tie_is_seen_in_memory(timer: Any, tmp_path: Path) -> None:
    ids = {"input_ids": torch.randint(96, (4, 12))}
    model = in_memory(llama(tied=True), tmp_path)
    autoplan(model, ids, **QUICK)
    assert [(item.name, item.reason) for item in plan_of(model).left_alone] == [
        ("lm_head", "its weight is tied to model.embed_tokens.weight")
    ]
    twins = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    twins[4].weight = twins[0].weight
    whole, x = copy.deepcopy(twins), torch.randn(12, 64)
    autoplan(in_memory(twins, tmp_path), x, **QUICK)
    plan = plan_of(twins)
    assert [(layer.name, layer.aliases) for layer in plan.layers] == [("0", ("4",)), ("2", ())]
    assert twins[0]._packed is twins[4]._packed
    assert torch.equal(twins(x), apply_plan(whole, plan)(x))


def test_a_prepacked_float_weight_does_not_take_the_place_of_an_offloaded_one(timer: Any, tmp_path: Path) -> None:
    timer.ratios = {"none/onednn": 0.4}
    x = torch.randn(12, 64)
    whole = autoplan(stack(), x, **QUICK)
    plan = plan_of(whole)
    assert isinstance(whole.layers[0], PlannedLinear)
    model = in_memory(stack(), tmp_path)
    away = on_meta(model)
    torch.testing.assert_close(apply_plan(model, plan)(x), whole(x))
    assert on_meta(model) == away


@pytest.mark.parametrize("spread", [in_files, in_memory])
def test_the_digests_of_a_plan_are_those_of_offloaded_weights(timer: Any, spread: Spread, tmp_path: Path) -> None:
    plan = plan_of(autoplan(stack(), torch.randn(12, 64), **QUICK, strict=True))
    other = stack()
    with torch.no_grad():
        other.layers[1].weight[3, 5] += 1
    with pytest.raises(PlanMismatchError, match=r"another model: layers\.1 has other weights \("):
        apply_plan(spread(other, tmp_path / "other"), plan)
    apply_plan(spread(stack(), tmp_path / "same"), plan, weights="strict")


@pytest.mark.parametrize("kind", [Stack, WithoutGradients])
def test_of_weights_in_files_one_is_read_at_a_time(
    timer: Any, kind: type[Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[StorageWeakRef] = []
    at_once: list[int] = []
    load = accelerate.utils.offload.load_offloaded_weight

    def counted(file: str, info: Mapping[str, Any]) -> Tensor:
        tensor: Tensor = load(file, info)
        if tensor.dim() == 2:
            read.append(StorageWeakRef(tensor.untyped_storage()))
            at_once.append(sum(not weight.expired() for weight in read))
        return tensor

    model = in_files(stack(6, kind), tmp_path)
    monkeypatch.setattr(accelerate.utils.offload, "load_offloaded_weight", counted)
    autoplan(model, torch.randn(12, 64), **QUICK, exclude=["layers.1"])
    assert sum(isinstance(module, PlannedLinear) for module in model.modules()) == 6
    assert len(at_once) > 7 * 5
    assert max(at_once) == 1
    assert all(weight.expired() for weight in read)


def test_layers_whose_weights_a_module_around_them_brings_are_left_alone(timer: Any, tmp_path: Path) -> None:
    x = torch.randn(12, 64)
    model = as_one(stack(), tmp_path)
    before = output_of(model, x)
    autoplan(model, x, **QUICK)
    assert {item.reason for item in plan_of(model).left_alone} == {"its weight is on the meta device"}
    assert torch.equal(output_of(model, x), before)


def test_offloaded_buffers_are_no_hindrance(timer: Any, tmp_path: Path) -> None:
    x = torch.randn(12, 64)
    whole = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64)).eval()
    model = accelerate.cpu_offload(copy.deepcopy(whole), CPU, offload_buffers=True)
    assert torch.equal(output_of(autoplan(model, x, **QUICK), x), output_of(autoplan(whole, x, **QUICK), x))
    assert isinstance(model[0], PlannedLinear)


def test_a_planned_layer_keeps_the_hook_that_brings_its_inputs(timer: Any, tmp_path: Path) -> None:
    moved = []

    class Watching(accelerate.hooks.AlignDevicesHook):  # type: ignore[misc, name-defined]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            moved.append(type(module))
            return super().pre_forward(module, *args, **kwargs)

    torch.manual_seed(0)
    model, x = Stack(1), torch.randn(12, 64)
    accelerate.hooks.add_hook_to_module(model.layers[0], Watching(execution_device="cpu"))
    autoplan(model, x, **QUICK)
    for twin in (model, copy.deepcopy(model), apply_plan(Stack(1), plan_of(model), weights="skip")):
        moved.clear()
        twin(x)
        assert moved == ([PlannedLinear] if hasattr(twin.layers[0], "_hf_hook") else [])


@pytest.mark.parametrize("spread", [dispatched, in_files, in_memory, two_hooks, as_one])
def test_the_values_of_all_tensors_are_found(spread: Spread, tmp_path: Path) -> None:
    expected = stack().state_dict()
    found = dict(offload.named_values(spread(stack(), tmp_path)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_values_have_the_dtype_of_the_layer_whatever_the_hook_holds() -> None:
    held = stack().state_dict()
    model = accelerate.cpu_offload(stack().bfloat16(), CPU, state_dict=held)
    weight, bias = offload.weight_and_bias(model.head)
    assert torch.equal(weight, held["head.weight"].bfloat16())
    assert bias is not None
    assert torch.equal(bias, held["head.bias"].bfloat16())
    own = offload.resident_bias(model.head)
    assert own is not None
    assert own.requires_grad
    assert own.data_ptr() not in (bias.data_ptr(), held["head.bias"].data_ptr())


def test_a_model_is_where_its_weights_are_brought_to() -> None:
    gpu = torch.device("cuda", 0)
    model = accelerate.cpu_offload(stack(), gpu)
    assert device_of_model(model) == offload.execution_device(model.head) == gpu
    assert device_of_model(stack().to("meta")) == CPU


def test_gradients_are_the_same_where_backward_reads_weights_again(tmp_path: Path) -> None:
    model, whole = in_files(stack().requires_grad_(False), tmp_path), stack()
    x = torch.randn(12, 64, requires_grad=True)
    forward = model.head.forward
    with offload.read_again_for_backward(model):
        y = model(x)
    assert model.head.forward is forward
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(whole(x).square().sum(), x)
    assert torch.equal(found, expected)


def test_what_backward_needs_must_not_be_written_over() -> None:
    norm = accelerate.cpu_offload(nn.LayerNorm(64), CPU)
    x = torch.randn(12, 64, requires_grad=True) * 2
    with offload.read_again_for_backward(norm):
        y = norm(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.square().sum().backward()


@every_spread
def test_the_copy_that_candidates_are_tried_in_has_no_weights_of_its_own(spread: Spread, tmp_path: Path) -> None:
    model = spread(stack(), tmp_path)
    copied = held_elsewhere(_replica(model))
    assert copied
    assert [(id(held), key) for held, key in copied] == [(id(held), key) for held, key in held_elsewhere(model)]

"""The module that stands in for a Linear: state, copies, moves and errors, for every candidate and kernel."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from autoplan.candidates import find_candidate, registered
from autoplan.errors import AutoplanError
from autoplan.kernels import find_kernel
from autoplan.layers import PlannedLinear
from autoplan.records import Call, Device, LayerProfile

CASES = [
    pytest.param(candidate.name, kernel, dtype, id=f"{candidate.name}-{kernel}-{dtype}")
    for candidate in registered()
    for kernel in candidate.kernels
    for dtype in ("float32", "bfloat16")
    if (candidate.name, dtype) != ("bf16", "bfloat16")
]


def planned(candidate: str, program: str, dtype: str, seed: int = 0) -> PlannedLinear:
    torch.manual_seed(seed)
    linear = nn.Linear(128, 48, dtype=getattr(torch, dtype))
    return PlannedLinear.from_linear("block.layer", linear, find_candidate(candidate), program)


def rows(dtype: str) -> Tensor:
    return torch.randn(5, 7, 128, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))


def wrapped(layer: PlannedLinear) -> nn.Sequential:
    return nn.Sequential(layer, nn.LayerNorm(48, dtype=layer.dtype))


@pytest.mark.parametrize(("candidate", "kernel", "dtype"), CASES)
def test_state_is_canonical_and_round_trips_bit_for_bit(
    candidate: str, kernel: str, dtype: str, tmp_path: Path
) -> None:
    model, x = wrapped(planned(candidate, f"1:{kernel}", dtype)), rows(dtype)
    expected = model(x)
    state = model.state_dict()
    assert {key for key in state if key.startswith("0.")} == {
        "0.bias",
        *(f"0.{name}" for name in find_candidate(candidate).tensors),
    }
    assert all(type(tensor) is Tensor and tensor.layout == torch.strided for tensor in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    safetensors.torch.save_file(
        {key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors"
    )
    for loaded in (torch.load(file, weights_only=True), safetensors.torch.load_file(tmp_path / "model.safetensors")):
        twin = wrapped(planned(candidate, f"1:{kernel}", dtype, seed=9))
        assert not torch.equal(twin(x), expected)
        twin.load_state_dict(loaded)
        assert torch.equal(twin(x), expected)
        again = twin.state_dict()
        assert all(torch.equal(again[key].view(torch.uint8), state[key].view(torch.uint8)) for key in state)


@pytest.mark.parametrize(("candidate", "kernel", "dtype"), CASES)
def test_copies_and_pickles_run_the_same(candidate: str, kernel: str, dtype: str) -> None:
    model, x = wrapped(planned(candidate, f"1:{kernel}", dtype)), rows(dtype)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


@pytest.mark.parametrize(("candidate", "kernel", "dtype"), CASES)
def test_a_change_of_dtype_leaves_codes_and_scales_alone(candidate: str, kernel: str, dtype: str) -> None:
    model, x = wrapped(planned(candidate, f"1:{kernel}", dtype)), rows(dtype)
    before = {key: tensor for key, tensor in model[0].canonical().items() if key != "weight"}
    model.to(torch.float16)
    after = model[0].canonical()
    assert all(torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)) for key, tensor in before.items())
    assert model[0].bias.dtype == torch.float16
    y = model(x.half())
    assert y.dtype == torch.float16
    assert bool(torch.isfinite(y).all())
    if candidate == "none":
        assert after["weight"].dtype == torch.float16


def test_a_float_weight_in_a_dtype_that_its_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(planned("none", "1:onednn", "float32"))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    model.to(torch.float16)
    assert (model[0].program, model[0]._running) == ("1:onednn", "1:linear")
    assert model(rows("float16")).dtype == torch.float16
    model.to(torch.float32)
    assert model[0]._running == "1:onednn"


@pytest.mark.parametrize(("candidate", "kernel", "dtype"), CASES)
def test_loading_onto_the_meta_device(candidate: str, kernel: str, dtype: str) -> None:
    model, x = wrapped(planned(candidate, f"1:{kernel}", dtype)), rows(dtype)
    expected, state = model(x), model.state_dict()
    hollow = copy.deepcopy(model).to("meta")
    assert all(tensor.is_meta for tensor in hollow.state_dict().values())
    with pytest.raises(RuntimeError, match=r"layer 'block\.layer' is on the meta device"):
        hollow[0](x)
    hollow.load_state_dict(state, assign=True)
    assert torch.equal(hollow(x), expected)


@pytest.mark.parametrize("candidate", [candidate.name for candidate in registered() if candidate.name != "bf16"])
def test_missing_and_misshapen_keys_are_named(candidate: str) -> None:
    kernel = find_candidate(candidate).kernels[0]
    model, x = wrapped(planned(candidate, f"1:{kernel}", "float32")), rows("float32")
    expected, state = model(x), model.state_dict()
    name = find_candidate(candidate).tensors[0]
    with pytest.raises(RuntimeError, match=rf"Missing key.*0\.{name}"):
        model.load_state_dict({key: tensor for key, tensor in state.items() if key != f"0.{name}"})
    misshapen = state | {f"0.{name}": state[f"0.{name}"][:-1]}
    with pytest.raises(RuntimeError, match=rf"0\.{name} \({candidate}\) is .* here, but the planned layer holds"):
        model.load_state_dict(misshapen)
    assert torch.equal(model(x), expected)
    keys = model.load_state_dict({}, strict=False)
    assert f"0.{name}" in keys.missing_keys


def test_a_float_checkpoint_is_refused_by_name() -> None:
    model = wrapped(planned("int8_dynamic", "1:onednn_u8s8", "float32"))
    plain = nn.Sequential(nn.Linear(128, 48), nn.LayerNorm(48))
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.codes.*\n.*Unexpected key.*0\.weight"):
        model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(("candidate", "kernel", "dtype"), CASES)
def test_inputs_of_any_shape_and_layout(candidate: str, kernel: str, dtype: str) -> None:
    layer, x = planned(candidate, f"1:{kernel}", dtype), rows(dtype)
    expected = layer(x)
    assert expected.shape == (5, 7, 48)
    assert layer(x[0, 0]).shape == (48,)
    assert layer(x[None]).shape == (1, 5, 7, 48)
    assert layer(x[:0]).shape == (0, 7, 48)
    swapped = x.transpose(0, 1)
    assert layer(swapped).shape == (7, 5, 48)
    wide = torch.zeros(5, 7, 256, dtype=x.dtype)
    wide[..., ::2] = x
    torch.testing.assert_close(layer(wide[..., ::2]), expected)
    torch.testing.assert_close(layer(swapped).transpose(0, 1), expected)


@pytest.mark.parametrize(("candidate", "kernel", "dtype"), CASES)
def test_a_bias_in_other_strides(candidate: str, kernel: str, dtype: str) -> None:
    linear = nn.Linear(128, 48, dtype=getattr(torch, dtype))
    biases = torch.randn(48, 3, generator=torch.Generator().manual_seed(2)).to(linear.weight)

    def given(bias: Tensor) -> PlannedLinear:
        linear.bias = nn.Parameter(bias)
        return PlannedLinear.from_linear("layer", linear, find_candidate(candidate), f"1:{kernel}")

    for strided in (biases[:, 1], biases[0, 0].expand(48)):
        expected, layer = given(strided.contiguous()), given(strided)
        twin = layer.sharing_weight("twin", linear)
        with torch.no_grad():
            assert torch.equal(layer(rows(dtype)), expected(rows(dtype)))
            assert torch.equal(twin(rows(dtype)), expected(rows(dtype)))


def test_wrong_inputs_are_told_layer_and_shapes() -> None:
    layer = planned("int8_dynamic", "1:onednn_u8s8", "float32")
    with pytest.raises(RuntimeError, match=r"'block\.layer' takes torch\.float32 inputs \[\.\.\., 128\].*\[3, 64\]"):
        layer(torch.randn(3, 64))
    with pytest.raises(RuntimeError, match=r"takes torch\.float32 .* was given torch\.float16"):
        layer(torch.randn(3, 128).half())


def test_a_candidate_that_fails_names_the_layer_and_the_remedy() -> None:
    linear = nn.Linear(100, 48)
    with pytest.raises(AutoplanError, match=r"layer 'x' \(48x100, torch\.float32\) cannot .*exclude=\['x'\]"):
        PlannedLinear.from_linear("x", linear, find_candidate("int4_g64"), "1:int4pack")


def test_a_prepacked_float_weight_is_held_once() -> None:
    layer = planned("none", "1:onednn", "float32")
    assert layer.nbytes() == 128 * 48 * 4
    torch.manual_seed(0)
    assert torch.equal(layer.weight, nn.Linear(128, 48).weight)


@pytest.mark.parametrize(
    "candidate",
    [c.name for c in registered() if find_kernel(c.kernels[-1]).layout.name == ",".join(c.tensors)],  # not padded
)
def test_nbytes_is_what_the_tensors_take(candidate: str) -> None:
    kernel = find_candidate(candidate).kernels[-1]
    layer = planned(candidate, f"1:{kernel}", "float32")
    assert layer.nbytes() == sum(tensor.nbytes for tensor in layer.canonical().values())


def test_gradients_pass_through_to_the_input() -> None:
    layer = planned("int8_dynamic", "1:onednn_u8s8", "float32")
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 128), rtol=1e-4, atol=1e-5)
    assert layer.bias is not None
    assert layer.bias.grad is not None


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_backward_hook"])
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_backward_hooks_come_along(register: str) -> None:
    linear, seen = nn.Linear(128, 48), []
    getattr(linear, register)(lambda module, *_: seen.append(type(module)))
    layer = PlannedLinear.from_linear("layer", linear, find_candidate("int8_dynamic"), "1:int_mm")
    layer(torch.randn(3, 128, requires_grad=True)).sum().backward()
    assert seen == [PlannedLinear]


def test_usable_kernels_are_those_that_every_recorded_dtype_can_use() -> None:
    calls = (Call("default", 4, "float32", 1), Call("default", 4, "float64", 1))
    layer = LayerProfile("x", (), 8, 8, True, "float32", "cpu", calls)
    kernels, reasons = find_candidate("none").usable_kernels(layer, Device("cpu", "cpu"))
    assert not kernels
    assert all("float64" in reason for reason in reasons.values())

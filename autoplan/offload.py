"""Layers that accelerate offloads: their weights lie in CPU memory, or in files, and come to the device for each call.

Between calls such a module has parameters on the meta device, and a hook that has their values in its `weights_map`.
Whoever needs the values of a layer gets them here, for one layer at a time; what the hook holds is never changed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module, those inside a `SequentialHook` one by one."""
    found = [vars(module)["_hf_hook"]] if "_hf_hook" in vars(module) else []
    while any(hasattr(hook, "hooks") for hook in found):
        found = [inner for hook in found for inner in getattr(hook, "hooks", [hook])]
    return found


def only_places(module: nn.Module) -> bool:
    """Whether accelerate replaced the module's forward, and for no more than to bring weights and inputs together."""
    found = hooks(module)
    return bool(found) and all(isinstance(getattr(hook, "offload", None), bool) for hook in found)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's weights elsewhere between calls."""
    return _offloader(module) is not None


def execution_device(linear: nn.Module) -> torch.device:
    """Where a Linear runs: where its weight is, or is brought to."""
    hook = _offloader(linear)
    return linear.get_parameter("weight").device if hook is None else torch.device(hook.execution_device)


def weight_and_bias(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight [out_features, in_features] and bias on the device where the layer runs.

    Of an offloaded layer they are read at each call: let go of them before the next layer's. They are not to be
    changed, as they may be the very tensors that the hook holds.
    """
    device = execution_device(linear)
    weight = values(linear, "weight").to(device)
    return weight, None if linear.bias is None else values(linear, "bias").to(device)


def resident_bias(linear: nn.Linear) -> nn.Parameter | None:
    """The bias of a module that stands in for `linear`: the same, or where that is offloaded a copy that stays.

    Kernels take it for contiguous: where it is not, a copy that is.
    """
    bias: nn.Parameter | None = linear.bias
    if bias is None or not (is_offloaded(linear) or not bias.is_contiguous()):
        return bias
    own = values(linear, "bias").to(execution_device(linear), copy=True).contiguous()
    return nn.Parameter(own, requires_grad=bias.requires_grad)


def resident_hook(hook: Any) -> Any:
    """What brings inputs as accelerate's `hook` does, to a module whose weights stay on the device."""
    if hasattr(hook, "hooks"):
        twin = copy.copy(hook)
        twin.hooks = tuple(map(resident_hook, hook.hooks))
        return twin
    if not hook.offload:
        return hook
    twin = copy.copy(hook)
    twin.offload, twin.weights_map, twin.tied_params_map = False, None, None
    return twin


def values(module: nn.Module, key: str) -> Tensor:
    """A parameter or buffer of the module itself, wherever its values are; on the meta device if nowhere."""
    tensor: Tensor = getattr(module, key)
    hook = _offloader(module)
    return tensor if hook is None or not tensor.is_meta else _read(hook, key, tensor.dtype)


def named_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers of `model` that have values, those that are offloaded read one at a time."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_meta:
            yield name, tensor
            continue
        parts = name.split(".")
        for depth in reversed(range(len(parts))):  # its own module, or one around it that is brought as a whole
            hook = _offloader(model.get_submodule(".".join(parts[:depth])))
            if hook is not None and (hook.place_submodules or depth == len(parts) - 1):
                yield name, _read(hook, ".".join(parts[depth:]), tensor.dtype)
                break


def identity(module: nn.Module, key: str) -> Hashable:
    """What tensors have in common that start at one place in memory, offloaded or not.

    Of ties between weights in files nothing is known: there, each is one of its own.
    """
    tensor: Tensor | None = getattr(module, key)
    hook = _offloader(module)
    if hook is not None and tensor is not None and tensor.is_meta:
        tensor = _in_memory(hook.weights_map, key)
    return (id(module), key) if tensor is None else tensor.data_ptr()


@contextmanager
def read_again_for_backward(model: nn.Module) -> Iterator[None]:
    """Inside, autograd holds no offloaded weight until the backward pass, which reads it again as it gets there.

    Else, at the end of a forward pass that wants gradients, all weights would be on the device at once. Casts of them,
    which autocast makes, still are.
    """
    with ExitStack() as restored:
        for module in model.modules():
            hook = _offloader(module)
            if hook is not None:
                forward = module.forward
                vars(module)["forward"] = functools.partial(_forward, module, hook, forward)
                restored.callback(vars(module).__setitem__, "forward", forward)
        yield


def _forward(module: nn.Module, hook: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The module's own `forward`, after which autograd holds what it saves, but for weights that can be read again."""

    def pack(saved: Tensor) -> Callable[[], Tensor]:
        for key, parameter in module.named_parameters():
            if not parameter.is_meta and parameter.dtype == saved.dtype and _storage(parameter) == _storage(saved):
                view = saved.size(), saved.stride(), saved.storage_offset()
                return functools.partial(_read_view, hook, key, saved.dtype, view)
        return functools.partial(_unchanged, saved, saved._version)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved()):
        return forward(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _read_view(hook: Any, key: str, dtype: torch.dtype, view: tuple[Any, ...]) -> Tensor:
    return _read(hook, key, dtype).to(hook.execution_device).as_strided(*view)


def _unchanged(saved: Tensor, version: int) -> Tensor:
    """What was saved. Autograd does not look after what goes through hooks: a model may have written over it."""
    if saved._version != version:
        raise RuntimeError("a tensor that the backward pass needs was changed in place")
    return saved


def _offloader(module: nn.Module) -> Any:
    """The hook that has the module's weights; None if they are its own."""
    return next((hook for hook in hooks(module) if getattr(hook, "offload", False)), None)


def _read(hook: Any, key: str, dtype: torch.dtype) -> Tensor:
    tensor: Tensor = hook.weights_map[key]
    return tensor.detach().to(dtype)


def _in_memory(weights_map: Any, key: str) -> Tensor | None:
    """What a hook's map has in memory under this key; None for what it reads from a file at each access."""
    from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset

    while isinstance(weights_map, PrefixedDataset):
        weights_map, key = weights_map.dataset, weights_map.prefix + key
    if isinstance(weights_map, OffloadedWeightsLoader):
        weights_map = weights_map.state_dict
    return weights_map.get(key) if isinstance(weights_map, dict) else None

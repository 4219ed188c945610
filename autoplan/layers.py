"""The one module that stands in for an `nn.Linear`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoplan.candidates import Candidate, find_candidate
from autoplan.errors import AutoplanError
from autoplan.kernels import packing
from autoplan.kernels.ops import (
    Kernel,
    LinearSpec,
    Packed,
    Run,
    call_linear,
    find_kernel,
    pack_program,
    parse_program,
    unpack_program,
)
from autoplan.offload import resident_bias, resident_hook, weight_and_bias

if TYPE_CHECKING:
    from autoplan.siblings import Siblings


class PlannedLinear(nn.Module):
    """A linear layer that runs one candidate, each call on the kernel that the plan chose for its rows.

    `state_dict()` holds the candidate's canonical tensors (`codes`, `scale`, ...) and the bias, whatever kernels run;
    in memory lives only the form the kernels want, from which the canonical one is recovered exactly. Moving,
    copying, pickling and loading go through the canonical form. On the meta device there is nothing to pack, so
    the canonical tensors themselves are held until real ones are loaded. Moved to a kind of device that the program's
    kernels do not run on, the layer runs the candidate's most general kernel there.

    One that became a sibling (see `siblings`) holds no weight of its own while all of them hold theirs as one.

    Attributes:
        candidate: name of the numeric recipe.
        program: from how many rows on which kernel runs, such as "1:int8pack,24:dequantize_int8".
        dtype: the float dtype that the layer takes and returns.
    """

    bias: nn.Parameter | None
    _siblings: Siblings | None = None
    _place = 0  # among the siblings

    def __init__(
        self,
        name: str,
        candidate: str,
        program: str,
        canonical: packing.Canonical,
        bias: nn.Parameter | None,
        *,
        size: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.name, self.candidate, self.program = name, candidate, program
        self.out_features, self.in_features = size
        self.dtype = dtype
        self.register_parameter("bias", bias)
        self._packed: Packed | None = None
        self._inline: Run | None = None
        self.hold(canonical)

    @classmethod
    def from_linear(cls, name: str, linear: nn.Linear, candidate: Candidate, program: str) -> PlannedLinear:
        """A stand-in for `linear`, sharing its bias, hooks and train flag. Raises AutoplanError naming the layer.

        Of a layer that accelerate offloads, weight and bias are read, and what is made of them stays on its device.
        """
        try:
            canonical = candidate.quantize(weight_and_bias(linear)[0].detach())
            planned = cls(
                name,
                candidate.name,
                program,
                canonical,
                resident_bias(linear),
                size=(linear.out_features, linear.in_features),
                dtype=linear.weight.dtype,
            )
        except Exception as error:
            raise AutoplanError(
                f"layer {name!r} ({linear.out_features}x{linear.in_features}, {linear.weight.dtype}) cannot be turned "
                f"into {candidate.name} running {program}: {type(error).__name__}: {error}. "
                f"Exclude it with exclude=[{name!r}]"
            ) from error
        planned.adopt(linear)
        return planned

    def sharing_weight(self, name: str, linear: nn.Linear) -> PlannedLinear:
        """A stand-in for another Linear that runs the same weight: held once; bias and hooks are its own."""
        twin = PlannedLinear.__new__(PlannedLinear)
        nn.Module.__init__(twin)
        vars(twin).update(
            {k: value for k, value in vars(self).items() if not k.startswith("_") and k not in ("name", "forward")}
        )
        twin.name = name
        twin._packed, twin._canonical = self._packed, self._canonical
        twin._running, twin._inline = self._running, self._inline
        twin.register_parameter("bias", resident_bias(linear))
        twin.adopt(linear)
        return twin

    def adopt(self, linear: nn.Module) -> None:
        """Take over the train flag, the user's hooks and own attributes of the layer that this one stands in for."""
        self.training = linear.training
        for attribute, value in vars(linear).items():
            if not attribute.startswith("_") and attribute not in (*vars(self), "forward"):
                setattr(self, attribute, value)
        for attribute in vars(linear):
            if attribute.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook")):
                object.__setattr__(self, attribute, getattr(linear, attribute))
        if "_hf_hook" in vars(linear):  # accelerate's, which brings inputs to the device of the layer
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(self, resident_hook(vars(linear)["_hf_hook"]))

    def forward(self, input: Tensor) -> Tensor:
        dtype = self.dtype
        autocast = torch.is_autocast_enabled(input.device.type)
        if autocast:
            dtype = torch.get_autocast_dtype(input.device.type)
        if (siblings := self._siblings) is not None and (whole := siblings.whole) is not None:
            return own_piece(siblings.piece(whole, self._place, input, dtype), self.bias)
        if autocast:
            input = input.to(dtype)
        if input.dtype != dtype or input.shape[-1] != self.in_features:
            raise RuntimeError(
                f"layer {self.name!r} takes {dtype} inputs [..., {self.in_features}] "
                f"and was given {input.dtype} {list(input.shape)}"
            )
        if self._packed is None:
            raise RuntimeError(f"layer {self.name!r} is on the meta device: load a state_dict with assign=True first")
        flat = input.dim() == 2
        x = (input if flat else input.reshape(-1, self.in_features)).contiguous()
        if self._inline is not None and torch.compiler.is_compiling() and not torch.is_grad_enabled():
            y = self._inline(x, self._packed, self.bias, dtype)
        else:
            # nn.Module takes a microsecond to find it as an attribute, which is needed only once it is pruned.
            bias = self._parameters["bias"] if "bias" in self._parameters else self.bias  # noqa: SIM401
            y = call_linear(x, self._packed, bias, self._running, self.out_features, dtype)
        return y if flat else y.view(*input.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """The float weight [out_features, in_features] that this layer stands for, computed anew at each access."""
        if self._packed is None:
            return packing.dequantize(self.canonical(), self.dtype)
        size = (self.out_features, self.in_features)
        weight: Tensor = torch.ops.autoplan.dense_weight(self._packed, self._running, size, self.dtype)
        return weight

    def canonical(self) -> packing.Canonical:
        """The canonical tensors, as `state_dict()` shows them."""
        if self._packed is not None:
            return unpack_program(self._running, self._packed)
        if (siblings := self._siblings) is not None and siblings.whole is not None:
            start, stop = siblings.bounds[self._place]
            # clones: who saves a view saves all that it is a view of
            return {key: tensor[start:stop].clone() for key, tensor in siblings.whole.canonical().items()}
        return dict(self._canonical)

    def nbytes(self) -> int:
        """Bytes that the weight takes in memory (bias not counted): what the kernels hold, each tensor once."""
        if (siblings := self._siblings) is not None and siblings.whole is not None:  # its share of the whole
            return round(siblings.whole.nbytes() * self.out_features / siblings.whole.out_features)
        return packing.nbytes(list(self._packed or self._canonical.values()))

    def become_sibling(self, siblings: Siblings | None, place: int = 0) -> None:
        """Run as one with the others, as soon as all have become siblings; alone for None, or if the place is taken."""
        self._siblings, self._place = siblings, place
        if siblings is not None and not siblings.enter(place, self):
            self._siblings = None

    def placement(self) -> tuple[torch.device, torch.dtype] | None:
        """Where the weight of its own is, and for which dtype; None if there is none, or only on the meta device."""
        return None if self._packed is None else (self._packed[0].device, self.dtype)

    def let_go(self) -> None:
        """Hold no weight: the siblings do."""
        self._packed, self._inline = None, None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The weight held alone inside the block, to be changed; after it with the siblings', if they are alike."""
        if self._siblings is not None:
            self._siblings.scatter()
        yield
        if self._siblings is not None:
            self._siblings.gather()

    def hold(self, canonical: packing.Canonical) -> None:
        """Pack `canonical` for the kernels of the program; nothing changes if that fails."""
        running = self.program
        packed: Packed | None = None
        if not any(tensor.is_meta for tensor in canonical.values()):
            running = self._program_for(canonical)
            packed = pack_program(running, canonical)
        _, kernels, _ = parse_program(running)
        self._running, self._packed = running, packed
        self._canonical = canonical if packed is None else {}
        self._inline = kernels[0].inline if len(kernels) == 1 else None

    def _program_for(self, canonical: packing.Canonical) -> str:
        """The program; where not all its kernels run on this kind of device, the candidate's most general one there.

        The same where they do not take the dtype that a float weight was changed to.
        """
        first = next(iter(canonical.values()))
        device, dtype = first.device, canonical["weight"].dtype if "weight" in canonical else None

        def runs(kernel: Kernel) -> bool:
            taken = dtype is None or kernel.supports(LinearSpec(self.in_features, self.out_features, dtype)) is None
            return taken and device.type in kernel.devices

        if all(map(runs, parse_program(self.program)[1])):
            return self.program
        candidate = find_candidate(self.candidate)
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        spec = LinearSpec(self.in_features, self.out_features, dtype or self.dtype, candidate.group_size, capability)
        for name in reversed(candidate.kernels):
            kernel = find_kernel(name)
            if device.type in kernel.devices and kernel.rejects(spec) is None:
                return f"1:{name}"
        return self.program  # which will say what it misses

    def _apply(self, fn: Any, recurse: bool = True) -> PlannedLinear:
        """Follow `.to()`: codes and scales change device only; a float weight in the model's own dtype changes both."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        canonical = self.canonical()
        device = next(iter(canonical.values())).device
        moved = fn(torch.empty(0, dtype=self.dtype, device=device))
        if moved.device != device or moved.dtype != self.dtype:
            follows_dtype = self.candidate == "none"
            with self._alone():
                self.hold({key: fn(t) if follows_dtype else t.to(moved.device) for key, t in canonical.items()})
                self.dtype = moved.dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in self.canonical().items():
            destination[prefix + key] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        held = self.canonical()
        keys = {key: prefix + key for key in held}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in keys.values()]
        missing = [key for key in keys.values() if key not in state_dict]
        if missing:
            missing_keys.extend(missing if strict else [])
            return
        loaded = {key: state_dict[keys[key]] for key in held}
        for key, tensor in loaded.items():
            if tensor.shape != held[key].shape or tensor.dtype != held[key].dtype:
                error_msgs.append(
                    f"{keys[key]} ({self.candidate}) is {tensor.dtype} {list(tensor.shape)} here, but the "
                    f"planned layer holds {held[key].dtype} {list(held[key].shape)}: apply the plan it was saved under"
                )
                return
        device = next(iter(held.values())).device
        if device.type == "meta":  # as load_state_dict(assign=True) does: take the file's tensors where they are
            device = next(iter(loaded.values())).device
        with self._alone():
            self.hold({key: tensor.detach().to(device, copy=True) for key, tensor in loaded.items()})

    def __getstate__(self) -> dict[str, Any]:
        """Plain tensors only: oneDNN's packed weights can be neither copied nor saved, and float8 not pickled."""
        state = {key: value for key, value in vars(self).items() if key not in ("_packed", "_running", "_inline")}
        canonical = self.canonical()
        bytewise = {k: t.view(torch.uint8) if t.itemsize == 1 else t for k, t in canonical.items()}
        return state | {"_canonical": bytewise, "_dtypes": {k: t.dtype for k, t in canonical.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        dtypes = state.pop("_dtypes")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.hold({key: tensor.view(dtypes[key]) for key, tensor in state["_canonical"].items()})
        if self._siblings is not None:  # new ones if they were copied too; or the same, with the place taken
            self.become_sibling(self._siblings, self._place)

    def extra_repr(self) -> str:
        kernels = f"kernels={self.program}"
        if self._siblings is not None and self._siblings.whole is not None:
            kernels = f"as one with {self._siblings.label}, kernels={self._siblings.program}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"candidate={self.candidate}, {kernels}"
        )


def own_piece(piece: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's output from its piece of a larger one: with its bias, contiguous, and free to be changed in place."""
    if bias is not None:
        return (piece + bias).to(piece.dtype)
    return piece.clone(memory_format=torch.contiguous_format) if piece.requires_grad else piece.contiguous()

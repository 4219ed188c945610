"""Sampled Fisher: the gradients that a layer's output gets, and the harm they predict of a change of that output.

For logits, with labels drawn from the model's own output distribution and g = d(-log p(label)) / dY, a change dY of a
layer's output moves the model's output by KL = E[(g . dY)^2] / 2 to second order (the Fisher information, Amari 1998).
For other outputs, with v ~ N(0, I) on the output and g = d(v . output) / dY, E[(g . dY)^2] is the squared error of the
output to first order (Hutchinson 1990). With a loss of the user's, g is its gradient: the empirical Fisher.

Before it is squared, g . dY is summed over a unit of the output: the sample; or, where each token has an output of its
own, a block of neighbouring tokens. Squares of single tokens would miss that their errors reach the same outputs
together (up to half of the harm, where activations have outliers); squares of sums over whole samples miss nothing, but
a text is a single draw then, and vary as much. Blocks are nearly as good as the one and as steady as the other.

Gradients run through activations only, on a few samples at a time: memory is bounded by the rows of one backward pass,
rather than by checkpointing, which runs parts of a model twice and so breaks those that keep state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoplan.divergence import OutputPicker, Reference, call, main_output, unmasked
from autoplan.errors import AutoplanError
from autoplan.offload import read_again_for_backward, weight_and_bias

Loss = Callable[[Any], Tensor]  # of what the model returns

KEPT = torch.bfloat16  # what gradients are kept in: sums of thousands of products with them feel no rounding
_BLOCK = 32  # tokens of a sample


class GradientError(Exception):
    """No gradient of the output can be had, or none that can be trusted; the message says why. Never the caller's."""


@dataclass(slots=True)
class Call:
    """One call of a layer, and what its output's gradients were."""

    name: str
    x: Tensor  # [..., in_features]
    autocast: torch.dtype | None
    output: torch.Size  # the leading dimensions of the model's output
    gradients: list[Tensor]  # one per pass, each [..., out_features], KEPT


Calls = list[list[Call]]  # of one layer: per input of the model


def gradients(
    model: nn.Module,
    names: Mapping[str, str],
    against: Sequence[Reference],
    picker: OutputPicker | None,
    loss: Loss | None,
    passes: range,
    seed: int,
) -> dict[str, Calls]:
    """What each layer was given and the gradients of its output: one forward per input, one backward per pass.

    `names` maps the dotted names of modules to those of the layers they belong to. Leaves no gradient and no flag
    behind. Call inside `undisturbed`. Raises GradientError, and AutoplanError for a `loss` that gives no scalar.
    """
    found: dict[str, Calls] = {layer: [] for layer in names.values()}
    with torch.inference_mode(False), _constant_weights(model), read_again_for_backward(model), torch.enable_grad():
        for number, reference in enumerate(against):
            try:
                calls = _of_one_input(model, names, reference, picker, loss, passes, seed + 7919 * number)
            except (AutoplanError, GradientError):
                raise
            except Exception as error:
                first_line = str(error).partition("\n")[0]
                raise GradientError(f"its backward pass failed ({type(error).__name__}: {first_line})") from error
            for layer, own in found.items():
                own.append([one for one in calls if names[one.name] == layer])
    return found


def _of_one_input(
    model: nn.Module,
    names: Mapping[str, str],
    reference: Reference,
    picker: OutputPicker | None,
    loss: Loss | None,
    passes: range,
    seed: int,
) -> list[Call]:
    calls: list[Call] = []
    taps: list[Tensor] = []
    with _tapped(model, names, calls, taps):
        result = call(model, reference.model_input)
    output, _ = main_output(result, picker)
    target = output if loss is None else _scalar(loss(result)) * math.sqrt(0.5) * unmasked(reference)
    if not target.requires_grad:
        raise GradientError("its output has no gradient")
    for number in passes:
        generator = torch.Generator(output.device).manual_seed(seed + 104729 * number)
        cotangent = None if loss is not None else _cotangent(reference, output.detach(), generator)
        with _bf16_products():
            found = torch.autograd.grad(target, taps, cotangent, retain_graph=number != passes[-1], allow_unused=True)
        for one, gradient in zip(calls, found, strict=True):
            if gradient is None:
                gradient = torch.zeros((), device=one.x.device).expand(*one.x.shape[:-1], 1)
            elif not math.isfinite(torch.linalg.vector_norm(gradient, dtype=torch.float32)):
                raise GradientError(f"the gradient at layer {one.name!r} is not finite")
            one.gradients.append(gradient.to(KEPT))
    for one in calls:
        one.output = output.shape[:-1]
    return calls


def _scalar(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        shown = f"a tensor {list(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise AutoplanError(f"loss= must return one floating number as a tensor, and returned {shown}")
    return loss.reshape(())


def _cotangent(reference: Reference, output: Tensor, generator: torch.Generator) -> Tensor:
    """What the backward pass starts with, so scaled that the harm is the sum of squares. Zero where masked."""
    if reference.logits:
        v = torch.softmax(output.float(), dim=-1).nan_to_num(nan=1.0).flatten(0, -2)
        labels = torch.multinomial(v, 1, generator=generator)
        v = v.scatter_add(1, labels, v.new_full(labels.shape, -1.0)).view(output.shape) * math.sqrt(0.5)
    else:
        v = torch.randn(output.shape, generator=generator, device=output.device)
    if reference.mask is not None:
        v = torch.where(reference.mask.reshape(reference.mask.shape + (1,) * (v.dim() - reference.mask.dim())), v, 0)
    return v.to(output.dtype)


@contextmanager
def _bf16_products() -> Iterator[None]:
    """On CPUs with bfloat16 units, float32 products inside the block round what they multiply to it, as KEPT does."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def _constant_weights(model: nn.Module) -> Iterator[None]:
    """Parameters that want no gradient, and buffers of its own, in the place of the model's: nobody else's change."""
    modules = list(model.modules())
    held = [(module, dict(module._parameters), dict(module._buffers)) for module in modules]
    constant: dict[int, nn.Parameter] = {}
    copied: dict[int, Tensor] = {}
    try:
        for module, parameters, buffers in held:
            for key, parameter in parameters.items():
                if parameter is not None and parameter.requires_grad:
                    if id(parameter) not in constant:
                        constant[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
                    module._parameters[key] = constant[id(parameter)]
            for key, buffer in buffers.items():
                if buffer is not None:
                    module._buffers[key] = copied.setdefault(id(buffer), buffer.detach().clone())
        yield
    finally:
        for module, parameters, buffers in held:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


@contextmanager
def _tapped(model: nn.Module, names: Mapping[str, str], calls: list[Call], taps: list[Tensor]) -> Iterator[None]:
    """Every call of these modules is noted in `calls`, and zeros that want a gradient are added to its output."""

    def hook(name: str) -> Any:
        def tap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            x: Tensor = args[0] if args else kwargs["input"]
            if not x.numel():
                return None
            x = x.detach().to(output.device, copy=True)  # models may write over it; accelerate may bring it
            if not torch.is_grad_enabled():
                raise GradientError(f"layer {name!r} runs under torch.no_grad()")
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
            calls.append(Call(name, x, dtype, torch.Size(), []))
            taps.append(output.new_zeros((), requires_grad=True).expand_as(output))
            return output + taps[-1]

        return tap

    first_names = {id(model.get_submodule(name)): name for name in reversed(list(names))}
    handles = [
        model.get_submodule(name).register_forward_hook(hook(name), prepend=True, with_kwargs=True)
        for name in first_names.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Changes:
    """What changes of one layer's output do, by its calls and their gradients."""

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        self._calls = calls
        self._float = [[self._run(model.get_submodule(one.name), one) for one in own] for own in calls]

    @property
    def dead(self) -> bool:
        """Whether no gradient reached the layer."""
        return not any(bool(gradient.any()) for own in self._calls for one in own for gradient in one.gradients)

    def squares(self, planned: Mapping[str, nn.Module]) -> dict[Hashable, Tensor]:
        """(g . dY)^2, float64 [passes, units], with these layers, by name, in the place of the float ones.

        Whatever its kernels are, they run on the rows and in the dtype of use. The keys tell inputs and kinds of units
        apart: what has the same key and shape is about the same units, also for another candidate or layer.
        """
        units: dict[Hashable, Tensor] = {}
        for i, (calls, outputs) in enumerate(zip(self._calls, self._float, strict=True)):
            for j, (one, y) in enumerate(zip(calls, outputs, strict=True)):
                change = self._run(planned[one.name], one).float() - y.float()
                dots = torch.stack([torch.linalg.vecdot(gradient.float(), change) for gradient in one.gradients])
                kind, dots = by_unit(dots, one.output)
                key = (i, kind, j) if kind == "row" else (i, kind)  # of rows, nobody knows which belong together
                units[key] = units[key] + dots if key in units else dots
        return {key: dots.double().square() for key, dots in units.items()}

    @staticmethod
    def _run(module: nn.Module, one: Call) -> Tensor:
        """The layer alone, without the user's hooks: they are not to see a call that the model did not make."""
        with torch.autocast(one.x.device.type, one.autocast, enabled=one.autocast is not None):
            if type(module) is not nn.Linear:
                y: Tensor = module.forward(one.x)
                return y
            weight, bias = weight_and_bias(module)
            return F.linear(one.x.to(weight.device), weight, bias).to(one.x.device)


def by_unit(dots: Tensor, output: Sequence[int]) -> tuple[str, Tensor]:
    """Dot products per row of a layer, [passes, ...], summed to what the output has: [passes, units], and its kind.

    `output` is the leading dimensions of the model's output, the first of them samples. As many rows as these hold are
    its positions, and summed to "block"s of neighbours in a sample. Otherwise rows are summed to the "sample" they are
    of, where that is known: a leading dimension is the samples', or the output is pooled and the rows are a multiple.
    Rows that a model has gathered (as for the experts of a mixture) stand each for itself, as "row".
    """
    passes, *rows = dots.shape
    count, positions = math.prod(rows), math.prod(output)
    samples = output[0] if output else 1
    if count == positions:
        dots = dots.reshape(passes, samples, -1)
        dots = F.pad(dots, (0, -dots.shape[-1] % _BLOCK))
        return "block", dots.unflatten(-1, (-1, _BLOCK)).sum(dim=-1).flatten(1)
    if len(rows) > 1 and samples in rows:
        return "sample", dots.movedim(1 + rows.index(samples), 1).reshape(passes, samples, -1).sum(dim=-1)
    if positions == samples and count % samples == 0:
        return "sample", dots.reshape(passes, samples, -1).sum(dim=-1)
    return "row", dots.reshape(passes, -1)


def units(reference: Reference) -> int:
    """How many units the main output of one input has."""
    samples, *positions = reference.output.shape[:-1] or (1,)
    return samples * math.ceil(math.prod(positions) / _BLOCK)

"""Divergence: how far a changed model's main output is from the float model's, and the inputs it is judged on.

For logits: mean KL(float || changed) in nats per token. Otherwise: norm(y - q)^2 / norm(y)^2. Both are ratios of
two sums over samples, which is what `Terms` holds, so that samples can be pooled and resampled.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoplan.errors import AutoplanError
from autoplan.recorder import ModelInput, device_of_model, eagerly
from autoplan.records import Estimate

OutputPicker = Callable[[Any], Tensor | Mapping[str, Tensor]]

_SAMPLES = (16, 64, 64)  # at most, for scoring, validation and the final figures


@dataclass(frozen=True, slots=True)
class Terms:
    """Numerator and denominator of the divergence, one row per sample: [samples, 2], float64."""

    values: NDArray[np.float64]

    def divergence(self) -> float:
        numerator, denominator = self.values.sum(axis=0)
        return float(numerator / denominator) if denominator else float(numerator)

    def estimate(self, seed: int = 0) -> Estimate:
        """The divergence with its 95 % interval over samples."""
        low, high = self.quantiles((0.025, 0.975), seed)
        return Estimate(self.divergence(), low, high)

    def upper_bound(self, seed: int = 0) -> float:
        """The one-sided 95 % upper bound of the divergence: what is held against a budget."""
        return self.quantiles((0.95,), seed)[0]

    def quantiles(self, levels: Sequence[float], seed: int = 0, resamples: int = 1000) -> list[float]:
        """Confidence bounds of the divergence at `levels`: the studentized bootstrap over samples.

        Unlike percentiles of resampled values it does not fall short where samples are few and skewed, as divergences
        are (Hall, "Theoretical Comparison of Bootstrap Confidence Intervals", Annals of Statistics 16(3), 1988; the
        standard error is that of a ratio of sums, linearised). It is cut to the range of the samples' own divergences,
        without which a handful of samples would prove nothing.
        """
        value = self.divergence()
        if not np.isfinite(value):
            return [value] * len(levels)
        generator = np.random.default_rng(seed)
        picked = self.values[generator.integers(len(self.values), size=(resamples, len(self.values)))]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            error, (ratios, errors) = _ratio(self.values)[1], _ratio(picked)
            off = np.nan_to_num((ratios - value) / errors, nan=0.0)  # 0 / 0: the sample itself was drawn again
            bounds = value - np.quantile(off, [1 - level for level in levels], method="lower") * error
        own = _ratio(self.values[:, None, :])[0]
        cut: list[float] = np.clip(np.nan_to_num(bounds, nan=value), own.min(), own.max()).tolist()
        return cut


def _ratio(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum of numerators / sum of denominators of samples [..., samples, 2], and the standard error of that."""
    n = values.shape[-2]
    sums = values.sum(axis=-2)
    below = np.where(sums[..., 1], sums[..., 1], 1.0)
    ratio = sums[..., 0] / below
    residuals = values[..., 0] - ratio[..., None] * values[..., 1]
    return ratio, np.sqrt((residuals**2).sum(axis=-1) * n / max(n - 1, 1)) / below


@dataclass(frozen=True, slots=True)
class Reference:
    """The float model's main output for one input, with the positions that count."""

    model_input: ModelInput
    output: Tensor
    mask: Tensor | None  # bool, over the leading dimensions of the output
    logits: bool


@dataclass(frozen=True, slots=True)
class Split:
    """Disjoint inputs for scoring, for validating plans, and for the final figures."""

    scoring: tuple[ModelInput, ...]
    validation: tuple[ModelInput, ...]
    final: tuple[ModelInput, ...]
    held_out: bool  # False when there was a single sample, used three times


@contextmanager
def undisturbed(model: nn.Module, eager: bool = True) -> Iterator[None]:
    """Extra forwards inside leave no trace: eval mode, no gradients, eager (unless told otherwise).

    Buffers, RNG and train flags are restored.
    """
    training = {module: module.training for module in model.modules()}
    held = [(module, dict(module._buffers)) for module in training]  # a forward may put another tensor in its place
    dense = [buffer for buffer in model.buffers() if buffer.layout == torch.strided and not buffer.is_quantized]
    buffers = [(buffer, buffer.clone()) for buffer in dense if not buffer.is_meta]  # those may be offloaded
    devices = {device_of_model(model), *(tensor.device for tensor in (*model.parameters(), *model.buffers()))}
    gpus = [device for device in devices if device.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=gpus), torch.no_grad(), eagerly() if eager else nullcontext():
            model.eval()
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for module, own in held:
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, saved in buffers:
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)


def call(model: nn.Module, model_input: ModelInput, through: Callable[..., Any] | None = None) -> Any:
    """Run the model, `through` what stands for it if that is given, on a copy of a recorded input.

    It runs in the autocast region that the input was recorded in.
    """
    args, kwargs = copied(model_input)
    with region_of(model_input, model):
        return (through or model)(*args, **kwargs)


def copied(model_input: ModelInput) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a recorded input, which a model may write to."""
    args, kwargs = tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf),
        (model_input.args, model_input.kwargs),
    )
    return args, kwargs


@contextmanager
def region_of(model_input: ModelInput, model: nn.Module) -> Iterator[None]:
    """The autocast region that an input was recorded in, or none, whatever is around; its casts are gone after it."""
    dtype = getattr(torch, model_input.autocast or "bfloat16")
    with torch.autocast(device_of_model(model).type, dtype, enabled=model_input.autocast is not None):
        try:
            yield
        finally:
            torch.clear_autocast_cache()  # which torch itself does only where no other region is around


def main_output(result: Any, picker: OutputPicker | None = None) -> tuple[Tensor, bool]:
    """The output that is judged, and whether it is logits: `.logits`, else the first floating tensor.

    A picker may return a tensor, which is judged as no logits, or {"logits": tensor}.
    Logits are [batch, classes] or [batch, tokens, classes] with several classes: of any other `.logits` (a score per
    sample, an image of classes) the relative squared error is taken.

    Raises AutoplanError when there is none, or when the user's `output=` callable returns something else.
    """
    result = result if picker is None else picker(result)
    logits = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    if isinstance(logits, Tensor) and logits.is_floating_point():
        return logits, logits.dim() in (2, 3) and logits.shape[-1] > 1
    if picker is not None and not (isinstance(result, Tensor) and result.is_floating_point()):
        raise AutoplanError(
            f'output= must return a floating tensor, or {{"logits": tensor}}, and returned {type(result).__name__}'
        )
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf, False
    raise AutoplanError(
        f"the model's forward returned {type(result).__name__} with no floating tensor in it; "
        "pass output=callable to say which output counts"
    )


def judged_output(model: nn.Module, model_input: ModelInput, picker: OutputPicker | None) -> tuple[Tensor, bool]:
    """The `main_output` of the model for a recorded input; a model that draws random numbers draws the same each time.

    Call inside `undisturbed`, which puts back the state of the generators.
    """
    device = device_of_model(model)
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)
    return main_output(call(model, model_input), picker)


def references(model: nn.Module, inputs: Sequence[ModelInput], picker: OutputPicker | None) -> list[Reference]:
    """Run the float model on `inputs`, to compare against later. Raises AutoplanError when its output is not finite."""
    found = []
    for model_input in inputs:
        output, logits = judged_output(model, model_input, picker)
        mask = _attention_mask(model, model_input, output)
        counted = output if mask is None else output[mask]
        if not bool(torch.isfinite(counted).all()):
            raise AutoplanError(
                "the float model's own output is not finite on the recorded inputs: nothing can be compared with it; "
                "if it hides some positions on purpose, pass output=callable that returns the finite part"
            )
        found.append(Reference(model_input, output.clone(), mask, logits))  # some models write over their output
    return found


def compare(model: nn.Module, against: Sequence[Reference], picker: OutputPicker | None) -> Terms:
    """The divergence terms of `model`, as it is now, against recorded float outputs."""
    rows = []
    for reference in against:
        output, _ = judged_output(model, reference.model_input, picker)
        rows.append(terms(reference, output))
    return Terms(np.concatenate(rows))


def argument(model: nn.Module, model_input: ModelInput, name: str) -> Any:
    """What the model was given under this name, by keyword or by position; None for nothing."""
    if name in model_input.kwargs or not model_input.args:
        return model_input.kwargs.get(name)
    try:
        return inspect.signature(model.forward).bind(*model_input.args, **model_input.kwargs).arguments.get(name)
    except (TypeError, ValueError):
        return None


def _attention_mask(model: nn.Module, model_input: ModelInput, output: Tensor) -> Tensor | None:
    """The recorded attention_mask [batch, tokens], if the output is [batch, tokens, ...].

    An output [batch, features] has no tokens to mask, even where there are as many features as tokens.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or any(key.startswith("decoder_") for key in model_input.kwargs):
        mask = argument(model, model_input, "decoder_attention_mask")  # the other mask is for the encoder's tokens
    else:
        mask = argument(model, model_input, "attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and output.dim() >= 3 and mask.shape == output.shape[:2]:
        return mask.to(output.device).bool()
    return None


def kl_by_position(reference: Reference, output: Tensor) -> Tensor:
    """KL(float || changed) of logits in nats, [batch] or [batch, tokens]; what the mask hides is among them."""
    y, q = F.log_softmax(reference.output.float(), -1), F.log_softmax(output.float(), -1)
    kl = F.kl_div(q, y, reduction="none", log_target=True).sum(-1)
    return kl.clamp_min(0)  # KL is never negative (Gibbs); its rounding is


def terms(reference: Reference, output: Tensor) -> NDArray[np.float64]:
    """Numerator and denominator of the divergence of one output, a row per sample: [samples, 2]."""
    y, q = reference.output.float(), output.float()
    if y.shape != q.shape:
        raise AutoplanError(f"the model's output changed its shape from {list(y.shape)} to {list(q.shape)}")
    if y.dim() < 2:
        y, q = y.reshape(1, -1), q.reshape(1, -1)
    if reference.logits:
        numerator = kl_by_position(reference, output)
        denominator = torch.ones_like(numerator)
    else:
        numerator, denominator = (y - q).square().sum(-1), y.square().sum(-1)
    if reference.mask is not None:
        numerator = torch.where(_like(reference.mask, numerator), numerator, 0)
        denominator = torch.where(_like(reference.mask, denominator), denominator, 0)
    pair = torch.stack((numerator.flatten(1).sum(1) if numerator.dim() > 1 else numerator,
                        denominator.flatten(1).sum(1) if denominator.dim() > 1 else denominator), dim=1)  # fmt: skip
    # a changed model that gives NaN is infinitely far away; it must never look close
    result: NDArray[np.float64] = torch.nan_to_num(pair.double(), nan=torch.inf, posinf=torch.inf).cpu().numpy()
    return result


def unmasked(reference: Reference) -> int:
    """How many positions of the output count: tokens, or samples where each has one output."""
    if reference.mask is not None:
        return int(reference.mask.sum())
    return math.prod(reference.output.shape[:-1])


def weight(against: Sequence[Reference]) -> float:
    """The denominator of the divergence from these outputs: tokens for logits, else their squared norm."""
    return float(sum(terms(reference, reference.output)[:, 1].sum() for reference in against))


def _like(mask: Tensor, values: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (values.dim() - mask.dim()))


def split_inputs(model: nn.Module, inputs: Sequence[ModelInput]) -> Split:
    """Three disjoint parts of the recorded inputs: whole batches where a workload has three, else by sample.

    A batch is cut along the first dimension only if the model gives the same output sizes for the parts.
    Call inside `undisturbed`.
    """
    parts: tuple[list[ModelInput], ...] = ([], [], [])
    held_out = True
    for workload in dict.fromkeys(item.workload for item in inputs):
        own = [item for item in inputs if item.workload == workload]
        if len(own) < 3:
            own = [piece for item in own for piece in _cut(model, item)]
        if len(own) < 3:
            held_out = False
            for part in parts:
                part.extend(own)
            continue
        for i, part in enumerate(parts):
            part.extend(own[i::3])
    scoring, validation, final = (_first(part, limit) for part, limit in zip(parts, _SAMPLES, strict=True))
    return Split(scoring, validation, final, held_out)


def _first(items: Sequence[ModelInput], samples: int) -> tuple[ModelInput, ...]:
    """The first items, at least one, until they hold `samples` samples: outputs are kept, and may be large."""
    taken: list[ModelInput] = []
    for item in items:
        if taken and sum(map(_batch_size, taken)) + _batch_size(item) > samples:
            break
        taken.append(item)
    return tuple(taken)


def _batch_size(item: ModelInput) -> int:
    tensors = [t for t in tree_leaves((item.args, item.kwargs)) if isinstance(t, Tensor) and t.dim()]
    return tensors[0].shape[0] if tensors else 1


def _cut(model: nn.Module, item: ModelInput, parts: int = 3) -> list[ModelInput]:
    """One batch as several, if its tensors share a first dimension of at least so many and the model bears it."""
    size = _batch_size(item)
    if size < parts or parts < 2:
        return [item]
    bounds = [size * i // parts for i in range(parts + 1)]
    pieces = []
    for low, high in itertools.pairwise(bounds):
        args, kwargs = tree_map(
            lambda leaf, low=low, high=high: (
                leaf[low:high] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size else leaf
            ),
            (item.args, item.kwargs),
        )
        pieces.append(replace(item, args=args, kwargs=kwargs))
    try:
        shapes = [main_output(call(model, piece))[0].shape for piece in pieces]
        whole = main_output(call(model, item))[0].shape
    except Exception:  # a model that does not bear a smaller batch: it is then judged on the whole one
        return [item]
    as_expected = [torch.Size((high - low, *whole[1:])) for low, high in itertools.pairwise(bounds)]
    return pieces if whole and whole[0] == size and shapes == as_expected else [item]


def in_parts(model: nn.Module, reference: Reference, parts: int) -> list[Reference]:
    """The reference as so many of fewer samples each, where the model bears smaller batches; else as it is."""
    pieces = _cut(model, reference.model_input, min(parts, _batch_size(reference.model_input)))
    if len(pieces) == 1 or len(reference.output) != _batch_size(reference.model_input):
        return [reference]
    sizes = [_batch_size(piece) for piece in pieces]
    masks = [None] * len(sizes) if reference.mask is None else list(reference.mask.split(sizes))
    outputs = reference.output.split(sizes)
    return [
        replace(reference, model_input=piece, output=output, mask=mask)
        for piece, output, mask in zip(pieces, outputs, masks, strict=True)
    ]

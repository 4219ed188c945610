"""What the scoreboard asks of every peer: models, the inputs they are timed and judged on, and how well they answer."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoplan import demo

Input = Mapping[str, Tensor]  # what the model's forward takes, by name
Output = Tensor | Sequence[Tensor]  # what it gives
Accuracy = Mapping[str, float]

CALIBRATION = 3  # inputs per scenario that peers may calibrate and plan with; none of them is timed or judged


@dataclass(frozen=True)
class Scenario:
    """One way to run a model. The first of `judged` is what is timed."""

    name: str
    calibration: Sequence[Input]
    judged: Sequence[Input]
    items: int  # in one call
    unit: str
    weight: float = 1.0  # how often it counts, for a plan that serves several scenarios


@dataclass(frozen=True)
class Workload:
    """A model, given in `dtype`; peers may ask for it in another."""

    name: str
    table: str  # workloads of one table share a file
    dtype: torch.dtype
    load: Callable[[torch.dtype], nn.Module]  # a fresh one, the same weights every time
    scenarios: Sequence[Scenario]
    accuracy: Callable[[Scenario, Sequence[Any], Sequence[Any]], Accuracy]  # the first figure is the divergence
    together: int = 16  # peers that are in memory, and raced, at once
    compiled: bool = True  # False: nothing is, not even what is called so, and what is measured means nothing
    output: Callable[[Any], Any] | None = None  # as `make_plan` takes it


# --- how well a model answers: (scenario, the float32 model's outputs, its outputs) ---


def tensors_of(output: Output) -> Sequence[Tensor]:
    return [output] if isinstance(output, Tensor) else output


def relative_error(_: Scenario, reference: Sequence[Output], outputs: Sequence[Output]) -> Accuracy:
    """norm(y - q)^2 / norm(y)^2, over all outputs."""
    y, q = (
        torch.cat([tensor.double().flatten() for output in some for tensor in tensors_of(output)])
        for some in (reference, outputs)
    )
    return {"relative_error": float((y - q).square().sum() / y.square().sum())}


def embeddings(_: Scenario, reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> Accuracy:
    found = demo.fidelity(torch.cat(list(reference)), torch.cat(list(outputs)))
    return {
        "relative_error": found.relative_error,
        "cosine": found.cosine,
        "top_1": found.top_1,
        "top_10": found.top_10,
    }


def logits(_: Scenario, reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> Accuracy:
    """Mean KL of the float32 model's distribution to the model's, in nats per token; how often they agree."""
    kl = agree = count = 0.0
    for y, q in zip(reference, outputs, strict=True):
        p, log_q = y.float().log_softmax(-1), q.float().log_softmax(-1)
        kl += float(F.kl_div(log_q, p, reduction="sum", log_target=True))
        agree += float((p.argmax(-1) == log_q.argmax(-1)).sum())
        count += p.shape[:-1].numel()
    return {"kl": kl / count, "top_1": agree / count}


def perplexity(scenario: Scenario, reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> Accuracy:
    """As `logits`; and per byte, the exponential of the mean loss of the next one."""
    found = dict(logits(scenario, reference, outputs))
    tokens = [judged["input_ids"] for judged in scenario.judged[: len(outputs)]]
    if tokens[0].shape[1] > 1:
        losses = [
            F.cross_entropy(q[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
            for q, ids in zip(outputs, tokens, strict=True)
        ]
        found["perplexity"] = math.exp(float(torch.stack(losses).mean()))
    return found


# --- models ---


def as_logits(output: Tensor) -> dict[str, Tensor]:
    return {"logits": output}


class Logits(nn.Module):
    """A causal language model that takes tokens [batch, tokens] and returns logits [batch, tokens, vocabulary].

    There is no key-value cache: a decode step is the forward of one token, which leaves out what no peer changes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return found


def llama(width: int, layers: int, vocabulary: int) -> nn.Module:
    """A causal language model shaped like Llama, with heads of 64 features and random bfloat16 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


class Features(nn.Module):
    """A vision transformer: images [batch, 3, height, width] to logits [batch, 1000]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = self.model(pixel_values=pixel_values).logits
        return found


class Bank(nn.Module):
    """Equal Linears with weights of their own; x [rows, in_features] to as many outputs [rows, out_features].

    So many that in float32 they exceed the caches, as a model's layers do: one layer, called over and over, would not.
    """

    def __init__(self, out_features: int, in_features: int, megabytes: int = 128, most: int = 16) -> None:
        super().__init__()
        count = max(2, min(most, math.ceil(megabytes * 2**20 / (4 * out_features * in_features))))
        self.layers = nn.ModuleList(nn.Linear(in_features, out_features) for _ in range(count))
        self.register_buffer("like", torch.empty(0), persistent=False)  # follows the model's dtype, as weights may not

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x.to(self.like.dtype)
        return [layer(x) for layer in self.layers]  # each its own: what copies them together would be timed, too


def seeded(make: Callable[[], nn.Module]) -> Callable[[torch.dtype], nn.Module]:
    """A loader of a model with random weights, the same ones every time."""

    def load(dtype: torch.dtype) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make().eval().requires_grad_(False).to(dtype)

    return load


# --- workloads ---


def minilm(batch: int, tokens: int, judged: int = demo.JUDGED) -> Workload:
    corpus = demo.sentences()
    planning = corpus[judged : judged + CALIBRATION * max(batch, 8)]
    scenario = Scenario(
        f"batch {batch} x {tokens} tokens",
        demo.tokenize(planning, batch, tokens),
        demo.tokenize(corpus[:judged], batch, tokens),
        batch,
        "sentences",
    )

    def load(dtype: torch.dtype) -> nn.Module:
        return demo.load(dtype).requires_grad_(False)

    return Workload(f"minilm-{batch}x{tokens}", f"minilm-{batch}x{tokens}", torch.float32, load, [scenario], embeddings)


def language_model(quick: bool) -> Workload:
    """A byte-level Llama, trained here as for planners.py: the only weights here that mean something to a language."""
    import planners

    size = planners.QUICK if quick else replace(planners.FULL, steps=150)
    train, held_out = planners.corpus()

    @functools.cache
    def trained() -> Mapping[str, Any]:
        with torch.enable_grad():
            return {"model": planners.trained(size, train, 0)}

    def load(dtype: torch.dtype) -> nn.Module:
        return Logits(copy.deepcopy(trained()["model"])).eval().requires_grad_(False).to(dtype)

    def batches(tokens: Tensor, shape: tuple[int, int], count: int, seed: int) -> list[Input]:
        rows, width = shape
        found = planners.sequences(tokens, rows * count, seed)[:, :width]
        return [{"input_ids": part.contiguous()} for part in found.split(rows)]

    scenarios = [
        Scenario(
            name, batches(train, shape, CALIBRATION, 1), batches(held_out, shape, 4 if quick else 16, 2),
            shape[0] * shape[1], "tokens", weight,
        )
        for name, shape, weight in [("prefill 4 x 128", (4, 128), 1.0), ("decode 1", (1, 1), 128.0)]
    ]  # fmt: skip
    return Workload("language-model", "language-model", torch.float32, load, scenarios, perplexity, output=as_logits)


def decoder(quick: bool) -> Workload:
    """Shaped like Llama, with random weights: hidden 2048, 8 layers, vocabulary 32,000."""

    width, layers, vocabulary = (128, 1, 512) if quick else (2048, 8, 32_000)

    def make() -> nn.Module:
        return Logits(llama(width, layers, vocabulary))  # rounded to bfloat16, also where a peer wants float32

    def tokens(batch: int, length: int, seed: int, count: int) -> list[Input]:
        generator = torch.Generator().manual_seed(seed)
        return [{"input_ids": torch.randint(vocabulary, (batch, length), generator=generator)} for _ in range(count)]

    scenarios = [
        Scenario(
            name,
            tokens(batch, length, 1, CALIBRATION),
            tokens(batch, length, 2, judged),
            batch * length,
            "tokens",
            weight,
        )
        for name, batch, length, judged, weight in [
            ("decode 1", 1, 1, 32, 256.0),
            ("decode 8", 8, 1, 8, 32.0),
            ("prefill 256", 1, 32 if quick else 256, 2, 1.0),
        ]
    ]
    return Workload("decoder", "decoder", torch.bfloat16, seeded(make), scenarios, logits, together=3, output=as_logits)


def vit(quick: bool) -> Workload:
    """Shaped like ViT-B/16, with random weights, on images of noise."""

    def make() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(num_labels=1000)
        if quick:
            config = ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
                               image_size=32, num_labels=10)  # fmt: skip
        return Features(ViTForImageClassification(config))

    def images(seed: int, count: int) -> list[Input]:
        generator, side = torch.Generator().manual_seed(seed), 32 if quick else 224
        return [{"pixel_values": torch.randn(8, 3, side, side, generator=generator)} for _ in range(count)]

    scenario = Scenario("batch 8", images(1, CALIBRATION), images(2, 4), 8, "images")
    return Workload("vit", "vit", torch.float32, seeded(make), [scenario], relative_error, together=8)


def layer(out_features: int, in_features: int, rows: int) -> Workload:
    def inputs(seed: int, count: int) -> list[Input]:
        generator = torch.Generator().manual_seed(seed)
        return [{"x": torch.randn(rows, in_features, generator=generator)} for _ in range(count)]

    name = f"{out_features}x{in_features}, {rows} rows"
    bank = functools.partial(Bank, out_features, in_features)
    scenario = Scenario(name, inputs(1, CALIBRATION), inputs(2, 4), rows * len(bank().layers), "rows")
    return Workload(
        f"layer {name}", "layers", torch.float32, seeded(bank), [scenario], relative_error, output=torch.stack
    )


LAYERS = ((64, 64), (384, 384), (1536, 384), (384, 1536), (4096, 4096), (11008, 4096))  # as linear.py has them
SOME_LAYERS = ((1536, 384, 256), (4096, 4096, 1), (4096, 4096, 32))  # out_features, in_features, rows
TABLES = ("minilm-32x64", "minilm-1x16", "language-model", "decoder", "vit", "layers")


def of_table(table: str, full: bool, quick: bool) -> Iterator[Workload]:
    """The workloads of one table; `quick`: of a size that says nothing, in seconds."""
    if table == "minilm-32x64":
        yield minilm(2, 8, judged=12) if quick else minilm(32, 64)
    elif table == "minilm-1x16":
        yield minilm(1, 16, judged=12) if quick else minilm(1, 16)
    elif table == "language-model":
        yield language_model(quick)
    elif table == "decoder":
        yield decoder(quick)
    elif table == "vit":
        yield vit(quick)
    elif quick:
        yield layer(64, 64, 3)
    else:
        every = sorted({*SOME_LAYERS, *((*shape, rows) for shape in LAYERS for rows in (1, 256))})
        for size in every if full else SOME_LAYERS:
            yield layer(*size)

"""A whole decoder, shaped like Llama-3-8B with random bfloat16 weights: tokens per second, planned and not.

    python benchmarks/decode.py                              # decode at batch 1 and 32, and a prompt of 2,048 tokens
    python benchmarks/decode.py --scenarios decode-1         # one of them
    python benchmarks/decode.py --device cpu --small --mode eager    # does the script work?

For each scenario the model is recorded and planned, as a user would who runs just that. Then the bfloat16 model is
timed against each variant of it, pair by pair in interleaved rounds: one candidate wherever it can run, the plan, and
other libraries where they can be imported (what fails is a row with the reason). All are compiled with CUDA graphs. The
time is that of the forward alone: no sampling, no tokenizer. Random weights cannot tell what a plan does to a model's
output, so here the budget only keeps the choice honest. Prints a table; writes decode.csv into
benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from result_files import folder_of, measured_on, write_csv
from tabulate import tabulate
from torch import Tensor, nn

from autoplan import Plan, PlanCache, apply_plan, kernels, make_plan, record, timing
from autoplan.apply import Swap, stand_ins
from autoplan.cache import fingerprint
from autoplan.layers import PlannedLinear
from autoplan.records import COMPILED, EAGER

CANDIDATES = ("none", "int8_weight_only", "int8_dynamic", "fp8_weight_only", "fp8_dynamic", "int4_g128")
FIELDS = ("scenario", "variant", "ms", "tokens_per_s", "speedup", "low", "high", "weights_gib", "layers", "note")
_SECONDS = 20.0  # for one pair
_STEPS = 3  # recorded inputs: one each to score on, to validate on, and for the final figures

Row = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """The sizes of a decoder; by default Llama-3-8B's."""

    dim: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 14336
    vocabulary: int = 128256
    slots: int = 8192  # key-value pairs that the cache holds, over all sequences of a batch

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class Scenario:
    """One way to run the decoder: so many sequences, so many new tokens each, and how far back attention looks."""

    name: str
    batch: int
    tokens: int
    context: int


SCENARIOS = (
    Scenario("decode-1", 1, 1, 256),
    Scenario("decode-32", 32, 1, 256),
    Scenario("prefill-2048", 1, 2048, 2048),
)
SMALL = (Scenario("decode-1", 1, 1, 16), Scenario("decode-32", 4, 1, 16), Scenario("prefill-2048", 1, 32, 32))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and a static cache [kv_heads, slots, head_dim]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, kv = config, config.kv_heads * config.head_dim
        self.keys: Tensor
        self.values: Tensor
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv, bias=False)
        self.v_proj = nn.Linear(config.dim, kv, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(config.kv_heads, config.slots, config.head_dim), persistent=False)

    def forward(self, x: Tensor, rotation: Tensor, positions: Tensor, context: int) -> Tensor:
        batch, tokens, _ = x.shape
        heads, kv_heads, width = self.config.heads, self.config.kv_heads, self.config.head_dim
        q = rotated(self.q_proj(x).view(batch, tokens, heads, width), rotation)
        k = rotated(self.k_proj(x).view(batch, tokens, kv_heads, width), rotation)
        v = self.v_proj(x).view(batch, tokens, kv_heads, width)
        slots = (torch.arange(batch, device=x.device)[:, None] * context + positions).flatten()
        self.keys[:, slots] = k.permute(2, 0, 1, 3).flatten(1, 2)
        self.values[:, slots] = v.permute(2, 0, 1, 3).flatten(1, 2)
        if tokens > 1:  # a prompt, from the first token on
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
            ).transpose(1, 2)
        else:
            size = (kv_heads, batch, context, width)
            keys, values = (cache[:, : batch * context].view(size) for cache in (self.keys, self.values))
            q = q.view(batch, kv_heads, heads // kv_heads, width).transpose(0, 1)  # the heads that share keys
            scores = (q @ keys.transpose(2, 3)).float() / math.sqrt(width)
            seen = torch.arange(context, device=x.device) <= positions
            y = scores.masked_fill(~seen, -torch.inf).softmax(-1).to(x.dtype) @ values
            y = y.transpose(0, 1)
        out: Tensor = self.o_proj(y.reshape(batch, tokens, -1))
        return out


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864): x [batch, tokens, heads, width].

    rotation [2, tokens, 1, width / 2]: cosines and sines.
    """
    (cos, sin), (a, b) = rotation, x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(config.dim), nn.RMSNorm(config.dim)
        self.attention = Attention(config)
        self.gate_proj = nn.Linear(config.dim, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, positions: Tensor, context: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, positions, context)
        y = self.mlp_norm(x)
        out: Tensor = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return out


class Decoder(nn.Module):
    """Tokens [batch, tokens] and their positions [tokens] to the logits of the last one, [batch, vocabulary]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.lm_head = nn.Linear(config.dim, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, context: int) -> Tensor:
        x = self.embed(tokens)
        frequencies = 5e5 ** -(torch.arange(0, self.config.head_dim, 2, device=x.device) / self.config.head_dim)
        angles = positions[:, None] * frequencies
        rotation = torch.stack((angles.cos(), angles.sin()))[:, :, None]
        for block in self.blocks:
            x = block(x, rotation, positions, context)
        logits: Tensor = self.lm_head(self.norm(x[:, -1]))
        return logits

    @classmethod
    def random(cls, config: Config, device: str, seed: int) -> Decoder:
        """A decoder with random bfloat16 weights, made on the device."""
        with torch.device("meta"):
            model = cls(config)
        model = model.bfloat16().to_empty(device=device).eval().requires_grad_(False)
        generator = torch.Generator(device).manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(1.0)
        for buffer in model.buffers():
            buffer.zero_()
        return model


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny decoder, a fraction of a second for each pair")
    parser.add_argument("--mode", choices=[COMPILED, EAGER], default=COMPILED, help="compiled: with CUDA graphs")
    parser.add_argument("--scenarios", nargs="+", choices=[scenario.name for scenario in SCENARIOS])
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES)
    parser.add_argument("--budget", default="high")
    parser.add_argument("--layers", type=int, help="fewer blocks than 32")
    parser.add_argument("--planning-seconds", type=float, default=300.0, help="for one plan (default: %(default)s)")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/<device>)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here; --device cpu --small shows that the script works", file=sys.stderr)
        return 2
    began = time.monotonic()
    environment = fingerprint.environment(arguments.device, fingerprint.source_digest(kernels))
    print(f"{environment['device']}, torch {torch.__version__}, {arguments.mode}", flush=True)
    config = Config(64, 2, 4, 2, 128, 256, 64) if arguments.small else Config()
    if arguments.layers:
        config = Config(**{**vars(config), "layers": arguments.layers})
    if arguments.mode == COMPILED:  # every variant is one more of the same code
        torch._dynamo.config.recompile_limit = 256
    rows: list[Row] = []
    cache = PlanCache()
    with torch.no_grad():
        model = Decoder.random(config, arguments.device, arguments.seed)
        for scenario in SMALL if arguments.small else SCENARIOS:
            if scenario.name in (arguments.scenarios or [scenario.name]):
                for row in run(model, scenario, cache, arguments):
                    print(tabulate([row], tablefmt="plain"), file=sys.stderr, flush=True)
                    rows.append(row)
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    out = (arguments.out or folder_of(environment)) / "decode.csv"
    about = measured_on(environment, mode=arguments.mode, blocks=config.layers, budget=arguments.budget)
    write_csv(out, rows, about)
    print(f"{len(rows)} rows in {time.monotonic() - began:.0f} s; written to {out}")
    return 0


def run(model: Decoder, scenario: Scenario, cache: PlanCache, arguments: argparse.Namespace) -> Iterator[Row]:
    """Plan the scenario, then time every variant against the bfloat16 model."""
    plan = planned(model, scenario, cache, arguments)
    print(plan.report() if arguments.small else "\n".join(plan.report().splitlines()[-16:]), flush=True)
    inputs = inputs_of(model, scenario, arguments.seed)
    variants: dict[str, Callable[[], nn.Module]] = {
        f"uniform {name}": lambda name=name: uniform(model, plan, name)  # type: ignore[misc]
        for name in arguments.candidates
        if name != "none"
    }
    variants["autoplan"] = lambda: apply_plan(twin(model), plan, weights="skip")
    if not arguments.no_peers:
        variants |= {name: lambda make=make: make(copy.deepcopy(model)) for name, make in PEERS.items()}  # type: ignore[misc]
    plain = runner(model, arguments.mode)
    for name, make in variants.items():
        row: Row = {
            **dict.fromkeys(FIELDS, math.nan),
            "scenario": scenario.name,
            "variant": name,
            "layers": "",
            "note": "",
        }
        try:
            variant = make()
            row["layers"], row["weights_gib"] = listed(variant), weight_bytes(variant) / 2**30
            calls = {"bf16": lambda: plain(*inputs), name: bound(runner(variant, arguments.mode), inputs)}
            found = compared(calls, arguments)[name]
        except Exception as error:  # a library that is not here, or that cannot do this
            yield {**row, "note": f"failed: {type(error).__name__}: {error}".partition("\n")[0]}
            continue
        finally:
            variant = calls = None  # type: ignore[assignment]
            free()
        tokens = scenario.batch * scenario.tokens
        if name == next(iter(variants)):
            us, gib = found.baseline_us, weight_bytes(model) / 2**30
            yield {**row, "variant": "bf16", "layers": listed(model), "weights_gib": gib, "ms": us / 1e3,
                   "tokens_per_s": tokens * 1e6 / us, "speedup": 1.0, "low": 1.0, "high": 1.0}  # fmt: skip
        us = found.baseline_us * found.ratio
        row |= {"ms": us / 1e3, "tokens_per_s": tokens * 1e6 / us, "speedup": 1 / found.ratio, "note": found.note}
        yield row | {"low": 1 / found.ratio_high, "high": 1 / max(found.ratio_low, 1e-9)}


def inputs_of(model: Decoder, scenario: Scenario, seed: int, step: int = 0) -> tuple[Tensor, Tensor, int]:
    """Random tokens: a prompt, or the next token of sequences that are half as long as the context."""
    device = model.norm.weight.device
    generator = torch.Generator(device).manual_seed(seed + step)
    size = (scenario.batch, scenario.tokens)
    tokens = torch.randint(model.config.vocabulary, size, generator=generator, device=device)
    first = 0 if scenario.tokens > 1 else scenario.context // 2 + step
    return tokens, torch.arange(first, first + scenario.tokens, device=device), scenario.context


def planned(model: Decoder, scenario: Scenario, cache: PlanCache, arguments: argparse.Namespace) -> Plan:
    with record(model, seed=arguments.seed) as recording:
        for step in range(_STEPS):
            model(*inputs_of(model, scenario, arguments.seed, step))
    return make_plan(
        model,
        recording,
        candidates=arguments.candidates,
        budget=arguments.budget,
        cache=cache,
        compiled=arguments.mode == COMPILED,
        max_seconds=arguments.planning_seconds,
        seed=arguments.seed,
    )


def twin(model: nn.Module) -> nn.Module:
    """A copy with buffers of its own that shares the parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def uniform(model: nn.Module, plan: Plan, candidate: str) -> nn.Module:
    """The model with one candidate in every layer that can run it, on the kernels that planning found best for it."""
    changed = twin(model)
    for layer in plan.layers:
        program = next((option.program for option in layer.options if option.candidate == candidate), "")
        if program:
            Swap(changed, stand_ins(changed, (layer.name, *layer.aliases), candidate, program)).exchange()
    return changed


def runner(model: nn.Module, mode: str) -> Callable[..., object]:
    if mode == EAGER:
        return model
    compiled: Callable[..., object] = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    return compiled


def bound(run: Callable[..., object], inputs: tuple[Tensor, Tensor, int]) -> Callable[[], object]:
    return lambda: run(*inputs)


def compared(calls: Mapping[str, Callable[[], object]], arguments: argparse.Namespace) -> dict[str, timing.Timing]:
    for _ in range(3):  # compiles, records its CUDA graph, replays it
        for call in calls.values():
            call()
    return timing.compare(
        calls,
        baseline="bf16",
        max_seconds=0.2 if arguments.small else _SECONDS,
        min_batch_us=timing.BATCH_US[arguments.device],
        clock=timing.clock_of(arguments.device),
        seed=arguments.seed,
    )


def listed(model: nn.Module) -> str:
    """How many layers run which candidate."""
    counts = Counter(
        module.candidate if isinstance(module, PlannedLinear) else "none"
        for module in model.modules()
        if isinstance(module, nn.Linear | PlannedLinear)
    )
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def weight_bytes(model: nn.Module) -> int:
    held = sum(module.nbytes() for module in model.modules() if isinstance(module, PlannedLinear))
    return held + sum(parameter.nbytes for parameter in model.parameters())


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- other libraries -------------------------------------------------------------------------------------------------


def _torchao(config: str, **arguments: Any) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        quantization = importlib.import_module("torchao.quantization")
        given = {
            key: getattr(quantization, value)() if key == "granularity" else value for key, value in arguments.items()
        }
        quantization.quantize_(model, getattr(quantization, config)(**given))
        return model

    return make


PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao int8 weight only": _torchao("Int8WeightOnlyConfig"),
    "torchao int4 weight only": _torchao("Int4WeightOnlyConfig", group_size=128),
    "torchao int8 dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao fp8 row-wise": _torchao("Float8DynamicActivationFloat8WeightConfig", granularity="PerRow"),
}


if __name__ == "__main__":
    sys.exit(main())

"""A whole decoder, shaped like Llama-3-8B with random bfloat16 weights: tokens per second, planned and not.

    python benchmarks/decode.py                              # decode at batch 1 and 32, and a prompt of 2,048 tokens
    python benchmarks/decode.py --scenarios decode-1         # one of them
    python benchmarks/decode.py --device cpu --small --mode eager    # does the script work?

See workbench/whole.py for what is raced, and how. The time is that of the forward alone: no sampling, no tokenizer.
Prints a table; writes decode.csv into benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workbench import whole


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


# name: (sequences, new tokens of each, how far back attention looks)
SCENARIOS = {"decode-1": (1, 1, 256), "decode-32": (32, 1, 256), "prefill-2048": (1, 2048, 2048)}
SMALL = {"decode-1": (1, 1, 16), "decode-32": (4, 1, 16), "prefill-2048": (1, 32, 32)}


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
        return whole.randomized(model, device, seed)


def main(argv: Sequence[str] | None = None) -> int:
    return whole.main(argv, __doc__ or "", "decode", list(SCENARIOS), subject)


def subject(arguments: argparse.Namespace) -> whole.Subject:
    config = Config(64, 2, 4, 2, 128, 256, 64) if arguments.small else Config()
    config = replace(config, layers=arguments.layers or config.layers)
    scenarios = [
        whole.Scenario(
            name, batch * tokens, "tokens",
            functools.partial(inputs_of, config, arguments.device, batch, tokens, context, arguments.seed),
        )
        for name, (batch, tokens, context) in (SMALL if arguments.small else SCENARIOS).items()
    ]  # fmt: skip
    return whole.Subject(Decoder.random(config, arguments.device, arguments.seed), scenarios, {"blocks": config.layers})


def inputs_of(
    config: Config, device: str, batch: int, tokens: int, context: int, seed: int, step: int
) -> tuple[Tensor, Tensor, int]:
    """Random tokens: a prompt, or the next token of sequences that are half as long as the context."""
    generator = torch.Generator(device).manual_seed(seed + step)
    found = torch.randint(config.vocabulary, (batch, tokens), generator=generator, device=device)
    first = 0 if tokens > 1 else context // 2 + step
    return found, torch.arange(first, first + tokens, device=device), context


if __name__ == "__main__":
    sys.exit(main())

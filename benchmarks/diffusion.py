"""Blocks of a diffusion transformer with random bfloat16 weights: image tokens per second, planned and not.

    python benchmarks/diffusion.py                              # images of 1,024 and 512 pixels a side
    python benchmarks/diffusion.py --device cpu --small --mode eager    # does the script work?

The blocks are those of DiT (https://arxiv.org/abs/2212.09748), as wide as FLUX.1's: layer norms whose scale, shift and
gate one Linear makes of the time step (one row), attention and a feed-forward network over all tokens of an image.
See workbench/whole.py for what is raced, and how. Prints a table; writes diffusion.csv into
benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workbench import whole

PATCHES = {"1024-pixels": 4096, "512-pixels": 1024}  # by scenario: tokens of an image, 16 x 16 pixels each
SMALL = {"1024-pixels": 32, "512-pixels": 8}


@dataclass(frozen=True)
class Config:
    """The sizes of a transformer; by default FLUX.1's, but for fewer blocks."""

    dim: int = 3072
    layers: int = 6
    heads: int = 24


class Block(nn.Module):
    """A DiT block with adaptive layer norms: tokens [batch, tokens, dim], a condition [batch, dim]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, dim = config.heads, config.dim
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_b, scale_b, gate_b = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale_a) + shift_a).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + gate_a * self.proj(y.transpose(1, 2).flatten(-2))
        y = self.up(self.norm(x) * (1 + scale_b) + shift_b)
        out: Tensor = x + gate_b * self.down(F.gelu(y, approximate="tanh"))
        return out


class Blocks(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return x


def main(argv: Sequence[str] | None = None) -> int:
    return whole.main(argv, __doc__ or "", "diffusion", list(PATCHES), subject)


def subject(arguments: argparse.Namespace) -> whole.Subject:
    config = Config(64, 2, 2) if arguments.small else Config()
    config = replace(config, layers=arguments.layers or config.layers)
    with torch.device("meta"):
        model = Blocks(config)
    scenarios = [
        whole.Scenario(
            name, tokens, "image tokens", functools.partial(inputs_of, config, arguments.device, tokens, arguments.seed)
        )
        for name, tokens in (SMALL if arguments.small else PATCHES).items()
    ]
    return whole.Subject(
        whole.randomized(model, arguments.device, arguments.seed), scenarios, {"blocks": config.layers}
    )


def inputs_of(config: Config, device: str, tokens: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Noise: the tokens of one image, and its condition."""
    generator = torch.Generator(device).manual_seed(seed + step)
    draw = functools.partial(torch.randn, generator=generator, device=device, dtype=torch.bfloat16)
    return draw((1, tokens, config.dim)), draw((1, config.dim))


if __name__ == "__main__":
    sys.exit(main())

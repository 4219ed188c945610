"""The zoo: small models of every kind that people plan, with random weights that make their outputs worth comparing.

A new animal is one `Animal(...)` in `ZOO`; every check of `test_zoo.py` then covers it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

SAMPLES, TOKENS, VOCABULARY = 6, 12, 96  # of a batch, of a sample, of a language model
BATCHES = 3

_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Animal:
    """A kind of model, how it is called, and what is expected of its plan."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]  # new random inputs of SAMPLES samples, in a form that `autoplan` takes
    output: Callable[[Any], Tensor]  # the tensor that is judged, out of what forward returns
    logits: bool = False  # whether that is judged by KL divergence
    left_alone: Mapping[str, str] = field(default_factory=dict)  # name of a module -> words of the reason
    generate: Callable[[nn.Module], Tensor] | None = None
    has_linears: bool = True
    may_stay_float: bool = False  # with so few samples, the final split may refuse what the others allowed

    def make(self, seed: int = 0) -> nn.Module:
        """The model in eval mode. Matrices are drawn so large that layers pass on what they are given."""
        torch.manual_seed(seed)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
        return model

    def batches(self) -> list[Any]:
        """The same inputs at every call."""
        torch.manual_seed(1)
        return [self.batch() for _ in range(BATCHES)]


def call(model: nn.Module, batch: Any) -> Any:
    """The model on one batch, without gradients."""
    with torch.no_grad():
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple) else model(batch)


def tokens(length: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (SAMPLES, length))  # none of the special ones


def padded() -> dict[str, Tensor]:
    """Token ids with an attention mask that hides the end of the second sample."""
    mask = torch.ones(SAMPLES, TOKENS, dtype=torch.long)
    mask[1, TOKENS - 4 :] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def _continued(model: Any) -> Tensor:
    torch.manual_seed(2)
    generated: Tensor = model.generate(
        input_ids=tokens(5),
        attention_mask=torch.ones(SAMPLES, 5, dtype=torch.long),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
    )
    return generated


def _transcribed(model: Any) -> Tensor:
    torch.manual_seed(2)
    generated: Tensor = model.generate(
        input_features=torch.randn(SAMPLES, 16, 32), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    return generated


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_GROUPED))


def _mistral() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_GROUPED, sliding_window=8))


def _qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        **_GROUPED, num_experts=4, moe_intermediate_size=48, shared_expert_intermediate_size=64, num_experts_per_tok=2
    )
    return transformers.Qwen2MoeForCausalLM(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0,
        eos_token_id=1, pad_token_id=2, max_position_embeddings=32, word_embed_proj_dim=48,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def _bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**_TEXT, max_position_embeddings=32))


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=2,
        eos_token_id=1, pad_token_id=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**_VISION, num_labels=7))


def _clip() -> nn.Module:
    config = transformers.CLIPConfig(
        text_config={**_TEXT, "max_position_embeddings": 32, "projection_dim": 32},
        vision_config={**_VISION, "projection_dim": 32},
        projection_dim=32,
    )
    return transformers.CLIPModel(config)


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=16, max_source_positions=16,
        max_target_positions=32, bos_token_id=0, eos_token_id=1, pad_token_id=2, decoder_start_token_id=0,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


class ListOutput(nn.Module):
    """Gives a list: whole numbers first, which nobody can judge, then the features of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(64, 96), nn.ModuleList(nn.Linear(96, 32) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.body(x).relu()
        return [hidden.argmax(-1), *(head(hidden) for head in self.heads)]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 10))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(64, 32))


def _convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Unflatten(1, (8, 10)))


def _logits(result: Any) -> Tensor:
    logits: Tensor = result.logits
    return logits


def _pixels() -> Tensor:
    return torch.randn(SAMPLES, 3, 16, 16)


def _whole(result: Tensor) -> Tensor:
    return result


_FUSED = "fused kernel"

ZOO = [
    Animal("llama", _llama, padded, _logits, logits=True, generate=_continued),
    Animal("mistral", _mistral, padded, _logits, logits=True, generate=_continued),
    Animal(
        "qwen2_moe", _qwen2_moe, padded, _logits, logits=True, generate=_continued,
        left_alone={"model.layers.1.mlp.experts": "one parameter [4, "},
    ),
    Animal(
        "gpt2", _gpt2, padded, _logits, logits=True, generate=_continued,
        left_alone={"transformer.h.0.attn.c_attn": "Conv1D", "transformer.h.1.mlp.c_proj": "Conv1D"},
    ),
    Animal(
        "opt", _opt, padded, _logits, logits=True, generate=_continued,
        left_alone={"lm_head": "tied to model.decoder.embed_tokens.weight"},
    ),
    Animal("bert", _bert, padded, lambda result: result.last_hidden_state),
    Animal("t5", _t5, lambda: {**padded(), "decoder_input_ids": tokens(7)}, _logits, logits=True, generate=_continued),
    Animal("vit", _vit, _pixels, _logits, logits=True),
    Animal(
        "clip", _clip, lambda: {**padded(), "pixel_values": _pixels()}, lambda result: result.logits_per_image,
        may_stay_float=True,
    ),
    Animal(
        "whisper", _whisper, lambda: {"input_features": torch.randn(SAMPLES, 16, 32), "decoder_input_ids": tokens(7)},
        _logits, logits=True, generate=_transcribed, left_alone={"proj_out": "tied to model.decoder.embed_tokens"},
    ),
    Animal(
        "encoder", _encoder, lambda: (torch.randn(SAMPLES, TOKENS, 64),), _whole,
        left_alone={
            "0.layers.0.linear1": _FUSED, "0.layers.1.linear2": _FUSED,
            "0.layers.0.self_attn.out_proj": "NonDynamicallyQuantizableLinear",
        },
    ),
    Animal("mlp", _mlp, lambda: torch.randn(SAMPLES, 64), _whole),
    Animal("list_output", ListOutput, lambda: {"x": torch.randn(SAMPLES, 5, 64)}, lambda result: result[1]),
    Animal("no_linear", _convolutions, lambda: torch.randn(SAMPLES, 3, 12), _whole, has_linears=False),
]  # fmt: skip

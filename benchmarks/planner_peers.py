"""For planners.py: the formats that planners choose from, and the planners of other libraries, each optional.

What a peer prints is swallowed; what it raises is the caller's to report. See requirements-planners.txt.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from autoplan.candidates import Candidate

BYTES = 3  # a byte's token is the byte plus 3, as in transformers' ByT5Tokenizer
FLOAT_BITS = 16.0

Plan = Mapping[str, str]  # layer -> format, or "none"
Plans = Mapping[float, Plan]  # by budget, in effective bits per weight
Score = Mapping[tuple[str, str], float]  # (layer, format) -> predicted harm


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


modelopt: Any = None
try:
    with quietly():
        import modelopt.torch.quantization as modelopt
        from modelopt.torch.quantization.config import QuantizerAttributeConfig
        from modelopt.torch.quantization.nn import TensorQuantizer
except Exception as error:  # for whatever reason: it is what its rows will say
    _no_modelopt = f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Format:
    """A numeric format in ModelOpt's terms, and as AutoRound has it; `rows` is for activations."""

    bits: float  # of a weight, scales not counted: ModelOpt's cost
    weight: Mapping[str, Any]
    rows: Mapping[str, Any] | None = None
    autoround: Mapping[str, Any] | None = None

    def modelopt(self) -> dict[str, Any]:
        rows = {"enable": False} if self.rows is None else {"cfg": dict(self.rows)}
        quantizers = [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": dict(self.weight)},
            {"quantizer_name": "*input_quantizer"} | rows,
        ]
        return {"quant_cfg": quantizers, "algorithm": "max"}


def _integer(bits: int, block: int | None) -> Format:
    scales = {"axis": 0} if block is None else {"block_sizes": {-1: block, "type": "static"}}
    autoround = {"bits": bits, "group_size": block or -1, "sym": True, "data_type": "int", "act_bits": 16}
    return Format(bits, {"num_bits": bits, **scales}, autoround=autoround)


_FP8_PER_TOKEN = {"num_bits": (4, 3), "axis": None, "type": "dynamic", "block_sizes": {-1: None}}
FORMATS = {
    "int3_b16": _integer(3, 16),
    "int4_b16": _integer(4, 16),
    "int6_b16": _integer(6, 16),
    "int8": _integer(8, None),
    "fp8": Format(8, {"num_bits": (4, 3), "axis": 0}, _FP8_PER_TOKEN),
}


def bits_of(name: str) -> float:
    return FORMATS[name].bits if name in FORMATS else FLOAT_BITS


def quantizer(config: Mapping[str, Any] | None) -> Callable[[Tensor], Tensor]:
    """Rounding to a format and back: ModelOpt's own quantizer, or the same in plain torch where it is not installed."""
    if config is None:
        return lambda x: x
    if modelopt:
        attributes = QuantizerAttributeConfig(**config)
        return lambda x: TensorQuantizer(attributes)(x)  # a new one each time: it keeps the first shape that it sees
    bits, block = config["num_bits"], (config.get("block_sizes") or {}).get(-1)

    def rounded(x: Tensor) -> Tensor:
        blocks = x.reshape(-1, block) if block else x
        most = 448.0 if bits == (4, 3) else 2.0 ** (bits - 1) - 1
        scale = most / blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12)
        q = blocks * scale
        q = q.to(torch.float8_e4m3fn).to(x.dtype) if bits == (4, 3) else q.round()
        return (q / scale).reshape(x.shape)

    return rounded


class FakeQuantized(Candidate):
    """A format as a candidate of autoplan, so that its scoring and its layers take it like any other."""

    tensors = ("weight",)

    def __init__(self, name: str, format: Format) -> None:
        self.name = name
        self._weight, self._rows = quantizer(format.weight), quantizer(format.rows)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": self._weight(weight).contiguous()}

    def linear(self, x: Tensor, canonical: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return F.linear(self._rows(x), canonical["weight"], bias)


def modelopt_plans(
    method: str, model: nn.Module, batches: Sequence[Tensor], loss: Any, budgets: Sequence[float], seed: int
) -> tuple[Plans, Score]:
    """mtq.auto_quantize, asked as its documentation shows: its plans, and its scores (a group's with its first layer).

    It scores once, into a checkpoint, and solves each budget in a call of its own.
    """
    if modelopt is None:
        raise RuntimeError(_no_modelopt)
    plans: dict[float, Plan] = {}
    with tempfile.TemporaryDirectory() as folder, quietly(), torch.enable_grad():
        for budget in budgets:
            torch.manual_seed(seed)
            _, state = modelopt.auto_quantize(
                copy.deepcopy(model).requires_grad_(True),
                constraints={"effective_bits": budget},
                quantization_formats=[format.modelopt() for format in FORMATS.values()],
                data_loader=batches,
                forward_step=lambda model, batch: model(input_ids=batch).logits,
                loss_func=loss if method == "gradient" else None,
                num_calib_steps=len(batches),
                num_score_steps=len(batches),
                method=method,
                checkpoint=f"{folder}/state.pt",
            )
            found, stats = state["best"]["recipe"], state["candidate_stats"]
            plans[budget] = {n: _format(recipe) for key, recipe in found.items() for n in stats[key]["module_names"]}
    score = {
        (of_group["module_names"][0], _format(recipe)): value
        for of_group in stats.values()
        for recipe, value in zip(of_group["formats"], of_group["scores"], strict=True)
    }
    return plans, score


def _format(recipe: object) -> str:
    """ModelOpt calls formats that are not its presets by their place in the list it was given."""
    place = re.match(r"CUSTOM_(\d+)", str(recipe))
    return list(FORMATS)[int(place[1])] if place else "none"


def autoround_plans(
    model: nn.Module, groups: Sequence[Sequence[str]], tokens: Tensor, budgets: Sequence[float]
) -> Plans:
    """AutoScheme with its own quantizers, scores and solver, of the formats that it has; its cache is not kept."""
    with quietly():
        from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
        from auto_round.schemes import QuantizationScheme

    own = {name: format.autoround for name, format in FORMATS.items() if format.autoround}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, AR_AUTO_SCHEME_CACHE=folder),
        quietly(),
        torch.enable_grad(),
    ):
        texts = [bytes((sequence - BYTES).tolist()).decode("latin-1") for sequence in tokens]
        Path(folder, "tokens.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        scheme = AutoScheme(
            avg_bits=list(budgets),
            options=[*(QuantizationScheme(**fields) for fields in own.values()), "BF16"],
            shared_layers=[group for group in groups if len(group) > 1],
            ignore_scale_zp_bits=True,
            nsamples=len(texts),
            seqlen=tokens.shape[1],
            batch_size=4,
            low_gpu_mem_usage=False,
            low_cpu_mem_usage=False,
        )
        names = [name for group in groups for name in group]
        made: Any = GenScheme(
            scheme, copy.deepcopy(model), names, {}, f"{folder}/tokens.jsonl", "cpu", transformers.ByT5Tokenizer()
        ).get_layer_config()
    by_fields = {(fields["bits"], fields["group_size"]): name for name, fields in own.items()}
    return {
        budget: {n: by_fields.get((made[budget][n]["bits"], made[budget][n]["group_size"]), "none") for n in names}
        for budget in budgets
    }

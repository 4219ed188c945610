"""Predicted harm against what it predicts: gradients against enumeration, scores against running the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoplan import fisher as gradients_room
from autoplan import record, sensitivity
from autoplan.apply import Swap
from autoplan.cache.store import PlanCache
from autoplan.candidates import find_candidate
from autoplan.divergence import Reference, compare, references, undisturbed
from autoplan.errors import AutoplanError
from autoplan.fisher import Changes, GradientError, by_unit, gradients, units
from autoplan.recorder import ModelInput
from autoplan.records import LayerPlan, LayerProfile, Option
from autoplan.request import device_of
from autoplan.sensitivity import Subject, Trial, measure, size_of

CANDIDATES = ("int4_g32", "int8_dynamic", "int8_weight_only")


def draw(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Attention and a gated network, pre-norm, on a residual stream [batch, tokens, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = self.qkv(self.n1(x)).chunk(3, dim=-1)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=causal))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Transformer(nn.Module):
    """Gives logits per token, logits per sample, features per token, or features per sample."""

    def __init__(self, gives: str, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.gives = gives
        self.into = nn.Linear(32, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 50)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        h = self.into(x)
        for block in self.blocks:
            h = block(h, causal=self.gives == "token logits")
        h = self.norm(h)
        if self.gives == "sample features":
            return F.normalize(self.head(h).mean(dim=1), dim=-1)
        return h if self.gives == "token features" else {"logits": self.head(h if "token" in self.gives else h[:, 0])}


class Changed(nn.Module):
    """A Linear whose output is off by a fixed linear map of its input."""

    def __init__(self, linear: nn.Linear, off: Tensor) -> None:
        super().__init__()
        self.linear, self.off = linear, off

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.linear(x, self.linear.weight + self.off, self.linear.bias)
        return y


@contextmanager
def subject(model: nn.Module, *batches: Any, scored: int | None = None, **arguments: Any) -> Iterator[Subject]:
    """The model recorded on all batches, to be judged on the first `scored`."""
    with record(model) as recording, undisturbed(model):
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    with undisturbed(model):
        against = references(model, recording.inputs[:scored], arguments.get("output"))
        yield Subject(model, recording, against, **arguments)


def program(profile: LayerProfile, candidate: str) -> str:
    kernels, _ = find_candidate(candidate).usable_kernels(profile, device_of(profile))
    return f"1:{kernels[-1].name}"


def trials_of(judged: Subject, candidates: Sequence[str] = CANDIDATES) -> list[Trial]:
    return [Trial(p, name, program(p, name)) for p in judged.recording.profiles() for name in candidates]


def harms(strategy: str, judged: Subject, candidates: Sequence[str] = CANDIDATES) -> dict[tuple[str, str], float]:
    trials = trials_of(judged, candidates)
    found = sensitivity.STRATEGIES[strategy](judged, trials, lambda done: True)
    return {(score.layer, score.candidate): score.harm for scores in found for score in scores}


def measured(
    judged: Subject, candidates: Sequence[str] = CANDIDATES, cache: PlanCache | None = None, **arguments: Any
) -> Any:
    prints = {name: {} for name in ("model", "data", "environment", "planner")}
    options = {"output": None, "loss": None, "candidates": {name: name for name in candidates}}
    layers = [
        LayerPlan(p.name, p.aliases, p.in_features, p.out_features, p.has_bias, p.dtype, p.calls, 1.0, "none", "",
                  (Option("none"), *(Option(name, program(p, name)) for name in candidates)))
        for p in judged.recording.profiles()
    ]  # fmt: skip
    return measure(layers, judged.recording.profiles(), judged, prints | {"options": options}, cache, **arguments)


def test_the_bytes_of_what_was_tried_are_kept() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 48))
    with subject(model, torch.randn(8, 64)) as judged:
        measured(judged)
        for trial in trials_of(judged):
            size = size_of(trial.profile, trial.candidate, trial.program)
            assert judged.nbytes[size] == trial.made(model)[trial.profile.name].nbytes()


def ranks(values: Sequence[float]) -> Any:
    return np.argsort(np.argsort(values))


def agree(found: dict[Any, float], true: dict[Any, float]) -> tuple[float, float]:
    """Spearman's rank correlation of two sets of scores, and the ratio of their sums, true / found."""
    pairs = [pair for pair in found if math.isfinite(found[pair])]
    ours, theirs = [found[pair] for pair in pairs], [true[pair] for pair in pairs]
    return float(np.corrcoef(ranks(ours), ranks(theirs))[0, 1]), sum(theirs) / sum(ours)


# Gradients, against enumeration.


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = nn.Linear(7, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": 3 * self.b(torch.tanh(self.a(x)))}


def test_the_harm_is_the_second_order_kl_and_near_the_true_one_for_small_changes() -> None:
    model, x = Classifier(), draw(6, 7)
    off = draw(9, 7, seed=2) * 0.02
    with subject(model, x) as judged:
        passes = range(1000)
        calls = gradients(model, {"a": "a"}, judged.against, None, None, passes, 0)
        found = Changes(model, calls["a"]).squares({"a": Changed(model.a, off)})
        sampled = sum(float(value.sum()) for value in found.values()) / len(passes) / 6
        with Swap(model, {"a": Changed(model.a, off)}):
            true = compare(model, judged.against, None).divergence()

        def logits(y: Tensor) -> Tensor:
            out: Tensor = 3 * model.b(torch.tanh(y))
            return out

        exact = 0.0  # the Fisher information by its definition, label by label, in float64
        model.double()
        for row in x.double():
            with torch.enable_grad():
                y = model.a(row)
                jacobian = torch.autograd.functional.jacobian(lambda y: torch.log_softmax(logits(y), -1), y)
            p, change = torch.softmax(logits(y), -1), off.double() @ row
            exact += float((p * (jacobian @ change).square()).sum()) / 2 / 6
    assert sampled == pytest.approx(exact, rel=0.06)
    assert true == pytest.approx(exact, rel=0.05)


def test_the_harm_of_other_outputs_is_their_relative_squared_error() -> None:
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 11)).requires_grad_(False)
    off = draw(9, 7, seed=2) * 1e-3
    with subject(model, draw(6, 7)) as judged:
        passes = range(1000)
        calls = gradients(model, {"0": "0"}, judged.against, None, None, passes, 0)
        found = Changes(model, calls["0"]).squares({"0": Changed(model[0], off)})
        sampled = sum(float(v.sum()) for v in found.values()) / len(passes) / judged.against[0].output.square().sum()
        with Swap(model, {"0": Changed(model[0], off)}):
            true = compare(model, judged.against, None).divergence()
    assert float(sampled) == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize(
    ("rows", "output", "kind", "sums"),
    [
        ((2, 3), (2, 3), "block", [6, 15]),
        ((6,), (2, 3), "block", [6, 15]),  # flattened
        ((2, 3), (2,), "sample", [6, 15]),
        ((6,), (2,), "sample", [6, 15]),
        ((3, 2), (2,), "sample", [9, 12]),  # tokens first
        ((2, 3), (2, 7), "sample", [6, 15]),  # an encoder's tokens, under a decoder's
        ((2, 1, 3), (2, 7), "sample", [6, 15]),
        ((6,), (5,), "row", [1, 2, 3, 4, 5, 6]),  # gathered
        ((6,), (2, 4), "row", [1, 2, 3, 4, 5, 6]),
        ((6,), (), "sample", [21]),
        ((6,), (1,), "sample", [21]),
    ],
)
def test_what_is_summed_before_it_is_squared_is_the_unit_of_the_output(
    rows: tuple[int, ...], output: tuple[int, ...], kind: str, sums: list[float]
) -> None:
    dots = torch.arange(1.0, 7.0).reshape(1, *rows)
    found, units = by_unit(torch.cat((dots, 2 * dots)), output)
    assert found == kind
    assert units.tolist() == [sums, [2 * value for value in sums]]


def test_tokens_are_summed_by_blocks_of_their_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients_room, "_BLOCK", 2)
    kind, found = by_unit(torch.arange(1.0, 7.0).reshape(1, 2, 3), (2, 3))
    assert (kind, found.tolist()) == ("block", [[1 + 2, 3, 4 + 5, 6]])
    for shape, blocks in {(2, 3, 7): 4, (5, 7): 5, (7,): 1, (2, 2, 3, 7): 6}.items():
        assert units(Reference(ModelInput("", (), {}), torch.zeros(shape), None, True)) == blocks


# Scores, against running the model.


@pytest.mark.parametrize("gives", ["token logits", "sample logits", "token features", "sample features"])
def test_fisher_ranks_and_scales_like_the_sweep(gives: str) -> None:
    with subject(Transformer(gives), draw(24, 13, 32)) as judged:
        rank, ratio = agree(harms("fisher", judged), harms("kl", judged))
    assert rank >= 0.95
    assert 0.8 <= ratio <= 1.25


@pytest.mark.parametrize("gives", ["token logits", "sample features"])
def test_the_sum_of_scores_predicts_random_plans_on_held_out_inputs(gives: str) -> None:
    model = Transformer(gives)
    with subject(model, draw(24, 13, 32), draw(24, 13, 32, seed=2), scored=1) as judged:
        scores, made = harms("fisher", judged), {trial.pair: trial.made(model) for trial in trials_of(judged)}
        held_out = references(model, judged.recording.inputs[1:], None)
        predicted, true = [], []
        for seed in range(30):
            pick = np.random.default_rng(seed)
            names = list(dict.fromkeys(layer for layer, _ in scores))
            shares = pick.dirichlet([1.0, 0.3, 1.0, 1.0])
            plan = [(name, (*CANDIDATES, "none")[pick.choice(4, p=shares[[1, 0, 2, 3]])]) for name in names]
            plan = [pair for pair in plan if pair in scores]
            with Swap(model, {name: module for pair in plan for name, module in made[pair].items()}):
                true.append(compare(model, held_out, None).divergence())
            predicted.append(sum(scores[pair] for pair in plan))
    assert np.corrcoef(ranks(predicted), ranks(true))[0, 1] >= 0.97
    ratios = [t / p for t, p in zip(true, predicted, strict=True) if p]
    assert 0.75 <= np.quantile(ratios, 0.1) <= np.quantile(ratios, 0.9) <= 1.5


def test_masked_tokens_do_not_count() -> None:
    mask = torch.ones(24, 13, dtype=torch.int64)
    mask[:, 5:] = 0
    x = draw(24, 13, 32)
    with subject(Transformer("token logits"), {"x": x, "attention_mask": mask}) as judged:
        found, true = harms("fisher", judged), harms("kl", judged)
    x[:, 5:] += 7  # a causal model does not see these from where it counts
    with subject(Transformer("token logits"), {"x": x, "attention_mask": mask}) as judged:
        again = harms("fisher", judged, ["int8_weight_only"])
    rank, ratio = agree(found, true)
    assert rank >= 0.95
    assert 0.8 <= ratio <= 1.25
    assert again == pytest.approx({pair: harm for pair, harm in found.items() if pair in again}, rel=0.3)


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_half_precision_scores_like_float32(how: str) -> None:
    """The sweep does not: rounding elsewhere, which any change sets off, is its floor for the least harmful."""
    model, x = Transformer("token logits"), draw(24, 13, 32)
    with subject(model, x) as judged:
        expected = harms("fisher", judged)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16), record(model) as recording, undisturbed(model):
            model(x)
        with undisturbed(model):
            found = harms("fisher", Subject(model, recording, references(model, recording.inputs, None)))
    else:
        dtype = getattr(torch, how)
        with subject(model.to(dtype), x.to(dtype)) as judged:
            found = harms("fisher", judged)
    rank, ratio = agree(found, expected)
    assert rank >= 0.97
    assert 0.8 <= ratio <= 1.25


class Twice(nn.Module):
    """One layer called twice in a forward on equal inputs, once by another name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.f, self.head = nn.Linear(64, 64), nn.Linear(64, 64)
        self.g = nn.Linear(64, 64)
        self.g.weight, self.g.bias = self.f.weight, self.f.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.f(x) + self.g(x))
        return y


def test_calls_of_one_weight_add_up_before_they_are_squared() -> None:
    with subject(Twice(), draw(64, 5, 64)) as judged:
        found, true = harms("fisher", judged), harms("kl", judged)
    assert len(found) == 2 * len(CANDIDATES)
    for pair in found:
        assert found[pair] == pytest.approx(true[pair], rel=0.25)  # apart they would be half of it


def test_large_batches_go_backward_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = Transformer("sample features"), []
    with subject(model, draw(24, 13, 32)) as judged:
        whole = harms("fisher", judged, ["int8_weight_only"])
        monkeypatch.setattr(sensitivity, "_ROWS_PER_BACKWARD", 100)
        handle = model.into.register_forward_hook(lambda _, args, y: sizes.append(len(y)) if y.requires_grad else None)
        parts = harms("fisher", judged, ["int8_weight_only"])
        handle.remove()
    assert set(sizes) == {6}
    rank, ratio = agree(parts, whole)
    assert rank >= 0.95
    assert 0.8 <= ratio <= 1.25


def test_more_passes_are_made_while_the_scores_are_not_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[range] = []

    def spy(*arguments: Any) -> Any:
        made.append(arguments[5])
        return gradients(*arguments)

    monkeypatch.setattr(sensitivity, "gradients", spy)
    with subject(Transformer("token logits"), draw(48, 26, 32)) as judged:
        harms("fisher", judged, ["int8_weight_only"])
    assert made == [range(11)]  # 48 samples of 26 tokens, a block each: 512 are wanted
    made.clear()
    with subject(Classifier(), draw(1, 7)) as judged:
        harms("fisher", judged, ["int8_weight_only"])
    assert made == [range(16)]  # one sample: all that are allowed
    made.clear()
    monkeypatch.setattr(sensitivity, "_FIRST_SAMPLES", 1)
    with subject(Transformer("sample features"), draw(4, 13, 32)) as judged:
        harms("fisher", judged, ["int8_weight_only"])
    assert made[0] == range(1)
    assert made[1].start == 1
    assert 1 < made[1].stop <= 16


# No trace.


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_leave_no_trace(fails: bool) -> None:
    model = Transformer("token logits")
    model.into.weight.requires_grad_(False)
    model.register_buffer("seen", torch.zeros(()))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    held, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    with subject(model, draw(4, 5, 32)) as judged:
        torch.manual_seed(4)
        before = torch.random.get_rng_state()
        if fails:
            with pytest.raises(GradientError, match="ZeroDivisionError"):
                gradients(model, {"head": "head"}, judged.against, lambda y: 1 / 0, None, range(1), 0)
        else:
            harms("fisher", judged, ["int8_weight_only"])
        assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p is held[name] for name, p in model.named_parameters())
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_scores_are_seeded() -> None:
    def run(seed: int) -> dict[tuple[str, str], float]:
        with subject(Transformer("token logits"), draw(8, 13, 32), seed=seed) as judged:
            return harms("fisher", judged, ["int8_weight_only"])

    assert run(1) == run(1) != run(2)


def test_under_inference_mode_too() -> None:
    model = Transformer("token logits")
    with torch.inference_mode(), subject(model, draw(8, 13, 32)) as judged:
        inside = harms("fisher", judged, ["int8_weight_only"])
    with subject(Transformer("token logits"), draw(8, 13, 32)) as judged:
        assert harms("fisher", judged, ["int8_weight_only"]) == inside


# Where there is no gradient.


class Odd(nn.Module):
    """Does with the first layer's output, of 64 features, what a test says."""

    def __init__(self, does: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.does = does

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.does(self.a(x)))
        return y


class Unpassable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Any:
        raise NotImplementedError("no backward\nat all")


def written_over(x: Tensor) -> Tensor:
    y = x.exp()
    y += 1
    return y


def at_zero(x: Tensor) -> Tensor:
    return torch.sqrt(x * 0)


@pytest.mark.parametrize(
    ("does", "why"),
    [
        (lambda x: x.detach(), "no gradient reaches layer 'a', but the output depends on it"),
        (torch.round, "no gradient reaches layer 'a'"),
        (Unpassable.apply, r"its backward pass failed \(NotImplementedError: no backward\)"),
        (written_over, r"its backward pass failed \(RuntimeError: .*inplace"),
        (at_zero, "the gradient at layer 'a' is not finite"),
        (torch.no_grad()(lambda x: x + 0), "no gradient reaches layer 'a'"),
    ],
)
def test_without_a_gradient_every_score_is_measured_and_a_note_says_why(
    does: Callable[[Tensor], Tensor], why: str
) -> None:
    import re

    with subject(Odd(does), 3 * draw(24, 64)) as judged:
        scores, notes = measured(judged)
        expected = harms("kl", judged)
    assert {pair: score.harm for pair, score in scores.items()} == expected
    assert len(notes) == 1
    assert re.search(rf"one candidate at a time \(kl\), not predicted from gradients: {why}", notes[0])


def test_a_layer_run_without_gradients_is_noticed() -> None:
    class Frozen(Odd):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.a(x)
            return self.b(y)  # type: ignore[no-any-return]

    with subject(Frozen(torch.relu), draw(24, 64)) as judged:
        _, notes = measured(judged)
    assert "layer 'a' runs under torch.no_grad()" in notes[0]


def test_a_layer_that_does_not_reach_the_output_does_no_harm() -> None:
    class Two(Odd):
        def forward(self, x: Tensor) -> Any:
            return self.a(x), self.b(x)

    for taken, other, index in (("a", "b", 0), ("b", "a", 1)):
        with subject(Two(torch.relu), draw(24, 64), output=lambda pair, i=index: pair[i]) as judged:
            scores, notes = measured(judged)
        assert all((score.harm == 0) == (layer == other) for (layer, _), score in scores.items()), taken
        assert "fisher" in notes[0]


def test_in_place_operations_that_autograd_bears_are_no_problem() -> None:
    with subject(Odd(lambda x: x.add_(1).relu_()), draw(24, 64)) as judged:
        rank, ratio = agree(harms("fisher", judged), harms("kl", judged))
    assert rank >= 0.8
    assert 0.7 <= ratio <= 1.4


# Layers without rows, the audit, a loss of the user's, the cache.


class Experts(nn.Module):
    """Each row goes to the expert that its first feature names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = x[:, :, 0].round().clamp(0, 2) == i
            y[rows] = expert(x[rows])
        out: Tensor = self.head(y)
        return out


def test_an_expert_without_rows_gets_the_mean_of_its_kind_and_a_note() -> None:
    x, rest = draw(24, 5, 64), draw(24, 5, 64, seed=2)
    x[:, :, 0], rest[:, :, 0] = torch.arange(5) % 2, 2.0
    cache = PlanCache()
    with subject(Experts(), x, rest, scored=1) as judged:
        true = harms("kl", judged)
        for _ in range(2):
            scores, notes = measured(judged, limit=1e-9, cache=cache)
            assert notes == [
                "the scoring inputs gave these layers no rows, so their harm is the mean of their kind: experts.2"
            ]
            for candidate in CANDIDATES:
                assert true["experts.2", candidate] == 0
                seen = [scores[f"experts.{i}", candidate].harm for i in (0, 1)]
                assert scores["experts.2", candidate].harm == pytest.approx(sum(seen) / 2)
                for i in (0, 1):
                    assert seen[i] == pytest.approx(true[f"experts.{i}", candidate], rel=0.4)
    assert len(cache.keys("sensitivities")) == 3 * len(CANDIDATES)  # what is assumed is not known


def test_the_most_harmful_choices_inside_the_budget_are_measured() -> None:
    with subject(Transformer("token logits"), draw(24, 13, 32)) as judged:
        predicted, true = harms("fisher", judged), harms("kl", judged)
        limit = sorted(predicted.values())[-10]
        scores, notes = measured(judged, limit=limit)
    worst = sorted((pair for pair in predicted if predicted[pair] <= limit), key=lambda pair: -predicted[pair])[:3]
    for pair, score in scores.items():
        assert score.harm == (true if pair in worst else predicted)[pair]
    assert len(notes) == 1
    ratio = sum(true[pair] for pair in worst) / sum(predicted[pair] for pair in worst)
    assert notes[0].endswith(f"the 3 most harmful choices inside the budget measured {ratio:.2f} times as much")


def test_a_loss_of_the_users_is_scaled_by_the_audit() -> None:
    labels = torch.randint(0, 50, (24, 13), generator=torch.Generator().manual_seed(1))

    def loss(result: Any) -> Tensor:
        return 30 * F.cross_entropy(result["logits"].flatten(0, 1), labels.flatten())

    with subject(Transformer("token logits"), draw(24, 13, 32), loss=loss) as judged:
        scores, notes = measured(judged)
        true = harms("kl", judged)
    assert notes[0].endswith("times as much, and so all were scaled")
    rank, ratio = agree({pair: score.harm for pair, score in scores.items()}, true)
    assert rank >= 0.9
    assert 0.5 <= ratio <= 2


@pytest.mark.parametrize(
    "wrong", [lambda result: 3.0, lambda result: result["logits"], lambda result: torch.ones(1).long()]
)
def test_a_loss_that_is_no_number_is_refused(wrong: Any) -> None:
    refused = pytest.raises(AutoplanError, match="loss= must return one floating number as a tensor")
    with subject(Classifier(), draw(6, 7), loss=wrong) as judged, refused:
        measured(judged, ["int8_weight_only"])


def test_what_was_scored_before_the_end_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "_HELD_BYTES", 1)  # each layer its own group
    seen: list[str] = []
    interrupted = [True]

    def spy(model: nn.Module, names: Any, *rest: Any) -> Any:
        seen.extend(names)
        if interrupted and "blocks.0.up" in names:
            interrupted.clear()
            raise KeyboardInterrupt
        return gradients(model, names, *rest)

    monkeypatch.setattr(sensitivity, "gradients", spy)
    cache, model = PlanCache(), Transformer("token logits")
    with subject(model, draw(24, 13, 32)) as judged:
        with pytest.raises(KeyboardInterrupt):
            measured(judged, cache=cache)
        assert list(dict.fromkeys(seen)) == ["into", "blocks.0.qkv", "blocks.0.o", "blocks.0.up"]
        assert len(cache.keys("sensitivities")) == 3 * len(CANDIDATES)
        seen.clear()
        resumed, notes = measured(judged, cache=cache)
        assert seen[0] == "blocks.0.up"
        calls = len(seen)
        again = measured(judged, cache=cache)
        assert len(seen) == calls
        assert again == (resumed, notes)
        fresh, _ = measured(judged)
    assert {pair: score.harm for pair, score in fresh.items()} == pytest.approx(
        {pair: score.harm for pair, score in resumed.items()}
    )


@pytest.mark.parametrize("strategy", ["fisher", "kl"])
def test_when_time_runs_out_the_rest_is_absent(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if strategy == "kl":
        monkeypatch.setattr(gradients_room, "_constant_weights", lambda model: 1 / 0)
        monkeypatch.setattr(sensitivity, "gradients", fails)
    asked: list[int] = []

    def seconds_left() -> float:
        asked.append(1)
        return 1.0 if len(asked) <= 4 else 0.0

    cache = PlanCache()
    with subject(Transformer("token logits"), draw(8, 13, 32)) as judged:
        scores, notes = measured(judged, cache=cache, seconds_left=seconds_left)
        total = len(trials_of(judged))
    assert 0 < len(scores) < total
    assert len(cache.keys("sensitivities")) == len(scores)
    assert notes[-1] == f"max_seconds ran out with {total - len(scores)} of {total} scores missing"


def fails(*_: Any) -> Any:
    raise GradientError("it is not to be had")


def test_each_layer_is_quantized_once_for_gate_and_score(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []
    original = Trial.made

    def spy(trial: Trial, model: nn.Module) -> Any:
        made.append(trial.pair)
        return original(trial, model)

    monkeypatch.setattr(Trial, "made", spy)
    with subject(Transformer("token logits"), draw(48, 26, 32)) as judged:
        _, notes = measured(judged, limit=0.0)
    assert sorted(made) == sorted(trial.pair for trial in trials_of(judged))
    assert not notes


def test_a_layer_below_the_gate_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd(torch.relu)
    x = draw(24, 64)
    x[:, 0] *= 3000.0
    with torch.no_grad():
        model.a.weight[:, 0] *= 1e-4
    with subject(model, x) as judged:
        scores, _ = measured(judged, ["int8_dynamic", "int8_weight_only"])
    assert scores["a", "int8_dynamic"].harm == math.inf
    assert scores["a", "int8_dynamic"].sqnr_db < 10 < scores["a", "int8_weight_only"].sqnr_db
    assert copy.copy(scores["a", "int8_weight_only"]).harm < 1

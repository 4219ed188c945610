"""The whole model judged: figures against ones worked out by hand, and what becomes of plans that do harm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoplan import autoplan, plan_of
from autoplan.apply import stand_ins
from autoplan.divergence import references, undisturbed
from autoplan.errors import AutoplanError
from autoplan.recorder import ModelInput
from autoplan.records import COMPILED, EAGER, NO_DIVERGENCE, Autocast, LayerPlan, Option, Outcome
from autoplan.rescale import ROUNDS, within_budget
from autoplan.selection import Budget, choosing, is_plain
from autoplan.validate import OTHER_SIDE, Whole, do_no_harm, whole_model_times

LANGUAGE, CLASSES = 11, 7


class Told(nn.Module):
    """Two layers of which nothing depends: the first stands for the float model's answer, or the planned one's."""

    def __init__(self, answers: dict[str, Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.answers = answers

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.answers["float" if type(self.layer) is nn.Linear else "planned"]


class Other(nn.Identity):
    """Stands in for a layer."""


def told(float_answer: Any, planned_answer: Any, *args: Any, **kwargs: Any) -> Outcome:
    model = Told({"float": float_answer, "planned": planned_answer})
    whole = Whole(model, lambda plan: {"layer": Other()}, (), {}, None, EAGER, 0)
    against = references(model, [ModelInput("default", args, kwargs)], None)
    return whole.judged(empty(), (), against)


def empty(**changes: Any) -> Outcome:
    return replace(Outcome(None, "", None, NO_DIVERGENCE, False, True, 1.0, 1), **changes)


def logits(values: Tensor) -> Any:
    return SimpleNamespace(logits=values)


# Figures.


def language(seed: int = 0, noise: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [4, 33], the logits of a model that predicts the next ones well, and the same with noise."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, LANGUAGE, (4, 33), generator=draw)
    y = torch.randn(4, 33, LANGUAGE, generator=draw)
    y[:, :-1].scatter_add_(2, ids[:, 1:, None], torch.full((4, 32, 1), 2.0))
    return ids, y, y + noise * torch.randn(y.shape, generator=draw)


def test_figures_of_a_language_model() -> None:
    ids, y, q = language()
    mask = torch.ones(4, 33)
    mask[1, 20:] = 0
    y[1, 20:], q[1, 20:] = 1e3, -1e3  # nothing there counts
    ids[1, 20:] = -100
    found = told(logits(y), logits(q), ids, attention_mask=mask)
    counts = mask.bool()
    p, r = y.double().log_softmax(-1)[counts], q.double().log_softmax(-1)[counts]
    kl = (p.exp() * (p - r)).sum(-1).numpy()
    assert found.divergence.value == pytest.approx(kl.mean(), rel=1e-4)
    assert found.divergence_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == r.argmax(-1)).double().mean().item())
    assert 0.5 < (found.top1_agreement or 0) < 1
    both = counts[:, 1:] & counts[:, :-1]
    nll = [float(F.cross_entropy(z[:, :-1][both].double(), ids[:, 1:][both])) for z in (y, q)]
    assert found.perplexity_ratio == pytest.approx(math.exp(nll[1] - nll[0]), rel=1e-4)
    assert found.divergence.value < (found.divergence_bound or 0) <= found.divergence.high


def test_there_is_a_perplexity_only_of_models_that_predict_the_next_token() -> None:
    ids, y, q = language()
    assert told(logits(y), logits(q), ids).perplexity_ratio is not None
    assert told(logits(y), logits(q), input_ids=ids).perplexity_ratio is not None
    assert told(logits(y), logits(q), ids[:, :-1]).perplexity_ratio is None  # other positions
    assert told(logits(y), logits(q), ids + LANGUAGE).perplexity_ratio is None  # classes that are not tokens
    assert told(logits(y), logits(q), ids.float()).perplexity_ratio is None
    assert told(logits(y[:, :1]), logits(q[:, :1]), ids[:, :1]).perplexity_ratio is None  # a step of decoding
    masked = torch.randn(4, 33, LANGUAGE).scatter_add_(2, ids[..., None], torch.full((4, 33, 1), 5.0))
    assert told(logits(masked), logits(masked), ids).perplexity_ratio is None  # predicts the token it is given


def test_figures_of_a_classifier_and_of_an_output_without_classes() -> None:
    y, q = torch.randn(32, CLASSES), torch.randn(32, CLASSES)
    found = told(logits(y), logits(q), torch.zeros(32, 5))
    assert found.top1_agreement == pytest.approx((y.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.perplexity_ratio is None
    vectors = told(y, q, torch.zeros(32, 5))
    own = ((y - q).double().square().sum(-1) / y.double().square().sum(-1)).numpy()  # of each sample
    assert vectors.divergence_p99 == pytest.approx(np.quantile(own, 0.99), rel=1e-5)
    assert vectors.top1_agreement is vectors.perplexity_ratio is None


def test_an_output_that_is_not_finite_has_an_infinite_divergence() -> None:
    y = torch.randn(8, CLASSES)
    for wrap in (logits, lambda values: values):
        found = told(wrap(y), wrap(y * math.nan), torch.zeros(8, 5))
        assert found.divergence.value == found.divergence_bound == math.inf


# Plans of real layers: errors that amplify or cancel each other.


class Sum(nn.Module):
    """Layers of one weight (each a copy of its own) whose outputs are added, each with its sign, to a large one."""

    def __init__(self, signs: Sequence[float]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.signs = signs
        self.base = nn.Linear(64, 33)
        self.layers = nn.ModuleList(nn.Linear(64, 33) for _ in signs)
        for layer in self.layers:
            layer.load_state_dict(self.layers[0].state_dict())  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = 3.0 * self.base(x)
        for sign, layer in zip(self.signs, self.layers, strict=True):
            y = y + sign * layer(x)
        return y


EVERYWHERE = Autocast("cpu", "bfloat16", 0)
PROGRAMS = {"none": ("1:linear", 100.0), "int4_g32": ("1:dequantize_int4", 30.0), "bf16": ("1:linear", 60.0)}


def trial(signs: Sequence[float], candidates: Sequence[str] = ("none", "int4_g32")) -> tuple[Whole, list[LayerPlan]]:
    """The model, and its layers with the harm of each candidate measured one at a time."""
    model = Sum(signs).eval()
    inputs = [ModelInput("default", (torch.randn(5, 64, generator=torch.Generator().manual_seed(i)),), {})
              for i in range(6)]  # fmt: skip

    def made(plan: Sequence[LayerPlan]) -> dict[str, nn.Module]:
        return {
            name: layer
            for item in plan
            if not is_plain(item)
            for name, layer in stand_ins(model, (item.name,), item.chosen, item.choice.program).items()
        }

    whole = Whole(model, made, inputs, {"default": 1.0}, None, EAGER, 0)
    layers = []
    with undisturbed(model):
        against = references(model, inputs[:3], None)
        for i in range(len(signs)):
            options = []
            for name in candidates:
                program, us = PROGRAMS[name]
                option = Option(name, program, us, us, us, int(us))
                alone = LayerPlan(f"layers.{i}", (), 64, 33, True, "float32", (), 100.0, name, "", (option,))
                harm = 0.0 if name == "none" else whole.measure([alone], against).value
                options.append(replace(option, harm=harm))
            layers.append(LayerPlan(f"layers.{i}", (), 64, 33, True, "float32", (), 100.0, "none", "", tuple(options)))
    return whole, layers


def held_out(whole: Whole, part: slice = slice(3, 6)) -> Any:
    with undisturbed(whole.model):
        return references(whole.model, whole.inputs[part], None)


@pytest.mark.parametrize(
    ("signs", "ratio"), [([1.0] * 6, (4.0, 8.0)), ([1.0, -1.0] * 3, (0.0, 0.01)), ([1.0], (0.6, 1.5))]
)
def test_errors_amplify_and_cancel_and_the_budget_is_kept(signs: list[float], ratio: tuple[float, float]) -> None:
    whole, layers = trial(signs)
    against = held_out(whole)
    everything = choosing(layers, ["int4_g32"] * len(signs))
    with undisturbed(whole.model):
        together = whole.measure(everything, against).value / sum(x.choice.harm or 0 for x in everything)
        assert ratio[0] <= together <= ratio[1]
        one = layers[0].option("int4_g32").harm or 0.0
        for limit in (0.5 * one, 1.5 * one, 5 * one, 100 * one):
            found = within_budget(layers, Budget(divergence=limit), lambda plan: whole.measure(plan, against))
            measured = whole.measure(found.layers, against)
            assert measured.bound <= limit
            assert found.rounds <= ROUNDS
            switched = sum(layer.chosen != "none" for layer in found.layers)
            # one more layer alike, and it is over: its error is that of the others times how many there are
            if ratio[0] > 1 and switched < len(signs):
                more = choosing(layers, ["int4_g32"] * (switched + 1) + ["none"] * (len(signs) - switched - 1))
                assert whole.measure(more, against).bound > limit
        assert switched == len(signs)  # in a budget that is wide enough


# Do no harm.


def outcome(whole: Whole, plan: list[LayerPlan], budget: Budget, **options: Any) -> tuple[list[LayerPlan], Outcome]:
    layers, found = do_no_harm(whole, plan, budget, empty(notes=("before",)), held_out(whole), **options)
    assert found.notes[0] == "before"
    assert all(type(module) is not Other for module in whole.model.modules())
    return list(layers), found


def test_the_users_metric_gets_as_much_of_the_plan_as_it_accepts(timer: Any) -> None:
    """Errors amplify: with four of eight layers the metric is still content, and no part of it looks at harms."""
    whole, layers = trial([1.0] * 8)
    plan = choosing(layers, ["int4_g32"] * 8)
    x = whole.inputs[0].args[0]
    with torch.no_grad():
        expected = whole.model(x)

    def exactness(model: nn.Module) -> float:
        with torch.no_grad():
            return -float((model(x) - expected).norm())

    with undisturbed(whole.model):
        one = -whole.score(exactness, choosing(layers, ["int4_g32"] + ["none"] * 7))
    kept, found = outcome(whole, plan, Budget(divergence=9.0), judge=(exactness, 4.5 * one))
    assert sum(layer.chosen == "int4_g32" for layer in kept) == 4
    assert "evaluate() fell from" in found.notes[1]
    assert "so 4 layers were put back to none" in found.notes[1]
    assert found.speedup is not None
    with undisturbed(whole.model):  # the figures are those of what was kept
        assert found.divergence.value == pytest.approx(whole.measure(kept, held_out(whole)).value)

    floating, found = outcome(whole, plan, Budget(divergence=9.0), judge=(exactness, 0.5 * one))
    assert all(map(is_plain, floating))
    assert "so the float model is kept" in found.notes[-1]
    assert found.divergence == NO_DIVERGENCE
    assert found.divergence_bound is None
    asked = []
    outcome(whole, plan, Budget(divergence=9.0), judge=(lambda model: asked.append(1) or 0.0, 0.0))
    assert len(asked) == 2  # once each, where the first answer will do
    floating, found = outcome(whole, plan, Budget(divergence=9.0), judge=(lambda model: math.nan, 0.0))
    assert "evaluate() gave nan for the float model" in found.notes[-1]
    with pytest.raises(AutoplanError, match="must return a number, and returned str"):
        outcome(whole, plan, Budget(divergence=9.0), judge=(lambda model: "good", 0.0))


def test_the_other_side_of_autocast_is_timed_where_that_may_be_faster_and_inside_the_budget(
    timer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, layers = trial([1.0] * 2, candidates=("none", "bf16", "int4_g32"))
    plan = choosing(layers, ["int4_g32"] * 2)
    timer.other_side_ratio = 0.7
    _, found = outcome(whole, plan, Budget(divergence=9.0), autocast=True)
    assert found.other_side is not None
    assert found.other_side.value == 0.7
    assert outcome(whole, plan, Budget(divergence=9.0))[1].other_side is None
    with undisturbed(whole.model):
        outside = whole.measure(plan, held_out(whole)).value
    strict = outcome(whole, plan, Budget(divergence=0.5 * outside), pinned={"layers.0": "int4_g32"}, autocast=True)
    assert strict[1].other_side is None
    slower = [replace(layer, baseline_us=1.0) for layer in plan]  # than which bfloat16 is no faster
    assert outcome(whole, slower, Budget(divergence=9.0), autocast=True)[1].other_side is None
    inside = replace(whole, region=EVERYWHERE)
    assert outcome(inside, slower, Budget(divergence=9.0), autocast=True)[1].other_side is not None

    def refuse(model: nn.Module, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("this model wants float32")
        return forward(model, x)

    forward = Sum.forward
    monkeypatch.setattr(Sum, "forward", refuse)
    assert outcome(whole, plan, Budget(divergence=9.0), autocast=True)[1].other_side is None


def test_a_region_of_some_workloads_is_judged_by_these(timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, layers = trial([1.0] * 2)
    plan = choosing(layers, ["int4_g32"] * 2)
    small, large = (replace(whole.inputs[0], workload=name) for name in ("small", "large"))
    (x,) = small.args
    small = replace(small, args=(x[:1],))
    there = replace(
        whole, inputs=[small, large], weights={"small": 1e6, "large": 1.0}, region=replace(EVERYWHERE, least=x.numel())
    )
    compare = timer.compare
    ratios = iter([{"plan": 1.0, "float": 2.0, OTHER_SIDE: 0.5}, {"plan": 1.0, "float": 4.0, OTHER_SIDE: 3.0}])

    def compared(calls: Any, **options: Any) -> Any:
        found, own = compare(calls, **options), next(ratios)
        return {name: replace(one, ratio=own[name]) for name, one in found.items()}

    monkeypatch.setattr("autoplan.timing.compare", compared)
    made = there.stand_ins(plan)
    swaps = {"float": there.swapped({}), "plan": there.swapped(made), OTHER_SIDE: whole.swapped(made)}
    times = whole_model_times(there, swaps, baseline="plan", seconds=0.1, share=0.8)
    assert times.note.startswith("the whole model was timed in small only")
    assert times.ratios[OTHER_SIDE].value == 3.0  # in the large one
    assert times.ratios["float"].value == 2.0


def test_planned_models_enter_their_region_and_float_ones_do_not(timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, layers = trial([1.0] * 2)
    plan, seen, forward = choosing(layers, ["int4_g32"] * 2), list[bool](), Sum.forward

    def watched(model: nn.Module, x: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(model, x)

    monkeypatch.setattr(Sum, "forward", watched)
    with undisturbed(whole.model):
        outside = whole.measure(plan, held_out(whole))
        there = replace(whole, region=EVERYWHERE)
        assert there.measure(plan, held_out(whole)) != outside
    assert not seen[0]
    assert seen[-1]
    seen.clear()
    swaps = {"float": there.swapped({}), "plan": there.swapped(there.stand_ins(plan))}
    whole_model_times(there, swaps, baseline="plan", seconds=0.1)
    assert set(seen[::2]) == {False}
    assert set(seen[1::2]) == {True}


def test_a_plan_that_the_final_split_forbids_loses_its_worst_contributors(timer: Any) -> None:
    """Errors amplify: the harm of a plan grows with the square of its switched layers, so of eight not all can stay."""
    whole, layers = trial([1.0] * 8)
    plan = choosing(layers, ["int4_g32"] * 8)
    against = held_out(whole)
    with undisturbed(whole.model):
        limit = 1.01 * whole.measure(choosing(layers, ["int4_g32"] * 3 + ["none"] * 5), against).bound
    kept, found = outcome(whole, plan, Budget(divergence=limit))
    assert sum(layer.chosen == "int4_g32" for layer in kept) == 3
    assert "on the final split the divergence is" in found.notes[1]
    assert "so 5 layers were put back to none" in found.notes[1]
    assert found.divergence_bound is not None
    assert found.divergence_bound <= limit
    assert found.speedup is not None

    floating, found = outcome(whole, plan, Budget(divergence=1e-12))
    assert all(map(is_plain, floating))
    assert "so the float model is kept" in found.notes[-1]
    floating, found = outcome(whole, plan, Budget(divergence=limit), seconds_left=lambda: -1.0)
    assert all(map(is_plain, floating))


def test_out_of_time_the_users_metric_is_asked_no_further(timer: Any) -> None:
    whole, layers = trial([1.0] * 4)
    scores = iter([1.0, 0.0])
    floating, found = outcome(
        whole, choosing(layers, ["int4_g32"] * 4), Budget(divergence=9.0), judge=(lambda model: next(scores), 0.1),
        seconds_left=lambda: -1.0,
    )  # fmt: skip
    assert all(map(is_plain, floating))
    assert "evaluate() fell from 1 to 0" in found.notes[-1]


def test_a_divergence_surely_above_the_budget_on_the_final_split_keeps_the_float_model(timer: Any) -> None:
    whole, layers = trial([1.0] * 2)
    plan = choosing(layers, ["int4_g32"] * 2)
    floating, found = outcome(whole, plan, Budget(divergence=1e-9))
    assert all(map(is_plain, floating))
    assert "on the final split the divergence is" in found.notes[-1]
    pinned, found = outcome(whole, plan, Budget(divergence=1e-9), pinned=("layers.0",))
    assert [layer.chosen for layer in pinned] == ["int4_g32"] * 2
    assert (found.divergence_bound or 0) > 1e-9


def test_the_float_models_own_time_comes_with_the_speed(timer: Any) -> None:
    whole, layers = trial([1.0] * 2)
    timer.model_ratio, timer.baseline_us = 0.5, 100.0  # of the planned model, in us
    _, found = outcome(whole, choosing(layers, ["int4_g32"] * 2), Budget(divergence=9.0))
    assert found.speedup is not None
    assert found.speedup.value == pytest.approx(2.0)
    assert found.float_us == pytest.approx(200.0)


@pytest.mark.parametrize(("first", "second", "kept"), [(0.6, 0.01, False), (0.6, 0.6, True), (0.01, 0.01, False)])
def test_few_rounds_that_leave_the_speed_open_are_followed_by_more(
    timer: Any, monkeypatch: pytest.MonkeyPatch, first: float, second: float, kept: bool
) -> None:
    widths, rounds, compare = iter([first, second]), [], timer.compare

    def of_that_width(calls: Any, *, max_rounds: int, **settings: Any) -> Any:
        rounds.append(max_rounds)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timer, "width", next(widths))
            return compare(calls, **settings)

    monkeypatch.setattr("autoplan.timing.compare", of_that_width)
    monkeypatch.setattr("autoplan.validate._SECONDS", 0.0)  # so that the fewest rounds come first
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    inputs = [torch.randn(8, 64) for _ in range(3)]
    plan = plan_of(autoplan(model, inputs, candidates=["int8_dynamic"], budget=Budget(divergence=0.1), cache=False))
    assert all(map(is_plain, plan.layers)) == kept
    assert rounds == ([8, 40] if first > 0.1 else [8])


# Several workloads.


class Ticking(nn.Module):
    """Takes as many us as it is given rows, by the `clock` that it comes with, and half of that when planned."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.now_ns = nn.Linear(2, 2), 0

    def clock(self) -> int:
        return self.now_ns

    def forward(self, x: Tensor) -> Tensor:
        self.now_ns += 1000 * len(x) // (1 if type(self.layer) is nn.Linear else 2)
        return x


@pytest.mark.parametrize(
    ("weights", "share", "timed", "percent"),
    [
        ({"small": 400.0, "middle": 32.0, "large": 1.0}, 0.8, ["small"], 85),
        ({"small": 256.0, "middle": 32.0, "large": 1.0}, 0.8, ["small", "large"], 90),  # the first takes 78 %
        ({"small": 1.0, "middle": 1.0, "large": 2.0}, 0.8, ["large"], 98),
        ({"small": 1000.0}, 0.8, ["small"], 96),  # of the others each counts 1
        ({"small": 40.0, "middle": 40.0, "large": 1.0}, 0.8, ["small", "middle", "large"], 100),
        ({"small": 400.0, "middle": 1.0, "large": 1.0}, 1.0, ["small", "middle", "large"], 100),
    ],
)
def test_workloads_are_timed_until_they_are_most_of_the_time(
    monkeypatch: pytest.MonkeyPatch, weights: dict[str, float], share: float, timed: list[str], percent: int
) -> None:
    model, rows = Ticking(), {"small": 1, "middle": 1, "large": 40}
    monkeypatch.setattr("autoplan.timing.clock_of", lambda device: model.clock)
    inputs = [ModelInput(name, (torch.ones(n, 2),), {}) for name, n in rows.items() for _ in range(2)]
    with undisturbed(model):
        whole = Whole(model, lambda plan: {}, inputs, weights, None, EAGER, 0)
        swaps = {"float": whole.swapped({}), "plan": whole.swapped({"layer": Other()})}
        times = whole_model_times(whole, swaps, baseline="plan", seconds=0.001, share=share)
    spent = {name: weights.get(name, 1.0) * n for name, n in rows.items()}
    assert times.baseline_us == pytest.approx(sum(spent[name] for name in timed) / 2, rel=0.01)
    assert times.ratios["float"].value == pytest.approx(2.0, rel=0.01)
    words = f"timed in {', '.join(timed)} only, which is about {percent} % of the float model's time"
    assert times.note == ("" if percent == 100 else f"the whole model was {words}")


def test_what_was_timed_as_a_whole_is_told_and_not_held_against_what_was_predicted_of_all(timer: Any) -> None:
    whole, layers = trial([1.0] * 2)
    plan = choosing(layers, ["int4_g32"] * 2)
    two = [replace(item, workload=name) for item in whole.inputs for name in ("often", "seldom")]
    mostly = replace(whole, inputs=two, weights={"often": 1e6, "seldom": 1.0})
    _, found = outcome(mostly, plan, Budget(divergence=9.0))
    assert found.notes[-1].startswith("the whole model was timed in often only, which is about 100 % of")
    assert found.speedup is not None
    assert found.float_us is None
    assert timer.comparisons == 1
    evenly = replace(mostly, weights={"often": 1.0, "seldom": 1.0})
    _, found = outcome(evenly, plan, Budget(divergence=9.0))
    assert found.notes == ("before",)
    assert found.float_us == pytest.approx(4 * timer.baseline_us)
    assert timer.comparisons == 3


def test_a_workload_of_several_is_compiled_for_its_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compiled(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    whole, _ = trial([1.0])
    several = [*whole.inputs, replace(whole.inputs[0], workload="other")]
    for inputs, count in ((whole.inputs, 2), (several, 4)):
        asked.clear()
        with undisturbed(whole.model):
            asked_of = replace(whole, inputs=inputs, mode=COMPILED)
            swaps = {"float": asked_of.swapped({}), "plan": asked_of.swapped({})}
            whole_model_times(asked_of, swaps, baseline="plan", seconds=0.001)
        assert [options["dynamic"] for options in asked] == [False if count == 4 else None] * count

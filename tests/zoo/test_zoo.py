"""Every animal of the zoo is planned, run, saved and reloaded, and keeps what is its own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from animals import ZOO, Animal, call
from torch import Tensor, nn

from autoplan import Plan, apply_plan, autoplan, plan_of
from autoplan.layers import PlannedLinear

# Given times, by which the fastest candidate is too harmful to be used everywhere: the budget has to bind.
RATIOS = {"int4_g32": 0.3, "int8_dynamic": 0.5, "bf16": 0.8}


@dataclass(frozen=True)
class Planned:
    """An animal before and after planning."""

    animal: Animal
    before: nn.Module  # a twin that nobody planned
    model: nn.Module
    seen: Mapping[str, Any]  # the model's own state around planning
    complaints: list[str]

    @property
    def plan(self) -> Plan:
        return plan_of(self.model)

    def outputs(self, model: nn.Module) -> list[Tensor]:
        return [self.animal.output(call(model, batch)).clone() for batch in self.animal.batches()]


_planned: dict[str, Planned] = {}


def _name(animal: Animal) -> str:
    return animal.name


@pytest.fixture(params=ZOO, ids=_name)
def planned(request: pytest.FixtureRequest, timer: Any, caplog: pytest.LogCaptureFixture) -> Planned:
    """The animal, planned on given times: by the first test that asks for it, for all of them."""
    animal: Animal = request.param
    if animal.name not in _planned:
        timer.ratios = RATIOS
        model, before, batches = animal.make(), animal.make(), animal.batches()
        torch.manual_seed(5)
        state = {"before": _own(model)}
        torch.manual_seed(5)
        assert autoplan(model, batches, candidates=list(RATIOS), cache=False, progress=False) is model
        state |= {"after": _own(model)}
        _planned[animal.name] = Planned(animal, before, model, state, [r.getMessage() for r in caplog.records])
    return _planned[animal.name]


def _own(model: nn.Module) -> dict[str, Any]:
    """What planning may not change, beside the Linears' weights. Draws a random number."""
    return {
        "modules": [name for name, _ in model.named_modules(remove_duplicate=False)],
        "train flags": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            (name, kind): list(hooks.values())
            for name, module in model.named_modules()
            for kind, hooks in vars(module).items()
            if kind.endswith("_hooks") and hooks
        },
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "biases": {name: p.requires_grad for name, p in model.named_parameters() if name.endswith("bias")},
        "random numbers": torch.rand(3),
    }


def _notes(plan: Plan) -> tuple[str, ...]:
    return plan.outcome.notes if plan.outcome else ()


def _divergence(logits: bool, expected: list[Tensor], outputs: list[Tensor], masks: list[Tensor | None]) -> float:
    """Mean KL in nats per token, or relative squared error, in float64: written anew, as an oracle."""
    numerator = denominator = 0.0
    for y, q, mask in zip(expected, outputs, masks, strict=True):
        y, q = y.double(), q.double()
        if logits:
            terms = y.softmax(-1) * (y.log_softmax(-1) - q.log_softmax(-1))
            weights = torch.ones_like(y[..., 0])
        else:
            terms, weights = (y - q) ** 2, (y**2).sum(-1)
        counted = torch.ones(y.shape[:-1]) if mask is None or mask.shape != y.shape[:2] else mask.double()
        numerator += float((terms.sum(-1) * counted).sum())
        denominator += float((weights * counted).sum())
    return numerator / denominator


def test_every_linear_is_planned_or_left_alone_with_a_reason(planned: Planned) -> None:
    plan, animal = planned.plan, planned.animal
    names = [name for layer in plan.layers for name in (layer.name, *layer.aliases)]
    reasons = {item.name: item.reason for item in plan.left_alone}
    linears = {n for n, m in planned.before.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
    assert len(names) == len(set(names))
    assert not set(names) & set(reasons)
    assert linears <= {*names, *reasons}
    assert bool(linears) == animal.has_linears
    assert all(layer.reason for layer in plan.layers)
    assert all(reasons.values())
    for name, words in animal.left_alone.items():
        assert words in reasons[name]
    assert planned.complaints == []


def test_the_plan_is_what_the_model_runs(planned: Planned) -> None:
    running = {
        name: module.candidate
        for name, module in planned.model.named_modules(remove_duplicate=False)
        if isinstance(module, PlannedLinear)
    }
    chosen = {
        name: layer.chosen
        for layer in planned.plan.layers
        if layer.chosen != "none"
        for name in (layer.name, *layer.aliases)
    }
    assert running == chosen
    if planned.animal.may_stay_float and not chosen:
        assert any("the float model is kept" in note for note in _notes(planned.plan))
    else:
        assert bool(chosen) == planned.animal.has_linears


def test_the_output_is_finite_and_inside_the_budget(planned: Planned) -> None:
    animal, plan = planned.animal, planned.plan
    masks = [batch.get("attention_mask") if isinstance(batch, Mapping) else None for batch in animal.batches()]
    expected, outputs = planned.outputs(planned.before), planned.outputs(planned.model)
    assert all(bool(torch.isfinite(output).all()) for output in outputs)
    divergence = _divergence(animal.logits, expected, outputs, masks)
    assert plan.outcome is not None
    assert plan.budget.divergence is not None
    assert plan.outcome.held_out
    assert plan.outcome.logits == animal.logits
    assert plan.outcome.divergence.low <= plan.budget.divergence
    # What kept it is a 95 % bound from a third of these few batches: all of them may well be a little above.
    assert divergence <= 1.1 * plan.budget.divergence
    assert (divergence > 0) == any(layer.chosen != "none" for layer in plan.layers)


def test_planning_leaves_no_trace(planned: Planned) -> None:
    before, after = planned.seen["before"], planned.seen["after"]
    for kind in ("modules", "train flags", "hooks", "gradients", "biases"):
        assert after[kind] == before[kind], kind
    assert before["hooks"] == {}
    assert before["buffers"].keys() == after["buffers"].keys()
    assert all(torch.equal(buffer, after["buffers"][name]) for name, buffer in before["buffers"].items())
    assert torch.equal(before["random numbers"], after["random numbers"])


@pytest.mark.parametrize("suffix", ["json", "pkl"])
def test_saved_and_reloaded_into_a_twin_it_gives_equal_outputs(planned: Planned, suffix: str, tmp_path: Path) -> None:
    planned.plan.save(tmp_path / f"plan.{suffix}")
    torch.save(planned.model.state_dict(), tmp_path / "weights.pt")
    plan = Plan.load(tmp_path / f"plan.{suffix}")
    assert plan == planned.plan
    twin = apply_plan(planned.animal.make(seed=9), plan, weights="skip")
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert all(map(torch.equal, planned.outputs(twin), planned.outputs(planned.model)))


def test_replayed_on_the_float_model_it_gives_equal_outputs(planned: Planned) -> None:
    replayed = apply_plan(copy.deepcopy(planned.before), planned.plan)
    assert all(map(torch.equal, planned.outputs(replayed), planned.outputs(planned.model)))


def test_copied_and_pickled_it_gives_equal_outputs(planned: Planned) -> None:
    expected = planned.outputs(planned.model)
    for twin in (copy.deepcopy(planned.model), pickle.loads(pickle.dumps(planned.model))):
        assert plan_of(twin) == planned.plan
        assert all(map(torch.equal, planned.outputs(twin), expected))


def test_the_report_names_every_layer(planned: Planned) -> None:
    for form in ("text", "markdown", "csv", "json"):
        report = planned.plan.report(form)
        assert all(layer.name.rpartition(".")[2] in report for layer in planned.plan.layers)
    assert all(item.reason in "".join(planned.plan.report("json")) for item in planned.plan.left_alone)


@pytest.mark.parametrize("planned", [animal for animal in ZOO if animal.generate], indirect=True, ids=_name)
def test_generators_generate(planned: Planned) -> None:
    generate = planned.animal.generate
    assert generate is not None
    generated = generate(planned.model)
    assert generated.shape == generate(planned.before).shape
    assert torch.equal(generated, generate(copy.deepcopy(planned.model)))


@pytest.mark.parametrize("name", ["mlp", "llama", "vit"])
def test_on_real_times_a_plan_is_faster_or_says_why_it_is_not(name: str) -> None:
    animal = next(animal for animal in ZOO if animal.name == name)
    before, model = animal.make(), autoplan(animal.make(), animal.batches(), cache=False, progress=False)
    plan = plan_of(model)
    assert all(layer.baseline_us > 0 for layer in plan.layers)
    assert plan.outcome is not None
    assert plan.budget.divergence is not None
    if any(isinstance(module, PlannedLinear) for module in model.modules()):
        assert plan.outcome.speedup is not None
        assert plan.outcome.speedup.low > 1
        assert plan.outcome.divergence.low <= plan.budget.divergence
    else:
        assert plan.outcome.notes
    planned = Planned(animal, before, model, {}, [])
    expected, outputs = planned.outputs(before), planned.outputs(model)
    assert _divergence(animal.logits, expected, outputs, [None] * len(outputs)) <= plan.budget.divergence

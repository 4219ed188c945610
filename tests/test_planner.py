"""Planning as a whole, on given times: what is chosen, what is left alone and why, and what must not change.

Many of these are defects of torchao.autoquant (removed in 2026), which we must not have.
"""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoplan import (
    AutoplanError,
    Budget,
    Candidate,
    Plan,
    PlanCache,
    apply_plan,
    autoplan,
    make_plan,
    plan_of,
    planner,
    record,
    register_candidate,
    request,
)
from autoplan.errors import BudgetError, CandidateError, RecordingError
from autoplan.kernels import ops
from autoplan.layers import PlannedLinear
from autoplan.records import Autocast
from autoplan.validate import OTHER_SIDE

LOOSE = Budget(divergence=0.1)
EVERYWHERE = Autocast("cpu", "bfloat16", 0)


def mlp(dtype: torch.dtype = torch.float32, width: int = 64) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 32)
    ).to(dtype)


def inputs(rows: int = 24, width: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def chosen(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.chosen for layer in plan_of(model).layers}


def option(plan: Plan, layer: str, candidate: str) -> Any:
    return next(item for item in plan.layers if item.name == layer).option(candidate)


# What is chosen.


def test_the_fastest_accurate_candidate_is_chosen_and_the_output_stays_inside_the_budget(timer: Any) -> None:
    model, x = mlp(), inputs()
    expected = model(x)
    assert autoplan(model, x, budget=LOOSE, cache=False) is model
    assert set(chosen(model).values()) == {"int8_dynamic"}
    error = ((model(x) - expected).norm() / expected.norm()) ** 2
    assert 0 < error < 0.1
    outcome = plan_of(model).outcome
    assert outcome is not None
    assert outcome.speedup is not None
    assert outcome.speedup.value == pytest.approx(2.0)
    assert outcome.held_out


def test_a_tight_budget_buys_only_what_fits(timer: Any) -> None:
    model = mlp()
    autoplan(model, inputs(), budget=Budget(divergence=1e-5), cache=False)
    assert "int8_dynamic" not in chosen(model).values()
    outcome = plan_of(model).outcome
    assert outcome is not None
    assert outcome.divergence.value <= 1e-5


def test_a_stricter_budget_on_a_warm_cache_decides_anew_without_timing(timer: Any) -> None:
    cache, x = PlanCache(), inputs()
    loose = autoplan(mlp(), x, budget=LOOSE, cache=cache)
    races = timer.races
    strict = autoplan(mlp(), x, budget=Budget(divergence=1e-9), cache=cache)
    assert timer.races == races
    assert set(chosen(loose).values()) == {"int8_dynamic"}
    assert "int8_dynamic" not in chosen(strict).values()
    assert chosen(autoplan(mlp(), x, budget=LOOSE, cache=cache)) == chosen(loose)


def test_layers_of_one_shape_are_judged_each_by_its_own_weight(timer: Any) -> None:
    model = mlp()
    with torch.no_grad():  # int8 per channel loses what stands beside one huge weight
        model[2].weight.mul_(1e-3)
        model[2].weight[:, 0] = 3.0
        model[2].bias.zero_()
        model[0].weight[0] = 0.0
        model[0].bias[0] = 0.0  # the huge column meets a dead input, so the small weights carry the signal
    plan = plan_of(autoplan(model, inputs(), candidates=["int8_dynamic"], budget=Budget(divergence=1e-3), cache=False))
    benign, ridden = option(plan, "0", "int8_dynamic"), option(plan, "2", "int8_dynamic")
    assert ridden.sqnr_db < 10 < benign.sqnr_db
    assert "SQNR on recorded rows" in ridden.rejected
    assert not benign.rejected
    assert timer.races == 2  # 64x64 once, 32x64 once


def test_an_outlier_activation_channel_rejects_int8_dynamic(timer: Any) -> None:
    model, x = mlp(), inputs()
    x[:, 0] *= 3000.0
    with torch.no_grad():
        model[0].weight[:, 0] *= 1e-4
    plan = plan_of(autoplan(model, x, budget="high", cache=False))
    assert plan.layers[0].chosen != "int8_dynamic"
    assert "SQNR on recorded rows" in option(plan, "0", "int8_dynamic").rejected


def test_ties_go_to_none(timer: Any) -> None:
    timer.ratios = dict.fromkeys(("none/onednn", "bf16", "int8_dynamic", "int8_weight_only"), 1.0)
    model = autoplan(mlp(), inputs(), budget=LOOSE, cache=False)
    assert set(chosen(model).values()) == {"none"}
    assert all(type(module) is not PlannedLinear for module in model.modules())
    assert any("nothing was switched" in note for note in plan_of(model).outcome.notes)  # type: ignore[union-attr]


def test_a_gain_that_is_not_sure_is_no_gain(timer: Any) -> None:
    timer.ratios, timer.width = {"int8_dynamic": 0.9}, 0.2
    model = autoplan(mlp(), inputs(), budget=LOOSE, cache=False)
    assert set(chosen(model).values()) == {"none"}
    assert "not surely faster" in option(plan_of(model), "0", "int8_dynamic").rejected


def test_lossless_speed_needs_no_budget(timer: Any) -> None:
    timer.ratios = {"none/onednn": 0.5}
    model, x = mlp(), inputs()
    expected = model(x)
    autoplan(model, x, budget=Budget(divergence=0.0), cache=False)
    assert set(chosen(model).values()) == {"none"}
    assert all(layer.choice.program == "1:onednn" for layer in plan_of(model).layers)
    torch.testing.assert_close(model(x), expected)


def test_the_order_of_candidates_does_not_matter(timer: Any) -> None:
    names = ["int8_dynamic", "bf16", "int8_weight_only", "int4_g32"]
    plans = [
        plan_of(autoplan(mlp(), inputs(), candidates=order, budget="high", cache=False))
        for order in (names, names[::-1])
    ]
    assert plans[0].layers == plans[1].layers


def test_the_same_seed_gives_the_same_plan(timer: Any) -> None:
    plans = [plan_of(autoplan(mlp(), inputs(), cache=False, seed=3)) for _ in range(2)]
    assert plans[0].layers == plans[1].layers
    assert plans[0].outcome == plans[1].outcome


# Do no harm.


def test_the_float_model_is_kept_when_the_whole_is_not_faster(timer: Any) -> None:
    timer.model_ratio = 1.0
    model = autoplan(mlp(), inputs(), budget=LOOSE, cache=False)
    assert type(model[0]) is nn.Linear
    assert any("not surely faster than the float model" in note for note in plan_of(model).outcome.notes)  # type: ignore[union-attr]


def test_a_uniform_plan_that_beats_the_solver_is_taken(timer: Any) -> None:
    timer.ratios = {"int8_dynamic": 0.5, "bf16": 0.6}
    harmless = plan_of(autoplan(mlp(), inputs(), candidates=["bf16"], cache=False)).predicted_divergence
    whole = plan_of(autoplan(mlp(), inputs(), candidates=["int8_dynamic"], budget=LOOSE, cache=False))
    timer.uniform_ratio = 0.8
    budget = Budget(divergence=(harmless + whole.predicted_divergence) / 2)
    model = autoplan(mlp(), inputs(), candidates=["bf16", "int8_dynamic"], budget=budget, cache=False)
    assert set(chosen(model).values()) == {"bf16"}
    assert any("was taken" in note for note in plan_of(model).outcome.notes)  # type: ignore[union-attr]


def test_the_users_metric_is_the_last_judge(timer: Any) -> None:
    x = inputs()
    expected = mlp()(x)

    def exactness(model: nn.Module) -> float:
        return -float((model(x) - expected).abs().max())

    kept = autoplan(mlp(), x, budget=LOOSE, evaluate=(exactness, 1e-6), cache=False)
    assert type(kept[0]) is nn.Linear
    assert any("evaluate() fell" in note for note in plan_of(kept).outcome.notes)  # type: ignore[union-attr]
    assert set(chosen(autoplan(mlp(), x, budget=LOOSE, evaluate=(exactness, 10.0), cache=False)).values()) == {
        "int8_dynamic"
    }


def test_a_machine_that_is_busy_while_layers_are_timed_is_told(timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, told in ((0, False), (10**12, True)):
        waited = itertools.count(0, step)
        monkeypatch.setattr("autoplan.contention.waited_ns", lambda waited=waited: next(waited))
        plan = plan_of(autoplan(mlp(), inputs(), budget=LOOSE, cache=False))
        assert any("had to wait" in note for note in plan.outcome.notes) == told  # type: ignore[union-attr]


def test_a_single_sample_is_reported_as_not_held_out(timer: Any) -> None:
    plan = plan_of(autoplan(mlp(), inputs(rows=1), budget=LOOSE, cache=False))
    assert plan.outcome is not None
    assert not plan.outcome.held_out
    assert any("not held out" in note for note in plan.outcome.notes)


# What planning must not change.


class Counting(nn.Module):
    """Counts its forwards, and whether gradients were on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 32)
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(64)
        self.register_buffer("steps", torch.zeros(()))
        self.calls: Counter[bool] = Counter()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        self.calls[torch.is_grad_enabled()] += 1
        self.steps += 1
        y = self.b(self.dropout(self.norm(self.a(x).relu())))
        return y if scale is None else y * scale


def test_the_users_own_call_runs_once_in_their_grad_mode_and_returns_the_float_output(timer: Any) -> None:
    model = Counting().eval()
    x = inputs()
    expected = copy.deepcopy(model)(x)
    model = autoplan(model, budget=LOOSE, cache=False)
    assert not model.calls
    y = model(x)
    assert model.calls[True] == 1
    assert torch.equal(y, expected)
    assert y.requires_grad
    assert set(chosen(model).values()) == {"int8_dynamic"}
    assert model.steps == 1  # planning's extra forwards left the buffer as the user's call did


def test_extra_forwards_leave_no_trace(timer: Any) -> None:
    model = Counting().train()
    model.a.eval()
    before = {key: value.clone() for key, value in model.state_dict().items() if "norm" in key or key == "steps"}
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    autoplan(model, (inputs(),), budget=LOOSE, cache=False)
    assert torch.equal(torch.rand(3), drawn)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert model.training
    assert not model.a.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.calls[True]


def test_hooks_names_and_flags_survive(timer: Any) -> None:
    model = mlp().train()
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model[0].bias.requires_grad_(False)
    names = [name for name, _ in model.named_modules()]
    autoplan(model, inputs(), budget=LOOSE, cache=False)
    seen.clear()
    model(inputs())
    assert seen == [torch.Size((24, 64))]
    assert [name for name, _ in model.named_modules()] == names
    assert type(model[0]) is PlannedLinear
    assert model[0].training
    assert not model[0].bias.requires_grad
    assert model[2].bias.requires_grad
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_exception_while_planning_changes_nothing(timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from autoplan import validate

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the machine burns")

    monkeypatch.setattr(validate, "whole_model_times", broken)
    model, x = Counting().train(), inputs()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="machine burns"):
        autoplan(model, x, budget=LOOSE, cache=False)
    assert type(model.a) is nn.Linear
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key != "steps")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with pytest.raises(AutoplanError, match="has no plan"):
        plan_of(model)


def test_if_lazy_planning_fails_the_float_model_stays_with_a_warning(
    timer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from autoplan import benchmark

    monkeypatch.setattr(benchmark, "measure", lambda *_, **__: 1 / 0)
    model, x = mlp(), inputs()
    expected = model(x)
    model = autoplan(model, cache=False)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model(x), expected)
    assert "planning failed, the float model stays: ZeroDivisionError" in caplog.text
    assert type(model[0]) is nn.Linear
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_first_call_that_raises_is_not_the_recording(timer: Any) -> None:
    model = autoplan(mlp(), budget=LOOSE, cache=False)
    with pytest.raises(RuntimeError):
        model(inputs(width=63))
    model(inputs())
    assert set(chosen(model).values()) == {"int8_dynamic"}


def test_an_interrupted_first_call_is_not_the_recording(timer: Any) -> None:
    model = autoplan(mlp(), budget=LOOSE, cache=False)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(inputs())
    handle.remove()
    x = inputs()
    model(x)
    assert chosen(model) == chosen(autoplan(mlp(), x, budget=LOOSE, cache=False))
    assert torch.compile(lambda x: x + 1, backend=refusing)  # the process compiles again
    with pytest.raises(Exception, match="asked to compile"):
        torch.compile(lambda x: x + 1, backend=refusing)(x)


def refusing(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("asked to compile")


@pytest.mark.parametrize("why", ["it was planned in another way", "it returns no tensor"])
def test_a_first_call_that_cannot_be_planned_runs_on_in_float(
    why: str, timer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Silent(nn.Sequential):
        def forward(self, x: Tensor) -> None:  # type: ignore[override]
            super().forward(x)

    if why == "it was planned in another way":
        inner = mlp()
        model: nn.Module = autoplan(torch.compile(inner, backend="eager"), budget=LOOSE, cache=False)
        autoplan(inner, inputs(), budget=LOOSE, cache=False)
        expected = "planned already"
    else:
        model, expected = autoplan(Silent(*mlp()), budget=LOOSE, cache=False), "returned NoneType"
    for _ in range(2):
        model(inputs())
    assert caplog.text.count("the float model stays") == 1
    assert expected in caplog.text


def test_the_default_device_is_the_callers_own_affair(timer: Any) -> None:
    x = inputs()
    expected = autoplan(mlp(), x, budget=LOOSE, cache=False)
    model = mlp()
    with torch.device("meta"):  # as set_default_device does
        autoplan(model, x, budget=LOOSE, cache=False)
        y = model(x)
    assert chosen(model) == chosen(expected)
    assert torch.equal(y, expected(x))


def test_a_layer_without_a_shape_is_left_alone(timer: Any) -> None:
    model = autoplan(nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 64)), budget=LOOSE, cache=False)
    assert model(inputs()).shape[-1] == 64
    (left,) = plan_of(model).left_alone
    assert (left.name, left.reason) == ("0", "its weight has no shape yet: call the model once before")
    assert chosen(model) == {"1": "int8_dynamic"}


def test_calls_of_other_threads_are_not_judged_on(timer: Any) -> None:
    model = mlp()
    first = threading.get_ident()
    others: list[threading.Thread] = []

    def meanwhile(*_: object) -> None:
        if threading.get_ident() == first and not others:
            others.append(threading.Thread(target=model, args=(inputs(3),)))
            others[0].start()
            others[0].join()

    model[1].register_forward_hook(meanwhile)
    autoplan(model, budget=LOOSE, cache=False)
    (waiting,) = {hook.__self__ for hook in model._forward_hooks.values() if hasattr(hook, "__self__")}
    model(inputs())
    assert others
    assert waiting.recording.forwards == {"default": 1}
    assert [item.args[0].shape for item in waiting.recording.inputs] == [inputs().shape]


def test_concurrent_first_calls_plan_once(timer: Any) -> None:
    model, x = mlp(), inputs()
    expected = model(x)
    model = autoplan(model, budget=LOOSE, cache=False)
    outputs: list[Tensor] = []
    threads = [threading.Thread(target=lambda: outputs.append(model(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 4
    assert any(torch.equal(y, expected) for y in outputs)
    assert all(((y - expected).norm() / expected.norm()) < 0.1 for y in outputs)
    assert set(chosen(model).values()) == {"int8_dynamic"}


# How models are called.


class Keyword(nn.Module):
    """Calls its layers by keyword, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, *, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"ids": mask.long(), "hidden": self.b(input=self.a(input=x) * mask)}


@pytest.mark.parametrize("as_batches", [False, True])
def test_dict_inputs_and_keyword_calls(timer: Any, as_batches: bool) -> None:
    model, batch = Keyword(), {"x": inputs(), "mask": torch.ones(24, 1)}
    expected = model(**batch)["hidden"]
    model = autoplan(model, [batch] * 3 if as_batches else batch, budget=LOOSE, cache=False)
    assert set(chosen(model).values()) == {"int8_dynamic"}
    y = model(**batch)["hidden"]
    assert ((y - expected).norm() / expected.norm()) < 0.1


def test_a_bias_is_never_dropped(timer: Any) -> None:
    model = mlp()
    with torch.no_grad():
        model[0].bias.fill_(50.0)
    x = inputs()
    expected = model[0](x)
    autoplan(model, x, budget=LOOSE, cache=False)
    assert ((model[0](x) - expected).norm() / expected.norm()) < 0.01


def test_autocast_is_recorded_at_its_effective_dtype_and_works_after_planning(timer: Any) -> None:
    model, x = mlp(), inputs()
    with record(model) as recording, torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    assert {call.dtype for profile in recording.profiles() for call in profile.calls} == {"bfloat16"}
    apply_plan(model, make_plan(model, recording, budget=LOOSE, cache=False))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert ((y - expected).float().norm() / expected.float().norm()) < 0.1


def test_a_float32_model_gets_a_region_of_autocast_where_its_plan_is_faster_there(
    timer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compare = timer.compare

    def compared(calls: Any, **options: Any) -> Any:
        found = compare(calls, **options)
        if OTHER_SIDE in calls:  # what is timed next is the plan for that
            timer.model_ratio, timer.other_side_ratio = 0.4, 1.0
        return found

    monkeypatch.setattr("autoplan.timing.compare", compared)
    model, reference, x = mlp(), mlp(), inputs()
    expected = reference(x)
    options: dict[str, Any] = {"budget": LOOSE, "cache": tmp_path}
    assert plan_of(autoplan(mlp(), x, **options)).autocast is None  # no faster there
    timer.other_side_ratio, timer.model_ratio, comparisons = 0.8, 0.5, timer.comparisons
    options["cache"] = tmp_path / "other"
    plan = plan_of(autoplan(model, x, **options))
    assert timer.comparisons == comparisons + 2
    assert plan.autocast == EVERYWHERE
    assert {call.dtype for layer in plan.layers for call in layer.calls} == {"bfloat16"}
    assert "without autocast" in plan.planning_seconds
    y = model(x)
    assert y.dtype == torch.float32
    assert 0 < ((y - expected).norm() / expected.norm()) < 0.1
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(reference(x), y)

    again = mlp()
    assert plan_of(autoplan(again, x, **options)).layers == plan.layers
    assert timer.comparisons == comparisons + 2
    loaded = mlp()
    plan.save(tmp_path / "plan.json")
    apply_plan(loaded, Plan.load(tmp_path / "plan.json"))
    for other in (again, loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
    with torch.no_grad():
        compiled_y = torch.compile(model, fullgraph=True)(x)
    assert compiled_y.dtype == torch.float32
    torch.testing.assert_close(compiled_y, y, rtol=0.02, atol=0.05)
    revalidated = plan.revalidate(mlp(), x, cache=False)
    assert revalidated.autocast == EVERYWHERE


def test_a_model_that_is_faster_in_a_region_is_planned_for_it_alone(timer: Any, tmp_path: Path) -> None:
    timer.inside_ratio, timer.other_side_ratio, x = 0.4, 1.3, inputs()
    options: dict[str, Any] = {"budget": LOOSE, "cache": tmp_path}
    plan = plan_of(autoplan(mlp(), x, **options))
    assert timer.comparisons == 1
    assert plan.autocast == EVERYWHERE
    assert plan.outcome is not None
    assert plan.outcome.other_side is not None
    assert plan.outcome.other_side.value == 1.3
    assert "1.30x as fast as outside" in plan.report()
    assert sum(seconds for stage, seconds in plan.planning_seconds.items() if stage != "total") == pytest.approx(
        plan.planning_seconds["total"], abs=0.2
    )
    again = plan_of(autoplan(mlp(), x, **options))
    assert (again.layers, again.autocast, timer.comparisons) == (plan.layers, plan.autocast, 1)
    assert plan_of(autoplan(mlp(), x, autocast=False, **options)).autocast is None
    assert plan_of(autoplan(mlp(), x, budget=Budget(time=0.9), cache=False)).autocast is None
    assert plan_of(autoplan(mlp(), x, budget=LOOSE, cache=False, candidates=["int8_dynamic"])).autocast is None


def test_where_the_region_promised_more_than_it_gives_both_sides_are_planned(
    timer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer.inside_ratio, timer.other_side_ratio = 0.4, 1.01  # too little
    plan = plan_of(autoplan(mlp(), inputs(), budget=LOOSE, cache=False))
    assert timer.comparisons == 2
    assert plan.autocast is None  # a tie
    assert plan.outcome is not None
    assert plan.outcome.notes[-1] == "a plan in autocast was made too, and was no faster"
    assert plan.planning_seconds["in autocast"] > 0
    monkeypatch.setattr("autoplan.inside.recorded_inside", _fail)
    plan = plan_of(autoplan(mlp(), inputs(), budget=LOOSE, cache=False))
    assert plan.autocast is None
    assert plan.outcome is not None
    assert "planning for a region of autocast failed: RuntimeError: no such luck" in plan.outcome.notes


def test_a_region_for_some_of_the_workloads(timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    region = Autocast("cpu", "bfloat16", 1000)
    monkeypatch.setattr("autoplan.inside.promising", lambda *_: region)
    timer.other_side_ratio, model = 1.3, mlp()
    few, many = inputs()[:2], inputs()
    with record(model) as recording, torch.no_grad():
        for name, x, weight in (("decode", few, 1000.0), ("prefill", many, 1.0)):
            with recording.workload(name, weight):
                expected = model(x)
    plan = make_plan(model, recording, budget=LOOSE, cache=False)
    assert plan.autocast == region
    for layer in plan.layers:
        assert {call.workload: call.dtype for call in layer.calls} == {"decode": "float32", "prefill": "bfloat16"}
    assert "in calls of 1,000 elements or more" in plan.report()
    apply_plan(model, plan)
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda _, args, y: seen.append(y.dtype))
    assert model(few).dtype == torch.float32
    y = model(many)
    assert y.dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]
    assert 0 < ((y - expected).norm() / expected.norm()) < 0.1
    assert Plan.from_dict(plan.to_dict()) == plan


def _fail(*_: Any) -> None:
    raise RuntimeError("no such luck")


def test_no_region_of_autocast_where_its_plan_is_no_faster_or_fails(
    timer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer.other_side_ratio = 0.8
    plan = plan_of(autoplan(mlp(), inputs(), budget=LOOSE, cache=False))
    assert plan.autocast is None
    assert plan.outcome is not None
    assert plan.outcome.notes[-1] == "a plan in autocast was made too, and was no faster"
    plan = plan_of(autoplan(mlp(), inputs(), budget=LOOSE, cache=False, max_seconds=100, autocast=False))
    assert "autocast" not in "".join(plan.outcome.notes if plan.outcome else ())

    monkeypatch.setattr("autoplan.inside.recorded_inside", _fail)
    plan = plan_of(autoplan(mlp(), inputs(), budget=LOOSE, cache=False))
    assert plan.outcome is not None
    assert plan.outcome.notes[-1] == "planning for a region of autocast failed: RuntimeError: no such luck"


def test_a_first_call_inside_autocast_is_planned_for_it_and_timed_outside(
    timer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, race = [], timer.race

    def watched(*arguments: Any, **options: Any) -> Any:
        states.append(torch.is_autocast_enabled("cpu"))
        return race(*arguments, **options)

    def evaluate(model: nn.Module) -> float:
        judged.append(torch.is_autocast_enabled("cpu"))
        return 1.0

    judged: list[bool] = []
    monkeypatch.setattr("autoplan.timing.race", watched)
    model, x = autoplan(mlp(), budget=LOOSE, evaluate=evaluate, cache=False), inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        y = model(x)
        plan = plan_of(model).revalidate(mlp(), x, cache=False)
    assert set(chosen(model).values()) == {"int8_dynamic"}
    assert {call.dtype for layer in plan.layers for call in layer.calls} == {"bfloat16"}
    assert ((y - expected).float().norm() / expected.float().norm()) < 0.1
    assert states
    assert not any(states)
    assert judged
    assert all(judged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(timer: Any, dtype: torch.dtype) -> None:
    model, x = mlp(dtype), inputs(dtype=dtype)
    expected = model(x)
    autoplan(model, x, budget=LOOSE, cache=False)
    assert set(chosen(model).values()) == {"int8_dynamic"}
    assert model(x).dtype == dtype
    assert ((model(x) - expected).float().norm() / expected.float().norm()) < 0.1


def test_workloads_weigh_what_was_recorded(timer: Any) -> None:
    model = mlp()
    with record(model) as recording:
        with recording.workload("prefill"):
            model(inputs(48))
        with recording.workload("decode", weight=256):
            for _ in range(3):
                model(inputs(1))
    plan = make_plan(model, recording, budget=LOOSE, cache=False)
    assert plan.workloads == {"prefill": 1.0, "decode": 256.0}
    assert plan.layers[0].baseline_us == pytest.approx(100.0 * (1 + 256))
    assert type(model[0]) is nn.Linear


# What is left alone.


class Zoo(nn.Module):
    """One of everything that must be left alone, beside layers that may be planned."""

    def __init__(self) -> None:
        super().__init__()

        class Scaled(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input) * 2

        self.embedding = nn.Embedding(50, 64)
        self.plain = nn.Linear(64, 64)
        self.again = self.plain
        self.twin = nn.Linear(64, 64)
        self.twin.weight = self.plain.weight
        self.scaled = Scaled(64, 64)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.unused = nn.Linear(64, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.twin(self.again(self.plain(x)))
        x = self.parametrized(self.scaled(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x)


def test_what_cannot_be_planned_is_left_alone_with_a_reason(timer: Any) -> None:
    model = Zoo().eval()
    ids = torch.randint(0, 50, (24, 5))
    expected = model(ids)
    autoplan(model, ids, budget=LOOSE, cache=False)
    plan = plan_of(model)
    reasons = {item.name: item.reason for item in plan.left_alone}
    assert "forward of its own" in reasons["scaled"]
    assert "parametrized" in reasons["parametrized"]
    assert "NonDynamicallyQuantizableLinear" in reasons["attention.out_proj"]
    assert reasons["unused"] == "saw no input while recording"
    assert "tied to embedding.weight" in reasons["head"]
    assert [(layer.name, layer.aliases) for layer in plan.layers] == [("plain", ("again", "twin"))]
    assert plan.layers[0].calls[0].count == 3
    assert model.plain is model.again
    assert isinstance(model.twin, PlannedLinear)
    assert model.twin._packed is model.plain._packed
    assert model.head.weight is model.embedding.weight
    assert ((model(ids) - expected).norm() / expected.norm()) < 0.1


def test_a_linear_that_is_the_model_itself_is_left_alone(timer: Any) -> None:
    layer = nn.Linear(64, 32)
    autoplan(layer, inputs(), cache=False)
    assert not plan_of(layer).layers
    assert "the model itself" in plan_of(layer).left_alone[0].reason


def test_include_exclude_and_pin(timer: Any) -> None:
    model = autoplan(mlp(), inputs(), budget=LOOSE, exclude="0", pin={"4": "int8_weight_only"}, cache=False)
    assert chosen(model) == {"2": "int8_dynamic", "4": "int8_weight_only"}
    assert {item.name: item.reason for item in plan_of(model).left_alone} == {"0": "excluded by the caller"}
    assert plan_of(model).layers[1].reason == "pinned by the caller"
    assert list(chosen(autoplan(mlp(), inputs(), include=["0", "4"], exclude="4", budget=LOOSE, cache=False))) == ["0"]


def test_groups_get_one_candidate(timer: Any) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
        model[2].weight[:, 0] = 3.0
        model[2].bias.zero_()
        model[0].weight[0] = 0.0
        model[0].bias[0] = 0.0
    plan = plan_of(autoplan(model, inputs(), budget=LOOSE, groups=[["0", "2"]], cache=False))
    assert plan.layers[0].chosen == plan.layers[1].chosen != "int8_dynamic"
    assert plan.layers[2].chosen == "int8_dynamic"


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": "tiny"}, BudgetError, "one of the presets lossless, high, balanced"),
        ({"budget": 0.1}, BudgetError, "neither a Budget nor"),
        ({"candidates": ["int3"]}, CandidateError, "no candidate is named 'int3'"),
        (
            {"exclude": "encoder.*"},
            RecordingError,
            r"exclude: the pattern 'encoder.\*' matches no layer; there are 0, 2, 4",
        ),
        ({"include": ["9"]}, RecordingError, "include: the pattern '9' matches no layer"),
        ({"pin": {"0": "int7"}}, CandidateError, "'int7' is not among the candidates"),
        ({"pin": {"x": "bf16"}}, RecordingError, "pin: the pattern 'x' matches no layer"),
        ({"pin": {"0": "int4_g128"}}, CandidateError, "layer '0' cannot use int4_g128: in_features 64"),
        ({"groups": [["0"], ["*"]]}, AutoplanError, "layer '0' is in two groups"),
        ({"evaluate": 3}, AutoplanError, "evaluate= must be callable"),
        ({"output": "logits"}, AutoplanError, "output= must be a callable"),
        ({"output": lambda result: None}, AutoplanError, "output= must return a floating tensor"),
        ({"max_seconds": 0}, AutoplanError, "max_seconds must be a positive number"),
        ({"max_seconds": "3"}, AutoplanError, "max_seconds must be a positive number"),
        ({"seed": -1}, AutoplanError, "seed must be an integer"),
        ({"compiled": "yes"}, AutoplanError, "compiled must be"),
        ({"progress": 3}, AutoplanError, "progress must be"),
        ({"evaluate": (len, "a")}, AutoplanError, "tolerance of evaluate="),
        ({"cache": 17}, AutoplanError, "cache=17"),
    ],
)
def test_bad_arguments_get_a_clear_error(
    timer: Any, arguments: dict[str, Any], error: type[AutoplanError], message: str
) -> None:
    model = mlp()
    with pytest.raises(error, match=message):
        autoplan(model, inputs(), **({"cache": False} | arguments))
    assert all(type(module) is not PlannedLinear for module in model)


def test_unknown_arguments_and_inputs_are_refused(timer: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        autoplan(mlp(), inputs(), supress_errors=True)  # type: ignore[call-arg]
    with pytest.raises(RecordingError, match="must be a Tensor, a tuple"):
        autoplan(mlp(), 3, cache=False)
    with pytest.raises(RecordingError, match="holds no batch"):
        autoplan(mlp(), [], cache=False)
    with pytest.raises(AutoplanError, match=r"takes an nn\.Module"):
        autoplan(lambda x: x, inputs())  # type: ignore[type-var]
    with pytest.raises(BudgetError, match="an empty budget"):
        Budget()
    with pytest.raises(BudgetError, match="divergence must be a positive number"):
        Budget(divergence=float("nan"))


def test_planning_twice_is_a_no_op_with_a_message(timer: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = autoplan(mlp(), inputs(), budget=LOOSE, cache=False)
    plan = plan_of(model)
    with caplog.at_level(logging.WARNING):
        assert autoplan(model, inputs()) is model
    assert "planned already" in caplog.text
    assert plan_of(model) is plan
    with pytest.raises(RecordingError, match="planned already"), record(model):
        pass
    with pytest.raises(RecordingError, match="planned already"):
        apply_plan(model, plan)


def test_an_empty_recording_is_refused(timer: Any) -> None:
    model = mlp()
    with record(model) as recording:
        pass
    with pytest.raises(RecordingError, match="nothing was recorded"):
        make_plan(model, recording)


def test_a_model_without_linears_plans_to_nothing(timer: Any) -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU())
    autoplan(model, torch.randn(8, 3, 10), cache=False)
    assert plan_of(model).layers == ()
    assert "nothing was switched" in plan_of(model).report()


# A candidate of the user's own.


class Rounded(Candidate):
    """Weights on a coarse grid: no kernel of its own, it runs its `linear`."""

    name = "test_rounded"
    tensors = ("weight",)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": (weight * 256).round() / 256}


def test_a_candidate_of_the_users_own_is_timed_scored_and_run(timer: Any) -> None:
    timer.ratios = {"test_rounded": 0.3}
    x = inputs()
    candidate = register_candidate(Rounded())
    model = autoplan(mlp(), x, candidates=[candidate], budget=LOOSE, cache=False)
    assert set(chosen(model).values()) == {"test_rounded"}
    expected = x @ candidate.quantize(mlp()[0].weight)["weight"].T + mlp()[0].bias
    torch.testing.assert_close(model[0](x), expected)


# Plans again.


def test_a_cached_plan_needs_no_measurement(timer: Any) -> None:
    cache, x = PlanCache(), inputs()
    first = autoplan(mlp(), x, budget=LOOSE, cache=cache)
    races, comparisons = timer.races, timer.comparisons
    second = autoplan(mlp(), x, budget=LOOSE, cache=cache)
    assert (timer.races, timer.comparisons) == (races, comparisons)
    assert plan_of(second) == plan_of(first)
    assert torch.equal(second(x), first(x))


def test_other_weights_reuse_timings_but_never_scores(timer: Any) -> None:
    cache, x = PlanCache(), inputs()
    autoplan(mlp(), x, budget=LOOSE, cache=cache)
    races, scores = timer.races, len(cache.keys("sensitivities"))
    other = mlp()
    with torch.no_grad():
        other[0].weight.mul_(1.01)
    autoplan(other, x, budget=LOOSE, cache=cache)
    assert timer.races == races
    assert len(cache.keys("sensitivities")) == 2 * scores


def test_the_lazy_form_and_the_eager_form_make_one_plan(timer: Any) -> None:
    cache, x = PlanCache(), inputs()
    eager = autoplan(mlp(), x, budget=LOOSE, cache=cache)
    lazy = autoplan(mlp(), budget=LOOSE, cache=cache)
    with torch.no_grad():
        lazy(x)
    assert plan_of(lazy) == plan_of(eager)


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.fc, self.scale = nn.Linear(64, 64), scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.scale * self.fc(x)
        return y


def test_what_else_a_model_computes_makes_another_plan(timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, x = PlanCache(), inputs()

    def divergence(scale: float) -> float:
        outcome = plan_of(autoplan(Scaled(scale), x, pin={"fc": "int8_dynamic"}, cache=cache)).outcome
        assert outcome is not None
        return outcome.divergence.value

    assert divergence(100.0) > 2 * divergence(0.01)  # an attribute
    before = divergence(0.01)
    monkeypatch.setattr(Scaled, "forward", lambda self, x: self.fc(x))  # the code
    assert divergence(0.01) > 2 * before


def test_a_planner_or_a_machine_that_is_another_plans_anew(timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, x = PlanCache(), inputs()
    first = autoplan(mlp(), x, budget=LOOSE, cache=cache)

    def is_cached() -> bool:
        return plan_of(autoplan(mlp(), x, budget=LOOSE, cache=cache)) == plan_of(first)

    assert is_cached()
    with monkeypatch.context() as patch:
        patch.setattr(request, "_own_source", lambda: "another")
        assert not is_cached()
    with monkeypatch.context() as patch:  # a compiler was installed since
        patch.setattr(ops, "_probe_once", lambda kernel: "no compiler" if kernel.name == "int_mm" else None)
        assert not is_cached()
    assert is_cached()


def test_a_plan_that_ran_out_of_time_is_no_answer_to_one_that_has_it(
    timer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, x = PlanCache(), inputs()
    with monkeypatch.context() as patch:
        patch.setattr(planner, "_TIMING_SHARE", 1e-9)
        hasty = autoplan(mlp(), x, budget=LOOSE, cache=cache, max_seconds=100)
    assert "max_seconds ran out" in option(plan_of(hasty), "0", "int8_dynamic").rejected
    assert set(chosen(autoplan(mlp(), x, budget=LOOSE, cache=cache)).values()) == {"int8_dynamic"}


def test_max_seconds_gives_a_valid_plan(timer: Any) -> None:
    model = autoplan(mlp(), inputs(), budget=LOOSE, max_seconds=1e-6, cache=False)
    assert set(chosen(model).values()) == {"none"}
    assert "max_seconds ran out" in option(plan_of(model), "0", "int8_dynamic").rejected
    assert torch.isfinite(model(inputs())).all()


def test_batch_invariant_keeps_one_kernel_per_layer(timer: Any) -> None:
    timer.ratios = {"int8_weight_only/int8pack": 0.4, "int8_weight_only/dequantize_int8": 0.5}
    model = autoplan(mlp(), [inputs(1), inputs(48), inputs(24)], budget=LOOSE, batch_invariant=True, cache=False)
    assert all("," not in layer.choice.program for layer in plan_of(model).layers)


# What an outside review found.


class Scores(nn.Module):
    """One score per sample, called logits, as rerankers return."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(x).relu())}


def test_logits_of_one_class_are_judged_by_their_error(timer: Any) -> None:
    timer.ratios = {"int4_g32": 0.2}
    model = autoplan(Scores(), inputs(), budget="lossless", candidates=["int4_g32"], cache=False)
    outcome = plan_of(model).outcome
    assert outcome is not None
    assert not outcome.logits
    assert "int4_g32" not in chosen(model).values()


def test_replays_run_in_the_autocast_region_they_were_recorded_in(timer: Any) -> None:
    seen: list[bool] = []

    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return self.a(x)

    model = Seeing()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), record(model) as recording:
        model(inputs())
    make_plan(model, recording, budget=LOOSE, cache=False)
    assert len(seen) > 5
    assert all(seen)


def test_nobody_else_is_served_a_trial(timer: Any) -> None:
    timer.ratios = {"int4_g32": 0.2}
    model, x = mlp().eval(), inputs()
    expected, served, running = model(x), [], threading.Event()

    def serve() -> None:
        running.set()
        while running.is_set():
            served.append(bool(torch.equal(model(x), expected)) and not model.training)

    thread = threading.Thread(target=serve)
    autoplan(model, candidates=["int4_g32"], budget=Budget(divergence=1e-9), cache=False)
    model.register_forward_hook(lambda *_: None)
    thread.start()
    running.wait()
    model(x)
    running.clear()
    thread.join()
    assert all(served)


def test_overlapping_recordings_leave_the_compile_stance_as_it_was() -> None:
    first, second = record(mlp()), record(mlp())
    before = torch._dynamo.eval_frame._stance
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance == before


def test_what_an_output_callable_picks_is_found_again_by_its_code_alone(timer: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    model, cache = Two(), PlanCache()
    with record(model) as recording:
        model(inputs())
    first = make_plan(model, recording, output=lambda pair: pair[0], budget=LOOSE, cache=cache)
    second = make_plan(model, recording, output=lambda pair: pair[1], budget=LOOSE, cache=cache)
    scores = len(cache.keys("sensitivities"))
    again = make_plan(model, recording, output=lambda pair: pair[1], budget=LOOSE, cache=cache)
    which = 0
    unknown = make_plan(model, recording, output=lambda pair: pair[which], budget=LOOSE, cache=cache)
    assert again.to_dict() == second.to_dict()
    assert len(cache.keys("sensitivities")) == scores
    assert unknown.fingerprints["options"]["output"].endswith("<lambda>")
    assert option(unknown, "b", "int8_dynamic").harm == 0
    assert option(first, "b", "int8_dynamic").harm == 0 < option(first, "a", "int8_dynamic").harm
    assert option(second, "a", "int8_dynamic").harm == 0 < option(second, "b", "int8_dynamic").harm


def test_equal_weights_in_another_structure_are_another_model(timer: Any) -> None:
    cache, x = PlanCache(), inputs()
    autoplan(mlp(), x, budget=LOOSE, cache=cache)
    plans = len(cache.keys("plans"))
    other = mlp()
    other[1] = nn.Hardshrink(2.0)
    autoplan(other, x, budget=LOOSE, cache=cache)
    assert len(cache.keys("plans")) == plans + 1


def test_a_transposed_tie_is_not_one_weight(timer: Any) -> None:
    timer.ratios = {"none/onednn": 0.5}
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = nn.Parameter(model[0].weight.detach().t())
    expected = model(inputs())
    autoplan(model, inputs(), cache=False)
    torch.testing.assert_close(model(inputs()), expected)


class Caching(nn.Module):
    """Takes and returns an object that holds tensors, as language models do with their key-value cache."""

    class State:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)

    def forward(self, x: Tensor, state: Any = None, lock: Any = None) -> tuple[Tensor, Any]:
        y = self.a(x if state is None else x + state.tensor)
        return y, self.State(y)


def test_recording_never_breaks_the_users_call(timer: Any) -> None:
    model, x = Caching(), inputs()
    with record(model) as recording:
        _, state = model(x)
        model(x, state=state)  # holds a tensor with a gradient history, which deepcopy refuses
        model(x, lock=threading.Lock())  # cannot be copied at all
    assert len(recording.inputs) == 2
    assert recording.inputs_dropped == 1
    plan = make_plan(model, recording, budget=LOOSE, cache=False)
    assert plan.outcome is not None
    assert any("1 recorded inputs" in note for note in plan.outcome.notes)


def test_hooks_never_see_the_rows_that_layers_are_judged_on(timer: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    shapes = set()
    model[0].register_forward_hook(lambda module, args, y: shapes.add(y[:, -1, :].shape))
    autoplan(model, torch.randn(12, 5, 64), budget=LOOSE, cache=False)
    assert {shape[1] for shape in shapes} == {64}
    assert set(chosen(model).values()) == {"int8_dynamic"}


def test_groups_and_pins_together(timer: Any) -> None:
    model = autoplan(mlp(), inputs(), groups=["*"], pin={"0": "int8_dynamic"}, budget=LOOSE, cache=False)
    assert set(chosen(model).values()) == {"int8_dynamic"}


def test_a_layers_own_attributes_come_along(timer: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.fc.alpha = 2.0  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.fc.alpha

    model = autoplan(Scaled(), inputs(), budget=LOOSE, cache=False)
    assert model.fc.alpha == 2.0
    assert isinstance(model.fc, PlannedLinear)


def test_a_model_that_waits_for_its_first_call_can_be_asked_again_copied_and_pickled(timer: Any) -> None:
    x = inputs()
    twice = autoplan(autoplan(mlp(), cache=False), budget=LOOSE, cache=False)
    twice(x)
    assert set(chosen(twice).values()) == {"int8_dynamic"}
    now = autoplan(autoplan(mlp(), cache=False), x, budget=LOOSE, cache=False)
    assert set(chosen(now).values()) == {"int8_dynamic"}
    waiting = autoplan(mlp(), budget=LOOSE, cache=False)
    for twin in (copy.deepcopy(waiting), pickle.loads(pickle.dumps(waiting)), waiting):
        twin(x)
        assert set(chosen(twin).values()) == {"int8_dynamic"}


class Noisy(nn.Sequential):
    """Draws random numbers in every forward, as a variational decoder does."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x + torch.randn_like(x))
        return y + torch.randn_like(y)


def test_a_model_that_draws_random_numbers_is_judged_on_equal_draws(timer: Any) -> None:
    model, before = Noisy(*mlp()), torch.get_rng_state()
    autoplan(model, inputs(), budget=LOOSE, cache=False)
    assert torch.equal(torch.get_rng_state(), before)
    outcome = plan_of(model).outcome
    assert outcome is not None
    assert outcome.divergence.value < 0.01
    assert set(chosen(model).values()) == {"int8_dynamic"}


class OnGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.register_buffer("neighbours", torch.eye(24).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.neighbours @ x)
        return y


def test_a_sparse_buffer_is_no_obstacle(timer: Any) -> None:
    model, other = OnGraph(), OnGraph()
    other.neighbours = 2 * other.neighbours
    plans = [plan_of(autoplan(m, inputs(), pin={"fc": "int8_dynamic"}, cache=False)) for m in (model, other)]
    assert chosen(model) == {"fc": "int8_dynamic"}
    assert plans[0].fingerprints["model"]["digest"] != plans[1].fingerprints["model"]["digest"]


def test_an_output_of_zeros_is_planned(timer: Any) -> None:
    model = mlp()
    for parameter in model[4].parameters():
        nn.init.zeros_(parameter)
    autoplan(model, inputs(), budget=LOOSE, cache=False)
    assert torch.equal(model(inputs()), torch.zeros(24, 32))


def test_the_recording_of_another_model_is_refused(timer: Any) -> None:
    with record(mlp()) as recording:
        pass
    with pytest.raises(RecordingError, match="the recording of this very model"):
        make_plan(mlp(), recording)


def test_a_file_that_is_no_cache_is_left_alone(timer: Any, tmp_path: Path) -> None:
    model = autoplan(mlp(), inputs(), budget=LOOSE, cache=False)
    plan_of(model).save(tmp_path / "mine.plan.json")
    autoplan(mlp(), inputs(), budget=LOOSE, cache=tmp_path / "mine.plan.json")
    assert Plan.load(tmp_path / "mine.plan.json") == plan_of(model)
    assert [file.name for file in tmp_path.glob("mine*") if not file.name.endswith(".lock")] == ["mine.plan.json"]


def test_an_encoders_mask_does_not_hide_a_decoders_tokens(timer: Any) -> None:
    from autoplan.divergence import _attention_mask
    from autoplan.recorder import ModelInput

    mask, output = torch.tensor([[1, 0], [1, 0]]), torch.randn(2, 2, 7)
    assert _attention_mask(mlp(), ModelInput("default", (), {"attention_mask": mask}), output) is not None
    decoding = ModelInput("default", (), {"attention_mask": mask, "decoder_input_ids": mask})
    assert _attention_mask(mlp(), decoding, output) is None

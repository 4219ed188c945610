"""A plan in another environment: what is timed anew, what stays, what changes, and what the report says of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoplan import Budget, Plan, PlanCache, apply_plan, autoplan, make_plan, plan_of, record, recorder
from autoplan.errors import AutoplanError, CandidateError, PlanMismatchError, RecordingError
from autoplan.kernels import ops

LOOSE = Budget(divergence=0.5)
CANDIDATES = ["bf16", "int8_dynamic", "int8_weight_only"]


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32))


def rows(count: int = 24) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(1))


def foreign(timer: Any, **options: Any) -> Plan:
    """A plan that says it was made elsewhere, with int8_dynamic chosen and int8_weight_only open everywhere."""
    original = model()
    with record(original) as recording:
        original(rows())
    plan = make_plan(original, recording, budget=LOOSE, cache=False, candidates=CANDIDATES, **options)
    assert {layer.chosen for layer in plan.layers} == {options.get("pin", {"*": "int8_dynamic"})["*"]}
    environment = {**plan.fingerprints["environment"], "device": "Another CPU", "torch": "2.8.0"}
    return replace(plan, fingerprints={**plan.fingerprints, "environment": environment})


def chosen(plan: Plan) -> list[str]:
    return [layer.chosen for layer in plan.layers]


def test_kernels_that_cannot_run_here_are_told_when_a_plan_is_applied(
    timer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = foreign(timer)
    plan = replace(plan, fingerprints={})  # made here, where all of them could
    used = plan.layers[0].choice.program.partition(",")[0].partition(":")[2]
    monkeypatch.setattr(ops, "_probe_once", lambda kernel: "no compiler" if kernel.name == used else None)
    with caplog.at_level(logging.WARNING):
        assert plan_of(apply_plan(model(), plan)).stale == (f"{used} cannot run here: no compiler",)
    assert "chooses what can run" in caplog.text


@pytest.mark.parametrize("progress", [None, True, False])
def test_progress_is_shown_as_for_a_plan(timer: Any, progress: bool | None) -> None:
    plan = foreign(timer)
    assert chosen(plan.revalidate(model(), cache=False, progress=progress)) == chosen(plan)


def test_a_choice_that_holds_stays(timer: Any, caplog: pytest.LogCaptureFixture) -> None:
    plan = foreign(timer)
    with caplog.at_level(logging.WARNING):
        stale = plan_of(apply_plan(model(), plan)).stale
    here = plan_of(autoplan(model(), rows(), cache=False, candidates=[])).fingerprints["environment"]
    assert stale == (
        f"device is {here['device']}, was Another CPU",
        f"torch is {torch.__version__}, was 2.8.0",
    )
    assert "plan.revalidate(float_model, inputs)" in caplog.text
    assert "plan.revalidate(model, inputs)" in plan_of(apply_plan(model(), plan)).report()
    timer.raced.clear()
    float_model = model()
    state = {name: tensor.clone() for name, tensor in float_model.state_dict().items()}
    new = plan.revalidate(float_model, cache=False)
    assert timer.races == 3  # one per distinct shape
    assert chosen(new) == chosen(plan)
    assert new.stale == ()
    assert new.fingerprints["environment"]["torch"] == torch.__version__
    assert new.fingerprints["model"] == plan.fingerprints["model"]
    assert "was Another CPU" in new.revalidated[0]
    assert new.revalidated[1:] == ("every choice stands",)
    assert "every choice stands" in new.report()
    assert "not measured: it was revalidated without inputs" in new.report()
    assert all(type(module) in (nn.Linear, nn.ReLU) for module in float_model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in float_model.state_dict().items())
    assert plan.fingerprints["environment"]["torch"] == "2.8.0"
    caplog.clear()
    assert plan_of(apply_plan(model(), new)) == new
    assert not caplog.text


def test_only_the_top_two_and_plain_linear_are_timed(timer: Any) -> None:
    plan = foreign(timer)
    timer.raced.clear()
    new = plan.revalidate(model(), cache=False)
    assert len(timer.raced) == 3
    for arms in timer.raced:
        assert {arm.partition("/")[0] for arm in arms} == {"none", "int8_dynamic", "int8_weight_only"}
        assert {"none/linear", "int8_dynamic/onednn_u8s8"} <= arms
        assert len(arms) <= 4
    others = [option for option in new.layers[0].options if option.candidate == "bf16"]
    assert all("not timed here" in option.rejected and option.us is None for option in others)


def test_a_rival_that_is_surely_faster_here_takes_over_within_the_budget(timer: Any) -> None:
    plan = foreign(timer)
    timer.ratios |= {"int8_dynamic/onednn_u8s8": 0.7, "int8_weight_only": 0.3}
    new = plan.revalidate(model(), cache=False)
    assert chosen(new) == ["int8_weight_only"] * 3
    assert [layer.reason for layer in new.layers] == ["surely faster here than int8_dynamic"] * 3
    assert new.revalidated[1].startswith("0: int8_dynamic on onednn_u8s8 at 0.40x the plain time there, now ")
    assert "int8_weight_only" in new.revalidated[1]
    assert new.us == pytest.approx(0.3 * new.baseline_us)
    planned = apply_plan(model(), new)
    assert plan_of(planned).stale == ()
    harms = [layer.option("int8_weight_only").harm for layer in plan.layers]
    assert [layer.choice.harm for layer in new.layers] == harms
    timer.ratios |= {"int8_weight_only": 0.7}  # as fast: what was chosen stays
    assert chosen(plan.revalidate(model(), cache=False)) == ["int8_dynamic"] * 3


def test_a_faster_rival_that_breaks_the_budget_does_not(timer: Any) -> None:
    plan = foreign(timer)
    worse = [
        replace(layer, options=tuple(
            replace(option, harm=10.0) if option.candidate == "int8_weight_only" else option for option in layer.options
        ))
        for layer in plan.layers
    ]  # fmt: skip
    timer.ratios |= {"int8_dynamic/onednn_u8s8": 0.7, "int8_weight_only": 0.3}
    assert chosen(replace(plan, layers=tuple(worse)).revalidate(model(), cache=False)) == ["int8_dynamic"] * 3


def test_what_is_surely_slower_than_plain_here_goes_back_to_plain(timer: Any) -> None:
    plan = foreign(timer)
    timer.ratios |= {"int8_dynamic/onednn_u8s8": 1.3, "int8_weight_only": 1.4}
    new = plan.revalidate(model(), cache=False)
    assert chosen(new) == ["none"] * 3
    assert {layer.choice.program for layer in new.layers} == {"1:linear"}
    assert new.nbytes == new.baseline_nbytes
    assert len(new.revalidated) == 4
    assert all(type(module) in (nn.Linear, nn.ReLU) for module in apply_plan(model(), new))


def test_a_kernel_that_is_not_here_gives_way(timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from autoplan.kernels import find_kernel

    plan = foreign(timer)
    broken = replace(find_kernel("onednn_u8s8"), probe=lambda: "no such instruction here")
    monkeypatch.setitem(find_kernel.__globals__["_KERNELS"], "onednn_u8s8", broken)
    timer.ratios |= {"int8_dynamic": 0.5}
    new = plan.revalidate(model(), cache=False)
    assert chosen(new) == ["int8_dynamic"] * 3
    assert "onednn_u8s8" not in {layer.choice.program for layer in new.layers}
    assert "int8_dynamic stays, on " in new.revalidated[1]
    assert new.revalidated[1].endswith("was on onednn_u8s8")


def test_a_candidate_that_is_not_known_here_gives_way(timer: Any) -> None:
    plan = foreign(timer)
    renamed = [
        replace(layer, chosen="theirs", options=tuple(
            replace(option, candidate="theirs") if option.candidate == "int8_dynamic" else option
            for option in layer.options
        ))
        for layer in plan.layers
    ]  # fmt: skip
    new = replace(plan, layers=tuple(renamed)).revalidate(model(), cache=False)
    assert chosen(new) == ["int8_weight_only"] * 3
    assert "no candidate is named 'theirs'" in new.layers[0].reason


def test_a_pinned_choice_stays_or_is_refused(timer: Any) -> None:
    plan = foreign(timer, pin={"*": "int8_weight_only"})
    timer.ratios |= {"int8_weight_only": 3.0}
    assert chosen(plan.revalidate(model(), cache=False)) == ["int8_weight_only"] * 3
    renamed = [
        replace(layer, chosen="theirs", options=tuple(
            replace(option, candidate="theirs") if option.candidate == "int8_weight_only"
            else replace(option, rejected="pinned to theirs") for option in layer.options
        ))
        for layer in plan.layers
    ]  # fmt: skip
    with pytest.raises(CandidateError, match="'0' is pinned to theirs, which cannot run here"):
        replace(plan, layers=tuple(renamed)).revalidate(model(), cache=False)


def test_inputs_show_divergence_and_speed_of_the_whole(timer: Any) -> None:
    plan = foreign(timer)
    timer.model_ratio = 0.25
    new = plan.revalidate(model(), [rows(), rows(8)], cache=False)
    assert new.outcome is not None
    assert new.outcome.speedup is not None
    assert new.outcome.speedup.value == pytest.approx(4.0)
    y, q = model()(rows()), apply_plan(model(), new)(rows())
    expected = ((y - q).square().sum() / y.square().sum()).item()
    assert new.outcome.divergence.value == pytest.approx(expected, rel=0.2)
    assert 0 < new.outcome.divergence.value < 0.01
    assert "inputs given to revalidate" in new.report()


def test_a_plan_that_breaks_its_budget_or_is_slower_as_a_whole_gives_the_float_model(timer: Any) -> None:
    plan = foreign(timer)
    strict = replace(plan, budget=Budget(divergence=1e-9))
    new = strict.revalidate(model(), rows(), cache=False)
    assert chosen(new) == ["none"] * 3
    assert "surely above the budget" in new.revalidated[-1]
    timer.model_ratio = 1.5
    new = plan.revalidate(model(), rows(), cache=False)
    assert chosen(new) == ["none"] * 3
    assert "slower than the float model as a whole" in new.revalidated[-1]


@pytest.mark.parametrize("budget", [Budget(time=0.41), Budget(nbytes=1000), Budget(time=0.41, nbytes=1000)])
def test_what_a_choice_takes_here_is_allowed(timer: Any, budget: Budget) -> None:
    plan = replace(foreign(timer), budget=budget)
    timer.ratios |= {"int8_dynamic/onednn_u8s8": 0.6}
    assert chosen(plan.revalidate(model(), cache=False)) == ["int8_dynamic"] * 3


def test_inputs_that_cannot_be_kept_are_told_before_anything_is_timed(
    timer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = foreign(timer)
    timer.raced.clear()
    monkeypatch.setattr(recorder, "_MAX_INPUT_BYTES", 8)
    with pytest.raises(RecordingError, match="its inputs are too large"):
        plan.revalidate(model(), rows(), cache=False)
    assert not timer.raced


def test_timings_are_kept_in_the_cache(timer: Any) -> None:
    plan, cache = foreign(timer), PlanCache()
    first = plan.revalidate(model(), cache=cache)
    timer.raced.clear()
    again = plan.revalidate(model(), cache=cache)
    assert timer.races == 0
    assert replace(again, planning_seconds={}) == replace(first, planning_seconds={})


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_files_keep_what_was_revalidated(timer: Any, tmp_path: Path, suffix: str) -> None:
    new = foreign(timer).revalidate(model(), rows(), cache=False)
    new.save(tmp_path / f"new{suffix}")
    assert Plan.load(tmp_path / f"new{suffix}") == new


def test_what_cannot_be_revalidated(timer: Any) -> None:
    plan = foreign(timer)
    with pytest.raises(PlanMismatchError, match="0 has other weights"):
        plan.revalidate(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32)))
    with pytest.raises(AutoplanError, match="planned already"):
        plan.revalidate(apply_plan(model(), plan))


def test_it_works_with_real_times() -> None:
    original = model()
    with record(original) as recording:
        original(rows())
    plan = make_plan(original, recording, budget=LOOSE, cache=False, candidates=["int8_dynamic"])
    new = plan.revalidate(original, rows(), cache=False)
    assert new.stale == ()
    assert torch.isfinite(apply_plan(original, new)(rows())).all()

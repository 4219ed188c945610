"""The plan as a record: files that come back equal, files that are refused, other points of the frontier, reports."""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoplan import Budget, Plan
from autoplan.errors import AutoplanError, BudgetError, CacheError
from autoplan.records import Call, Estimate, FrontierPoint, LayerPlan, LeftAlone, Option, Outcome

GOLDEN = Path(__file__).parent / "data" / "plan-v1.json"  # written once; every later version must read it


def layer(name: str, us: float, harm: float) -> LayerPlan:
    return LayerPlan(
        name=name,
        aliases=(f"{name}.twin",),
        in_features=16,
        out_features=8,
        has_bias=True,
        dtype="float32",
        calls=(Call("decode", 1, "float32", 4), Call("prefill", 48, "bfloat16", 1)),
        baseline_us=100.0,
        chosen="int8_dynamic",
        reason="fastest, 12.0% of budget",
        options=(
            Option("none", "1:linear", 100.0, 99.0, 101.0, 512, None, 0.0),
            Option("bf16", "1:onednn", 60.0, 59.0, 61.0, 256, 51.5, harm / 100),
            Option("int8_dynamic", "1:int8pack,24:onednn_u8s8", us, us - 1, us + 1, 160, -0.5, harm),
            Option("fp8_dynamic", rejected="out_features 8 is not a multiple of 16"),
        ),
    )


def sample() -> Plan:
    return Plan(
        layers=(layer("a", 20.0, 1e-3), layer("b.c", 40.0, 3e-3)),
        left_alone=(LeftAlone("head", "its weight is tied to embedding.weight"),),
        budget=Budget(divergence=1e-2, preset="high"),
        workloads={"prefill": 1.0, "decode": 256.0},
        mode="eager",
        fingerprints={"environment": {"device": "Some CPU"}, "model": {"layers": {"a": {"digest": "sampled:0"}}}},
        frontier=(FrontierPoint(0.0, 200.0, 1024, 0), FrontierPoint(4.4e-3, 60.0, 320, 2)),
        gap=0.0,
        price_us=1e4,
        outcome=Outcome(
            Estimate(2.0, 1.9, 2.1), "int8_dynamic", None, Estimate(4e-3, 3e-3, 5e-3), False, True, 1.1, 1, ("a note",)
        ),
        planning_seconds={"timing": 1.5, "total": 2.0},
    )


def test_totals() -> None:
    plan = sample()
    assert (plan.us, plan.baseline_us, plan.nbytes, plan.baseline_nbytes) == (60.0, 200.0, 320, 1024)
    assert plan.predicted_divergence == pytest.approx(1.1 * 4e-3)


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_a_file_gives_back_an_equal_plan(tmp_path: Path, suffix: str) -> None:
    plan, file = sample(), tmp_path / f"plan{suffix}"
    plan.save(file)
    loaded = Plan.load(str(file))
    assert loaded == plan
    assert loaded.to_dict() == plan.to_dict()
    again = tmp_path / f"again{suffix}"
    loaded.save(again)
    assert Plan.load(again) == plan


def test_dicts_hold_builtins_only_and_share_nothing() -> None:
    plan = sample()

    def check(value: Any) -> None:
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item)

    data = plan.to_dict()
    check(data)
    data["workloads"]["prefill"] = 2.0
    assert plan == sample()


def test_pickle_and_copies_are_equal() -> None:
    plan = sample()
    assert pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan) == plan


def test_the_golden_file() -> None:
    assert Plan.load(GOLDEN) == sample()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"newer autoplan \(schema 2 > 1\): upgrade"):
        Plan.from_dict(sample().to_dict() | {"schema": 2, "unheard": 1})


DAMAGE: dict[str, tuple[list[Any], Any]] = {
    "plan.layers must be a list": (["layers"], {}),
    "plan.layers[1].options[0].us must be float": (["layers", 1, "options", 0, "us"], "fast"),
    "plan.layers[0].in_features must be int": (["layers", 0, "in_features"], 16.0),
    "plan.layers[0].has_bias must be bool": (["layers", 0, "has_bias"], 1),
    "plan.layers[0].baseline_us must be float": (["layers", 0, "baseline_us"], True),
    "plan.layers[0].calls[0].count must be int": (["layers", 0, "calls", 0, "count"], None),
    "plan.layers[0].options[1].harm must be float": (["layers", 0, "options", 1, "harm"], -1e-9),
    "plan.layers 'a': chose 'int3'": (["layers", 0, "chosen"], "int3"),
    "plan.left_alone[0] must hold name, reason": (["left_alone", 0], {"name": "x"}),
    "plan.budget: budget nbytes must be": (["budget", "nbytes"], 0),
    "plan.budget.divergence must be a finite float": (["budget", "divergence"], float("inf")),
    "plan.budget must hold": (["budget"], "high"),
    "plan.workloads.decode must be float": (["workloads", "decode"], []),
    "plan.workloads must be a mapping": (["workloads"], [1]),
    "plan.fingerprints must be a mapping": (["fingerprints"], None),
    "plan.fingerprints.environment must be a mapping": (["fingerprints", "environment"], 3),
    "plan.fingerprints.model must be a mapping": (["fingerprints", "model"], []),
    "plan.fingerprints.model.layers must be a mapping": (["fingerprints", "model", "layers"], "x"),
    "plan.fingerprints.model.layers.a must be a mapping": (["fingerprints", "model", "layers", "a"], 1),
    "plan.frontier[0].switched must be int": (["frontier", 0, "switched"], "2"),
    "plan.gap must be float": (["gap"], float("nan")),
    "plan.outcome.divergence.high must be float": (["outcome", "divergence", "high"], "x"),
    "plan.outcome.notes[0] must be str": (["outcome", "notes", 0], 1),
    "plan.schema must be int": (["schema"], "1"),
    "plan must hold layers": (["extra"], 1),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_field_is_named(message: str) -> None:
    path, value = DAMAGE[message]
    data = where = sample().to_dict()
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    with pytest.raises(CacheError) as error:
        Plan.from_dict(data)
    assert message in str(error.value)


@pytest.mark.parametrize("data", [None, [], 3, "plan", {}])
def test_what_is_no_plan_at_all(data: Any) -> None:
    with pytest.raises(CacheError, match="plan must hold layers"):
        Plan.from_dict(data)


class Hostile:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for number, data in enumerate([Hostile(made), sample().to_dict() | {"mode": Hostile(made)}, sample()]):
        file = tmp_path / f"{number}.pkl"
        file.write_bytes(pickle.dumps(data))
        with pytest.raises(CacheError):
            Plan.load(file)
    assert not made.exists()


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CacheError):
        Plan.load(tmp_path / "missing.json")
    with pytest.raises(CacheError):
        sample().save(tmp_path / "plan.yaml")
    (tmp_path / "half.json").write_bytes(GOLDEN.read_bytes()[:300])
    with pytest.raises(CacheError):
        Plan.load(tmp_path / "half.json")


# Other points.


def test_another_point_is_solved_from_the_evidence() -> None:
    plan = sample()
    strict = plan.at(divergence=2e-3)
    assert [item.chosen for item in strict.layers] == ["int8_dynamic", "bf16"]
    assert strict.outcome is None
    assert strict.budget == Budget(divergence=2e-3)
    assert strict.predicted_divergence == pytest.approx(1.1 * (1e-3 + 3e-5))
    assert strict.layers[1].reason == "chosen by plan.at(), not measured on the whole model"
    assert strict.layers[0].reason == plan.layers[0].reason
    assert [item.chosen for item in plan.at(divergence=0).layers] == ["none", "none"]
    assert plan == sample()


def test_a_point_of_a_point_is_the_same_point() -> None:
    plan = sample()
    limit = 4.2e-3  # with kappa 1.1 the last step costs 4.4e-3
    assert plan.at(divergence=1e-3).at(divergence=limit).us == plan.at(divergence=limit).us == 80.0
    assert Plan.from_dict(plan.at(divergence=1e-3).to_dict()) == plan.at(divergence=1e-3)


def test_a_speed_up_or_a_size_can_be_asked_for() -> None:
    plan = sample()
    faster = plan.at(speedup=1.5)
    assert plan.baseline_us / faster.us >= 1.5
    assert [item.chosen for item in faster.layers] == ["bf16", "bf16"]
    assert plan.at(nbytes=320).nbytes <= 320
    assert plan.at(speedup=2.0, divergence=1e-2).us <= 100


@pytest.mark.parametrize(
    "wanted",
    [{}, {"speedup": 50}, {"speedup": 0}, {"nbytes": 10}, {"divergence": -1}, {"speedup": 3, "divergence": 1e-5}],
)
def test_points_that_do_not_exist(wanted: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        sample().at(**wanted)


# Reports.


@pytest.mark.parametrize("plan", [sample(), sample().at(divergence=2e-3), replace(sample(), layers=())])
def test_reports_in_every_format(plan: Plan) -> None:
    for text in (plan.report(), plan.report("markdown")):
        assert "head" in text
        assert all(item.name in text for item in plan.layers)
    json.loads(plan.report("json"))
    rows = list(csv.reader(io.StringIO(plan.report("csv"))))
    assert len({len(row) for row in rows}) == 1
    with pytest.raises(AutoplanError):
        plan.report("pdf")

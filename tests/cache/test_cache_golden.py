"""Files of schema version 1, written once by autoplan 0.1.0: every later version reads them. Never change them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from autoplan import Budget, Plan, PlanCache
from autoplan import plan as plan_room
from autoplan.cache import codec, form
from autoplan.cache.store import entry
from autoplan.errors import CacheError
from autoplan.records import Call, Estimate, FrontierPoint, LayerPlan, LeftAlone, Option, Outcome

GOLDEN = Path(__file__).parent / "golden"

PLAN = Plan(
    layers=(
        LayerPlan(
            name="encoder.0.mlp",
            aliases=("encoder.1.mlp",),
            in_features=64,
            out_features=96,
            has_bias=True,
            dtype="bfloat16",
            calls=(Call("prefill", 48, "bfloat16", 2), Call("decode", 1, "bfloat16", 64)),
            baseline_us=120.5,
            chosen="int8_dynamic",
            reason="fastest, 12.0% of budget",
            options=(
                Option("none", "1:linear", 120.5, 119.0, 122.0, 12480, None, 0.0),
                Option("int8_dynamic", "1:int8pack,24:onednn_u8s8", 60.25, 59.5, 61.0, 6912, 38.5, 1.25e-05),
                Option("fp8_dynamic", rejected="this CPU has no such kernel"),
            ),
            group="group 1",
        ),
    ),
    left_alone=(LeftAlone("head", "its weight is tied to embedding.weight"),),
    budget=Budget(divergence=0.01, preset="high"),
    workloads={"prefill": 1.0, "decode": 256.0},
    mode="compiled",
    fingerprints={
        "environment": {"device_type": "cpu", "device": "Some CPU", "threads": 2, "triton": None},
        "model": {"digest": "0" * 64, "layers": {"encoder.0.mlp": {"shape": [96, 64], "digest": "sampled:00"}}},
        "data": {"digest": "1" * 64},
        "options": {"budget": "high", "naïve": "\N{SNOWMAN}"},
    },
    frontier=(FrontierPoint(0.0, 120.5, 12480, 0), FrontierPoint(1.25e-05, 60.25, 6912, 1)),
    gap=0.0,
    price_us=4.82e06,
    outcome=Outcome(
        Estimate(2.0, 1.9, 2.1), "int8_dynamic", Estimate(1.1, 1.0, 1.2), Estimate(1.5e-05, 1e-05, 2e-05),
        True, True, 1.15, 2, ("a note",),
    ),
    planning_seconds={"timing": 1.5, "total": 2.0},
)  # fmt: skip

AS_WRITTEN: Any = codec.unsealed(codec.read(GOLDEN / "plan-v1.json"))  # without the fields that came later

RECORDS: dict[form.Kind, tuple[dict[str, Any], dict[str, Any]]] = {
    "timings": (
        {"environment": {"device": "Some CPU", "features": ["avx2", "amx_int8"]}, "shape": {"rows": 1, "bias": False}},
        {"candidate": "bf16", "ratio": 0.5, "rounds": 30, "note": ""},
    ),
    "sensitivities": (
        {"layer": "encoder.0", "weights": ["sampled:00", None]},
        {"harm": 1e-05, "sqnr_db": 41.5, "note": "naïve", "held_out": True},
    ),
    "plans": ({"model": {"digest": "0" * 64}, "options": {"budget": [0.01, None, None]}}, AS_WRITTEN),
}


@pytest.mark.parametrize("name", ["plan-v1.json", "plan-v1.pkl"])
def test_a_plan_of_schema_1(name: str) -> None:
    assert Plan.load(GOLDEN / name) == PLAN


@pytest.mark.parametrize(
    "name", ["cache-v1.json", "cache-v1.pkl", "cache-v1-lines.pkl", "cache-v1-unsealed.json", "cache-v1"]
)
def test_a_cache_of_schema_1(name: str, tmp_path: Path) -> None:
    if (GOLDEN / name).is_dir():
        shutil.copytree(GOLDEN / name, tmp_path / name)
    else:
        shutil.copy(GOLDEN / name, tmp_path / name)
    cache = PlanCache(tmp_path / name)
    assert len(cache) == len(RECORDS)
    assert cache.problems() == {}
    for kind, (fingerprint, value) in RECORDS.items():
        key, record = entry(fingerprint, value)
        assert cache.get(kind, key) == record
    found = cache.get("plans", cache.keys("plans")[0])
    assert found is not None
    assert Plan.from_dict(found["value"]) == PLAN


@pytest.mark.skipif(form.SCHEMA > 1, reason="this version writes another schema")
def test_what_is_written_today_is_the_golden_file(tmp_path: Path) -> None:
    """To the byte: whoever changes the form of the file makes a new schema, and a migration."""
    PlanCache.load(GOLDEN / "cache-v1.pkl").save(tmp_path / "cache.json")
    PlanCache.load(GOLDEN / "cache-v1.json").save(tmp_path / "cache.pkl")
    assert (tmp_path / "cache.json").read_bytes() == (GOLDEN / "cache-v1.json").read_bytes()
    assert (tmp_path / "cache.pkl").read_bytes() == (GOLDEN / "cache-v1-lines.pkl").read_bytes()
    PlanCache(f"{tmp_path}/cache/").merge(PlanCache.load(tmp_path / "cache.json"))
    for file in (GOLDEN / "cache-v1").rglob("*.json"):
        assert (tmp_path / "cache" / file.relative_to(GOLDEN / "cache-v1")).read_bytes() == file.read_bytes()


def test_a_plan_is_migrated_and_a_newer_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_room, "SCHEMA", 3)
    monkeypatch.setitem(plan_room.MIGRATIONS, 1, lambda data: {**data, "mode": "eager"})
    monkeypatch.setitem(plan_room.MIGRATIONS, 2, lambda data: {**data, "gap": data["gap"] + 0.5})
    plan = Plan.load(GOLDEN / "plan-v1.json")
    assert (plan.schema, plan.mode, plan.gap) == (3, "eager", 0.5)
    monkeypatch.setitem(plan_room.MIGRATIONS, 2, lambda data: data["what is not there"])
    with pytest.raises(CacheError, match="not of schema 2"):
        Plan.load(GOLDEN / "plan-v1.json")
    with pytest.raises(CacheError, match=r"newer autoplan \(schema 4 > 3\): upgrade"):
        Plan.from_dict(codec.sealed({**PLAN.to_dict(), "schema": 4}))
    with pytest.raises(CacheError, match="schema 0 is not a version"):
        Plan.from_dict({**PLAN.to_dict(), "schema": 0})


def test_a_plan_that_was_edited_by_hand_says_so(tmp_path: Path) -> None:
    edited: Any = codec.read(GOLDEN / "plan-v1.json")
    edited["layers"][0]["reason"] = "because I say so"
    codec.write(tmp_path / "plan.json", edited)
    with pytest.raises(CacheError, match="delete that line after editing"):
        Plan.load(tmp_path / "plan.json")
    del edited["digest"]
    codec.write(tmp_path / "plan.json", edited)
    assert Plan.load(tmp_path / "plan.json").layers[0].reason == "because I say so"

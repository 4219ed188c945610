"""Plan once, ship the file: a fresh process makes the same choices, times nothing, and computes the same bits."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import Tensor, nn

from autoplan import Budget, Plan, PlanCache, apply_plan, autoplan, make_plan, plan_of, record
from autoplan.errors import PlanMismatchError

# What both processes run.
SOURCE = """
import torch
from torch import nn

def model():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))

def rows():
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(1))

PIN = {"0": "int8_dynamic", "2": "int8_weight_only", "4": "bf16"}
CANDIDATES = ["none", *PIN.values()]
"""
_made: dict[str, Any] = {}
exec(SOURCE, _made)
PIN: dict[str, str] = _made["PIN"]
CANDIDATES: list[str] = _made["CANDIDATES"]
BUDGET = Budget(divergence=0.5)

# The other process: hooks count every forward of every module and every timing.
ELSEWHERE = """
import pickle, sys
from contextlib import contextmanager
from pathlib import Path
from autoplan import Budget, Plan, PlanCache, apply_plan, autoplan, plan_of, timing

folder = Path(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))

@contextmanager
def forwards():
    seen = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append(module))
    yield seen
    handle.remove()

def output(planned):
    with torch.no_grad():
        return planned(rows())

def replay(plan):
    with forwards() as seen:
        planned = apply_plan(model(), plan)
    assert not seen, "a forward was run"
    assert timing.timings_made == 0, "something was timed"
    assert plan_of(planned) == plan
    return planned
"""


def elsewhere(tmp_path: Path, script: str) -> dict[str, Any]:
    """What the script puts into `found`, run by a fresh interpreter in another folder."""
    away = tmp_path / "another folder"
    away.mkdir(exist_ok=True)
    whole = f"{SOURCE}{ELSEWHERE}\nfound = {{}}\n{script}\ntorch.save(found, folder / 'found.pt')\n"
    command = [sys.executable, "-W", "error::UserWarning:autoplan", "-c", whole]
    done = subprocess.run(
        [*command, str(tmp_path), str(torch.get_num_threads())], cwd=away, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "another environment" not in done.stderr
    found: dict[str, Any] = torch.load(tmp_path / "found.pt")
    return found


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process finds this very autoplan, wherever it runs."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))


def model() -> nn.Module:
    made: nn.Module = _made["model"]()
    return made


def rows() -> Tensor:
    made: Tensor = _made["rows"]()
    return made


def planned(cache: PlanCache | str | Path | bool, **options: Any) -> Plan:
    original = model()
    with record(original) as recording:
        original(rows())
    return make_plan(original, recording, budget=BUDGET, candidates=CANDIDATES, pin=PIN, cache=cache, **options)


def output(module: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = module(rows())
    return y


def test_a_shipped_plan_and_a_shipped_cache_replay_in_another_process(timer: Any, tmp_path: Path) -> None:
    cache = PlanCache()
    plan = planned(cache)
    assert timer.races > 0
    plan.save(tmp_path / "plan.json")
    plan.save(tmp_path / "plan.pkl")
    (tmp_path / "plan.pickle").write_bytes(pickle.dumps(plan))
    cache.save(tmp_path / "cache.json")
    cache.save(tmp_path / "cache.pkl")
    PlanCache(f"{tmp_path}/cache/").merge(cache)
    (tmp_path / "cache.pickle").write_bytes(pickle.dumps(cache))
    expected = output(apply_plan(model(), plan))
    assert not torch.equal(expected, output(model()))
    found = elsewhere(
        tmp_path,
        """
for name in ("plan.json", "plan.pkl", "plan.pickle"):
    file = folder / name
    plan = pickle.loads(file.read_bytes()) if name.endswith("pickle") else Plan.load(file)
    found[name] = plan.to_dict(), output(replay(plan))
for name in ("cache.json", "cache.pkl", "cache", "cache.pickle"):
    file = folder / name
    cache = pickle.loads(file.read_bytes()) if name.endswith("pickle") else PlanCache(file, read_only=True)
    with forwards() as seen:
        quick = autoplan(model(), rows(), budget=Budget(divergence=0.5), candidates=CANDIDATES, pin=PIN, cache=cache)
    assert timing.timings_made == 0, "something was timed"
    assert sum(isinstance(module, nn.Sequential) for module in seen) == 1, "recorded, and run no more"
    found[name] = plan_of(quick).to_dict(), output(quick)
found["compiled"] = plan.to_dict(), output(torch.compile(replay(plan)))
""",
    )
    assert len(found) == 8
    compiled = output(torch.compile(apply_plan(model(), plan)))
    for name, (data, y) in found.items():
        assert data == plan.to_dict(), name
        assert [layer["chosen"] for layer in data["layers"]] == list(PIN.values())
        assert torch.equal(y, compiled if name == "compiled" else expected), name


def test_a_plan_and_a_cache_at_a_url(timer: Any) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    plan = planned("memory://fleet/cache")
    expected = output(apply_plan(model(), plan))
    races, comparisons = timer.races, timer.comparisons
    forwards: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: forwards.append(module))
    try:
        for url in ("memory://fleet/plan.json", "memory://fleet/plan.pkl"):
            plan.save(url)
            forwards.clear()
            again = apply_plan(model(), Plan.load(url))
            assert not forwards
            assert plan_of(again) == plan
            assert torch.equal(output(again), expected)
    finally:
        handle.remove()
    assert planned("memory://fleet/cache") == plan
    assert (timer.races, timer.comparisons) == (races, comparisons)
    memory.store.clear()


def forged() -> nn.Module:
    """The model with two words of a weight exchanged, which no sampled digest sees (they are in one of its sums)."""
    twin = large()
    with torch.no_grad():
        words = twin[0].weight.view(torch.int64).view(-1)
        words[[1, 4094]] = words[[4094, 1]]
    assert not torch.equal(twin[0].weight, large()[0].weight)
    return twin


def large() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(160, 128), nn.ReLU(), nn.Linear(128, 64))


def test_strict_digests_cover_every_byte(timer: Any, tmp_path: Path) -> None:
    x = torch.randn(24, 160)
    plans = {}
    for strict in (False, True):
        quick = autoplan(large(), x, budget=BUDGET, cache=False, strict=strict)
        plan_of(quick).save(tmp_path / "plan.json")
        plans[strict] = Plan.load(tmp_path / "plan.json")
        digests = [layer["digest"] for layer in plans[strict].fingerprints["model"]["layers"].values()]
        assert len(digests) == 2
        assert all(digest.startswith("strict:" if strict else "sampled:") for digest in digests)
    apply_plan(large(), plans[False], weights="check")
    apply_plan(forged(), plans[False], weights="check")  # what a sample cannot see
    apply_plan(large(), plans[True], weights="check")
    apply_plan(large(), plans[True], weights="strict")
    for weights in ("check", "strict"):
        twin = forged()
        with pytest.raises(PlanMismatchError, match="0 has other weights"):
            apply_plan(twin, plans[True], weights=weights)  # type: ignore[arg-type]
        assert all(type(module) in (nn.Linear, nn.ReLU) for module in twin)
    apply_plan(forged(), plans[True], weights="skip")
    with pytest.raises(PlanMismatchError, match="make it with strict=True"):
        apply_plan(large(), plans[False], weights="strict")


def test_a_strict_plan_is_found_again_by_strict_planning_only(timer: Any) -> None:
    cache, x = PlanCache(), torch.randn(24, 160)
    for strict, known in ((True, False), (True, True), (False, False)):
        before = timer.comparisons
        autoplan(large(), x, budget=BUDGET, cache=cache, strict=strict)
        assert (timer.comparisons == before) is known

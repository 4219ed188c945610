"""Ranks that plan together: the work is split, the plans are equal to the byte, and what fails on one fails on all."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoplan import AutoplanError, Plan, autoplan
from autoplan.distributed import together

ROOT = Path(__file__).resolve().parent.parent

# What every rank runs: scenario by scenario, on one process group. Times are given, so that no race takes long.
SCRIPT = """
import datetime, json, os, sys, time
import torch, torch.distributed as dist
from torch import nn
from autoplan import Budget, PlanCache, apply_plan, autoplan, contention, make_plan, plan_of, record, timing
from autoplan.cache import fingerprint
from autoplan.timing import Timing

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=40))
rank, size, folder = dist.get_rank(), dist.get_world_size(), sys.argv[1]
races = []  # of this rank: when, and what
breaks = None  # called in every race

def race(arms, *, baseline, **_):
    began = time.monotonic()
    if breaks:
        breaks()
    time.sleep(0.01)
    weight = arms[0].calls[0].func.weight if hasattr(arms[0].calls[0], "func") else None
    races.append([began, time.monotonic(), list(weight.shape), sorted(arm.name for arm in arms)])
    ratio = lambda arm: 1.0 if arm.name == baseline else 0.4 if arm.group == "int8_dynamic" else 1.5
    return {arm.name: Timing(arm.name, arm.group, 100.0, r, r, r, 8, "") for arm in arms for r in [ratio(arm)]}

def compare(calls, *, baseline, **_):
    for call in calls.values():
        call()
    times = {"plan": 1.0, "float": 2.0, "uniform": 1.0}
    return {name: Timing(name, name, 100.0, times[name], times[name], times[name], 8, "") for name in calls}

timing.race, timing.compare = race, compare
contention.waited_ns = lambda: 0  # tests beside this one take the CPUs

def model(seed=0, width=64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, width), nn.ReLU(), nn.Linear(width, 32),
                         nn.ReLU(), nn.Linear(32, 64, bias=False), nn.Linear(64, 80))

def rows(seed=1, count=24):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))

forwards = []

def plan(made=None, x=None, **options):
    races.clear()
    forwards.clear()
    made = made or model()
    options = {"budget": Budget(divergence=0.9), "candidates": ["int8_dynamic", "bf16"], "cache": False} | options
    with record(made) as recording:
        made(rows() if x is None else x)
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: forwards.append(1) if isinstance(module, nn.Sequential) else None
    )
    try:
        return make_plan(made, recording, **options)
    finally:
        handle.remove()

def told(**options):
    began = time.monotonic()
    try:
        found = plan(**options)
    except Exception as error:
        return {"error": str(error), "kind": type(error).__name__, "seconds": time.monotonic() - began}
    return {"plan": found.to_dict(), "races": list(races), "forwards": len(forwards)}

def only(which, function):
    global breaks
    breaks = function if rank == which else None

def boom():
    raise ZeroDivisionError("boom on purpose")

"""

SCENARIOS = {
    "alike": """
made = plan()
made.save(f"{folder}/{rank}.plan.json")
found = {"plan": made.to_dict(), "races": list(races), "forwards": len(forwards)}
""",
    "autoplan": """
quick = autoplan(model(), rows(), budget=Budget(divergence=0.9), candidates=["int8_dynamic"], cache=False)
found = {"plan": plan_of(quick).to_dict(), "types": [type(module).__name__ for module in quick]}
lazy = autoplan(model(), budget=Budget(divergence=0.9), candidates=["int8_dynamic"], cache=False)
lazy(rows())
found["lazy"] = plan_of(lazy).to_dict()["layers"]
""",
    "caches": """
mine = PlanCache()
first = plan(cache=mine)
timed = len(races)
again = plan(cache=mine)
found = {"same": first == again, "timed": timed, "timed again": len(races), "records": len(mine.keys("timings"))}
plan(cache=mine, seed=1)  # another plan, of known timings
found["timed for another plan"] = len(races)
""",
    "other inputs": "found = told(x=rows(seed=rank, count=16 + 8 * rank))",
    "raises while timing": "only(1, boom); found = told(); only(1, None)",
    "raises while deciding": """
judge = boom if rank == 0 else None
found = told(evaluate=lambda model: boom())
""",
    "raises while recording": """
class Fails(nn.Module):
    def forward(self, x):
        boom()
try:
    autoplan(Fails() if rank == size - 1 else model(), rows(), cache=False)
    found = {}
except Exception as error:
    found = {"error": str(error), "kind": type(error).__name__}
""",
    "other arguments": "found = told(budget=Budget(divergence=0.1 if rank else 0.2))",
    "other weights": "found = told(made=model(seed=rank))",
    "shards": """
class Parallel(nn.Module):
    "Column-parallel, then row-parallel: each rank holds a part of the inner features, and the sum is the output."
    def __init__(self):
        super().__init__()
        whole = model()
        wide, part = 96 // size, slice(rank * 96 // size, (rank + 1) * 96 // size)
        self.up, self.down = nn.Linear(64, wide), nn.Linear(wide, 64, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(whole[0].weight[part])
            self.up.bias.copy_(whole[0].bias[part])
            self.down.weight.copy_(whole[2].weight[:, part])
    def forward(self, x):
        y = self.down(torch.relu(self.up(x)))
        dist.all_reduce(y)
        return y

made = Parallel()
with torch.no_grad():
    expected = made(rows())
options = {"budget": Budget(divergence=0.5), "candidates": ["int8_dynamic"], "cache": False}
races.clear()
quick = autoplan(made, rows(), **options)
timed = list(races)
with torch.no_grad():
    error = (quick(rows()) - expected).square().sum() / expected.square().sum()
again = apply_plan(Parallel(), plan_of(quick))  # its weights are among those that were planned
found = {"plan": plan_of(quick).to_dict(), "races": timed, "error": None, "divergence": error.item()}
del found["error"]
""",
    "other shapes": "found = told(made=model(width=48 if rank == 1 else 64))",
    "other devices": """
real = fingerprint.environment
def environment(*arguments):
    return real(*arguments) | {"device": f"kind {rank % 2}"}
fingerprint.environment = environment
found = told()
found["per device"] = told(distributed="per device")
fingerprint.environment = real
""",
    "alone": "found = told(distributed=False)",
    "of a group": """
groups = [dist.new_group(list(range(start, start + 2)), timeout=datetime.timedelta(seconds=30))
          for start in range(0, size, 2)]
found = told(distributed=groups[rank // 2])
""",
    "not in the group": """
pair = dist.new_group([0, 1])
found = told(distributed=pair)
""",
    "one does not come": """
import logging
from autoplan import distributed as room
class Ear(logging.Handler):
    def emit(self, record):
        heard.append(record.getMessage())
heard, room._PATIENCE = [], 1.0
logging.getLogger("autoplan").addHandler(Ear())
dist.barrier()  # the ranks come from different work, and the group has 3 s to form, too
short = dist.new_group(timeout=datetime.timedelta(seconds=3))
found = told(distributed=short) if rank != 1 else {}
found["heard"] = heard
dist.barrier()
""",
    "one is killed": """
only(1, lambda: os._exit(0))
found = told()
""",  # last: it ends the process group
}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each scenario gave on each rank; one launch for all of them, as starting ranks takes long."""
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    (folder / "script.py").write_text(
        SCRIPT
        + "results = {}\n"
        + "\n".join(
            f"found = None\n{code}\nresults[{name!r}] = found\n"
            "json.dump(results, open(f'{folder}/{rank}.json', 'w'))" for name, code in SCENARIOS.items()
        )
    )  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    done = subprocess.run(
        [*command, str(folder / "script.py"), str(folder)],
        capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]
    for rank, own in enumerate(found):
        own["alike"]["file"] = (folder / f"{rank}.plan.json").read_bytes()
    return found


Found = list[dict[str, Any]]


def plans(found: Found, scenario: str) -> list[dict[str, Any]]:
    """Each rank's plan in a scenario, which then raised nowhere."""
    assert not [own[scenario]["error"] for own in found if "error" in own[scenario]]
    return [own[scenario]["plan"] for own in found]


def test_work_is_split_and_each_key_is_timed_once(ranks: Found) -> None:
    races = [race for own in ranks for race in own["alike"]["races"]]
    timed = [tuple(shape) for _, _, shape, _ in races]
    assert sorted(timed) == [(32, 64), (64, 32), (64, 96), (80, 64), (96, 64)]
    counts = [len(own["alike"]["races"]) for own in ranks]
    assert max(counts) - min(counts) <= 1
    assert all({"none/linear", "int8_dynamic/onednn_u8s8", "bf16/linear"} <= set(arms) for *_, arms in races)
    assert ranks[0]["alike"]["forwards"] > 0
    assert not any(own["alike"]["forwards"] for own in ranks[1:]), "solved and judged once"


def test_ranks_on_one_cpu_time_one_after_the_other(ranks: Found) -> None:
    spans = sorted(race[:2] for own in ranks for race in own["alike"]["races"])  # of one clock: they share a machine
    assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(spans))


def test_all_ranks_hold_the_same_bytes(ranks: Found) -> None:
    files = {own["alike"]["file"] for own in ranks}
    assert len(files) == 1
    assert Plan.from_dict(json.loads(files.pop())) == Plan.from_dict(ranks[-1]["alike"]["plan"])
    assert [layer["chosen"] for layer in ranks[0]["alike"]["plan"]["layers"]] == ["int8_dynamic"] * 5


def test_autoplan_changes_the_model_of_every_rank(ranks: Found) -> None:
    assert all(plan == plans(ranks, "autoplan")[0] for plan in plans(ranks, "autoplan"))
    for own in ranks:
        assert own["autoplan"]["types"].count("PlannedLinear") == 5
        assert [layer["chosen"] for layer in own["autoplan"]["lazy"]] == ["int8_dynamic"] * 5


def test_what_the_cache_of_any_rank_knows_is_not_timed_again(ranks: Found) -> None:
    assert sum(own["caches"]["timed"] for own in ranks) == 5
    for own in ranks:
        assert own["caches"]["same"]
        assert own["caches"]["timed again"] == own["caches"]["timed for another plan"] == 0


def test_replicas_with_inputs_of_their_own_get_the_plan_of_the_first(ranks: Found) -> None:
    found = plans(ranks, "other inputs")
    assert all(plan == found[0] for plan in found)
    assert {call["rows"] for layer in found[0]["layers"] for call in layer["calls"]} == {16}
    assert sum(len(own["other inputs"]["races"]) for own in ranks) == 5


@pytest.mark.parametrize(
    ("scenario", "culprit"), [("raises while timing", 1), ("raises while deciding", 0), ("raises while recording", -1)]
)
def test_a_rank_that_raises_ends_all_with_its_message(ranks: Found, scenario: str, culprit: int) -> None:
    culprit %= len(ranks)
    for rank, own in enumerate(ranks):
        if rank == culprit:
            assert (own[scenario]["kind"], own[scenario]["error"]) == ("ZeroDivisionError", "boom on purpose")
        else:
            expected = f"planning failed on rank {culprit}: ZeroDivisionError: boom on purpose"
            assert (own[scenario]["kind"], own[scenario]["error"]) == ("AutoplanError", expected)


@pytest.mark.parametrize(
    ("scenario", "problem"),
    [
        ("other arguments", "ask for different plans"),
        ("other shapes", "have layers of different shapes"),
        ("other devices", "run on unlike devices"),
    ],
)
def test_ranks_that_cannot_share_a_plan_are_refused_on_all(ranks: Found, scenario: str, problem: str) -> None:
    errors = {own[scenario]["error"] for own in ranks}
    assert len(errors) == 1
    assert f"ranks 0 and 1 {problem}" in (error := errors.pop())
    assert "distributed=False" in error


def test_models_of_their_own_are_refused(ranks: Found) -> None:
    for own in ranks:
        assert "ranks hold other weights, and do not talk" in own["other weights"]["error"]


def test_shards_of_one_model_are_judged_as_a_whole(ranks: Found) -> None:
    found = plans(ranks, "shards")
    assert all(plan == found[0] for plan in found)
    wide = 96 // len(ranks)
    assert [(layer["out_features"], layer["in_features"]) for layer in found[0]["layers"]] == [(wide, 64), (64, wide)]
    assert [layer["chosen"] for layer in found[0]["layers"]] == ["int8_dynamic"] * 2
    assert sum(len(own["shards"]["races"]) for own in ranks) == 2
    digests = found[0]["fingerprints"]["model"]["layers"]["up"]["shards"]
    assert len(set(digests)) == len(ranks)
    divergence = ranks[0]["shards"]["divergence"]  # of the whole, with every shard quantized
    assert 0 < divergence < 1e-2
    assert found[0]["outcome"]["divergence"]["value"] == pytest.approx(divergence, rel=0.5)


def test_a_plan_per_kind_of_device(ranks: Found) -> None:
    found = [own["other devices"]["per device"] for own in ranks]
    for kind in (0, 1):
        same = found[kind::2]
        assert all(own["plan"] == same[0]["plan"] for own in same)
        assert same[0]["plan"]["fingerprints"]["environment"]["device"] == f"kind {kind}"
        assert sum(len(own["races"]) for own in same) == 5


def test_a_rank_can_plan_alone(ranks: Found) -> None:
    assert all(len(own["alone"]["races"]) == 5 for own in ranks)


def test_a_group_plans_for_itself(ranks: Found) -> None:
    for start in range(0, len(ranks), 2):
        pair = ranks[start : start + 2]
        assert pair[0]["of a group"]["plan"] == pair[1]["of a group"]["plan"]
        assert sum(len(own["of a group"]["races"]) for own in pair) == 5
    for own in ranks[2:]:
        assert "not in the process group" in own["not in the group"]["error"]
    assert all("plan" in own["not in the group"] for own in ranks[:2])


def test_a_rank_that_does_not_come_ends_the_others_within_the_timeout(ranks: Found) -> None:
    for rank, own in enumerate(ranks):
        if rank != 1:
            assert "call autoplan on all of them, or with distributed=False" in own["one does not come"]["error"]
            assert own["one does not come"]["seconds"] < 30  # the group waits 3 s, torch's own 30 minutes
            assert any(line.startswith("still waiting") for line in own["one does not come"]["heard"])


def test_a_rank_that_is_killed_ends_the_others(ranks: Found) -> None:
    for rank, own in enumerate(ranks):
        if rank != 1:
            assert f"planning on {len(ranks)} ranks ended" in own["one is killed"]["error"]


def test_without_torch_distributed_there_is_nobody_to_ask() -> None:
    for distributed in (None, False, "per device"):
        with together(distributed) as ranks:
            assert ranks.alone
            assert ranks.is_first
            assert ranks.gather(3) == [3]
            assert ranks.from_first(lambda: 4) == 4
            assert ranks.share([1, 2, 3]) == [1, 2, 3]


@pytest.mark.parametrize("distributed", [True, "per rank", 2])
def test_what_distributed_can_be(distributed: Any) -> None:
    with pytest.raises(AutoplanError, match='None, False, "per device" or a process group'):
        autoplan(nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8), cache=False, distributed=distributed)

"""One plan for two workloads: prefill and decode of a decoder, against plans made for one of them and uniform plans.

    python benchmarks/workloads.py                 # Llama-shaped, bfloat16, 4 layers of hidden 2048; about 8 minutes
    python benchmarks/workloads.py --small         # about a minute; says nothing about speed

A prefill of 512 rows counts once, a decode step of 1 row 256 times. Plans are made for both workloads together, for
each alone, and with each single candidate wherever it is open; all are then timed in one interleaved run on both
workloads, eager, and so is the float model. Weights are random, so budgets are loose: this is about time. Prints a
table, writes a CSV with device and versions. No plan may be faster than the joint one by more than its interval.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from result_files import folder_of, measured_on, write_csv
from tabulate import tabulate
from torch import nn
from workbench.workloads import llama

from autoplan import Budget, Plan, PlanCache, make_plan, record
from autoplan.apply import stand_ins_of
from autoplan.records import EAGER
from autoplan.validate import Whole, whole_model_times

CANDIDATES = ["int8_weight_only", "int8_dynamic", "int8_dual", "int4_g128", "int4_dynamic_g128"]
WEIGHTS = {"prefill": 1.0, "decode": 256.0}
VOCABULARY = 4096  # less than Llama's
ANYTHING = Budget(divergence=1e6)  # of random weights no output means anything


def planned(model: nn.Module, rows: dict[str, int], workloads: Iterable[str], cache: PlanCache, seed: int,
            candidates: Sequence[str] = CANDIDATES, pin: str | None = None) -> Plan:  # fmt: skip
    """A plan made for these workloads, three prompts each."""
    with torch.no_grad(), record(model, seed=seed) as recording:
        for workload in workloads:
            with recording.workload(workload, weight=WEIGHTS[workload]):
                for _ in range(3):
                    model(torch.randint(VOCABULARY, (1, rows[workload])))
    pins = None if pin is None else {"*": pin}
    return make_plan(
        model, recording, candidates=candidates, pin=pins, budget=ANYTHING, cache=cache, compiled=False, seed=seed
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="of the final comparison (default 120, small 2)")
    parser.add_argument("--out", type=Path, help="CSV file (default: benchmarks/results/<device>/workloads.csv)")
    arguments = parser.parse_args(argv)
    began, seed = time.monotonic(), arguments.seed
    torch.manual_seed(seed)
    width, layers = (512, 1) if arguments.small else (2048, 4)  # all widths are multiples of int4_g128's groups
    model, cache = llama(width, layers, VOCABULARY).eval(), PlanCache()
    rows = {"prefill": 32 if arguments.small else 512, "decode": 1}
    plans = {"both workloads": planned(model, rows, WEIGHTS, cache, seed)}
    for workload in WEIGHTS:
        plans[f"{workload} alone"] = planned(model, rows, [workload], cache, seed)
    for name in CANDIDATES:
        plans[f"uniform {name}"] = planned(model, rows, WEIGHTS, cache, seed, [name], pin=name)
    with torch.no_grad(), record(model, seed=seed) as recording:
        for workload, count in rows.items():
            with recording.workload(workload, weight=WEIGHTS[workload]):
                model(torch.randint(VOCABULARY, (1, count)))
    whole = Whole(model, partial(stand_ins_of, model), recording.inputs, WEIGHTS, None, EAGER, seed)
    variants = {"float": whole.swapped({})}
    variants |= {name: whole.swapped(whole.stand_ins(plan.layers)) for name, plan in plans.items()}
    seconds = arguments.seconds or (2 if arguments.small else 120)
    with torch.no_grad():
        ratios = whole_model_times(whole, variants, baseline="both workloads", seconds=seconds).ratios
    table = [
        {"plan": name, "time": ratio.value, "low": ratio.low, "high": ratio.high, "layers": chosen(plans.get(name))}
        for name, ratio in sorted(ratios.items(), key=lambda item: item[1].value)
    ]
    print("weighted time of a prefill and 256 decode steps / that of the plan for both, paired, with 95 % intervals")
    print(tabulate(table, headers="keys", floatfmt=".3f"))
    environment = plans["both workloads"].fingerprints["environment"]
    out = arguments.out or folder_of(environment) / "workloads.csv"
    write_csv(out, table, measured_on(environment, seed=seed))
    print(f"{time.monotonic() - began:.0f} s, seed {seed}; written to {out}")
    return 0


def chosen(plan: Plan | None) -> str:
    """How many layers got which candidate."""
    if plan is None:
        return "-"
    counts = Counter(layer.chosen for layer in plan.layers)
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


if __name__ == "__main__":
    sys.exit(main())

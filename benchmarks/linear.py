"""Single layers: the best kernel of every candidate against plain F.linear of the same dtype, in one interleaved run.

    python benchmarks/linear.py                        # the default shapes, float32 and bfloat16, eager
    python benchmarks/linear.py --shapes 4096x4096 --rows 1 8 256 --dtypes float32

For each shape and number of rows, all candidates are raced on rotated copies of random weights, as for a model that no
cache holds. What the planner would run is then raced against plain F.linear a second time, on fresh weights: that ratio
is the one to quote, for it did not take part in the choice. The floor of a kernel is the time that its bytes or its
products take at the rates that this machine reaches at most (workbench/floor.py), whichever is more; `of_floor` is the
floor over the time: 1 at best, but where a cache holds the weights. Prints a table and writes a CSV with device,
versions and those rates.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from result_files import folder_of, measured_on, write_csv
from tabulate import tabulate
from workbench import floor

from autoplan import benchmark, kernels, options
from autoplan.cache import fingerprint
from autoplan.candidates import find_candidate
from autoplan.candidates.base import select
from autoplan.records import Call, Device, LayerProfile, Option
from autoplan.selection import PLAIN, kernel_names

SHAPES = ("64x64", "384x384", "1536x384", "384x1536", "4096x4096", "11008x4096")
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 1024)
CANDIDATES = ("none", "bf16", "int8_weight_only", "int8_dynamic", "int4_g128", "int4_dynamic_g128",
              "fp8_weight_only", "fp8_dynamic")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES)
    parser.add_argument("--mode", choices=["eager", "compiled"], default="eager")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file (default: benchmarks/results/<device>/linear.csv)")
    arguments = parser.parse_args(argv)
    environment = fingerprint.environment("cpu", fingerprint.source_digest(kernels))
    print(f"{environment['device']}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.mode}")
    rates = floor.rates_of_cpu()
    about = {"read_gb_per_s": rates.bandwidth / 1e9} | {
        f"{kind}_tops": rates.operations[kind] / 1e12 for kind in floor.KINDS
    }
    print(", ".join(f"{name} {rate:.3g}" for name, rate in about.items()))
    began, rows = time.monotonic(), []
    for dtype in arguments.dtypes:
        for shape in arguments.shapes:
            out_features, in_features = map(int, shape.split("x"))
            for count in arguments.rows:
                calls = (Call("default", count, dtype, 1),)
                profile = LayerProfile("layer", (), in_features, out_features, True, dtype, "cpu", calls)
                rows.append(measure(profile, environment, arguments, rates))
                print(tabulate([rows[-1]], tablefmt="plain"), file=sys.stderr)
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    out = arguments.out or folder_of(environment) / "linear.csv"
    rounded = {name: round(rate, 3) for name, rate in about.items()}
    write_csv(out, rows, measured_on(environment, mode=arguments.mode, **rounded))
    print(f"{len(rows)} cases in {time.monotonic() - began:.0f} s; written to {out}")
    return 0


def measure(
    profile: LayerProfile, environment: dict[str, object], arguments: argparse.Namespace, rates: floor.Rates
) -> dict[str, object]:
    """One row of the table: what the planner would choose for speed alone, confirmed in a race of its own."""
    menu = options.screen(profile, select(arguments.candidates), Device("cpu", "cpu"))
    rules = options.Rules(arguments.mode, {"default": 1.0})
    wanted = options.to_time([menu], arguments.mode)
    found = benchmark.measure(wanted, environment, None, seed=arguments.seed)
    layer = options.with_times(menu, found, rules)
    best = min((o for o in layer.options if not o.rejected), key=lambda option: option.us or 0.0)
    (shape,) = wanted
    lossless = found[shape, "none", "onednn"].ratio if (shape, "none", "onednn") in found else float("nan")
    ratio, low, high = confirmed(best, wanted, environment, arguments.seed + 1)
    chosen = find_candidate(best.candidate).mode(kernel_at_these_rows(best))
    return {
        "dtype": profile.dtype,
        "shape": f"{profile.out_features}x{profile.in_features}",
        "rows": profile.calls[0].rows,
        "baseline_us": round(layer.baseline_us, 1),
        "lossless": round(1 / lossless, 3),
        "best": best.candidate,
        "kernel": kernel_at_these_rows(best),
        "ratio": round(ratio, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "of_floor": round(floor.floor_us(chosen, profile, rates) * ratio / layer.baseline_us, 3),
        "plain_of_floor": round(floor.floor_us(find_candidate("none"), profile, rates) / layer.baseline_us, 3),
        "others": " ".join(
            f"{option.candidate}:{layer.baseline_us / option.us:.2f}" for option in layer.options if option.us
        ),
    }


def kernel_at_these_rows(option: Option) -> str:
    """The first kernel of the program; another may follow, for more rows than were timed."""
    return kernel_names(option.program.partition(",")[0])


def confirmed(
    best: Option, wanted: dict[benchmark.Shape, list[benchmark.Contender]], environment: dict[str, object], seed: int
) -> tuple[float, float, float]:
    """Plain time / time of the choice, with its interval, on other weights than it was chosen on; 1 for plain."""
    if (best.candidate, best.program) == ("none", PLAIN):
        return 1.0, 1.0, 1.0
    ((shape, contenders),) = wanted.items()
    kernel = kernel_at_these_rows(best)
    kept = [
        contender
        for contender in contenders
        if (contender.candidate.name, contender.kernel.name) in (benchmark.BASELINE, (best.candidate, kernel))
    ]
    found = benchmark.measure({shape: kept}, environment, None, seed=seed)
    again = found[shape, best.candidate, kernel]
    return 1 / again.ratio, 1 / again.ratio_high, 1 / max(again.ratio_low, 1e-9)


if __name__ == "__main__":
    sys.exit(main())

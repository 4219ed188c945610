"""How long a plan cache of many records takes to open, to answer, and to merge: as a folder, and as one file.

Records are those that timing one kernel makes (1.9 kB each). Every figure is taken in turns over all sorts of cache,
each turn on new files; medians. Prints a table; `--out` writes a CSV.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from result_files import measured_on, write_csv
from tabulate import tabulate

from autoplan import PlanCache, kernels
from autoplan.cache import fingerprint
from autoplan.cache.form import Record
from autoplan.cache.store import entry

SORTS = {"folder": "cache/", "json": "cache.json", "pickle": "cache.pkl"}
LOOK_UPS = 500


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000, help="in each of two caches (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sorts", nargs="+", choices=SORTS, default=list(SORTS))
    parser.add_argument("--out", type=Path, help="CSV file")
    arguments = parser.parse_args(argv)
    environment = fingerprint.environment("cpu", fingerprint.source_digest(kernels))
    one = dict(record(environment, number) for number in range(arguments.records))
    two = dict(record(environment, number) for number in range(arguments.records, 2 * arguments.records))
    turns: dict[str, list[dict[str, float]]] = {sort: [] for sort in arguments.sorts}
    for _ in range(arguments.turns):
        for sort, figures in turns.items():
            with tempfile.TemporaryDirectory() as folder:
                figures.append(measure(folder, SORTS[sort], one, two))
    rows = [
        {"sort": sort, "records": arguments.records}
        | {name: statistics.median(turn[name] for turn in figures) for name in figures[0]}
        for sort, figures in turns.items()
    ]
    print(f"{environment['device']}, {environment['usable_cores']} cores")
    print(tabulate([{key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
                    for row in rows], headers="keys"))  # fmt: skip
    if arguments.out:
        write_csv(arguments.out, rows, measured_on(environment, turns=arguments.turns))
    return 0


def record(environment: dict[str, object], number: int) -> tuple[str, Record]:
    """What one timing makes: its key and record."""
    shape = {"rows": number, "in_features": 4096, "out_features": 4096, "has_bias": True, "dtype": "bfloat16"}
    shape |= {"weight_dtype": "bfloat16", "device": "cpu", "mode": "eager"}
    timer = {"margin": 0.02, "max_copies": 64, "version": 2, "bytes_between": 1 << 25}
    asked = {"environment": environment, "shape": shape, "timer": timer, "candidate": "int8_dynamic"}
    asked |= {"candidate_source": "a" * 64, "kernel": "onednn_u8s8"}
    value = {"candidate": "int8_dynamic", "kernel": "onednn_u8s8", "baseline_us": 123.4567, "ratio": 0.51}
    return entry(asked, value | {"ratio_low": 0.5, "ratio_high": 0.52, "rounds": 30, "note": ""})


def measure(folder: str, name: str, one: dict[str, Record], two: dict[str, Record]) -> dict[str, float]:
    """Seconds or milliseconds, as the names say, of each thing done once on new files."""
    PlanCache(f"{folder}/1-{name}").put_many("timings", one)
    PlanCache(f"{folder}/2-{name}").put_many("timings", two)
    found, missing = list(one)[:: max(1, len(one) // LOOK_UPS)], list(two)[:LOOK_UPS]
    opened: list[PlanCache] = []
    return {
        "open (s)": seconds(lambda: opened.append(PlanCache(f"{folder}/1-{name}"))),
        "hit (ms)": 1e3 / len(found) * seconds(lambda: [opened[0].get("timings", key) for key in found]),
        "miss (ms)": 1e3 / len(missing) * seconds(lambda: [opened[0].get("timings", key) for key in missing]),
        "put one (ms)": 1e3 * seconds(lambda: opened[0].put_many("timings", dict(list(two.items())[:1]))),
        "merge (s)": seconds(lambda: opened[0].merge(PlanCache(f"{folder}/2-{name}"))),
        "merge again (s)": seconds(lambda: opened[0].merge(PlanCache(f"{folder}/2-{name}"))),
        "list all (s)": seconds(lambda: opened[0].entries()),
    }


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())

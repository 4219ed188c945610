"""Side by side: autoplan and what a user could pick instead, on the same work, interleaved, in one run.

    python benchmarks/scoreboard.py                      # every workload, the peers that matter most
    python benchmarks/scoreboard.py --full               # every peer, more layers
    python benchmarks/scoreboard.py --workloads minilm-32x64 --peers "torchao *" "PT2E *"

Writes scoreboard-<workload>.csv, scoreboard.md and scoreboard.png (speed against divergence) into
benchmarks/results/<device>/; what earlier runs wrote there for other workloads stays on the page. Peers are optional
(requirements-peers.txt): one that is not here, or fails, is a row with the reason. Rules: see README.md beside this.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import gc
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from result_files import folder_of, measured_on, versions, write_csv
from workbench import tables
from workbench.peers import BASELINE, OURS, PEERS, Made, Peer
from workbench.workloads import TABLES, Output, Scenario, Workload, of_table, tensors_of

from autoplan import graphs, kernels, timing
from autoplan.cache import fingerprint

PACKAGES = (
    "torchao", "optimum-quanto", "onnxruntime", "openvino", "nncf", "bitsandbytes", "hqq", "transformers", "autoplan"
)  # fmt: skip
TOO_SLOW = 1.5  # times the baseline: not raced, and judged on the first inputs alone,
FEW_ITEMS = 16  # as many as hold so many items
TURN_MS = 20.0  # at least, of every peer: other libraries' threads go on spinning for about a millisecond
WARM_MS = 100.0  # a call that is quicker is made once before each turn, not timed: others have had the caches
ENOUGH_SECONDS = 3.0  # to see about how long a call takes
FULL_MEMORY = 0.4  # of the machine's that a process may hold and take in more peers: some libraries never free theirs
MIN_ROUNDS = 16  # so that joint intervals for all that race do not end at the worst rounds of a shared machine

GO_ON = os.EX_TEMPFAIL  # the exit status of a process that wants to be started again, with its memory free

Row = dict[str, Any]
Timings = Mapping[str, timing.Timing]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workloads", nargs="+", choices=TABLES, default=TABLES, metavar="NAME", help=", ".join(TABLES)
    )
    parser.add_argument("--peers", nargs="+", metavar="GLOB", help="instead of those that matter most for a table")
    parser.add_argument("--full", action="store_true", help="every peer, and more single layers")
    parser.add_argument("--quick", action="store_true", help="toys, not compiled: that it works, and nothing else")
    parser.add_argument("--seconds", type=float, help="of one race (default: 8, quick 0.5)")
    parser.add_argument("--patience", type=float, default=900, help="seconds a peer may take to set up (default: 900)")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/<device>)")
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)  # what a child process has done so far
    arguments = parser.parse_args(argv)
    arguments.seconds = arguments.seconds or (0.5 if arguments.quick else 8)
    if arguments.journal:
        (table,) = arguments.workloads
        play(table, arguments)
        return 0
    began = time.monotonic()
    environment = fingerprint.environment("cpu", fingerprint.source_digest(kernels))
    about = measured_on(environment, **versions(*PACKAGES))
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    out = arguments.out or folder_of(environment)
    with tempfile.TemporaryDirectory() as folder:
        for table in arguments.workloads:
            arguments.journal = Path(folder, f"{table}.jsonl")
            rows = play(table, arguments) if arguments.quick else in_a_child(table, arguments, folder)
            report(rows, table, out, about)
            print(f"{time.monotonic() - began:.0f} s so far; written to {out}", flush=True)
    return 0


def report(rows: Sequence[Row], table: str, out: Path, about: Mapping[str, str]) -> None:
    """Print a table, and write its file and the page of all."""
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        print(f"\n{table}: {scenario}\n{tables.markdown([row for row in rows if row['scenario'] == scenario])}")
    write_csv(out / f"scoreboard-{table}.csv", rows, about)
    tables.write_page(out, [name for name in TABLES if name != "layers"])


# --- processes: one per table; what kills it costs only the peer that did ---


def in_a_child(table: str, arguments: argparse.Namespace, folder: str) -> list[Row]:
    """The rows of a table, made in a process of its own, started again where a peer kills it or memory is short.

    The cache of plans is empty at first; what is started again finds them there. Inductor's is one for all tables: what
    it finds out about the machine takes a dozen seconds, which are no peer's.
    """
    command = [sys.executable, __file__, "--workloads", table, "--journal", str(arguments.journal)]
    command += ["--seconds", str(arguments.seconds), "--patience", str(arguments.patience)]
    command += ["--full"] * arguments.full
    command += ["--peers", *arguments.peers] if arguments.peers else []
    settings = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "AUTOPLAN_CACHE": f"{folder}/{table}"}
    settings |= {"TORCHINDUCTOR_FREEZING": "1"}  # weights become constants that Inductor packs; as an option it is late
    for _ in range(len(PEERS)):
        ended = subprocess.run(command, env=os.environ | settings).returncode
        if ended == 0:
            return rows_of(arguments.journal)
        if ended == GO_ON:
            continue
        trying = [entry["trying"] for entry in journal_of(arguments.journal) if "trying" in entry]
        if not trying or trying[-1]["peer"] in (BASELINE, None):
            break
        how = signal.Signals(-ended).name if ended < 0 else f"exit status {ended}"
        note_failure(arguments.journal, trying[-1], f"killed the process: {how}")
    raise SystemExit(f"{table}: the process ended with {ended} while no peer was to blame")


def note(journal: Path, **entry: Any) -> None:
    with journal.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def note_failure(journal: Path, trying: Row, reason: str) -> None:
    """A row for each scenario that there is none of yet."""
    there = {(row["workload"], row["peer"], row["scenario"]) for row in rows_of(journal)}
    for scenario in trying["scenarios"]:
        row = {"workload": trying["workload"], "scenario": scenario, "peer": trying["peer"], "note": reason}
        if (row["workload"], row["peer"], scenario) not in there:
            note(journal, row=row)


def journal_of(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def rows_of(journal: Path) -> list[Row]:
    return [entry["row"] for entry in journal_of(journal) if "row" in entry]


def play(table: str, arguments: argparse.Namespace) -> list[Row]:
    """All workloads of a table; goes on where the journal ends."""
    # Every peer has a code object of its own, so one that outruns the limit would run eagerly: that has to show.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True), torch.no_grad():
        if not arguments.quick:  # what Inductor finds out about the machine, once, is in no set-up time
            torch.compile(lambda x: x.sin() + 1)(torch.ones(64))
        for work in of_table(table, arguments.full, arguments.quick):
            Match(replace(work, compiled=not arguments.quick), arguments).play()
            gc.collect()
    return rows_of(arguments.journal)


def resident_share() -> float:
    """Of the machine's memory, what this process holds; 0 where the system does not tell."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) / os.sysconf("SC_PHYS_PAGES") if pages.exists() else 0.0


# --- one workload ---


class Match:
    """A workload, the float32 model's answers to it, and the peers that are in memory."""

    def __init__(self, work: Workload, arguments: argparse.Namespace) -> None:
        self.work, self.arguments = work, arguments
        self.made: dict[str, Made] = {}
        self.setup: dict[str, float] = {}
        self.answers: dict[str, list[Output]] = {}
        self.warm_ms: dict[tuple[str, str], float] = {}  # of a call, by peer and scenario
        self.ours: dict[str, timing.Timing] = {}  # against the baseline, by scenario

    def play(self) -> None:
        rows = self.rows()
        base, ours, others = split([peer for peer in PEERS if self.wanted(peer)])
        ours = [peer for peer in ours if all("ms" in row for row in rows if row["peer"] == peer.name)]  # or it failed
        others = [peer for peer in others if sum(row["peer"] == peer.name for row in rows) < len(self.work.scenarios)]
        self.set_up(base)  # or raise
        self.answers = {s.name: [self.made[BASELINE].calls[s.name](i) for i in s.judged] for s in self.work.scenarios}
        held = [BASELINE] + [peer.name for peer in ours if self.set_up(peer)]
        first = True
        size = max(1, self.work.together - len(held))
        for some in batches(others, size):
            if not first and resident_share() > FULL_MEMORY:
                raise SystemExit(GO_ON)
            before = graphs.written()
            rivals = [peer.name for peer in some if self.set_up(peer)]
            for scenario in self.work.scenarios:
                self.race(scenario, held, rivals, report=[*(held if first else []), *rivals])
            first = False
            gone = [call for name in rivals for call in self.made.pop(name).calls.values()]
            graphs.forget([call for call in gone if not isinstance(call, functools.partial)], before)
            del gone
            gc.collect()

    def rows(self) -> list[Row]:
        """What the journal has of this workload."""
        return [row for row in rows_of(self.arguments.journal) if row["workload"] == self.work.name]

    def trying(self, name: str | None) -> Row:
        """Note whose fault it is if the process ends here; None: nobody's."""
        found = {"workload": self.work.name, "peer": name, "scenarios": [s.name for s in self.work.scenarios]}
        note(self.arguments.journal, trying=found)
        return found

    def wanted(self, peer: Peer) -> bool:
        if peer.name in (BASELINE, OURS):
            return True
        if self.arguments.peers:
            return any(fnmatch.fnmatchcase(peer.name, pattern) for pattern in self.arguments.peers)
        return self.arguments.full or self.work.table in peer.matters

    def set_up(self, peer: Peer) -> bool:
        """Make it and call it until it is warm; a peer that fails leaves a row with the reason."""
        trying = self.trying(peer.name)
        print(f"{self.work.name}: {peer.name}", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            with patience(self.arguments.patience), contextlib.redirect_stdout(io.StringIO()):  # some libraries chat
                made = peer.make(self.work)
                for scenario in self.work.scenarios:
                    made.calls[scenario.name](scenario.judged[0])
                self.setup[peer.name] = time.monotonic() - began
                for scenario in self.work.scenarios:
                    seconds: list[float] = []
                    while sum(seconds) < (ENOUGH_SECONDS if len(seconds) < 3 else TURN_MS / 1e3):
                        began = time.monotonic()
                        found = made.calls[scenario.name](scenario.judged[0])
                        seconds.append(time.monotonic() - began)
                    self.warm_ms[peer.name, scenario.name] = 1e3 * min(seconds)
                    if not all(bool(tensor.isfinite().all()) for tensor in tensors_of(found)):
                        raise RuntimeError("its output is not finite")
        except (Exception, OutOfPatience) as error:
            if peer.name == BASELINE:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            note_failure(self.arguments.journal, trying, f"not run: {reason[:200]}")
            return False
        self.made[peer.name] = made
        return True

    def race(self, scenario: Scenario, held: Sequence[str], rivals: Sequence[str], report: Sequence[str]) -> None:
        """Race the rivals beside those who are held: beside ours alone, once its ratio to the baseline is known."""
        baseline_ms = self.warm_ms[BASELINE, scenario.name]
        racing = [*([OURS] if scenario.name in self.ours else held), *rivals]
        quick = [name for name in racing if self.warm_ms[name, scenario.name] < TOO_SLOW * baseline_ms]
        done = {row["peer"] for row in self.rows() if row["scenario"] == scenario.name}
        self.trying(None)
        to_float, to_ours = self.compare(scenario, quick)
        for name in report:
            if name in done:
                continue
            self.trying(name)
            made, row = self.made[name], self.row(scenario, name)
            raced = to_float.get(name)
            if raced and raced.ratio < float("inf"):
                ms = raced.baseline_us * raced.ratio / 1e3
                row |= {"ms": ms, "per_s": scenario.items / ms * 1e3, "unit": scenario.unit}
                row |= {"speedup": 1 / raced.ratio, "speedup_low": 1 / raced.ratio_high}
                row |= {"speedup_high": 1 / raced.ratio_low if raced.ratio_low else float("inf")}
            elif raced:
                row["note"] = raced.note
            else:
                ms = self.warm_ms[name, scenario.name]
                row |= {"ms": ms, "speedup": baseline_ms / ms, "note": "too slow to race: one call, few inputs judged"}
            if (duel := to_ours.get(name)) and name != OURS:
                row |= {"ours": duel.ratio, "ours_low": duel.ratio_low, "ours_high": duel.ratio_high}
            answers = self.answers[scenario.name][: None if raced else math.ceil(FEW_ITEMS / scenario.items)]
            accuracy = self.work.accuracy(
                scenario, answers, [made.calls[scenario.name](judged) for judged in scenario.judged[: len(answers)]]
            )
            row |= {"divergence": next(iter(accuracy.values())), **accuracy}
            note(self.arguments.journal, row=row)

    def compare(self, scenario: Scenario, names: Sequence[str]) -> tuple[Timings, Timings]:
        """The race of `names`, read against the baseline and against ours; it lasts as long as an interval takes.

        Where the baseline does not race, what ours is to it is multiplied by what each is to ours.
        """
        ms = {name: self.warm_ms[name, scenario.name] for name in names}
        counts = {name: math.ceil(TURN_MS / ms[name]) for name in names}
        turns = {
            name: turn(self.made[name], scenario.name, scenario.judged[0], count) for name, count in counts.items()
        }
        before = {
            name: turn(self.made[name], scenario.name, scenario.judged[0], 1) for name in names if ms[name] < WARM_MS
        }
        baselines = [name for name in (BASELINE, OURS) if name in names]
        round_ms = sum(ms[name] * (counts[name] + (name in before)) for name in names)
        seconds = max(self.arguments.seconds, 1.2 * (MIN_ROUNDS + 2) * round_ms / 1e3)
        found = {
            baseline: {name: a_call(raced, counts[name], counts[baseline]) for name, raced in timings.items()}
            for baseline, timings in timing.compare_with_each(
                turns, baselines=baselines, before=before, min_rounds=MIN_ROUNDS, max_seconds=seconds, min_batch_us=1.0
            ).items()
        }
        to_ours = found.get(OURS, {})
        if BASELINE not in found:
            return {name: chained(self.ours[scenario.name], to) for name, to in to_ours.items()}, to_ours
        if OURS in found:
            self.ours[scenario.name] = found[BASELINE][OURS]
        return found[BASELINE], to_ours

    def row(self, scenario: Scenario, name: str) -> Row:
        made = self.made[name]
        return {
            "workload": self.work.name, "scenario": scenario.name, "peer": name, "mib": made.nbytes / 2**20,
            "setup_s": self.setup[name], "note": made.about,
        }  # fmt: skip


def split(peers: Sequence[Peer]) -> tuple[Peer, list[Peer], list[Peer]]:
    """The baseline, ours that peers are compared with, and the others."""
    (base,) = [peer for peer in peers if peer.name == BASELINE]
    ours = [peer for peer in peers if peer.name == OURS]
    return base, ours, [peer for peer in peers if peer.name not in (BASELINE, OURS)]


def batches(peers: Sequence[Peer], size: int) -> Iterator[Sequence[Peer]]:
    for start in range(0, max(1, len(peers)), size):
        yield peers[start : start + size]


def chained(a_to_b: timing.Timing, c_to_a: timing.Timing) -> timing.Timing:
    """What c is to b; the interval is that of both at their ends."""
    return replace(
        c_to_a,
        baseline_us=a_to_b.baseline_us,
        ratio=a_to_b.ratio * c_to_a.ratio,
        ratio_low=a_to_b.ratio_low * c_to_a.ratio_low,
        ratio_high=a_to_b.ratio_high * c_to_a.ratio_high,
    )


def turn(made: Made, scenario: str, inputs: Any, count: int) -> Callable[[], None]:
    """So many calls."""
    call = made.calls[scenario]

    def take() -> None:
        for _ in range(count):
            call(inputs)

    return take


def a_call(raced: timing.Timing, count: int, baseline_count: int) -> timing.Timing:
    """Of turns of so many calls: what one call of each takes."""
    share = baseline_count / count
    return replace(
        raced,
        baseline_us=raced.baseline_us / baseline_count,
        ratio=raced.ratio * share,
        ratio_low=raced.ratio_low * share,
        ratio_high=raced.ratio_high * share,
    )


class OutOfPatience(BaseException):
    """Not an Exception: those are caught by libraries that try something else then."""


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Raises OutOfPatience in the block once it has taken so long, as soon as it is back in Python."""

    def give_up(*_: object) -> None:
        raise OutOfPatience(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())

"""Writes into the README what it shows of the results; nothing in these blocks is written by hand.

    python benchmarks/readme.py benchmarks/results/<device>                   # the scoreboard, and single layers
    autoplan demo > demo.txt                                                  # with an empty plan cache
    python benchmarks/readme.py benchmarks/results/<device> --demo demo.txt   # the report and the demo's figures too

Of the other devices whose results lie beside that folder, it shows the workloads. A block lies between
`<!-- name: begin -->` and `<!-- name: end -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate
from workbench.floor import KINDS
from workbench.peers import BASELINE, OURS, PEERS
from workbench.tables import Row, answers, interval, number, read, read_rows
from workbench.workloads import TABLES

README = Path(__file__).resolve().parent.parent / "README.md"
FIRST = "minilm-32x64"  # the table that is shown first
BLOCKS = 1  # of the report's layers, that are shown
SHOWN_ROWS = ("1", "8", "32", "256", "1024")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="benchmarks/results/<device>")
    parser.add_argument("--demo", type=Path, help="what `autoplan demo` printed")
    parser.add_argument("--readme", type=Path, default=README, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    tables = read(arguments.folder)
    boards = sorted(arguments.folder.resolve().parent.glob("*/scoreboard.md"))
    others = [board.parent for board in boards if board.parent != arguments.folder.resolve()]
    blocks = {
        "scoreboard": scoreboard(arguments.folder.resolve().name, tables),
        "workloads": "\n\n".join(
            [workloads(tables, leaving_out=FIRST), *(workloads(read(folder)) for folder in others)]
        ),
        "layers": layers(arguments.folder),
    }
    if arguments.demo:
        printed = arguments.demo.read_text(encoding="utf-8")
        blocks |= {"report": report(printed), "demo": figures(printed)}
    text = arguments.readme.read_text(encoding="utf-8")
    for name, block in blocks.items():
        text = filled(text, name, block)
    arguments.readme.write_text(text, encoding="utf-8")
    return 0


def filled(text: str, name: str, block: str) -> str:
    """The text with this block in the place of the one of that name. Raises ValueError where there is none."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"there is no block {name!r} to fill in")
    return f"{before}{begin}{block.rstrip()}\n{end}{rest.partition(end)[2]}"


def scoreboard(device: str, tables: Mapping[str, Sequence[Row]]) -> str:
    """Of one table the peers that matter most, and the picture of all."""
    every = any(row["peer"] not in that_matter(FIRST) for row in tables[FIRST])
    about = tables[FIRST][0]
    lines = [
        [
            f"**{row['peer']}**" if row["peer"].startswith("autoplan") else row["peer"],
            interval(row, "speedup"),
            number(row["cosine"], ".4f"),
            number(row["top_1"], ".1%"),
            number(row["mib"], ".0f"),
            number(row["setup_s"], ".0f"),
            "" if row["peer"] == OURS else interval(row, "ours"),
        ]
        for row in by_speed(tables[FIRST])
        if row["peer"] in that_matter(FIRST)
    ]
    headers = ["all-MiniLM-L6-v2, 32 x 64 tokens", "times float32 eager", "cosine", "same top-1", "weights, MiB",
               "set-up, s", "balanced is times as fast"]  # fmt: skip
    shown = f"benchmarks/results/{device}"
    return "\n\n".join(
        [
            table(lines, headers),
            f"![Speed against divergence: every peer a point]({shown}/scoreboard.png)",
            f"By `make bench{'-full' * every}` on {machine(about)}: all peers interleaved\n"
            'in one run, with 95 % intervals. Last column: this row\'s time / that of "autoplan balanced", so above 1 '
            f"autoplan is faster.\n[Other workloads](#what-was-measured-and-what-not); [every peer]({shown}/"
            "scoreboard.md); [the rules](benchmarks/README.md).",
        ]
    )


def that_matter(table: str) -> set[str]:
    """The peers of `make bench`."""
    return {peer.name for peer in PEERS if table in peer.matters}


def workloads(tables: Mapping[str, Sequence[Row]], leaving_out: str | None = None) -> str:
    """A machine's tables in one, in the usual order."""
    shown = {name: tables[name] for name in TABLES if name in tables and name != leaving_out}
    first = next(iter(shown.values()))[0]
    return f"On {first['device']}, {first['threads']} threads, torch {first['torch']}:\n\n{beside_the_fastest(shown)}"


def beside_the_fastest(tables: Mapping[str, Sequence[Row]]) -> str:
    """Each plan beside the fastest peer."""
    lines = []
    for name, rows in tables.items():
        for scenario in dict.fromkeys(row["scenario"] for row in rows):
            ordered = by_speed([row for row in rows if row["scenario"] == scenario])
            plans = [row for row in ordered if row["peer"].startswith("autoplan")]
            others = [row for row in ordered if row not in plans and row["peer"] != BASELINE]
            for plan in [plan for plan in plans if plan["peer"] in that_matter(name)] if others else []:
                best = others[0]
                ahead = interval(best, "ours")
                if plan["peer"] != OURS:  # not raced against each other: by their ratios to the baseline
                    ahead = f"{float(plan['speedup']) / float(best['speedup']):.2f}"
                workload = re.sub(r"^layer .*", "layer", plan["workload"])
                lines.append([f"{workload}: {scenario}", plan["peer"], interval(plan, "speedup"), harm(plan),
                              best["peer"], interval(best, "speedup"), harm(best), ahead])  # fmt: skip
    headers = ["workload", "plan", "times float32 eager", "divergence", "fastest peer", "times float32 eager",
               "divergence", "the plan is times as fast"]  # fmt: skip
    return table(lines, headers)


def by_speed(rows: Sequence[Row]) -> list[Row]:
    return sorted((row for row in rows if row.get("speedup") and answers(row)), key=lambda row: -float(row["speedup"]))


def harm(row: Row) -> str:
    return number(row["divergence"], ".2g")


def layers(folder: Path) -> str:
    """The speed of what was chosen, by layer and rows."""
    found = read_rows(folder / "linear.csv")
    lines = [
        [f"{dtype} {shape}"]
        + [
            f"{float(row['ratio']):.2f} {row['best']} ({number(row['of_floor'], '.0%')})"
            for rows in SHOWN_ROWS
            for row in found
            if (row["dtype"], row["shape"], row["rows"]) == (dtype, shape, rows)
        ]
        for dtype, shape in dict.fromkeys((row["dtype"], row["shape"]) for row in found)
    ]
    headers = ["layer (out x in)", *(f"{rows} rows" for rows in SHOWN_ROWS)]
    about = found[0]
    peaks = f"{float(about['read_gb_per_s']):.0f} GB/s, " + ", ".join(
        f"{float(about[f'{kind}_tops']):.2g} Tops in {kind}" for kind in KINDS
    )
    return f"On {machine(about)}; its peak: {peaks}.\n\n{table(lines, headers)}"


def machine(row: Row) -> str:
    return f"{row['device']}, {row['threads']} threads, torch {row['torch']}, {row['date']}"


def table(lines: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    rows = tabulate(lines, headers, tablefmt="pipe", disable_numparse=True).splitlines()
    return "\n".join(re.sub(r" {2,}|:?-{3,}:?", lambda found: "---" if "-" in found[0] else " ", row) for row in rows)


def report(printed: str) -> str:
    """The first plan's report, of its layers the first block."""
    found = re.search(r"^autoplan: .*?(?=^== |\Z)", printed, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError("the demo printed no report")
    head, _, after = found[0].partition("\n\nshare: ")
    blocks = re.split(r"^(?=\S+\.layer\.\d+ *$)", head, flags=re.MULTILINE)
    left = len(blocks) - 1 - BLOCKS
    return f"```\n{''.join(blocks[: 1 + BLOCKS]).rstrip()}\n... ({left} more blocks)\n\nshare: {after.rstrip()}\n```"


def figures(printed: str) -> str:
    """What the demo says of speed and fidelity."""
    parts = re.findall(r"^== (?:Speed|Fidelity).*?(?=^== |\Z)", printed, re.MULTILINE | re.DOTALL)
    return "```\n" + "\n\n".join(part.rstrip() for part in parts) + "\n```"


if __name__ == "__main__":
    sys.exit(main())

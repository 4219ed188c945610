"""From the CSV files in a folder, one per table: the Markdown page and the Pareto picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from workbench.peers import BASELINE

Row = dict[str, Any]

LEAST = 1e-7  # divergence below which two models are the same to the picture's axis
GARBAGE = 10.0  # divergence from which on an output has nothing to do with the model's, and its speed is no match
_ACCURACY = ("relative_error", "kl", "cosine", "top_1", "top_10", "perplexity")
_ABOUT = ("device", "threads", "date")


def read(folder: Path) -> dict[str, list[Row]]:
    """The rows of every table that was written to `folder`, in its own order."""
    paths = sorted(folder.glob("scoreboard-*.csv"))
    return {path.stem.removeprefix("scoreboard-"): read_rows(path) for path in paths}


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_page(folder: Path, pictured: Sequence[str]) -> None:
    """scoreboard.md and scoreboard.png in `folder`; the tables named in `pictured` are in the picture."""
    tables = read(folder)
    parts = ["# Scoreboard"]
    try:
        picture(folder / "scoreboard.png", {name: tables[name] for name in pictured if name in tables})
        parts.append("![Speed and divergence of every peer](scoreboard.png)")
    except ImportError as error:
        parts.append(f"No picture: {error}.")
    for name, rows in tables.items():
        about = {key: value for key, value in rows[0].items() if key in _ABOUT}
        parts.append(f"## {name}\n\n{', '.join(f'{key} {value}' for key, value in about.items())}")
        for scenario in dict.fromkeys(row["scenario"] for row in rows):
            parts.append(f"### {scenario}\n\n{markdown([row for row in rows if row['scenario'] == scenario])}")
    (folder / "scoreboard.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def markdown(rows: Sequence[Row]) -> str:
    """One scenario's table, the fastest first; last those that answer with garbage, and those that did not run."""
    figures = [key for key in _ACCURACY if any(row.get(key) for row in rows)]
    ordered = sorted(rows, key=lambda row: (not answers(row), -float(row.get("speedup") or 0)))
    lines = [
        [
            row["peer"],
            number(row.get("ms"), ".3g"),
            interval(row, "speedup"),
            *(number(row.get(figure), ".4g") for figure in figures),
            number(row.get("mib"), ".1f"),
            number(row.get("setup_s"), ".0f"),
            interval(row, "ours"),
            "; ".join(filter(None, (row.get("note"), "" if answers(row) else "its output is garbage"))),
        ]
        for row in ordered
    ]
    headers = ["peer", "ms", "times float32 eager", *figures, "MiB", "set-up s", "balanced is times as fast", "note"]
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True)


def answers(row: Row) -> bool:
    """Whether what it computes has to do with the model; what did not run is not asked."""
    return float(row.get("divergence") or 0) < GARBAGE


def number(value: Any, form: str) -> str:
    return "" if value in (None, "") else format(float(value), form)


def interval(row: Row, key: str) -> str:
    if row.get(key) in (None, ""):
        return ""
    low, high = (row.get(f"{key}_{side}") for side in ("low", "high"))
    known = low not in (None, "") and float(low or 0) != float(high or 0)  # of the baseline itself there is none
    return f"{float(row[key]):.2f}" + (f" [{float(low or 0):.2f}, {float(high or 0):.2f}]" if known else "")


def picture(path: Path, tables: Mapping[str, Sequence[Row]]) -> None:
    """Speed against divergence: every peer whose output means something is a point, ours are joined by a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[Row]] = {}
    for name, rows in tables.items():
        for row in rows:
            if row.get("speedup") and row.get("divergence") and answers(row):
                panels.setdefault(f"{name}: {row['scenario']}", []).append(row)
    if not panels:
        return
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(6.5 * across, 5 * down), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, title, rows)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis: Any, title: str, rows: Sequence[Row]) -> None:
    at = {row["peer"]: (max(float(row["divergence"]), LEAST), float(row["speedup"])) for row in rows}
    ours = sorted(point for peer, point in at.items() if peer.startswith("autoplan") and "given" not in peer)
    axis.plot(*zip(*ours, strict=True), "-o", color="tab:red", zorder=3) if ours else None
    given = [point for peer, point in at.items() if peer.startswith("autoplan") and "given" in peer]  # another model
    axis.plot(*zip(*given, strict=True), "o", color="tab:red", fillstyle="none") if given else None
    theirs = [point for peer, point in at.items() if not peer.startswith("autoplan") and peer != BASELINE]
    axis.scatter(*zip(*theirs, strict=True), s=16, color="tab:blue") if theirs else None
    for peer, point in at.items():
        axis.annotate(f" {peer}", point, fontsize=6, color="tab:red" if peer.startswith("autoplan") else "black")
    axis.axhline(1, color="grey", linewidth=0.6)
    axis.set(title=title, xscale="log", yscale="log", xlabel="divergence from float32", ylabel="times float32 eager")

"""A plan as people read it: the table with every layer and the totals, or the same as markdown, csv or json."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from autoplan.errors import AutoplanError
from autoplan.records import Autocast, Call, Estimate, FrontierPoint, LayerPlan, Option, Outcome

if TYPE_CHECKING:
    from autoplan.plan import Plan

_WIDTH = 160  # columns that the text aims at
_FRONTIER_SHOWN = 10
_MAX_WHY = 160  # characters of a runner-up's reason in a table; csv and json have all of it
_PLAIN_KERNEL = "linear"
_BLOCK = re.compile(r"((?:[^.]+\.)*?\d+)(?=\.)")  # "encoder.layer.3" of "encoder.layer.3.output.dense"

# header, alignment, and the width its words wrap at (0: never); two things in one column stand one below the other
_COLUMNS = (
    ("layer", "left", 0),
    ("out x in\nrows x\ncalls", "left", 14),
    ("share", "right", 0),
    ("float\nus", "right", 0),
    ("chosen\nkernel", "left", 16),
    ("us\n+-95 %", "right", 0),
    ("speed\n-up", "right", 0),
    ("SQNR\ndB", "right", 0),
    ("harm", "right", 0),
    ("price", "right", 0),
    ("MiB", "right", 0),
    ("why", "left", 15),
    ("runner-up, and why not", "left", 22),
)
_CSV_COLUMNS = (
    "layer", "aliases", "group", "out_features", "in_features", "bias", "dtype", "calls", "share", "float_us",
    "candidate", "status", "kernels", "us", "us_low", "us_high", "speedup", "sqnr_db", "harm", "price_per_ms",
    "nbytes", "why",
)  # fmt: skip


def render(plan: Plan, format: str) -> str:
    """The plan as "text", "markdown", "csv" or "json". Raises AutoplanError for any other format."""
    renderers = {"text": _text, "markdown": _markdown, "csv": _csv, "json": _json}
    if format not in renderers:
        raise AutoplanError(f"a report has no format {format!r}; there are {', '.join(renderers)}")
    return renderers[format](plan)


def kernels(program: str) -> str:
    """A program in words: "1:int8pack,24:dequantize_int8" is "int8pack, from 24 rows dequantize_int8".

    The configs of kernels, after an "@", are left out: csv and json have them.
    """
    words, last = [], ""
    for step in filter(None, program.split(",")):
        rows, _, kernel = step.partition(":")
        name = kernel.partition("@")[0]
        if name != last:
            words.append(name if int(rows) <= 1 else f"from {rows} rows {name}")
        last = name
    return ", ".join(words)


def bytes_in_words(count: int) -> str:
    """1536 is "1.5 KiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"


def interval(estimate: Estimate, format: str = ".2f", unit: str = "") -> str:
    """A measured value and its 95 % interval: "4.61x [4.55, 4.67]"."""
    return f"{estimate.value:{format}}{unit} [{estimate.low:{format}}, {estimate.high:{format}}]"


# -- the formats ---------------------------------------------------------------------------------------------------


def _text(plan: Plan) -> str:
    rows: list[list[str]] = []
    for block, layers in _blocks(plan.layers):
        if block:
            rows.append([block] + [""] * (len(_COLUMNS) - 1))
        for layer in layers:
            rows.append(_cells(plan, layer, layer.name.removeprefix(block)))
    rows = [[_wrap(cell, width) for cell, (_, _, width) in zip(cells, _COLUMNS, strict=True)] for cells in _ditto(rows)]
    table = tabulate(
        rows,
        headers=[header for header, _, _ in _COLUMNS],
        colalign=[alignment for _, alignment, _ in _COLUMNS] if rows else None,
        disable_numparse=True,
    )
    lines = [_headline(plan), ""]
    if warning := _nothing_switched(plan):
        lines += [warning, ""]
    lines += [table, "", _LEGEND, ""]
    if matrix := _matrix(plan, "simple"):
        lines += ["Choices, block by block:", matrix, ""]
    if plan.left_alone:
        lines.append(f"Left alone ({len(plan.left_alone)}):")
        lines += [_fill(f"{reason}: {', '.join(names)}", "  ") for reason, names in _left_alone(plan)]
        lines.append("")
    facts = _facts(plan)
    indent = max(len(label) for label, _ in facts) + 2
    lines += [_fill(fact, f"{label:<{indent}}", " " * indent) for label, fact in facts]
    if frontier := _frontier(plan, "simple"):
        lines += ["", "Frontier, as predicted (plan.at takes another point of it):", frontier]
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines())


_LEGEND = (
    "share: of the float time of these layers. us: in one forward of the model (of each workload, times its weight). "
    "SQNR: of the layer's own\noutput. harm: predicted divergence of the model's output from this layer alone. price: "
    "divergence per ms that the layer saves, kappa times\nits harm. none on linear: the layer as it was."
)


def _ditto(rows: list[list[str]]) -> list[list[str]]:
    """The rows, where both explanations (the last two columns) are those of the layer above, saying just that."""
    shown = []
    previous: list[str] = []
    for row in rows:
        explanations = row[-2:]
        shown.append([*row[:-2], "as above", "as above"] if explanations == previous and any(previous) else row)
        previous = explanations
    return shown


def _markdown(plan: Plan) -> str:
    rows = [[_escape(cell).replace("\n", ", ") for cell in _cells(plan, layer, layer.name)] for layer in plan.layers]
    table = tabulate(
        rows,
        headers=[header.replace("\n-", "-").replace("x\n", "x ").replace("\n", ", ") for header, _, _ in _COLUMNS],
        colalign=[alignment for _, alignment, _ in _COLUMNS] if rows else None,
        disable_numparse=True,
        tablefmt="pipe",
    )
    lines = [_headline(plan), ""]
    if warning := _nothing_switched(plan):
        lines += [f"**{warning}**", ""]
    lines += [table, "", _LEGEND.replace("\n", " "), ""]
    if matrix := _matrix(plan, "pipe"):
        lines += ["Choices, block by block:", "", matrix, ""]
    if plan.left_alone:
        lines += [f"Left alone ({len(plan.left_alone)}):", ""]
        lines += [f"- {reason}: {', '.join(f'`{name}`' for name in names)}" for reason, names in _left_alone(plan)]
        lines.append("")
    lines += [f"- **{label}**: {fact}" for label, fact in _facts(plan)]
    if frontier := _frontier(plan, "pipe"):
        lines += ["", "Frontier, as predicted (`plan.at` takes another point of it):", "", frontier]
    return "\n".join(lines)


def _csv(plan: Plan) -> str:
    """One row per layer and option, and one per layer left alone."""
    file = io.StringIO()
    writer = csv.DictWriter(file, _CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for layer in plan.layers:
        shared = {
            "layer": layer.name,
            "aliases": " ".join(layer.aliases),
            "group": layer.group,
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "bias": layer.has_bias,
            "dtype": layer.dtype,
            "calls": "; ".join(_calls(layer.calls, layer.dtype, limit=len(layer.calls), workloads=True)),
            "share": _ratio(layer.baseline_us, plan.baseline_us),
            "float_us": layer.baseline_us,
        }
        for option in layer.options:
            chosen = option.candidate == layer.chosen
            option = layer.choice if chosen else option  # as it runs, if with its siblings
            writer.writerow(
                shared
                | {
                    "candidate": option.candidate,
                    "status": "chosen" if chosen else "rejected" if option.rejected else "not chosen",
                    "kernels": option.program,
                    "us": option.us,
                    "us_low": option.us_low,
                    "us_high": option.us_high,
                    "speedup": None if option.us is None else _ratio(layer.baseline_us, option.us),
                    "sqnr_db": option.sqnr_db,
                    "harm": option.harm,
                    "price_per_ms": _price_per_ms(plan, layer, option),
                    "nbytes": option.nbytes,
                    "why": layer.reason if chosen else _why_not(plan, layer, option),
                }
            )
    for alone in plan.left_alone:
        writer.writerow({"layer": alone.name, "status": "left alone", "why": alone.reason})
    return file.getvalue().rstrip("\n")


def _json(plan: Plan) -> str:
    return json.dumps(plan.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)


# -- one layer -----------------------------------------------------------------------------------------------------


def _blocks(layers: Sequence[LayerPlan]) -> Iterator[tuple[str, list[LayerPlan]]]:
    """Neighbours under one numbered prefix ("encoder.layer.3"), to be named once; others come with ""."""
    for block, neighbours in itertools.groupby(layers, _numbered_prefix):
        members = list(neighbours)
        yield (block if len(members) > 1 else ""), members


def _numbered_prefix(layer: LayerPlan) -> str:
    match = _BLOCK.match(layer.name)
    return match.group(1) if match else ""


def _cells(plan: Plan, layer: LayerPlan, name: str) -> list[str]:
    option = layer.choice
    price = _price_per_ms(plan, layer, option)
    return [
        f"{name} (and {', '.join(layer.aliases)})" if layer.aliases else name,
        f"{layer.out_features}x{layer.in_features}\n"
        + "; ".join(_calls(layer.calls, layer.dtype, limit=3, workloads=len(plan.workloads) > 1)),
        f"{100 * _ratio(layer.baseline_us, plan.baseline_us):.1f} %",
        _us(layer.baseline_us),
        f"{option.candidate}\n{kernels(option.program) or _PLAIN_KERNEL}",
        _us_with_spread(option),
        "-" if option.us is None else f"{_ratio(layer.baseline_us, option.us):.2f}x",
        "-" if option.sqnr_db is None else f"{option.sqnr_db:.1f}",
        "-" if option.harm is None else _small(option.harm),
        "-" if price is None else _small(price),
        "-" if option.nbytes is None else f"{option.nbytes / 2**20:.3g}",
        f"{layer.reason} ({layer.group})" if layer.group else layer.reason,
        textwrap.shorten(_runner_up(plan, layer), _MAX_WHY, placeholder=" ..."),
    ]


def _price_per_ms(plan: Plan, layer: LayerPlan, option: Option) -> float | None:
    """Predicted divergence for each millisecond that an option saves; None if it saves none."""
    saved = None if option.us is None else (layer.baseline_us - option.us) / 1e3
    return plan.scaled_harm(option) / saved if saved and saved > 0 else None


def _is_plain(layer: LayerPlan) -> bool:
    """Whether the layer stays the plain `F.linear` that it was."""
    names = {step.partition(":")[2] for step in layer.choice.program.split(",") if step}
    return layer.chosen == "none" and names <= {_PLAIN_KERNEL}


def _calls(calls: Sequence[Call], weight_dtype: str, limit: int, workloads: bool) -> list[str]:
    """ "2048 x 1" per number of rows, "prefill 2048 x 1" where there are several workloads; those called most first."""
    counts: Counter[str] = Counter()
    for call in calls:
        words = [call.workload] if workloads else []
        words.append(str(call.rows))
        # autocast: the layer works in another dtype than its weight's
        words += [] if call.dtype == weight_dtype else [call.dtype]
        counts[" ".join(words)] += call.count
    shown = [f"{words} x {count}" for words, count in counts.most_common(limit)]
    return shown if len(counts) <= limit else [*shown, f"{len(counts) - limit} more"]


def _runner_up(plan: Plan, layer: LayerPlan) -> str:
    """The fastest option that was not chosen (an untimed one, if there is no other), and why it was not."""
    others = [option for option in layer.options if option.candidate != layer.chosen]
    if not others:
        return "there was no other candidate"
    timed = [option for option in others if option.us is not None]
    option = min(timed, key=lambda option: (option.us or 0.0, option.candidate)) if timed else others[0]
    time = "" if option.us is None else f"{_us(option.us)} us, "
    return f"{option.candidate}: {time}{_why_not(plan, layer, option)}"


def _why_not(plan: Plan, layer: LayerPlan, option: Option) -> str:
    """Why an option that is not chosen is not, in a few words."""
    chosen = layer.choice
    if option.rejected:
        return option.rejected
    if option.us is None or chosen.us is None:
        return "not timed"
    if option.us >= chosen.us:
        slower = _ratio(option.us, chosen.us) - 1
        return f"{100 * slower:.0f} % slower" if slower >= 0.01 else "no faster"
    gain, harm = chosen.us - option.us, (option.harm or 0.0) - (chosen.harm or 0.0)
    if _nothing_switched(plan):
        return f"harm {_small(option.harm or 0.0)}, but the float model was kept as a whole"
    if plan.budget.time is not None:
        return "faster than the time budget asks for"
    if harm > 0:
        return f"harm {_small(option.harm or 0.0)} for {_us(gain)} us less: it buys more in other layers"
    if plan.budget.nbytes is not None and (option.nbytes or 0) > (chosen.nbytes or 0):
        return f"{bytes_in_words((option.nbytes or 0) - (chosen.nbytes or 0))} more than the byte budget leaves"
    return f"{_us(gain)} us less alone, not as a whole"


# -- the totals ----------------------------------------------------------------------------------------------------


def _headline(plan: Plan) -> str:
    environment = plan.fingerprints.get("environment", {})
    parts = [str(environment[key]) for key in ("device",) if environment.get(key)]
    parts += [f"{environment['threads']} threads"] if environment.get("threads") else []
    parts += [f"torch {environment['torch']}"] if environment.get("torch") else []
    parts.append(f"timed {plan.mode}")
    if len(plan.workloads) > 1:
        parts.append("workloads " + ", ".join(f"{name} (weight {weight:g})" for name, weight in plan.workloads.items()))
    return f"autoplan: {_count(len(plan.layers), 'layer')} on " + "; ".join(parts)


def _nothing_switched(plan: Plan) -> str:
    if not all(map(_is_plain, plan.layers)):
        return ""
    return "NOTHING WAS SWITCHED: every layer stays the plain float layer that it was."


def _facts(plan: Plan) -> list[tuple[str, str]]:
    """The totals, as (label, sentence)."""
    outcome, seconds = plan.outcome, plan.planning_seconds
    facts = [("layers", _counts(plan))]
    if outcome is None:
        why = "it was revalidated without inputs" if plan.revalidated else "this is another point of the frontier"
        facts.append(("whole model", f"not measured: {why}, and its figures are predicted"))
    elif _nothing_switched(plan):
        facts.append(("whole model", "the float model as it was"))
    else:
        facts.append(("whole model", _speed(outcome.speedup, "the float model")))
        if plan.region:
            facts.append(("autocast", _region(plan.region, outcome)))
        if saving := _saving(plan, outcome):
            facts.append(("time saved", saving))
        facts.append(("versus uniform", _versus_uniform(outcome)))
        facts.append(("divergence", _divergence(plan, outcome)))
        if fidelity := _fidelity(outcome):
            facts.append(("fidelity", fidelity))
    time = f"{_us(plan.baseline_us)} us -> {_us(plan.us)} us ({_ratio(plan.baseline_us, plan.us):.2f}x)"
    facts.append(("these layers", f"{time}, the sum of their timings"))
    size = f"{bytes_in_words(plan.baseline_nbytes)} -> {bytes_in_words(plan.nbytes)}"
    facts.append(("weight bytes", f"{size} ({_ratio(plan.baseline_nbytes, plan.nbytes):.2f}x smaller)"))
    facts.append(("prediction", _prediction(plan)))
    facts.append(
        ("certified gap", f"no plan is predicted to be more than {100 * plan.gap:.2g} % better in this budget")
    )
    facts.append(("price", _marginal_price(plan)))
    if seconds:
        stages = [f"{stage} {spent:.1f}" for stage, spent in seconds.items() if stage != "total"]
        total = seconds.get("total", sum(seconds.values()))
        facts.append(("planning took", f"{total:.1f} s: {', '.join(stages)}"))
    facts += [("note", note) for note in (outcome.notes if outcome else ())]
    facts += [("revalidated", found) for found in plan.revalidated]
    facts += [("STALE", f"{difference}: plan.revalidate(model, inputs) times it here") for difference in plan.stale]
    return facts


def _counts(plan: Plan) -> str:
    labels = Counter(
        "none (plain)" if _is_plain(layer) else "none on another kernel" if layer.chosen == "none" else layer.chosen
        for layer in plan.layers
    )
    listed = ", ".join(f"{label} {count}" for label, count in sorted(labels.items(), key=lambda item: (-item[1], item)))
    return f"{len(plan.layers)} planned: {listed or 'none'}; {len(plan.left_alone)} left alone"


def _speed(estimate: Estimate | None, against: str) -> str:
    if estimate is None:
        return f"speed against {against} was not measured"
    text = f"{interval(estimate, unit='x')} as fast as {against}, measured in pairs"
    if estimate.low <= 1 <= estimate.high:
        text += ": no difference beyond noise"
    elif estimate.high < 1:
        text += ": SLOWER"
    return text


def _versus_uniform(outcome: Outcome) -> str:
    if outcome.versus_uniform is None:
        return (
            f"the same plan as the best uniform one, {outcome.uniform}" if outcome.uniform else "there is no such plan"
        )
    return _speed(outcome.versus_uniform, f"the best uniform plan, {outcome.uniform} wherever it can run")


def _region(autocast: Autocast, outcome: Outcome) -> str:
    region = f'torch.autocast("{autocast.device_type}", torch.{autocast.dtype})'
    calls = f" in calls of {autocast.least:,} elements or more" if autocast.least else ""
    gain = f", {outcome.other_side.value:.2f}x as fast as outside" if outcome.other_side else ""
    words = "and returns float32 as before; the layers' float times are those in there"
    return f"the planned model enters {region} by itself{calls}{gain}, {words}"


def _saving(plan: Plan, outcome: Outcome) -> str:
    """The time that the planned layers should save, and what the whole model does save."""
    whole, speedup, predicted = outcome.float_us, outcome.speedup, plan.baseline_us - plan.us
    if whole is None or speedup is None:
        return ""
    times = f" ({whole / (whole - predicted):.2f}x)" if predicted < whole else ""
    measured = f"measured {_us(whole - whole / speedup.value)} us ({speedup.value:.2f}x)"
    words = measured if plan.region else f"predicted {_us(predicted)} us{times}, {measured}"
    return f"{words}, of the {_us(whole)} us that the float model takes as a whole"


def _fidelity(outcome: Outcome) -> str:
    """What the mean divergence does not tell."""
    parts = []
    if (p99 := outcome.divergence_p99) is not None:
        parts.append(f"99 % of the {'positions' if outcome.logits else 'samples'} diverge by less than {p99:.2e}")
    if outcome.top1_agreement is not None:
        parts.append(f"same most likely class at {100 * outcome.top1_agreement:.2f} %")
    if outcome.perplexity_ratio is not None:
        parts.append(f"perplexity of the next token {outcome.perplexity_ratio:.4f} times the float model's")
    return "; ".join(parts)


def _marginal_price(plan: Plan) -> str:
    if not plan.price_us:
        return "the budget does not bind: more divergence would buy no time"
    per_ms = 1e3 * plan.price_us if plan.budget.time is not None else 1e3 / plan.price_us
    return f"{_small(per_ms)} of divergence per ms is what the solver pays at most; each layer's own price is above"


def _divergence(plan: Plan, outcome: Outcome) -> str:
    kind = "KL, nats per token" if outcome.logits else "relative squared error"
    measured = f"{interval(outcome.divergence, '.2e')} ({kind})"
    if outcome.divergence_bound is not None:
        measured += f", at most {outcome.divergence_bound:.2e} (95 %, one-sided)"
    held_out = (
        "on inputs held out from planning" if outcome.held_out else "NOT HELD OUT: on the inputs it was planned with"
    )
    bound = outcome.divergence.high if outcome.divergence_bound is None else outcome.divergence_bound
    return f"{measured}, {_against_budget(plan, outcome.divergence.value, bound)}, {held_out}"


def _against_budget(plan: Plan, measured: float, bound: float) -> str:
    budget = plan.budget
    limits = [] if budget.divergence is None else [f"divergence {budget.divergence:g}"]
    limits += [] if budget.nbytes is None else [bytes_in_words(budget.nbytes)]
    limits += [] if budget.time is None else [f"{100 * budget.time:.3g} % of the float time"]
    named = f'budget "{budget.preset}"' if budget.preset else "budget"
    verdict = ""
    if budget.divergence is not None:
        verdict = " (kept)" if measured <= budget.divergence else " (EXCEEDED)"
        if measured <= budget.divergence < bound:
            verdict = " (kept, but the upper bound is beyond it)"
    return f"{named} {', '.join(limits) or 'without limits'}{verdict}"


def _prediction(plan: Plan) -> str:
    text = f"divergence {_small(plan.predicted_divergence)}"
    if plan.outcome is None:
        return text
    rounds = _count(plan.outcome.rounds, "round")
    return f"{text}, which is kappa {plan.outcome.kappa:.3g} (measured upper bound / sum of harms); {rounds}"


def _left_alone(plan: Plan) -> list[tuple[str, list[str]]]:
    """The names of the layers left alone, by reason."""
    by_reason: dict[str, list[str]] = {}
    for alone in plan.left_alone:
        by_reason.setdefault(alone.reason, []).append(alone.name)
    return list(by_reason.items())


# -- choices and frontier at a glance ------------------------------------------------------------------------------


def _matrix(plan: Plan, tablefmt: str) -> str:
    """Blocks by layers, where the names have such a structure and the page the width; alike neighbours in one row."""
    blocks: dict[str, dict[str, str]] = {}
    for layer in plan.layers:
        if block := _numbered_prefix(layer):
            blocks.setdefault(block, {})[layer.name.removeprefix(f"{block}.")] = _short(layer)
    columns = list(dict.fromkeys(name for cells in blocks.values() for name in cells))
    rows: list[tuple[str, str, list[str]]] = []  # the first block, the last of those alike, their cells
    for block, own in blocks.items():
        cells = [own.get(name, "") for name in columns]
        if rows and rows[-1][2] == cells and _next_block(rows[-1][1]) == block:
            rows[-1] = (rows[-1][0], block, cells)
        else:
            rows.append((block, block, cells))
    table = tabulate(
        [[first if first == last else f"{first}-{last.rpartition('.')[2]}", *cells] for first, last, cells in rows],
        headers=["block", *(name if tablefmt == "pipe" else name.replace(".", "\n.") for name in columns)],
        disable_numparse=True,
        tablefmt=tablefmt,
    )
    fits = tablefmt == "pipe" or max(map(len, table.splitlines())) <= _WIDTH
    return table if len(blocks) > 1 and fits else ""


def _next_block(block: str) -> str:
    """ "encoder.layer.4" after "encoder.layer.3"."""
    prefix, dot, number = block.rpartition(".")
    return f"{prefix}{dot}{int(number) + 1}"


def _short(layer: LayerPlan) -> str:
    """A choice in few letters: "int8dyn", "int4g32"; "-" for the layer as it was."""
    name = layer.chosen.replace("_weight_only", "wo").replace("_dynamic", "dyn")
    return "-" if _is_plain(layer) else re.sub(r"_(g\d+|dual)$", r"\1", name)


def _same_point(point: FrontierPoint, plan: Plan) -> bool:
    pairs = ((point.divergence, plan.predicted_divergence), (point.us, plan.us))  # sums in another order
    return point.nbytes == plan.nbytes and all(math.isclose(one, other, rel_tol=1e-9) for one, other in pairs)


def _frontier(plan: Plan, tablefmt: str) -> str:
    """Some of the frontier's points, evenly spread, and this plan among them."""
    points = plan.frontier
    if len(points) < 2:
        return ""
    shown = [points[round(i)] for i in _spread(len(points), _FRONTIER_SHOWN)]
    switched = sum(not _is_plain(layer) for layer in plan.layers)
    rows = [(p.divergence, p.us, p.nbytes, p.switched, "") for p in shown if not _same_point(p, plan)]
    rows.append((plan.predicted_divergence, plan.us, plan.nbytes, switched, "this plan"))
    cells = [
        [_small(d), _us(us), f"{_ratio(plan.baseline_us, us):.2f}x", bytes_in_words(size), str(count), mark]
        for d, us, size, count, mark in sorted(rows, key=lambda row: (row[0], -row[1], row[4]))
    ]
    return tabulate(
        cells,
        headers=["divergence", "us", "speed-up", "bytes", "switched", ""],
        colalign=["right"] * 5 + ["left"],
        disable_numparse=True,
        tablefmt=tablefmt,
    )


def _spread(count: int, shown: int) -> list[float]:
    """Indices of at most `shown` of `count` things, the first and the last among them."""
    return [i * (count - 1) / (min(count, shown) - 1) for i in range(min(count, shown))]


# -- words and figures ---------------------------------------------------------------------------------------------


def _us(us: float) -> str:
    return f"{us:,.0f}" if us >= 99.95 else f"{us:.3g}"


def _us_with_spread(option: Option) -> str:
    if option.us is None:
        return "-"
    if option.us_low is None or option.us_high is None or option.us_low == option.us_high:
        return _us(option.us)
    spread = max(option.us_high - option.us, option.us - option.us_low) / option.us
    return f"{_us(option.us)}\n+-{100 * spread:.1f} %"


def _small(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 1.0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _wrap(cell: str, width: int) -> str:
    if not width:
        return cell
    lines = (textwrap.wrap(line, width, break_on_hyphens=False, break_long_words=False) for line in cell.splitlines())
    return "\n".join(itertools.chain.from_iterable(lines))


def _fill(text: str, indent: str, following: str | None = None) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  " if following is None else following,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")

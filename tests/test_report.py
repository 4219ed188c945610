"""The report: every layer and every option is in it, in words and figures that people can check."""

from __future__ import annotations

import csv
import io
import itertools
import json
from dataclasses import replace

import pytest

from autoplan import report
from autoplan.errors import AutoplanError
from autoplan.plan import Plan
from autoplan.records import Call, Estimate, FrontierPoint, LayerPlan, LeftAlone, Option, Outcome
from autoplan.selection import Budget

SHAPES = {"attention.self.query": (384, 384), "intermediate.dense": (1536, 384), "output.dense": (384, 1536)}


def layer(name: str, out_features: int, in_features: int, chosen: str = "int8_dynamic") -> LayerPlan:
    us = out_features * in_features / 100.0
    numel = out_features * in_features
    reasons = {
        "int8_dynamic": "fastest within the budget",
        "none": "int8_dynamic would cost 2.1e-03 of divergence",
        "bf16": "pinned",
    }
    return LayerPlan(
        name=name,
        aliases=(),
        in_features=in_features,
        out_features=out_features,
        has_bias=True,
        dtype="float32",
        calls=(Call("default", 2048, "float32", 6),),
        baseline_us=us,
        chosen=chosen,
        reason=reasons[chosen],
        options=(
            Option("none", "1:linear", us, us * 0.99, us * 1.01, 4 * numel, None, 0.0),
            Option("bf16", "1:onednn", us / 3, us / 3.05, us / 2.95, 2 * numel, 51.2, 2e-6),
            Option("int8_dynamic", "1:onednn_u8s8", us / 5, us / 5.1, us / 4.9, numel + 4 * out_features, 36.4, 1.2e-4),
            Option("int8_weight_only", "1:int8pack,24:dequantize_int8", us / 6, us / 6.1, us / 5.9, numel, 8.1, 2e-2,
                   rejected="SQNR 8.1 dB is below 10 dB"),
            Option("fp8_dynamic", rejected="out_features 33 is not a multiple of 16"),
        ),
    )  # fmt: skip


def sample_plan(chosen: str = "int8_dynamic") -> Plan:
    layers = [
        layer(f"encoder.layer.{block}.{name}", *shape, chosen) for block in range(6) for name, shape in SHAPES.items()
    ]
    return Plan(
        layers=(*layers, layer("head", 33, 384, "none")),
        left_alone=(
            LeftAlone("pooler.dense", "saw no input while recording"),
            LeftAlone("decoder", "its weight is tied to embeddings.word.weight"),
            LeftAlone("pooler.proj", "saw no input while recording"),
        ),
        budget=Budget(divergence=1e-2, preset="high"),
        workloads={"default": 1.0},
        mode="compiled",
        fingerprints={"environment": {"device": "Some CPU", "threads": 2, "torch": "2.13.0"}},
        frontier=(),
        gap=0.0,
        price_us=1.0e6,
        outcome=Outcome(
            speedup=Estimate(4.61, 4.55, 4.67),
            uniform="int8_dynamic",
            versus_uniform=Estimate(1.03, 1.01, 1.05),
            divergence=Estimate(4.6e-3, 4.2e-3, 5.1e-3),
            logits=True,
            held_out=True,
            kappa=1.11,
            rounds=2,
            notes=("one batch was too large to keep",),
            divergence_bound=5e-3,
            divergence_p99=9e-3,
            top1_agreement=0.991,
            perplexity_ratio=1.0023,
            float_us=120_000.0,
        ),
        planning_seconds={"recording": 2.0, "timing": 55.25, "sensitivity": 20.0},
    )


@pytest.fixture
def plan() -> Plan:
    return sample_plan()


def test_text_names_every_layer_and_stays_within_a_wide_terminal(plan: Plan) -> None:
    text = plan.report()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 160
    assert sum(line.startswith("encoder.layer.") and line[15:].strip() == "" for line in lines) == 6
    for name in SHAPES:
        assert sum(line.startswith(f".{name} ") for line in lines) == 6
    assert any(line.startswith("head ") for line in lines)
    for name in ("pooler.dense", "pooler.proj", "decoder"):
        assert name in text
    assert text.count("saw no input while recording") == 1  # grouped by reason


def test_text_shows_the_evidence_of_a_layer(plan: Plan) -> None:
    lines = plan.report().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(".intermediate.dense"))
    for line, cells in zip(lines[at:], (
        ("1536x384", "7.4 %", "5,898", "int8_dynamic", "1,180", "5.00x", "36.4", "1.2e-04", "2.8e-05", "0.568"),
        ("2048 x 6", "onednn_u8s8", "+-2.0 %"),
    ), strict=False):  # fmt: skip
        assert all(cell in line for cell in cells), line
    below = "\n".join(lines[at : at + 3])
    assert all(word in below for word in ("within", "budget", "int8_weight_only: 983", "8.1 dB is"))


def test_a_layers_price_is_its_divergence_for_each_ms_that_it_saves(plan: Plan) -> None:
    layer = plan.layers[1]
    rows = {r["candidate"]: r for r in csv.DictReader(io.StringIO(plan.report("csv"))) if r["layer"] == layer.name}
    saved_ms = layer.baseline_us * (1 - 1 / 5) / 1e3
    assert float(rows["int8_dynamic"]["price_per_ms"]) == pytest.approx(1.11 * 1.2e-4 / saved_ms)
    assert rows["none"]["price_per_ms"] == rows["fp8_dynamic"]["price_per_ms"] == ""
    assert "1.0e-03 of divergence per ms is what the solver pays at most" in plan.report()
    assert "the budget does not bind" in replace(plan, price_us=0.0).report()
    assert "2.0e-03 of divergence per ms" in replace(plan, price_us=2e-6, budget=Budget(time=0.5)).report()


def test_text_has_the_totals(plan: Plan) -> None:
    text = " ".join(plan.report().split())
    for part in (
        "Some CPU; 2 threads; torch 2.13.0; timed compiled",
        "19 planned: int8_dynamic 18, none (plain) 1; 3 left alone",
        "4.61x [4.55, 4.67] as fast as the float model",
        "1.03x [1.01, 1.05] as fast as the best uniform plan, int8_dynamic",
        "4.60e-03 [4.20e-03, 5.10e-03] (KL, nats per token)",
        'at most 5.00e-03 (95 %, one-sided), budget "high" divergence 0.01 (kept), on inputs held',
        "predicted 63,701 us (2.13x), measured 93,970 us (4.61x), of the 120,000 us",
        "99 % of the positions diverge by less than 9.00e-03; same most likely class at 99.10 %",
        "perplexity of the next token 1.0023 times",
        "kappa 1.11",
        "2 rounds",
        "77.2 s: recording 2.0, timing 55.2, sensitivity 20.0",
        "one batch was too large to keep",
    ):
        assert part in text
    assert "STALE" not in text
    assert "NOTHING WAS SWITCHED" not in text


def test_text_warns_of_what_a_reader_must_not_miss(plan: Plan) -> None:
    assert plan.outcome is not None
    worse = replace(
        plan.outcome,
        speedup=Estimate(0.9, 0.85, 0.95),
        versus_uniform=Estimate(1.0, 0.99, 1.01),
        divergence=Estimate(2e-2, 1e-2, 3e-2),
        held_out=False,
    )
    text = replace(plan, outcome=worse, stale=("torch is 2.13, was 2.12",)).report()
    for part in (
        "SLOWER",
        "no difference beyond noise",
        "(EXCEEDED)",
        "NOT HELD OUT",
        "STALE",
        "torch is 2.13, was 2.12",
    ):
        assert part in text
    near = replace(plan.outcome, divergence=Estimate(9e-3, 8e-3, 1.2e-2), divergence_bound=1.1e-2, versus_uniform=None)
    text = " ".join(replace(plan, outcome=near).report().split())
    assert "(kept, but the upper bound is beyond it)" in text
    assert "the same plan as the best uniform one, int8_dynamic" in text


@pytest.mark.parametrize("format", ["text", "markdown"])
def test_nothing_switched_is_said_loudly(format: str) -> None:
    assert "NOTHING WAS SWITCHED" in sample_plan("none").report(format)


def test_a_point_of_the_frontier_is_reported_as_not_measured(plan: Plan) -> None:
    text = replace(plan, outcome=None, budget=Budget(nbytes=2**20, time=0.5)).report()
    assert "not measured: this is another point of the frontier" in text


def test_a_plan_without_layers_is_reported(plan: Plan) -> None:
    empty = replace(plan, layers=())
    for format in ("text", "markdown", "csv", "json"):
        assert "pooler.dense" in empty.report(format)


def test_several_workloads_and_autocast_show_in_the_calls(plan: Plan) -> None:
    calls = (Call("prefill", 512, "bfloat16", 1), *(Call("decode", rows, "float32", 9) for rows in range(1, 5)))
    first = replace(plan.layers[0], calls=calls)
    plan = replace(plan, layers=(first,), workloads={"prefill": 1.0, "decode": 256.0})
    text = plan.report()
    assert "prefill (weight 1), decode (weight 256)" in text
    assert "decode 1 x 9; decode 2" in plan.report("markdown")
    assert "; 2 more" in plan.report("markdown")
    assert "prefill 512 bfloat16 x 1" in plan.report("csv")


def test_why_a_faster_option_was_not_chosen(plan: Plan) -> None:
    chosen_bf16 = layer("a.b", 384, 384, "bf16")
    options = tuple(option for option in chosen_bf16.options if not option.rejected)
    plan = replace(plan, layers=(replace(chosen_bf16, options=options),))
    assert "int8_dynamic: 295 us, harm 1.2e-04 for 197 us less" in plan.report("markdown")
    assert "faster than the time budget asks for" in replace(plan, budget=Budget(time=0.5)).report("markdown")
    alone = replace(chosen_bf16, options=(chosen_bf16.choice,))
    assert "no other candidate" in replace(plan, layers=(alone,)).report("markdown")


def test_markdown_is_one_table_with_whole_names(plan: Plan) -> None:
    markdown = plan.report("markdown")
    lines = markdown.splitlines()
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[lines.index("") + 1 :]))
    assert len(rows) == 2 + len(plan.layers)
    assert len({line.count("|") for line in rows}) == 1
    assert sum("encoder.layer.3.output.dense" in line for line in rows) == 1


def test_markdown_escapes_what_would_break_the_table(plan: Plan) -> None:
    odd = replace(plan.layers[0], reason="a|b")
    assert "a\\|b" in replace(plan, layers=(odd,)).report("markdown")


def test_csv_has_a_row_per_option(plan: Plan) -> None:
    rows = list(csv.DictReader(io.StringIO(plan.report("csv"))))
    assert len(rows) == sum(len(layer.options) for layer in plan.layers) + len(plan.left_alone)
    first = {row["candidate"]: row for row in rows if row["layer"] == plan.layers[0].name}
    assert first["int8_dynamic"]["status"] == "chosen"
    assert float(first["int8_dynamic"]["speedup"]) == pytest.approx(5.0)
    assert first["int8_weight_only"]["status"] == "rejected"
    assert first["int8_weight_only"]["why"] == "SQNR 8.1 dB is below 10 dB"
    assert first["bf16"] | {"status": "not chosen", "why": "67 % slower"} == first["bf16"]
    assert [row["why"] for row in rows if row["status"] == "left alone"] == [alone.reason for alone in plan.left_alone]


def test_json_is_the_plan(plan: Plan) -> None:
    assert Plan.from_dict(json.loads(plan.report("json"))) == plan


def test_an_unknown_format_names_those_there_are(plan: Plan) -> None:
    with pytest.raises(AutoplanError, match=r"'html'; there are text, markdown, csv, json"):
        plan.report("html")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("1:onednn", "onednn"),
        ("1:int8pack,24:dequantize_int8", "int8pack, from 24 rows dequantize_int8"),
        ("", ""),
    ],
)
def test_programs_in_words(program: str, words: str) -> None:
    assert report.kernels(program) == words


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (150 << 20, "150 MiB"), (5 << 40, "5 TiB")]
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert report.bytes_in_words(count) == words


def test_an_explanation_that_repeats_is_not_spelled_out_again(plan: Plan) -> None:
    same = replace(plan, layers=tuple(replace(plan.layers[0], name=f"h.{i}.fc") for i in range(4)))
    text = same.report()
    assert text.count("fastest within") == 1
    assert text.count("as above") == 2 * 3
    assert same.report("markdown").count("fastest within the budget") == 4


def test_a_kept_float_model_does_not_blame_the_other_layers() -> None:
    kept = sample_plan("none")
    fast = layer("fc", 384, 384, "none")
    options = tuple(option for option in fast.options if not option.rejected)
    text = replace(kept, layers=(replace(fast, options=options),)).report("markdown")
    assert "int8_dynamic: 295 us, harm 1.2e-04, but the float model was kept as a whole" in text


def test_a_plan_of_an_older_version_shows_what_it_has(plan: Plan) -> None:
    assert plan.outcome is not None
    older = replace(plan.outcome, divergence_bound=None, divergence_p99=None, top1_agreement=None,
                    perplexity_ratio=None, float_us=None)  # fmt: skip
    text = replace(plan, outcome=older).report()
    assert "(kept)" in text
    assert "at most" not in text.replace("pays at most", "")
    assert "time saved" not in text
    assert "fidelity" not in text
    too_wide = replace(older, divergence=Estimate(9e-3, 8e-3, 1.1e-2))
    assert "(kept, but the upper bound" in replace(plan, outcome=too_wide).report()


def test_samples_and_not_positions_where_there_are_no_logits(plan: Plan) -> None:
    assert plan.outcome is not None
    other = replace(plan.outcome, logits=False, top1_agreement=None, perplexity_ratio=None)
    text = replace(plan, outcome=other).report()
    assert "99 % of the samples diverge by less than 9.00e-03\n" in text


# At a glance.


def rows_of(text: str, start: str) -> list[list[str]]:
    """The cells of the lines that follow the line that starts so, up to an empty one."""
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(start)) + 1
    return [line.split() for line in lines[begin : next(i for i in range(begin, len(lines) + 1)
                                                        if i == len(lines) or not lines[i])]]  # fmt: skip


def test_blocks_by_layers(plan: Plan) -> None:
    changed = {1: "none", 5: "bf16", 12: "int8_weight_only"}
    layers = [replace(layer, chosen=changed.get(i, layer.chosen)) for i, layer in enumerate(plan.layers)]
    rows = rows_of(replace(plan, layers=tuple(layers)).report(), "Choices, block by block")
    assert [" ".join(row) for row in rows[4:]] == [
        "encoder.layer.0 int8dyn - int8dyn",
        "encoder.layer.1 int8dyn int8dyn bf16",
        "encoder.layer.2-3 int8dyn int8dyn int8dyn",
        "encoder.layer.4 int8wo int8dyn int8dyn",
        "encoder.layer.5 int8dyn int8dyn int8dyn",
    ]
    markdown = replace(plan, layers=tuple(layers)).report("markdown")
    assert "| encoder.layer.2-3 | int8dyn                | int8dyn              | int8dyn        |" in markdown


def test_blocks_of_several_kinds_and_numbers_that_are_missing(plan: Plan) -> None:
    names = ["encoder.0.fc", "encoder.1.fc", "encoder.3.fc", "decoder.0.fc", "decoder.1.fc", "decoder.1.extra", "head"]
    layers = tuple(layer(name, 384, 384) for name in names)
    rows = rows_of(replace(plan, layers=layers).report(), "Choices, block by block")
    assert [" ".join(row) for row in rows[2:]] == [
        "encoder.0-1 int8dyn",
        "encoder.3 int8dyn",
        "decoder.0 int8dyn",
        "decoder.1 int8dyn int8dyn",
    ]


def test_names_without_blocks_or_too_many_layers_in_one_have_no_matrix(plan: Plan) -> None:
    for names in (["fc1", "fc2"], ["0", "2"], ["h.0.fc1", "h.0.fc2"]):
        assert "block by block" not in replace(plan, layers=tuple(layer(name, 64, 64) for name in names)).report()
    experts = [f"layers.{i}.experts.{j}.gate_proj" for i in range(2) for j in range(32)]
    plan = replace(plan, layers=tuple(layer(name, 64, 64) for name in experts))
    assert "block by block" not in plan.report()
    assert "block by block" in plan.report("markdown")  # which scrolls


@pytest.mark.parametrize("count", [2, 3, 10, 25])
def test_the_frontier_and_this_plan_on_it(plan: Plan, count: int) -> None:
    points = [FrontierPoint(i * 1e-3, plan.baseline_us / (1 + i), 1 << (30 - i), i) for i in range(count)]
    plan = replace(plan, frontier=tuple(points))
    rows = rows_of(plan.report(), "Frontier, as predicted")[2:]
    assert len(rows) == min(count, 10) + 1
    own = next(row for row in rows if row[-2:] == ["this", "plan"])
    assert own == ["2.4e-03", "16,052", "4.97x", "7.69", "MiB", "18", "this", "plan"]
    harms = [float(row[0]) for row in rows]
    assert harms == sorted(harms)
    others = [row for row in rows if row != own]
    assert others[0] == ["0", f"{plan.baseline_us:,.0f}", "1.00x", "1", "GiB", "0"]
    assert others[-1][-1] == str(count - 1)
    assert "| this plan |" in plan.report("markdown")


def test_a_frontier_of_one_point_is_none(plan: Plan) -> None:
    assert "Frontier" not in replace(plan, frontier=(FrontierPoint(0.0, 1.0, 1, 0),)).report()

"""The report: every layer and every option is in it, in words and figures that people can check."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest

from autoplan import report
from autoplan.errors import AutoplanError
from autoplan.plan import Plan
from autoplan.records import Call, Estimate, LayerPlan, LeftAlone, Option, Outcome
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
            logits=False,
            held_out=True,
            kappa=1.11,
            rounds=2,
            notes=("one batch was too large to keep",),
        ),
        planning_seconds={"recording": 2.0, "timing": 55.25, "sensitivity": 20.0},
    )


@pytest.fixture
def plan() -> Plan:
    return sample_plan()


def test_text_names_every_layer_and_stays_within_a_wide_terminal(plan: Plan) -> None:
    text = plan.report()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 200
    assert sum(line.startswith("encoder.layer.") for line in lines) == 6
    for name in SHAPES:
        assert sum(line.startswith(f".{name} ") for line in lines) == 6
    assert any(line.startswith("head ") for line in lines)
    for name in ("pooler.dense", "pooler.proj", "decoder"):
        assert name in text
    assert text.count("saw no input while recording") == 1  # grouped by reason


def test_text_shows_the_evidence_of_a_layer(plan: Plan) -> None:
    row = next(line for line in plan.report().splitlines() if line.startswith(".intermediate.dense"))
    for cell in (
        *("1536x384", "2048 x 6", "7.4 %", "5,898", "int8_dynamic", "onednn_u8s8", "1,180 +-2.0 %", "5.00x", "36.4"),
        *("1.2e-04", "0.568", "fastest within the", "int8_weight_only: 983 us, SQNR"),
    ):
        assert cell in row


def test_text_has_the_totals(plan: Plan) -> None:
    text = plan.report()
    for part in (
        "Some CPU; 2 threads; torch 2.13.0; timed compiled",
        "19 planned: int8_dynamic 18, none (plain) 1; 3 left alone",
        "4.61x [4.55, 4.67] as fast as the float model",
        "1.03x [1.01, 1.05] as fast as the best uniform plan, int8_dynamic",
        "4.60e-03 [4.20e-03, 5.10e-03] (relative squared error)",
        'budget "high" divergence 0.01 (kept), on inputs held out',
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
    near = replace(plan.outcome, divergence=Estimate(9e-3, 8e-3, 1.1e-2), versus_uniform=None)
    text = replace(plan, outcome=near).report()
    assert "the interval reaches beyond it" in text
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
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
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
    assert text.count("fastest within the") == 1
    assert text.count("as above") == 2 * 3
    assert same.report("markdown").count("fastest within the budget") == 4


def test_a_kept_float_model_does_not_blame_the_other_layers() -> None:
    kept = sample_plan("none")
    fast = layer("fc", 384, 384, "none")
    options = tuple(option for option in fast.options if not option.rejected)
    text = replace(kept, layers=(replace(fast, options=options),)).report("markdown")
    assert "int8_dynamic: 295 us, harm 1.2e-04, but the float model was kept as a whole" in text

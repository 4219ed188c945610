"""From options to a choice: budgets, groups, the frontier, programs by rows, and the gates before them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from autoplan import options, selection
from autoplan.candidates import find_candidate
from autoplan.errors import BudgetError
from autoplan.kernels import ops
from autoplan.options import Menu, Rules, with_scores, with_times
from autoplan.records import Call, Device, Fused, LayerPlan, LayerProfile, Measurement, Option, Sensitivity, Shape
from autoplan.selection import Budget, best_uniform, choose, choosing, explained, frontier, keep_float

CPU = Device("cpu", "cpu")


@pytest.fixture(autouse=True)
def kernels_by_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that these tests make up: programs may name only registered ones."""
    for name in ("few", "many", "fast", "safe", "k"):
        monkeypatch.setitem(ops._KERNELS, name, replace(ops.find_kernel("linear"), name=name))


def layer(name: str, *menu: tuple[str, float, float, int], group: str = "", **changes: Any) -> LayerPlan:
    """`menu`: candidate, us, harm, bytes; `none` takes 100 us, no harm, 400 bytes."""
    found = [Option("none", "1:linear", 100.0, 100.0, 100.0, 400, None, 0.0)]
    found += [Option(c, "1:k", us, us, us, size, 40.0, harm) for c, us, harm, size in menu]
    made = LayerPlan(name, (), 10, 10, True, "float32", (), 100.0, "none", "", tuple(found), group)
    return replace(made, **changes)


LAYERS = [
    layer("a", ("bf16", 60, 1e-4, 200), ("int8", 20, 3e-3, 100)),
    layer("b", ("bf16", 70, 2e-4, 200), ("int8", 50, 1e-3, 100)),
    layer("c", ("bf16", 90, 5e-4, 200), ("int8", 30, 9e-3, 100)),
]


def by_force(layers: list[LayerPlan], keeps: Any, value: Any) -> float:
    plans = (
        choosing(layers, names) for names in itertools.product(*([o.candidate for o in p.options] for p in layers))
    )
    return min(value(plan) for plan in plans if keeps(plan))


@pytest.mark.parametrize("kappa", [1.0, 2.5])
@pytest.mark.parametrize("limit", [0.0, 1e-4, 5e-4, 1.2e-3, 4e-3, 1e-2, 1.0])
def test_the_fastest_inside_the_divergence(limit: float, kappa: float) -> None:
    choice = choose(LAYERS, Budget(divergence=limit), kappa)
    chosen = choosing(LAYERS, choice.candidates)
    assert kappa * selection.total_harm(chosen) <= limit * (1 + 1e-12)
    best = by_force(LAYERS, lambda plan: kappa * selection.total_harm(plan) <= limit, selection.total_us)
    assert selection.total_us(chosen) == best
    assert choice.gap == 0


@pytest.mark.parametrize("nbytes", [300, 500, 700, 1200])
def test_bytes_are_a_second_limit(nbytes: int) -> None:
    def size(plan: list[LayerPlan]) -> int:
        return sum(item.choice.nbytes or 0 for item in plan)

    chosen = choosing(LAYERS, choose(LAYERS, Budget(divergence=1.0, nbytes=nbytes), 1.0).candidates)
    assert size(chosen) <= nbytes
    assert selection.total_us(chosen) == by_force(LAYERS, lambda plan: size(plan) <= nbytes, selection.total_us)
    with pytest.raises(BudgetError):
        choose(LAYERS, Budget(nbytes=299), 1.0)


def test_a_time_budget_buys_the_most_accurate() -> None:
    chosen = choosing(LAYERS, choose(LAYERS, Budget(time=0.6), 1.0).candidates)
    assert selection.total_us(chosen) <= 180
    best = by_force(LAYERS, lambda plan: selection.total_us(plan) <= 180, selection.total_harm)
    assert selection.total_harm(chosen) == pytest.approx(best)
    with pytest.raises(BudgetError, match="least predicted divergence"):
        choose(LAYERS, Budget(time=0.6, divergence=1e-5), 1.0)
    with pytest.raises(BudgetError, match=r"least time \(us\)"):
        choose(LAYERS, Budget(time=0.1), 1.0)


def test_ties_go_to_none_and_rejected_options_are_never_chosen() -> None:
    tied = [layer("a", ("bf16", 100, 0.0, 400))]
    assert choose(tied, Budget(divergence=1.0), 1.0).candidates == ("none",)
    options_ = tuple(replace(o, rejected="no") if o.candidate == "int8" else o for o in LAYERS[0].options)
    assert choose([replace(LAYERS[0], options=options_)], Budget(divergence=1.0), 1.0).candidates == ("bf16",)


def test_a_group_gets_what_all_of_it_may_use() -> None:
    layers = [
        layer("a", ("bf16", 60, 0, 200), ("int8", 1, 0, 1), group="g"),
        layer("b", ("bf16", 90, 0, 200), group="g"),
    ]
    layers.append(layer("c", ("int8", 1, 0, 1)))
    assert choose(layers, Budget(divergence=1.0), 1.0).candidates == ("bf16", "bf16", "int8")


def test_pins_that_cannot_be_met_are_told() -> None:
    def pinned(item: LayerPlan, to: str, reason: str = "") -> LayerPlan:
        own = tuple(replace(o, rejected=reason if o.candidate == to else f"pinned to {to}") for o in item.options)
        return replace(item, options=own)

    for budget in (Budget(divergence=1.0), Budget(nbytes=10_000)):
        with pytest.raises(BudgetError, match="layer 'a' is pinned to int8, which it cannot use: SQNR is 3 dB"):
            choose([pinned(LAYERS[0], "int8", "SQNR is 3 dB"), LAYERS[1]], budget, 1.0)
        group = [replace(pinned(LAYERS[0], "int8"), group="g"), replace(pinned(LAYERS[1], "bf16"), group="g")]
        with pytest.raises(BudgetError, match=r"none is open to all of them \(a: int8; b: bf16\)"):
            choose(group, budget, 1.0)


def test_no_layers_at_all() -> None:
    assert choose([], Budget(divergence=0.1), 1.0).candidates == ()
    assert best_uniform([], Budget(divergence=0.1), 1.0) == ("none", [])


def test_the_frontier_falls_and_every_point_is_the_best_of_its_kind() -> None:
    points = frontier(LAYERS, 2.0)
    assert points[0] == selection.FrontierPoint(0.0, 300.0, 1200, 0)
    assert points[-1].us == 100
    for before, after in itertools.pairwise(points):
        assert after.us < before.us
        assert after.divergence > before.divergence
    for point in points:
        harm = point.divergence / 2.0 * (1 + 1e-9)
        assert point.us == by_force(LAYERS, lambda plan, h=harm: selection.total_harm(plan) <= h, selection.total_us)


def test_the_best_uniform_plan_keeps_the_budget() -> None:
    assert best_uniform(LAYERS, Budget(divergence=1.0), 1.0)[0] == "int8"
    assert best_uniform(LAYERS, Budget(divergence=1e-3), 1.0)[0] == "bf16"
    assert best_uniform(LAYERS, Budget(divergence=1e-3), 2.0)[0] == "none"
    only_some = [*LAYERS, layer("d")]
    assert [item.chosen for item in best_uniform(only_some, Budget(divergence=1.0), 1.0)[1]] == ["int8"] * 3 + ["none"]


def test_the_best_uniform_plan_keeps_bytes_time_and_groups() -> None:
    sizes = {name: sum(layer.option(name).nbytes or 0 for layer in LAYERS) for name in ("none", "bf16", "int8")}
    assert sizes["int8"] < sizes["bf16"] < sizes["none"]
    assert best_uniform(LAYERS, Budget(nbytes=sizes["int8"]), 1.0)[0] == "int8"
    slow = [layer(item.name, ("bf16", 60, 0, 200), ("int8", 1000, 0, 100)) for item in LAYERS]
    assert best_uniform(slow, Budget(divergence=1.0), 1.0)[0] == "bf16"
    assert best_uniform(slow, Budget(nbytes=sizes["bf16"] - 1), 1.0)[0] == "int8"
    assert best_uniform(LAYERS, Budget(time=1.0), 1.0)[0] == "none"
    assert best_uniform(LAYERS, Budget(time=0.75), 1.0)[0] == "bf16"
    group = [layer("a", ("int8", 1, 0, 1), group="g"), layer("b", group="g"), layer("c", ("int8", 1, 0, 1))]
    assert [item.chosen for item in best_uniform(group, Budget(divergence=1.0), 1.0)[1]] == ["none", "none", "int8"]


def test_numbers_of_numpy_are_numbers() -> None:
    budget = Budget(divergence=np.float32(0.5), nbytes=np.int64(7), time=np.float64(0.25))
    assert [type(limit) for limit in (budget.divergence, budget.nbytes, budget.time)] == [float, int, float]
    assert budget == Budget(divergence=0.5, nbytes=7, time=0.25)
    for wrong in (np.float64("nan"), np.float64("inf"), np.float32(-1), "1", 1j):
        with pytest.raises(BudgetError, match="must be a positive number"):
            Budget(divergence=wrong)


def test_reasons_and_keeping_float() -> None:
    budget = Budget(divergence=1e-2)
    chosen = replace(LAYERS[0], chosen="int8")
    assert explained(chosen, budget, 2.0, pinned=False).reason == "fastest, 60.0% of budget"
    assert explained(chosen, budget, 2.0, pinned=True).reason == "pinned by the caller"
    assert explained(LAYERS[0], budget, 1.0, pinned=False).reason == "budget buys more elsewhere"
    assert explained(layer("x"), budget, 1.0, pinned=False).reason == "nothing is surely faster"
    fast = replace(LAYERS[0].options[0], program="1:onednn", us=50.0)
    assert explained(layer("x", options=(fast,)), budget, 1.0, pinned=False).reason == "exact, and faster"
    (kept,) = keep_float([replace(chosen, options=(fast, *chosen.options[1:]))], "because")
    assert selection.is_plain(kept)
    assert (kept.reason, kept.choice.us, kept.options[1:]) == ("because", 100.0, chosen.options[1:])


@pytest.mark.parametrize("name", ["divergence", "nbytes", "time"])
@pytest.mark.parametrize("limit", [-1, math.nan, math.inf, "1"])
def test_limits_are_positive_numbers(name: str, limit: Any) -> None:
    with pytest.raises(BudgetError, match=f"budget {name} must be a positive number"):
        Budget(**{name: limit})


def test_presets_depend_on_the_kind_of_output() -> None:
    assert Budget.of("high", logits=True) == Budget(divergence=0.01, preset="high")
    assert Budget.of("lossless", logits=False) == Budget(divergence=5e-4, preset="lossless")
    assert selection.kernel_names("1:int8pack,24:dequantize_int8") == "int8pack/dequantize_int8"


# Options: kernels by rows, and the gates.

ROWS = (1, 16, 256)


def profile(*rows: int) -> LayerProfile:
    return LayerProfile("x", (), 64, 64, True, "float32", "cpu", tuple(Call("default", r, "float32", 1) for r in rows))


def timed(ratios: dict[str, dict[str, tuple[float, ...]]], rows: tuple[int, ...] = ROWS, **rules: Any) -> LayerPlan:
    """A layer with these ratios by candidate, kernel and rows; plain F.linear takes 10 us each time."""
    found = {}
    for candidate, kernels in ({"none": {"linear": (1.0,) * len(rows)}} | ratios).items():
        for kernel, own in kernels.items():
            for r, ratio in zip(rows, own, strict=True):
                shape = Shape(r, 64, 64, True, "float32", "float32", "cpu", "eager")
                found[shape, candidate, kernel] = Measurement(
                    shape,
                    candidate,
                    kernel,
                    10.0,
                    ratio,
                    ratio * 0.99,
                    ratio * 1.01,
                    8,
                    "broke" if ratio == math.inf else "",
                )
    kernels_ = {find_candidate(name): () for name in ("none", *ratios)}
    return with_times(Menu(profile(*rows), CPU, kernels_, {}), found, Rules("eager", {"default": 1.0}, **rules))


def test_a_program_switches_kernels_between_the_rows_that_were_seen() -> None:
    made = timed({"int8_weight_only": {"few": (0.2, 0.3, 2.0), "many": (0.9, 0.9, 0.5)}})
    option = made.option("int8_weight_only")
    assert option.program == f"1:few,{math.isqrt(16 * 256) + 1}:many"
    assert option.us == pytest.approx(10 * (0.2 + 0.3 + 0.5))
    assert option.us_low == pytest.approx(10 * (0.2 + 0.3 + 0.5) * 0.99)
    assert made.baseline_us == 30


def test_one_kernel_where_several_gain_too_little_or_may_not_be() -> None:
    close = {"int8_weight_only": {"few": (0.50, 0.5, 0.51), "many": (0.51, 0.51, 0.5)}}
    assert timed(close).option("int8_weight_only").program == "1:few"
    apart = {"int8_weight_only": {"few": (0.2, 0.3, 0.6), "many": (0.9, 0.9, 0.5)}}
    assert timed(apart, batch_invariant=True).option("int8_weight_only").program == "1:few"
    assert timed(apart, (5, 6, 7)).option("int8_weight_only").program == "1:few,7:many"


def test_a_kernel_that_fails_somewhere_or_misses_a_shape_is_not_used() -> None:
    broken = {"int8_weight_only": {"fast": (0.1, math.inf, 0.1), "safe": (0.5, 0.5, 0.5)}}
    assert timed(broken).option("int8_weight_only").program == "1:safe"
    all_broken = timed({"int8_weight_only": {"fast": (0.1, math.inf, 0.1)}}).option("int8_weight_only")
    assert all_broken.rejected == "fast: broke"


def test_none_stays_plain_unless_its_other_kernel_surely_wins() -> None:
    assert timed({"none": {"linear": (1.0,) * 3, "onednn": (0.99,) * 3}}).option("none").program == "1:linear"
    assert timed({"none": {"linear": (1.0,) * 3, "onednn": (0.5,) * 3}}).option("none").program == "1:onednn"


def test_the_gate() -> None:
    ratios = {"bf16": {"k": (0.98,) * 3}, "int8_dynamic": {"k": (0.6,) * 3}, "int8_weight_only": {"k": (0.3,) * 3}}
    made = timed(ratios | {"none": {"linear": (1.0,) * 3, "onednn": (0.5,) * 3}})
    assert made.option("bf16").rejected.startswith("not surely faster")
    assert "none on onednn" in made.option("int8_dynamic").rejected
    assert not made.option("int8_weight_only").rejected
    assert not any(option.rejected for option in timed(ratios, wants_bytes=True).options)
    pinned = timed(ratios, pinned={"x": "bf16"})
    assert {o.candidate: o.rejected for o in pinned.options if o.rejected} == dict.fromkeys(
        ("none", "int8_dynamic", "int8_weight_only"), "pinned to bf16"
    )


def test_what_was_not_timed_cannot_be_chosen() -> None:
    menu = Menu(
        profile(4), CPU, {find_candidate("none"): (), find_candidate("bf16"): ()}, {find_candidate("fp8_dynamic"): "no"}
    )
    made = with_times(menu, {}, Rules("eager", {}))
    assert {o.candidate: o.rejected for o in made.options} == {
        "none": "", "bf16": "not timed: max_seconds ran out", "fp8_dynamic": "no",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("harm", "sqnr", "rejected"),
    [
        (1e-3, 40.0, ""),
        (0.0, math.inf, ""),
        (1e-3, 9.9, "SQNR on recorded rows is 9.9 dB, below 10 dB"),
        (math.inf, -math.inf, "SQNR on recorded rows is not finite"),
        (math.inf, 40.0, "the model's output is not finite with it"),
        (math.nan, 40.0, "the model's output is not finite with it"),
    ],
)
def test_scores_gate_too(harm: float, sqnr: float, rejected: str) -> None:
    made = timed({"bf16": {"k": (0.5,) * 3}, "int8_dynamic": {"k": (0.5,) * 3}})
    scored = with_scores(made, {("x", "bf16"): Sensitivity("x", "bf16", harm, sqnr)}, lambda layer, option: 7)
    assert scored.option("bf16").rejected == rejected
    assert scored.option("bf16").nbytes == 7
    assert all(math.isfinite(o.harm or 0) and math.isfinite(o.sqnr_db or 0) for o in scored.options)  # files hold these
    assert scored.option("int8_dynamic").rejected == "not scored: max_seconds ran out"
    assert scored.option("none").harm == 0


def test_screening_names_every_reason() -> None:
    menu = options.screen(profile(4), [find_candidate(n) for n in ("none", "bf16", "int4_g128")], CPU)
    assert [c.name for c in menu.rejected] == ["int4_g128"]
    assert "multiple of the group size 128" in menu.rejected[find_candidate("int4_g128")]
    elsewhere = replace(profile(4), device="xpu")
    assert (
        "no kernel for xpu" in options.screen(elsewhere, [find_candidate("bf16")], CPU).rejected[find_candidate("bf16")]
    )
    wanted = options.to_time([menu, menu], "eager")
    assert len(wanted) == 1
    names = [(c.candidate.name, c.kernel.name) for own in wanted.values() for c in own]
    assert len(names) == len(set(names))
    assert ("none", "linear") in names


# Siblings: one decision, and what they take as one product.


def sibling(name: str, *menu: tuple[str, float, float, int], fused: dict[str, float], **changes: Any) -> LayerPlan:
    """A layer of the set "q+k+v"; `fused`: what a candidate takes where all of them run it as one product."""
    made = layer(name, *menu, siblings="q+k+v", **changes)
    options_ = tuple(
        replace(o, fused=Fused("1:wide", us, us, us)) if (us := fused.get(o.candidate)) else o for o in made.options
    )
    return replace(made, options=options_)


QKV = [
    sibling("q", ("bf16", 60, 1e-4, 200), ("int8", 50, 3e-3, 100), fused={"bf16": 30, "int8": 20}),
    sibling("k", ("bf16", 40, 2e-4, 200), ("int8", 45, 1e-3, 100), fused={"bf16": 25, "int8": 15}),
    sibling("v", ("bf16", 50, 5e-4, 200), ("int8", 30, 9e-3, 100), fused={"bf16": 28, "int8": 10}),
]


def brute(plan: list[LayerPlan]) -> tuple[float, float, int]:
    """Time, harm and bytes of a plan, added up by hand."""
    own = [item.option(item.chosen) for item in plan]
    us = [o.us for o in own]
    for members in (range(len(QKV)),):
        together = {own[i].candidate for i in members}
        if len(together) == 1 and all(own[i].fused for i in members):
            us[: len(QKV)] = [own[i].fused.us for i in members]  # type: ignore[union-attr]
    return sum(u or 0 for u in us), sum(o.harm or 0 for o in own), sum(o.nbytes or 0 for o in own)


@pytest.mark.parametrize("nbytes", [None, 700, 1000])
@pytest.mark.parametrize("limit", [0.0, 1e-4, 8e-4, 1e-3, 4e-3, 1.3e-2, 1.0])
def test_siblings_are_chosen_exactly(limit: float, nbytes: int | None) -> None:
    plan = [*QKV, *LAYERS]
    every = [
        choosing(plan, names) for names in itertools.product(*([o.candidate for o in item.options] for item in plan))
    ]
    keeps = [p for p in every if brute(p)[1] <= limit and (nbytes is None or brute(p)[2] <= nbytes)]
    if not keeps:
        with pytest.raises(BudgetError):
            choose(plan, Budget(divergence=limit, nbytes=nbytes), 1.0)
        return
    chosen = choosing(plan, choose(plan, Budget(divergence=limit, nbytes=nbytes), 1.0).candidates)
    us, harm, size = brute(chosen)
    assert us == selection.total_us(chosen) == min(brute(p)[0] for p in keeps)
    assert harm <= limit
    assert nbytes is None or size <= nbytes


def test_the_most_accurate_siblings_inside_a_time() -> None:
    every = [choosing(QKV, names) for names in itertools.product(("none", "bf16", "int8"), repeat=3)]
    for share in (0.16, 0.28, 0.5, 0.7, 1.0):
        chosen = choosing(QKV, choose(QKV, Budget(time=share), 1.0).candidates)
        assert brute(chosen)[0] <= share * 300
        least = min(brute(p)[1] for p in every if brute(p)[0] <= share * 300)
        assert selection.total_harm(chosen) == pytest.approx(least)


def test_only_siblings_that_chose_alike_run_as_one() -> None:
    alike, mixed = choosing(QKV, ["bf16"] * 3), choosing(QKV, ["bf16", "int8", "bf16"])
    assert selection.fused_sets(alike) == [[0, 1, 2]]
    assert [item.choice.us for item in alike] == [30, 25, 28]
    assert {item.choice.program for item in alike} == {"1:wide"}
    assert selection.fused_sets(mixed) == []
    assert [item.choice.us for item in mixed] == [60, 45, 50]
    assert selection.fused_sets(choosing(alike, ["none"] * 3)) == []
    assert selection.fused_sets(keep_float(alike, "it was slower")) == []
    assert selection.fused_sets(choosing(QKV[:1], ["bf16"])) == []
    told = explained(alike[0], Budget(divergence=1.0), 1.0, pinned=False).reason
    assert "as one product: q+k+v" in told


def test_siblings_in_groups_and_with_pins() -> None:
    tied = [replace(item, group="group 1") for item in QKV]
    assert choose(tied, Budget(divergence=1e-3), 1.0).candidates == ("bf16",) * 3
    assert selection.total_us(choosing(tied, ("bf16",) * 3)) == 83
    assert choose(tied, Budget(divergence=1e-4), 1.0).candidates == ("none",) * 3
    two = [replace(QKV[0], group="group 1"), QKV[1], replace(QKV[2], group="group 1")]
    assert choose(two, Budget(divergence=1e-3), 1.0).candidates == ("bf16",) * 3
    elsewhere = [replace(QKV[0], group="group 1"), *QKV[1:], replace(LAYERS[0], group="group 1")]
    chosen = choosing(elsewhere, choose(elsewhere, Budget(divergence=1.0), 1.0).candidates)
    assert chosen[0].chosen == chosen[3].chosen == "int8"
    pinned = [
        replace(item, options=tuple(o if o.candidate == "int8" else replace(o, rejected="pinned to int8")
                                    for o in item.options))
        for item in QKV
    ]  # fmt: skip
    assert selection.total_us(choosing(pinned, choose(pinned, Budget(divergence=1.0), 1.0).candidates)) == 45


def test_the_frontier_and_the_best_uniform_plan_know_what_runs_as_one() -> None:
    points = frontier(QKV, 1.0)
    assert (points[0].us, points[0].divergence) == (300, 0)
    assert points[-1].us == 45
    assert 83 in [point.us for point in points]
    name, uniform = best_uniform(QKV, Budget(divergence=1e-3), 1.0)
    assert (name, selection.total_us(uniform)) == ("bf16", 83)

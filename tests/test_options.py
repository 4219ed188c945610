"""What a layer may choose from: candidates of two modes, and programs for rows that nobody saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autoplan import Budget, Plan, apply_plan, make_plan, options, record
from autoplan.candidates import find_candidate
from autoplan.kernels import packing
from autoplan.kernels.ops import pack_program, parse_program, run_linear, unpack_program
from autoplan.kernels.reference import linear_float64, relative_error
from autoplan.layers import PlannedLinear
from autoplan.records import Call, Device, LayerProfile, Measurement, Option

CPU = Device("cpu", "cpu")
INT8 = ("int8_dynamic", "int8_dual", "int8_weight_only")
WEIGHT_ONLY, DYNAMIC = "int8pack", "onednn_u8s8"


def menu_of(rows: tuple[int, ...], candidates: tuple[str, ...] = INT8, in_features: int = 64) -> options.Menu:
    calls = tuple(Call("default", r, "bfloat16", 1) for r in rows)
    profile = LayerProfile("layer", (), in_features, 32, True, "bfloat16", "cpu", calls)
    return options.screen(profile, [find_candidate(name) for name in ("none", *candidates)], CPU)


def planned(ratios: dict[int, dict[str, float]], candidates: tuple[str, ...] = INT8, **rules: Any) -> dict[str, Option]:
    """The options of a layer by candidate, from ratios by rows and kernel; what is not named takes twice the time."""
    menu = menu_of(tuple(ratios), candidates)
    found = {}
    for shape, contenders in options.to_time([menu], "eager", rules.get("batch_invariant", False)).items():
        found[shape, "none", "linear"] = Measurement(shape, "none", "linear", 100.0, 1.0, 1.0, 1.0, 8)
        for contender in contenders:
            name, kernel = contender.candidate.name, contender.kernel.name
            ratio = ratios[shape.rows].get(kernel, 2.0)
            found.setdefault((shape, name, kernel), Measurement(shape, name, kernel, 100.0, ratio, ratio, ratio, 8))
    layer = options.with_times(menu, found, options.Rules("eager", {"default": 1.0}, **rules))
    return {option.candidate: option for option in layer.options}


def test_int8_runs_weight_only_at_few_rows_and_dynamic_at_many() -> None:
    few, many = {WEIGHT_ONLY: 0.3, DYNAMIC: 0.6}, {"dequantize_int8": 0.9, DYNAMIC: 0.2}
    options_ = planned({1: few, 512: many})
    assert options_["int8_dual"].program == f"1:{WEIGHT_ONLY},23:{DYNAMIC}"
    assert options_["int8_dual"].us == pytest.approx(30 + 20)
    assert options_["int8_weight_only"].us == pytest.approx(30 + 90)
    assert options_["int8_dynamic"].us == pytest.approx(60 + 20)
    assert not any(option.rejected for option in options_.values())


def test_int8_of_one_mode_only_is_that_candidate() -> None:
    options_ = planned({1: {WEIGHT_ONLY: 0.3, DYNAMIC: 0.6}})
    assert options_["int8_dual"].rejected == "at these rows it is int8_weight_only"
    alone = planned({1: {WEIGHT_ONLY: 0.3, DYNAMIC: 0.6}}, ("int8_dual",))["int8_dual"]
    assert alone.program == f"1:{WEIGHT_ONLY},129:dequantize"
    assert not alone.rejected
    few, many = {WEIGHT_ONLY: 0.3, DYNAMIC: 0.6}, {"dequantize_int8": 0.9, DYNAMIC: 0.2}
    invariant = planned({1: few, 512: many}, batch_invariant=True)
    assert invariant["int8_dual"].rejected == "at these rows it is int8_dynamic"


def test_groups_that_are_not_faster_than_finer_ones_are_out() -> None:
    kernel, names = "dequantize_int4", ("int4_g32", "int4_g64", "int4_g128")

    def rejected(g32: float, g64: float, g128: float, **rules: Any) -> list[str]:
        menu = menu_of((1,), names, in_features=128)
        (shape,) = options.to_time([menu], "eager")
        found = {(shape, "none", "linear"): Measurement(shape, "none", "linear", 100.0, 1.0, 1.0, 1.0, 8)}
        for name, ratio in zip(names, (g32, g64, g128), strict=True):
            found[shape, name, kernel] = Measurement(shape, name, kernel, 100.0, ratio, ratio, ratio, 8)
        layer = options.with_times(menu, found, options.Rules("eager", {"default": 1.0}, **rules))
        return [layer.option(name).rejected for name in names]

    assert rejected(0.5, 0.45, 0.4) == ["", "", ""]
    assert rejected(0.5, 0.495, 0.5) == ["", *["not 2% faster than int4_g32, whose weights are finer"] * 2]
    assert rejected(0.5, 0.5, 0.48) == ["", "not 2% faster than int4_g32, whose weights are finer", ""]
    assert rejected(0.99, 0.5, 0.5)[1:] == ["", "not 2% faster than int4_g64, whose weights are finer"]
    assert rejected(0.5, 0.5, 0.5, wants_bytes=True) == ["", "", ""]


def test_bits_that_do_not_pay_beside_a_few_more_are_out() -> None:
    names = ("int4_dynamic_g32", "int5_dynamic_g64", "int6_dynamic_g64", "int8_dynamic")

    def rejected(*ratios: float) -> list[str]:
        kernels = ("fused_int4", "fused_int5", "fused_int6", "fused_int8")
        found = planned({1: dict(zip(kernels, ratios, strict=True))}, names)
        return [found[name].rejected.partition(",")[0] for name in names]

    assert rejected(0.2, 0.25, 0.3, 0.4) == ["", "", "", ""]
    assert rejected(0.25, 0.25, 0.3, 0.4) == ["not 2% faster than int5_dynamic_g64", "", "", ""]
    assert rejected(0.3, 0.35, 0.3, 0.4) == [*["not 2% faster than int6_dynamic_g64"] * 2, "", ""]
    assert rejected(0.2, 0.3, 0.4, 0.4) == ["", "", "not surely faster than int8_dynamic", ""]


def test_int4_that_is_not_surely_faster_than_int8_is_out() -> None:
    menu = menu_of((1,), ("int8_weight_only", "int4_g64"))
    (shape,) = options.to_time([menu], "eager")
    found = {(shape, "none", "linear"): Measurement(shape, "none", "linear", 100.0, 1.0, 1.0, 1.0, 8)}
    found[shape, "int8_weight_only", "dequantize_int8"] = Measurement(
        shape, "int8_weight_only", "dequantize_int8", 100.0, 0.5, 0.48, 0.52, 8
    )

    def rejected(ratio: float, ratio_high: float) -> str:
        key = (shape, "int4_g64", "dequantize_int4")
        found[key] = Measurement(*key, 100.0, ratio, ratio, ratio_high, 8)
        layer = options.with_times(menu, found, options.Rules("eager", {"default": 1.0}))
        assert not layer.option("int8_weight_only").rejected
        return layer.option("int4_g64").rejected

    assert rejected(0.5, 0.5) == "not surely faster than int8_weight_only, whose weights are finer"
    assert rejected(0.45, 0.48) == "not surely faster than int8_weight_only, whose weights are finer"
    assert rejected(0.45, 0.47) == ""


def test_both_modes_are_timed_once_and_under_their_own_names() -> None:
    (contenders,) = options.to_time([menu_of((1,))], "eager").values()
    (alone,) = options.to_time([menu_of((1,), ("int8_dual",))], "eager").values()
    timed = [(c.candidate.name, c.kernel.name) for c in contenders]
    assert len(set(timed)) == len(timed)
    assert {name for name, _ in timed} == {"none", "int8_dynamic", "int8_weight_only"}
    assert {(c.candidate.name, c.kernel.name) for c in alone} == set(timed)


def test_both_modes_run_on_one_copy_of_the_codes_where_they_share_a_layout() -> None:
    program = "1:dequantize_int8,9:int_mm"
    canonical = find_candidate("int8_dual").quantize(torch.randn(33, 64))
    packed = pack_program(program, canonical)
    assert packing.nbytes(packed) == 33 * 64 + 33 * 4
    x = torch.randn(12, 64)
    exact = linear_float64(x, canonical, None)
    few = relative_error(run_linear(x[:3], packed, None, program, 33, torch.float32), exact[:3])
    many = relative_error(run_linear(x, packed, None, program, 33, torch.float32), exact)
    assert few < 1e-6 < 1e-3 < many < 0.03  # the activations are rounded to int8 in one of them only


@pytest.mark.parametrize("candidate", ["int8_weight_only", "int4_g32"])
def test_a_kernel_for_few_rows_leaves_many_to_the_dequantized_weight(candidate: str) -> None:
    few = {"int8_weight_only": "int8pack", "int4_g32": "int4pack"}[candidate]
    program = f"1:{few},129:dequantize"
    _, kernels, slices = parse_program(program)
    assert slices[0] == slices[1]
    canonical = find_candidate(candidate).quantize(torch.randn(48, 96))
    if reason := kernels[0].probe():
        pytest.skip(reason)
    packed = pack_program(program, canonical)
    assert unpack_program(program, packed).keys() == canonical.keys()
    x, bias = torch.randn(140, 96), torch.randn(48)
    y = run_linear(x, packed, bias, program, 48, torch.float32)
    assert relative_error(y, linear_float64(x, canonical, bias)) < 1e-6  # the kernel itself computes in bfloat16
    assert relative_error(run_linear(x[:5], packed, bias, program, 48, torch.float32), y[:5]) > 1e-4


def test_many_rows_beyond_those_seen_are_left_to_the_dequantized_weight_and_where_it_was_timed_it_stays() -> None:
    assert planned({16: {WEIGHT_ONLY: 0.3}})["int8_weight_only"].program == f"1:{WEIGHT_ONLY},129:dequantize"
    wide = planned({256: {WEIGHT_ONLY: 0.1, "dequantize_int8": 0.8}})["int8_weight_only"]
    assert wide.program == "1:dequantize_int8"  # 256 rows are beyond what the other is timed at
    assert planned({16: {WEIGHT_ONLY: 0.3}}, batch_invariant=True)["int8_weight_only"].program == f"1:{WEIGHT_ONLY}"


def test_a_program_cannot_start_with_what_to_do_beyond_another_kernel() -> None:
    with pytest.raises(Exception, match="no kernel is named 'dequantize'"):
        parse_program("1:dequantize")


def test_prefill_and_decode_share_one_plan_with_both_modes(timer: Any) -> None:
    """At 1 row weight-only is faster, at 40 dynamic: neither alone is the best for both together."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    race = timer.race

    def by_rows(arms: Any, **settings: Any) -> Any:
        rows = arms[0].calls[0].args[0].shape[0]
        weight_only, dynamic = (0.3, 0.6) if rows < 8 else (0.9, 0.2)
        timer.ratios = {"int8_weight_only": weight_only, "int8_dynamic": dynamic}
        return race(arms, **settings)

    with pytest.MonkeyPatch.context() as patch, record(model) as recording:
        with recording.workload("prefill"):
            for _ in range(3):
                model(torch.randn(40, 64))
        with recording.workload("decode", weight=2):
            for _ in range(3):
                model(torch.randn(1, 64))
        patch.setattr("autoplan.timing.race", by_rows)
        plan = make_plan(model, recording, candidates=list(INT8), budget=Budget(divergence=0.1), cache=False)
    assert [layer.chosen for layer in plan.layers] == ["int8_dual", "int8_dual"]
    assert plan.us == pytest.approx(2 * (0.2 * 100 + 2 * 0.3 * 100))
    assert "int8_dual" in plan.report()
    rounded = apply_plan(model, Plan.from_dict(plan.to_dict()))
    assert isinstance(rounded[0], PlannedLinear)
    assert rounded[0].candidate == "int8_dual"


def test_a_pin_to_a_candidate_of_two_modes_holds_even_where_only_one_pays() -> None:
    options_ = planned({1: {WEIGHT_ONLY: 0.3}}, pinned={"layer": "int8_dual"})
    assert not options_["int8_dual"].rejected
    assert options_["int8_weight_only"].rejected == "pinned to int8_dual"


class Pooled(nn.Module):
    """Returns what is judged, and beside it what another layer makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.judged, self.pooler = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.judged(x)
        return y, self.pooler(y)


def test_a_layer_that_the_judged_output_does_not_depend_on_stays_as_it_is(timer: Any) -> None:
    torch.manual_seed(5)
    model = Pooled()
    with record(model) as recording:
        for _ in range(3):
            model(torch.randn(8, 64))
    asked: Any = {"candidates": ["int8_dynamic"], "budget": Budget(divergence=0.1), "cache": False}
    plan = make_plan(model, recording, **asked)
    judged, pooler = plan.layers
    assert (judged.chosen, pooler.chosen) == ("int8_dynamic", "none")
    assert "does not reach the output that is judged" in pooler.option("int8_dynamic").rejected
    both = make_plan(model, recording, output=lambda made: torch.cat(made, dim=1), **asked)
    assert [layer.chosen for layer in both.layers] == ["int8_dynamic", "int8_dynamic"]
    pinned = make_plan(model, recording, pin={"pooler": "int8_dynamic"}, **asked)
    assert [layer.chosen for layer in pinned.layers] == ["int8_dynamic", "int8_dynamic"]

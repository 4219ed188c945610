"""Plans put into models: the same choices bit for bit, nothing timed, and a refusal that names what differs."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoplan import Budget, Plan, apply_plan, autoplan, make_plan, plan_of, record
from autoplan.apply import StandIns, Swap, stand_ins, stand_ins_of
from autoplan.errors import AutoplanError, CandidateError, PlanMismatchError
from autoplan.layers import PlannedLinear
from autoplan.records import Fused, LayerPlan, Option
from autoplan.selection import choosing

SOURCE = """
import torch
from torch import nn

def mlp(seed=7):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))

def rows():
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
"""
_made: dict[str, Any] = {}
exec(SOURCE, _made)  # the very text that the other process runs
mlp, rows = _made["mlp"], _made["rows"]

PIN = {"0": "int8_dynamic", "2": "int8_weight_only", "4": "bf16"}


@pytest.fixture
def plan(timer: Any) -> Plan:
    model = mlp()
    with record(model) as recording:
        model(rows())
    return make_plan(model, recording, budget=Budget(divergence=0.5), pin=PIN, cache=False)


def unchanged(model: nn.Module) -> bool:
    return not any(isinstance(m, PlannedLinear) for m in model.modules()) and "_autoplan_plan" not in vars(model)


# Applying.


def test_the_same_choices_in_place_without_a_forward(plan: Plan, timer: Any) -> None:
    model, names = mlp(), [name for name, _ in mlp().named_modules()]
    timed = timer.races, timer.comparisons
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    assert apply_plan(model, plan) is model
    assert not forwards
    assert (timer.races, timer.comparisons) == timed
    assert {name: m.candidate for name, m in model.named_modules() if isinstance(m, PlannedLinear)} == PIN
    assert [name for name, _ in model.named_modules()] == names
    assert plan_of(model) == plan
    expected = mlp()(rows())
    assert 0 < ((model(rows()) - expected).norm() / expected.norm()) < 0.1


def test_a_compiled_model_is_planned_inside_its_wrapper(plan: Plan) -> None:
    compiled = torch.compile(mlp(), backend="eager")
    assert apply_plan(compiled, plan) is compiled
    assert plan_of(compiled) is plan_of(compiled._orig_mod)


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_a_replay_in_another_process_is_bit_identical_and_times_nothing(
    plan: Plan, tmp_path: Path, suffix: str
) -> None:
    file, out = tmp_path / f"plan{suffix}", tmp_path / "y.pt"
    plan.save(file)
    script = f"""{SOURCE}
from autoplan import Plan, apply_plan, plan_of, timing
torch.set_num_threads({torch.get_num_threads()})
model = mlp()
forwards = []
handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: forwards.append(module))
apply_plan(model, Plan.load({str(file)!r}))
assert not forwards
handle.remove()
assert timing.timings_made == 0
assert plan_of(model) == Plan.load({str(file)!r})
with torch.no_grad():
    torch.save(model(rows()), {str(out)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(out), apply_plan(mlp(), plan)(rows()))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_their_plan(plan: Plan, way: Any) -> None:
    model = apply_plan(mlp(), plan)
    twin = way(model)
    assert plan_of(twin) == plan
    assert torch.equal(twin(rows()), model(rows()))
    with pytest.raises(AutoplanError, match="planned already"):
        apply_plan(twin, plan)


def test_weights_travel_by_safetensors_into_a_twin(plan: Plan, tmp_path: Path) -> None:
    model = apply_plan(mlp(), plan)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    twin = apply_plan(mlp(seed=8), plan, weights="skip")
    assert not torch.equal(twin(rows()), model(rows()))
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(twin(rows()), model(rows()))
    with torch.device("meta"):
        empty = mlp()
    apply_plan(empty, plan, weights="skip")
    empty.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    assert torch.equal(empty(rows()), model(rows()))


# Refusing.


def test_what_differs_is_named_and_nothing_changes(plan: Plan) -> None:
    model = mlp()
    model[0] = nn.Linear(64, 64, bias=False)
    model[2] = nn.Linear(64, 48).bfloat16()
    model[4] = nn.Identity()
    with pytest.raises(PlanMismatchError) as error:
        apply_plan(model, plan)
    told = str(error.value)
    assert "0 has no bias, unlike the planned layer" in told
    assert "2 is 48x64 bfloat16, planned for 64x64 float32" in told
    assert "4 is a Identity, not an nn.Linear" in told
    assert "skip" not in told
    assert unchanged(model)
    with pytest.raises(PlanMismatchError, match=r"4 is missing"):
        apply_plan(mlp()[:3], plan)


def test_a_long_list_is_cut(plan: Plan) -> None:
    many = replace(plan, layers=tuple(replace(plan.layers[0], name=f"x{i}") for i in range(11)))
    with pytest.raises(PlanMismatchError, match=r"x7 is missing; and 3 more\."):
        apply_plan(mlp(), many)


def test_other_weights_are_refused_unless_told(plan: Plan) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[5, 5] += 1e-3
    with pytest.raises(PlanMismatchError, match=r'2 has other weights \(weights="skip" applies it regardless\)'):
        apply_plan(model, plan)
    assert unchanged(model)
    assert isinstance(apply_plan(model, plan, weights="skip")[2], PlannedLinear)


@pytest.mark.parametrize("change", [{"chosen": "int3"}, {"program": "1:no_such_kernel"}, {"program": "nonsense"}])
def test_a_plan_that_cannot_run_here_changes_nothing(plan: Plan, change: dict[str, str]) -> None:
    last = plan.layers[-1]
    options = tuple(
        replace(o, candidate=change.get("chosen", o.candidate), program=change.get("program", o.program))
        if o.candidate == last.chosen
        else o
        for o in last.options
    )
    broken = replace(last, options=options, chosen=change.get("chosen", last.chosen))
    model = mlp()
    with pytest.raises(CandidateError if "chosen" in change else AutoplanError, match=r"int3|layer '4'"):
        apply_plan(model, replace(plan, layers=(*plan.layers[:-1], broken)))
    assert unchanged(model)


def test_arguments(plan: Plan) -> None:
    with pytest.raises(AutoplanError, match='"check", "strict" or "skip"'):
        apply_plan(mlp(), plan, weights="never")  # type: ignore[arg-type]
    with pytest.raises(AutoplanError, match="has no plan"):
        plan_of(mlp())


# Tied and shared.


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a = nn.Linear(64, 64)
        self.same = self.a
        self.b = nn.Linear(64, 64, bias=False)
        if tie:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.same(self.a(x).relu()).relu())


def test_tied_layers_share_one_quantized_weight_and_keep_their_own_bias(timer: Any) -> None:
    expected = Tied()(rows())
    planned = autoplan(Tied(), rows(), pin={"a": "int8_weight_only"}, budget=Budget(divergence=0.5), cache=False)
    model = apply_plan(Tied(), plan_of(planned))
    assert model.a is model.same
    assert model.a is not model.b
    assert model.a._packed is model.b._packed
    assert model.a.bias is not None
    assert model.b.bias is None
    assert ((model(rows()) - expected).norm() / expected.norm()) < 0.1


def test_a_twin_that_is_not_tied_never_runs_the_others_weight(timer: Any) -> None:
    plan = plan_of(autoplan(Tied(), rows(), pin={"a": "int8_weight_only"}, budget=Budget(divergence=0.5), cache=False))
    apart = Tied(tie=False)
    expected = apart(rows())
    with pytest.raises(PlanMismatchError, match="b has other weights"):
        apply_plan(apart, plan)
    assert unchanged(apart)
    apply_plan(apart, plan, weights="skip")
    assert ((apart(rows()) - expected).norm() / expected.norm()) < 0.1
    equal = Tied(tie=False)
    equal.b.weight = nn.Parameter(equal.a.weight.detach().clone())  # as a safetensors file gives it back
    assert isinstance(apply_plan(equal, plan).b, PlannedLinear)


# Swapping.


def test_swapped_puts_back_what_was_there_also_after_an_exception() -> None:
    model = mlp()
    first, expected = model[0], model(rows())
    layers = stand_ins(model, ("0",), "int8_weight_only", "1:dequantize_int8")
    swap = Swap(model, layers)
    for _ in range(2):
        with swap:
            assert model[0] is layers["0"]
        assert model[0] is first
    with pytest.raises(ZeroDivisionError), swap:
        raise ZeroDivisionError
    assert model[0] is first
    assert torch.equal(model(rows()), expected)
    nested = nn.Sequential(model)
    Swap(nested, {"0.0": nn.Identity()}).exchange()
    assert isinstance(nested.get_submodule("0.0"), nn.Identity)


def test_a_parent_of_two_names_has_its_layer_swapped_once() -> None:
    block = mlp()
    model = nn.Sequential(block, nn.Flatten(), block)
    first, layers = block[0], stand_ins(model, ("0.0", "2.0"), "int8_weight_only", "1:dequantize_int8")
    with Swap(model, layers):
        assert block[0] is layers["0.0"]
    assert block[0] is first


def test_only_linears_are_stood_in_for() -> None:
    with pytest.raises(AutoplanError, match="layer '1' is a ReLU"):
        stand_ins(mlp(), ("1",), "int8_weight_only", "1:dequantize_int8")


# The modules of plans that are tried one after the other.


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the layers that were quantized, in turn."""
    names: list[str] = []
    build = PlannedLinear.from_linear.__func__  # type: ignore[attr-defined]

    def counted(cls: type[PlannedLinear], name: str, *args: Any, **settings: Any) -> PlannedLinear:
        names.append(name)
        planned: PlannedLinear = build(cls, name, *args, **settings)
        return planned

    monkeypatch.setattr(PlannedLinear, "from_linear", classmethod(counted))
    return names


def test_only_layers_that_chose_otherwise_are_made_anew(plan: Plan, made: list[str]) -> None:
    modules = StandIns(mlp())
    first = modules(plan.layers)
    assert list(first) == made == ["0", "2", "4"]
    reasons = [replace(layer, reason="told otherwise") for layer in plan.layers]
    assert modules(reasons) == first
    others = [replace(layer, chosen="none") if layer.name == "0" else layer for layer in plan.layers]
    other = modules(others)
    assert "0" not in other or other["0"].candidate == "none"
    assert [other[name] is first[name] for name in ("2", "4")] == [True, True]
    assert made[:3] == ["0", "2", "4"]
    made.clear()
    assert modules(plan.layers)["0"] is not first["0"]  # no more than one plan's modules are kept
    assert made == ["0"]


def test_the_modules_of_the_last_plan_are_dropped_before_others_are_made(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = StandIns(mlp())
    last = {name: weakref.ref(module) for name, module in modules(plan.layers).items()}
    alive: list[list[str]] = []

    def looking(model: nn.Module, layers: Any) -> Any:
        gc.collect()
        alive.append([name for name, module in last.items() if module() is not None])
        return stand_ins_of(model, layers)

    monkeypatch.setattr("autoplan.apply.stand_ins_of", looking)
    modules([replace(layer, chosen="none") if layer.name == "0" else layer for layer in plan.layers])
    assert alive == [["2", "4"]]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(64, n) for n in (48, 32, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.o(x)


def test_layers_that_run_as_one_product_are_kept_together_or_made_anew_together(made: list[str]) -> None:
    program = "1:dequantize_int8"
    options = (
        Option("none", "1:linear", 1.0, 1.0, 1.0),
        Option("int8_weight_only", program, 1.0, 1.0, 1.0, fused=Fused(program, 1.0, 1.0, 1.0)),
    )
    layers = [
        LayerPlan(
            name, (), 64, out, True, "float32", (), 1.0, "none", "", options, siblings="" if name == "o" else "q+k"
        )
        for name, out in [("q", 48), ("o", 16), ("k", 32)]
    ]
    model, x = Two().eval(), torch.randn(5, 64)
    modules = StandIns(model)
    as_one = choosing(layers, ["int8_weight_only"] * 3)
    first = modules(as_one)
    assert first["q"]._siblings is first["k"]._siblings is not None
    assert first["o"]._siblings is None

    without_o = modules(choosing(layers, ["int8_weight_only", "none", "int8_weight_only"]))
    assert without_o == {name: first[name] for name in ("q", "k")}
    made.clear()
    alone = modules(choosing(layers, ["int8_weight_only", "none", "none"]))
    assert made == ["q"]  # what it had was one with k's
    assert alone["q"]._siblings is None
    again = modules(as_one)
    assert sorted(made) == ["k", "o", "q", "q"]
    expected = model(x)
    for choice in (alone, again, without_o):
        with Swap(model, choice):
            for y, meant in zip(model(x), expected, strict=True):
                assert (y - meant).norm() < 0.02 * meant.norm()


def test_a_plan_that_is_measured_judged_and_timed_is_quantized_once(
    timer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[str] = []

    def counted(model: nn.Module, layers: Any) -> Any:
        plans.extend(layer.chosen for layer in layers)
        return stand_ins_of(model, layers)

    monkeypatch.setattr("autoplan.apply.stand_ins_of", counted)
    model = mlp()
    with record(model) as recording:
        model(rows())
    make_plan(model, recording, budget=Budget(divergence=0.5), pin=PIN, cache=False)
    assert plans == list(PIN.values())

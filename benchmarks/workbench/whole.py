"""A whole model on one device against its variants: one candidate throughout, the plan, other libraries.

What decode.py and diffusion.py share. For each scenario the model is recorded and planned, as a user would who runs
just that. Then the bfloat16 model is timed against each variant of it, pair by pair in interleaved rounds; what fails
is a row with the reason. Unless it is to be eager, all are compiled with CUDA graphs. Random weights cannot tell what
a plan does to a model's output, so here the budget only keeps the choice honest.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from result_files import folder_of, measured_on, write_csv
from tabulate import tabulate
from torch import Tensor, nn

from autoplan import Plan, PlanCache, apply_plan, kernels, make_plan, record, timing
from autoplan.apply import Swap, stand_ins
from autoplan.cache import fingerprint
from autoplan.layers import PlannedLinear
from autoplan.records import COMPILED, EAGER

CANDIDATES = ("none", "int8_weight_only", "int8_dynamic", "fp8_weight_only", "fp8_dynamic", "int4_g128")
FIELDS = ("scenario", "variant", "ms", "per_s", "unit", "speedup", "low", "high", "weights_gib", "layers", "note")
_SECONDS = 20.0  # for one pair
_STEPS = 3  # recorded inputs: one each to score on, to validate on, and for the final figures

Row = dict[str, Any]
Inputs = tuple[Any, ...]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Scenario:
    """One way to run a model: so many `items` in a call; `inputs(step)` are the arguments of one, on the device."""

    name: str
    items: int
    unit: str
    inputs: Callable[[int], Inputs]


@dataclass(frozen=True)
class Subject:
    """A model, its scenarios, and what the rows say of it."""

    model: nn.Module
    scenarios: Sequence[Scenario]
    about: Mapping[str, Any]


def main(
    argv: Sequence[str] | None,
    description: str,
    name: str,
    scenarios: Sequence[str],
    subject: Callable[[argparse.Namespace], Subject],
) -> int:
    """A command that races the scenarios of what `subject` makes of the options, and writes <name>.csv."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model, a fraction of a second for each pair")
    parser.add_argument("--mode", choices=[COMPILED, EAGER], default=COMPILED, help="compiled: with CUDA graphs")
    parser.add_argument("--scenarios", nargs="+", choices=scenarios)
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES)
    parser.add_argument("--budget", default="high")
    parser.add_argument("--layers", type=int, help="so many blocks instead")
    parser.add_argument("--planning-seconds", type=float, default=300.0, help="for one plan (default: %(default)s)")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/<device>)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here; --device cpu --small shows that the script works", file=sys.stderr)
        return 2
    began = time.monotonic()
    environment = fingerprint.environment(arguments.device, fingerprint.source_digest(kernels))
    print(f"{environment['device']}, torch {torch.__version__}, {arguments.mode}", flush=True)
    if arguments.mode == COMPILED:  # every variant is one more of the same code
        torch._dynamo.config.recompile_limit = 256
    rows: list[Row] = []
    cache = PlanCache()
    with torch.no_grad():
        of = subject(arguments)
        out = (arguments.out or folder_of(environment)) / f"{name}.csv"
        about = measured_on(environment, mode=arguments.mode, **of.about, budget=arguments.budget)
        for scenario in of.scenarios:
            if scenario.name in (arguments.scenarios or [scenario.name]):
                for row in run(of.model, scenario, cache, arguments):
                    print(tabulate([row], tablefmt="plain"), file=sys.stderr, flush=True)
                    rows.append(row)
                    write_csv(out, rows, about)  # whatever comes after it
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    print(f"{len(rows)} rows in {time.monotonic() - began:.0f} s; written to {out}")
    return 0


def randomized(model: Model, device: str, seed: int) -> Model:
    """A model that was made on the meta device, in bfloat16 on `device`: random matrices, vectors of ones."""
    model = model.bfloat16().to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.fill_(1.0)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def run(model: nn.Module, scenario: Scenario, cache: PlanCache, arguments: argparse.Namespace) -> Iterator[Row]:
    """Plan the scenario, then time every variant against the bfloat16 model."""
    plan = planned(model, scenario, cache, arguments)
    print(plan.report() if arguments.small else "\n".join(plan.report().splitlines()[-16:]), flush=True)
    inputs = scenario.inputs(0)
    variants: dict[str, Callable[[], nn.Module]] = {
        f"uniform {name}": lambda name=name: uniform(model, plan, name)  # type: ignore[misc]
        for name in arguments.candidates
        if name != "none"
    }
    variants["autoplan"] = lambda: apply_plan(twin(model), plan, weights="skip")
    if not arguments.no_peers:
        variants |= {name: lambda make=make: make(copy.deepcopy(model)) for name, make in TORCHAO.items()}  # type: ignore[misc]
        variants["torchao autoquant"] = lambda: autoquant(copy.deepcopy(model), inputs)
    plain, told = runner(model, arguments.mode), False
    for name, make in variants.items():
        row: Row = {
            **dict.fromkeys(FIELDS, math.nan),
            "scenario": scenario.name,
            "variant": name,
            "unit": scenario.unit,
            "layers": "",
            "note": "",
        }
        try:
            variant = make()
            row["layers"], row["weights_gib"] = listed(variant), weight_bytes(variant) / 2**30
            calls = {"bf16": lambda: plain(*inputs), name: bound(runner(variant, arguments.mode), inputs)}
            found = compared(calls, arguments)[name]
        except Exception as error:  # a library that is not here, or that cannot do this
            yield {**row, "note": f"failed: {type(error).__name__}: {error}".partition("\n")[0]}
            continue
        finally:
            variant = calls = None  # type: ignore[assignment]
            free()
        if not told:
            told = True
            us, gib = found.baseline_us, weight_bytes(model) / 2**30
            yield {**row, "variant": "bf16", "layers": listed(model), "weights_gib": gib, "ms": us / 1e3,
                   "per_s": scenario.items * 1e6 / us, "speedup": 1.0, "low": 1.0, "high": 1.0}  # fmt: skip
        us = found.baseline_us * found.ratio
        row |= {"ms": us / 1e3, "per_s": scenario.items * 1e6 / us, "speedup": 1 / found.ratio, "note": found.note}
        yield row | {"low": 1 / found.ratio_high, "high": 1 / max(found.ratio_low, 1e-9)}


def planned(model: nn.Module, scenario: Scenario, cache: PlanCache, arguments: argparse.Namespace) -> Plan:
    with record(model, seed=arguments.seed) as recording:
        for step in range(_STEPS):
            model(*scenario.inputs(step))
    return make_plan(
        model,
        recording,
        candidates=arguments.candidates,
        budget=arguments.budget,
        cache=cache,
        compiled=arguments.mode == COMPILED,
        max_seconds=arguments.planning_seconds,
        seed=arguments.seed,
    )


def twin(model: nn.Module) -> nn.Module:
    """A copy with buffers of its own that shares the parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def uniform(model: nn.Module, plan: Plan, candidate: str) -> nn.Module:
    """The model with one candidate in every layer that can run it, on the kernels that planning found best for it."""
    changed = twin(model)
    for layer in plan.layers:
        program = next((option.program for option in layer.options if option.candidate == candidate), "")
        if program:
            Swap(changed, stand_ins(changed, (layer.name, *layer.aliases), candidate, program)).exchange()
    return changed


def runner(model: nn.Module, mode: str) -> Callable[..., object]:
    if mode == EAGER:
        return model
    compiled: Callable[..., object] = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    return compiled


def bound(run: Callable[..., object], inputs: Inputs) -> Callable[[], object]:
    return lambda: run(*inputs)


def compared(calls: Mapping[str, Callable[[], object]], arguments: argparse.Namespace) -> dict[str, timing.Timing]:
    for _ in range(3):  # compiles, records its CUDA graph, replays it
        for call in calls.values():
            call()
    return timing.compare(
        calls,
        baseline="bf16",
        max_seconds=0.2 if arguments.small else _SECONDS,
        min_batch_us=timing.MODEL_BATCH_US[arguments.device],
        clock=timing.clock_of(arguments.device),
        seed=arguments.seed,
    )


def listed(model: nn.Module) -> str:
    """How many layers run which candidate, or have which kind of weight of another library."""

    def kind(module: nn.Linear | PlannedLinear) -> str:
        if isinstance(module, PlannedLinear):
            return module.candidate
        return "none" if type(module.weight) is nn.Parameter else type(module.weight).__name__

    counts = Counter(kind(module) for module in model.modules() if isinstance(module, nn.Linear | PlannedLinear))
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def weight_bytes(model: nn.Module) -> int:
    held = sum(module.nbytes() for module in model.modules() if isinstance(module, PlannedLinear))
    return held + sum(map(stored_bytes, model.parameters()))


def stored_bytes(tensor: Tensor) -> int:
    """Of what a tensor holds; one of a quantized kind says the bytes of the float tensor that it stands for."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- other libraries -------------------------------------------------------------------------------------------------


def _torchao(config: str, **arguments: Any) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        quantization = importlib.import_module("torchao.quantization")
        given = {
            key: getattr(quantization, value)() if key == "granularity" else value for key, value in arguments.items()
        }
        quantization.quantize_(model, getattr(quantization, config)(**given))
        return model

    return make


TORCHAO: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao int8 weight only": _torchao("Int8WeightOnlyConfig"),
    "torchao int4 weight only": _torchao("Int4WeightOnlyConfig", group_size=128),
    "torchao int8 dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao fp8 row-wise": _torchao("Float8DynamicActivationFloat8WeightConfig", granularity="PerRow"),
}


def autoquant(model: nn.Module, inputs: Inputs) -> nn.Module:
    """autoplan's ancestor, in torchao up to 0.16: the first call shows it the shapes, and it times its classes."""
    importlib.import_module("torchao.quantization").autoquant(model, error_on_unseen=False, set_inductor_config=False)
    model(*inputs)
    return model

"""What users could pick: each peer makes a workload's model its own. It may fail; the reason is then its row.

One entry in PEERS is one peer. Compiled ones all go through `compile_`: the same options, one graph per shape.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoplan import Budget, PlanCache, apply_plan, graphs, make_plan, record
from workbench.workloads import TABLES, Input, Output, Scenario, Workload

BASELINE = "float32 eager"
OURS = "autoplan balanced"  # that peers are also compared with, pair by pair

Call = Callable[[Input], Output]


@dataclass(frozen=True)
class Made:
    """A workload's model as a peer has it."""

    calls: Mapping[str, Call]  # by scenario
    nbytes: int  # of its weights: parameters and buffers, or the file that holds them
    about: str = ""


Make = Callable[[Workload], Made]


@dataclass(frozen=True)
class Peer:
    name: str
    make: Make
    matters: Collection[str] = ()  # the tables that it takes part in where there is little time


# --- modules ---


def of_module(model: nn.Module, work: Workload, compiled: bool, about: str = "") -> Made:
    call = compile_(model, work) if compiled else entry(model)
    return Made(dict.fromkeys((scenario.name for scenario in work.scenarios), call), nbytes(model), about)


def entry(model: Callable[..., Any]) -> Call:
    """The model as a function of one input, with graphs of its own."""
    return graphs.separate(lambda inputs: model(**inputs))


def compile_(model: Callable[..., Any], work: Workload) -> Call:
    call = entry(model)
    return torch.compile(call, dynamic=False) if work.compiled else call


def nbytes(model: nn.Module) -> int:
    """Of all parameters and buffers, each once; of what a graph uses, if it is one; packed and wrapped ones count."""
    seen: dict[int, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, tuple | list):
            for one in value:
                count(one)
        elif isinstance(value, Tensor):
            if hasattr(value, "__tensor_flatten__"):
                for name in value.__tensor_flatten__()[0]:
                    count(getattr(value, name))
            elif value.is_quantized or value.is_mkldnn:
                seen[id(value)] = value.numel() * value.element_size()
            else:
                storage = value.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()

    held: Iterable[Any] = [*model.state_dict(keep_vars=True).values(), *model.parameters(), *model.buffers()]
    if isinstance(model, torch.fx.GraphModule):  # which keeps what it was made from
        held = [attrgetter(node.target)(model) for node in model.graph.nodes if node.op == "get_attr"]
    for value in held:
        count(value)
    return sum(seen.values())


def plain(dtype: torch.dtype, compiled: bool) -> Make:
    return lambda work: of_module(work.load(dtype), work, compiled)


def autocast(work: Workload) -> Made:
    return of_module(Autocast(work.load(torch.float32)), work, compiled=True)


class Autocast(nn.Module):
    """A model that is called in a region of autocast to bfloat16, and answers in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Output:
        with torch.autocast("cpu", torch.bfloat16):
            found: Output = self.model(**inputs)
        return found.float() if isinstance(found, Tensor) else [tensor.float() for tensor in found]


def quantize_dynamic(work: Workload) -> Made:
    model = torch.ao.quantization.quantize_dynamic(work.load(torch.float32), {nn.Linear}, dtype=torch.qint8)
    return of_module(model, work, compiled=False, about=f"engine {torch.backends.quantized.engine}")


# --- torchao ---


def torchao(dtype: torch.dtype, config: str, module: str = "torchao.quantization", **fields: Any) -> Make:
    def make(work: Workload) -> Made:
        from torchao.quantization import quantize_

        model = work.load(dtype)
        # set_inductor_config would change Inductor's settings for good, so for all that compile after it as well.
        quantize_(model, getattr(importlib.import_module(module), config)(**fields, set_inductor_config=False))
        changed = sum("torchao" in type(m.weight).__module__ for m in model.modules() if isinstance(m, nn.Linear))
        if not changed:
            raise RuntimeError("quantize_ left every Linear as it was")
        return of_module(model, work, compiled=True, about=f"{changed} layers quantized")

    return make


def pt2e(dynamic: bool) -> Make:
    """Export, quantize and compile, as its tutorial shows, for each scenario's shapes."""

    def make(work: Workload) -> Made:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        calls, size = {}, 0
        for scenario in work.scenarios:
            exported = torch.export.export(work.load(torch.float32), (), dict(scenario.judged[0])).module()
            quantizer = x86.X86InductorQuantizer()
            quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
            prepared = prepare_pt2e(exported, quantizer)
            for inputs in scenario.calibration:
                prepared(**inputs)
            converted = convert_pt2e(prepared)
            size = nbytes(converted)
            calls[scenario.name] = compile_(converted, work)
        return Made(calls, size, "a graph per scenario" if len(calls) > 1 else "")

    return make


# --- other libraries ---


def quanto(weights: str, activations: str | None = None, dtype: torch.dtype = torch.float32) -> Make:
    def make(work: Workload) -> Made:
        from optimum.quanto import Calibration, freeze, quantize

        model = work.load(dtype)
        quantize(model, weights=weights, activations=activations)
        if activations:
            with Calibration():
                for scenario in work.scenarios:
                    for inputs in scenario.calibration:
                        model(**inputs)
        freeze(model)
        return of_module(model, work, compiled=False)

    return make


def onnxruntime(int8: bool) -> Make:
    def make(work: Workload) -> Made:
        import onnx
        import onnxruntime as ort
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization import quantize_dynamic as quantize

        calls, size = {}, 0
        for scenario in work.scenarios:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "float.onnx")
                to_onnx(work.load(torch.float32), scenario, path)
                if int8:
                    described = onnx.load(path)
                    del described.graph.value_info[:]  # the shapes of weights, which quantizing transposes
                    quantize(described, Path(folder, "int8.onnx"), per_channel=True, weight_type=QuantType.QInt8,
                             use_external_data_format=True)  # fmt: skip
                    path.unlink()
                    Path(folder, "float.onnx.data").unlink(missing_ok=True)
                size = sum(file.stat().st_size for file in Path(folder).iterdir())
                options = ort.SessionOptions()
                options.intra_op_num_threads = torch.get_num_threads()
                options.add_session_config_entry("session.force_spinning_stop", "1")  # between its turns
                session = ort.InferenceSession(
                    next(Path(folder).glob("*.onnx")), options, providers=["CPUExecutionProvider"]
                )
            calls[scenario.name] = functools.partial(run_session, session)
        return Made(calls, size, "a session per scenario" if len(calls) > 1 else "")

    return make


def to_onnx(model: nn.Module, scenario: Scenario, path: Path) -> None:
    with contextlib.redirect_stdout(None):
        torch.onnx.export(
            model, (), path, kwargs=dict(scenario.judged[0]), input_names=list(scenario.judged[0]), dynamo=True,
            external_data=True, verbose=False,
        )  # fmt: skip


def run_session(session: Any, inputs: Input) -> Output:
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return as_output(map(torch.from_numpy, found))


def openvino(int8: bool) -> Make:
    """Its CPU plugin computes float models in bfloat16 where the CPU can: that is its default, and what is measured."""

    def make(work: Workload) -> Made:
        import openvino as ov

        calls, size = {}, 0
        for scenario in work.scenarios:
            example = dict(scenario.judged[0])
            model = ov.convert_model(torch.export.export(work.load(torch.float32), (), example))
            if int8:
                import nncf

                data = nncf.Dataset([{n: v.numpy() for n, v in i.items()} for i in scenario.calibration])
                model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER)
            with tempfile.TemporaryDirectory() as folder:
                ov.save_model(model, Path(folder, "model.xml"), compress_to_fp16=False)
                size = Path(folder, "model.bin").stat().st_size
            compiled = ov.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
            calls[scenario.name] = functools.partial(run_openvino, compiled)
        return Made(calls, size, "a graph per scenario" if len(calls) > 1 else "")

    return make


def run_openvino(compiled: Any, inputs: Input) -> Output:
    found = compiled({name: value.numpy() for name, value in inputs.items()})
    return as_output(torch.from_numpy(found[i].copy()) for i in range(len(compiled.outputs)))


def as_output(tensors: Iterable[Tensor]) -> Output:
    first, *others = tensors
    return [first, *others] if others else first


def replaced(dtype: torch.dtype, replacement: Callable[[nn.Linear], nn.Module]) -> Make:
    """Every Linear in a module's place."""

    def make(work: Workload) -> Made:
        model = work.load(dtype)
        for name, linear in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, replacement(linear))
        return of_module(model.eval().requires_grad_(False), work, compiled=False)

    return make


def bitsandbytes_int8(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # else a warning at each call
    found = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
    found.load_state_dict(linear.state_dict())
    return found.to("cpu")


def bitsandbytes_nf4(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    found = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None,
                              compute_dtype=linear.weight.dtype, quant_type="nf4")  # fmt: skip
    found.load_state_dict(linear.state_dict())
    return found.to("cpu")


def hqq(nbits: int) -> Callable[[nn.Linear], nn.Module]:
    def replacement(linear: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=nbits, group_size=64, axis=1)
        return HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")

    return replacement


# --- ours ---


@functools.cache
def plan_cache() -> PlanCache:
    """Of this table: each workload's first plan measures, and its set-up seconds show it; the others reuse that."""
    return PlanCache(os.environ.get("AUTOPLAN_CACHE"))


def autoplan(budget: str | Budget, dtype: torch.dtype | None = None) -> Make:
    """One plan for all scenarios."""

    def make(work: Workload) -> Made:
        if work.dtype is BF16 and dtype is BF16:
            raise RuntimeError("the model is given in bfloat16 as it is")
        model = work.load(dtype or work.dtype)
        with record(model) as recording:
            for scenario in work.scenarios:
                with recording.workload(scenario.name, weight=scenario.weight):
                    for inputs in scenario.calibration:
                        model(**inputs)
        plan = make_plan(
            model, recording, budget=budget, cache=plan_cache(), compiled=work.compiled, progress=False,
            output=work.output,
        )  # fmt: skip
        apply_plan(model, plan, weights="skip")
        chosen = [layer.chosen for layer in plan.layers]
        about = ", ".join(f"{name} {chosen.count(name)}" for name in sorted(set(chosen)))
        about += ", in autocast" * (plan.region is not None)
        return of_module(model, work, compiled=True, about=about)

    return make


F32, BF16 = torch.float32, torch.bfloat16
INT8_DYNAMIC = "Int8DynamicActivationInt8WeightConfig"
INT4 = "torchao.prototype.quantization.int4"
FLOAT8_DYNAMIC = "Float8DynamicActivationFloat8WeightOpaqueTensorConfig"
FLOAT8 = "torchao.prototype.float8_opaque_tensor"

ENCODERS = ("minilm-32x64", "minilm-1x16", "vit")

PEERS = (
    Peer(BASELINE, plain(F32, compiled=False), TABLES),
    Peer(OURS, autoplan("balanced"), TABLES),
    Peer("autoplan high", autoplan("high")),
    Peer("autoplan lossless", autoplan("lossless"), ["decoder"]),
    Peer("autoplan, divergence 0.06", autoplan(Budget(divergence=0.06)), ["decoder"]),  # about that of torchao's int4
    Peer("autoplan balanced, given bfloat16", autoplan("balanced", BF16), ["minilm-32x64", "language-model"]),
    Peer("autoplan high, given bfloat16", autoplan("high", BF16)),
    Peer("bfloat16 eager", plain(BF16, compiled=False)),
    Peer("float32 compiled", plain(F32, compiled=True), ["minilm-32x64", "layers"]),
    Peer("bfloat16 compiled", plain(BF16, compiled=True), TABLES),
    Peer("autocast bfloat16 compiled", autocast),
    Peer("quantize_dynamic", quantize_dynamic),
    Peer("torchao int8 weight-only bfloat16", torchao(BF16, "Int8WeightOnlyConfig"), ["language-model"]),
    Peer("torchao int8 dynamic float32", torchao(F32, INT8_DYNAMIC), ["minilm-32x64", "minilm-1x16", "layers"]),
    Peer("torchao int8 dynamic bfloat16", torchao(BF16, INT8_DYNAMIC), ["decoder"]),
    Peer("torchao int4 bfloat16", torchao(BF16, "PrototypeInt4WeightOnlyConfig", INT4, group_size=128), ["decoder"]),
    Peer("torchao int8 dynamic, int4 bfloat16", torchao(BF16, "Int8DynamicActivationInt4WeightConfig", INT4)),
    Peer("torchao float8 weight-only bfloat16", torchao(BF16, "Float8WeightOnlyConfig")),
    Peer("torchao float8 dynamic bfloat16", torchao(BF16, FLOAT8_DYNAMIC, FLOAT8)),
    Peer("PT2E dynamic", pt2e(dynamic=True)),
    Peer("PT2E static", pt2e(dynamic=False), ENCODERS),
    Peer("quanto int8", quanto("qint8"), ["minilm-32x64"]),
    Peer("quanto int8 bfloat16", quanto("qint8", dtype=BF16)),
    Peer("quanto int4", quanto("qint4")),
    Peer("quanto float8", quanto("qfloat8")),
    Peer("quanto int8, activations int8", quanto("qint8", "qint8")),
    Peer("onnxruntime float32", onnxruntime(int8=False)),
    Peer("onnxruntime dynamic int8", onnxruntime(int8=True), ["minilm-32x64", "minilm-1x16"]),
    Peer("openvino", openvino(int8=False)),
    Peer("openvino nncf int8", openvino(int8=True), [*ENCODERS, "language-model"]),
    Peer("bitsandbytes int8", replaced(F32, bitsandbytes_int8)),
    Peer("bitsandbytes nf4 bfloat16", replaced(BF16, bitsandbytes_nf4)),
    Peer("hqq int8 bfloat16", replaced(BF16, hqq(8))),
    Peer("hqq int4 bfloat16", replaced(BF16, hqq(4))),
)  # fmt: skip

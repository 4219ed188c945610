"""The shape-recording pass: forward pre-hooks log what every Linear is given. Weights are never touched."""

from __future__ import annotations

import copy
import fnmatch
import itertools
import logging
import threading
import weakref
import zlib
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoplan.errors import RecordingError
from autoplan.layers import PlannedLinear
from autoplan.offload import execution_device, identity, is_offloaded, only_places
from autoplan.records import Call, LayerProfile, LeftAlone

SAMPLE_ROWS = 1024  # real input rows kept per layer
_MAX_SIBLINGS = 8  # more layers fed by one tensor are no siblings: their choices are weighed in all combinations
_MAX_INPUT_BYTES = 256 << 20  # of model inputs kept for scoring and validation
_DEFAULT_WORKLOAD = "default"

_logger = logging.getLogger("autoplan")
_FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One call of the model: copies, each on its own device, so that it can be replayed."""

    workload: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: str | None = None  # the dtype of the autocast region it was made in


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside a `torch.compile` wrapper, or the module itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def device_of_model(model: nn.Module) -> torch.device:
    """Where a model is: the device of its first parameter that is not on the meta device; the CPU if it has none.

    Of a model that accelerate offloads whole, all are on the meta device between calls: then where it is brought to.
    """
    resident = (tensor.device for tensor in model.parameters() if not tensor.is_meta)
    brought_to = (execution_device(module) for module in model.modules() if is_offloaded(module))
    return next(itertools.chain(resident, brought_to), torch.device("cpu"))


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


@dataclass(slots=True)
class _Decision:
    """One decision of the planner: the Linears that run one and the same weight."""

    names: list[str]
    module: nn.Linear


def find_layers(model: nn.Module) -> tuple[list[_Decision], list[LeftAlone]]:
    """All Linears of `model`: those a plan may change, grouped by weight, and those left alone with the reason."""
    plannable: dict[tuple[Hashable, torch.Size, tuple[int, ...]], _Decision] = {}
    left_alone: list[LeftAlone] = []
    shared_with = _tensors_of_other_modules(model)
    fast_path = _fast_path_linears(model)
    seen: dict[int, str | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        reason: str | None
        if not isinstance(module, nn.Linear):
            if type(module).__name__ == "Conv1D":
                left_alone.append(LeftAlone(name, "it is a transformers Conv1D, not an nn.Linear"))
            elif isinstance(module, PlannedLinear):
                left_alone.append(LeftAlone(name, "it is planned already"))
            elif stack := _stacked_weight(module):
                left_alone.append(LeftAlone(name, f"its weights are one parameter {stack}, not nn.Linears"))
            continue
        if id(module) not in seen:
            seen[id(module)] = _reason_to_leave(name, module, shared_with, fast_path)
        if reason := seen[id(module)]:
            left_alone.append(LeftAlone(name, reason))
            continue
        weight = module.weight
        key = (identity(module, "weight"), weight.shape, weight.stride())
        decision = plannable.setdefault(key, _Decision([], module))
        decision.names.append(name)
    return list(plannable.values()), left_alone


def _reason_to_leave(
    name: str, module: nn.Linear, shared_with: Mapping[Hashable, str], fast_path: Mapping[int, str]
) -> str | None:
    if not name:
        return "it is the model itself; wrap it in nn.Sequential to plan it"
    if type(module).forward is not nn.Linear.forward:
        return f"it is a {type(module).__name__}, a Linear with a forward of its own"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "it is a NonDynamicallyQuantizableLinear: attention reads its weight without calling it"
    if "forward" in vars(module) and not only_places(module):
        return "its forward was replaced on the instance"
    if isinstance(module._parameters.get("weight"), nn.UninitializedParameter):
        return "its weight has no shape yet: call the model once before"
    if nn.utils.parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is parametrized or computed by a hook"
    if not module.weight.numel():
        return "its weight is empty"
    if module.weight.is_meta and not is_offloaded(module):
        return "its weight is on the meta device"
    if dtype_name(module.weight.dtype) not in _FLOATS:
        return f"its weight is {dtype_name(module.weight.dtype)}; float32, bfloat16 and float16 can be planned"
    if type(module.weight) is not nn.Parameter:
        return f"its weight is a tensor subclass, {type(module.weight).__name__}"
    if owner := shared_with.get(identity(module, "weight")):
        return f"its weight is tied to {owner}"
    return fast_path.get(id(module))


def _stacked_weight(module: nn.Module) -> list[int] | None:
    """The size of a parameter that holds the matrices of several experts, as mixtures keep them; None without one."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return None
    own = (parameter.shape for parameter in module._parameters.values() if parameter is not None)
    return next((list(shape) for shape in own if len(shape) == 3 and min(shape) > 1), None)


def _tensors_of_other_modules(model: nn.Module) -> dict[Hashable, str]:
    """Where the parameters of modules that are not Linears live: a Linear there is tied (to an embedding, mostly)."""
    return {
        identity(module, key): f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        for key, tensor in module.named_parameters(recurse=False)
        if tensor.numel() and (not tensor.is_meta or is_offloaded(module))
    }


def _fast_path_linears(model: nn.Module) -> dict[int, str]:
    """Linears whose weights torch's fused encoder layer reads itself, in inference, without calling them."""
    reason = "nn.TransformerEncoderLayer reads its weight in a fused kernel of its own"
    return {
        id(linear): reason
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        for linear in (module.linear1, module.linear2)
    }


class Recording:
    """What the shape-recording pass saw; made by `record`, read by `make_plan`."""

    def __init__(self, model: nn.Module, seed: int = 0, only_thread: int | None = None) -> None:
        refuse_planned(model)
        self.model = model
        self._device_type = device_of_model(model).type
        decisions, self.left_alone = find_layers(model)
        self.decisions = {decision.names[0]: decision for decision in decisions}
        self.seed = seed
        self.weights: dict[str, float] = {}  # workload -> weight
        self.forwards: Counter[str] = Counter()  # workload -> calls of the model
        self.inputs: list[ModelInput] = []
        self.inputs_dropped = 0
        self._only_thread = only_thread  # where other threads run the model too, the one whose calls count
        self._calls: dict[str, Counter[tuple[str, int, str]]] = {name: Counter() for name in self.decisions}
        self._samples = {name: _Reservoir(SAMPLE_ROWS, seed ^ zlib.crc32(name.encode())) for name in self.decisions}
        self._input_bytes = 0
        self._workload = _DEFAULT_WORKLOAD
        self._run = _Run()  # the layers called last, one after another with one and the same tensor
        self._runs: dict[tuple[str, ...], None] = {}  # all there were before

    @contextmanager
    def workload(self, name: str, weight: float = 1.0) -> Iterator[None]:
        """Calls made inside belong to the workload `name`, of which one forward counts `weight` times in the plan.

        Raises RecordingError when the weight is not a positive number, or differs from an earlier one of that name.
        """
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise RecordingError(f"workload {name!r}: weight must be a positive number, not {weight!r}")
        if self.weights.setdefault(name, float(weight)) != weight:
            raise RecordingError(f"workload {name!r} has weight {self.weights[name]} already, not {weight}")
        outer, self._workload = self._workload, name
        try:
            yield
        finally:
            self._workload = outer

    def sizes(self) -> dict[str, tuple[int, int, str]]:
        """out_features, in_features and dtype of every layer that can be planned, by name."""
        linears = {name: decision.module for name, decision in self.decisions.items()}
        return {name: (m.out_features, m.in_features, dtype_name(m.weight.dtype)) for name, m in linears.items()}

    def require_inputs(self) -> None:
        """Raise RecordingError where there is nothing to judge a plan on."""
        if not self.inputs:
            reason = "its inputs are too large or cannot be copied" if self.inputs_dropped else "nothing was run"
            raise RecordingError(f"nothing was recorded ({reason}): run the model inside `with record(model):`")

    def profiles(self) -> list[LayerProfile]:
        """One profile per layer that was called, in model order."""
        return [self._profile(name) for name, calls in self._calls.items() if calls]

    def call_weights(self) -> dict[str, float]:
        """What one recorded call counts, by workload: the workload's weight, over the forwards it was recorded with."""
        return {name: weight / max(self.forwards[name], 1) for name, weight in self.weights.items()}

    def not_called(self) -> list[LeftAlone]:
        """The layers that saw no input while recording."""
        return [LeftAlone(name, "saw no input while recording") for name, calls in self._calls.items() if not calls]

    def siblings(self, among: Collection[str]) -> list[tuple[str, ...]]:
        """The sets of layers that are fed by one tensor, in the order of their calls; only layers that are `among`.

        Such layers were called together whenever one of them was: each once, one right after another, with the very
        same tensor, unchanged in between. Layers that share a weight with others are in no set.
        """
        self._start_run()
        times = Counter(name for run in self._runs for name in run)
        sets = [tuple(name for name in run if name in among) for run in self._runs]
        return [
            names
            for names in sets
            if 1 < len(names) <= _MAX_SIBLINGS
            if all(times[name] == 1 and len(self.decisions[name].names) == 1 for name in names)
            if len({_kind(self.decisions[name].module) for name in names}) == 1
        ]

    def _start_run(self, x: Tensor | None = None) -> None:
        if self._run.names:
            self._runs[tuple(self._run.names)] = None
        self._run = _Run(x)

    def _profile(self, name: str) -> LayerProfile:
        module = self.decisions[name].module
        return LayerProfile(
            name=name,
            aliases=tuple(self.decisions[name].names[1:]),
            in_features=module.in_features,
            out_features=module.out_features,
            has_bias=module.bias is not None,
            dtype=dtype_name(module.weight.dtype),
            device=execution_device(module).type,
            calls=tuple(Call(*key, count) for key, count in sorted(self._calls[name].items())),
        )

    def rows(self, name: str) -> Tensor:
        """A sample of the real input rows of a layer, [<= SAMPLE_ROWS, in_features], in their own dtype, on the CPU."""
        return self._samples[name].rows()

    def _is_elsewhere(self) -> bool:
        """Whether this thread's calls are somebody else's."""
        return self._only_thread not in (None, threading.get_ident())

    def _log(self, name: str, x: Tensor) -> None:
        dtype, device = x.dtype, execution_device(self.decisions[name].module).type
        if torch.is_autocast_enabled(device) and dtype.is_floating_point:
            dtype = torch.get_autocast_dtype(device)
        given, x = x, x.detach().reshape(-1, x.shape[-1])
        if not x.numel() or x.shape[1] != self.decisions[name].module.in_features:
            return  # no rows (an expert that no token was sent to), or a call that is about to fail
        if not self._run.goes_on(given):
            self._start_run(given)
        self._run.names.append(name)
        self._calls[name][self._workload, x.shape[0], dtype_name(dtype)] += 1
        self._samples[name].add(x)

    def _keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_elsewhere():
            return
        self.weights.setdefault(self._workload, 1.0)
        self.forwards[self._workload] += 1
        self._start_run()
        size = _nbytes(tree_leaves((args, kwargs)))
        if self._input_bytes + size <= _MAX_INPUT_BYTES:
            memo: dict[int, Any] = {}  # of deepcopy: also names the tensors inside objects, such as a key-value cache
            try:
                args, kwargs = tree_map(lambda leaf: _copied(leaf, memo), (args, dict(kwargs)))
            except Exception as error:  # the user's own call must go on, whatever it is called with
                _logger.info("an input cannot be copied, so it is not kept for scoring: %s", error)
                self.inputs_dropped += 1
                return
            size += _nbytes(memo.values())
        if self._input_bytes + size > _MAX_INPUT_BYTES:
            self.inputs_dropped += 1
            return
        self._input_bytes += size
        autocast = None
        if torch.is_autocast_enabled(self._device_type):
            autocast = dtype_name(torch.get_autocast_dtype(self._device_type))
        self.inputs.append(ModelInput(self._workload, args, dict(kwargs), autocast))


class _Run:
    """Layers that are called one after another with one tensor, which is not kept alive for it."""

    def __init__(self, x: Tensor | None = None) -> None:
        self.names: list[str] = []
        self._x = None if x is None else weakref.ref(x)
        self._state = None if x is None else _state(x)

    def goes_on(self, x: Tensor) -> bool:
        """Whether the next layer is given the same tensor, and nobody wrote into it in between."""
        return self._x is not None and self._x() is x and self._state == _state(x)


def _state(x: Tensor) -> float:
    """What changes when somebody writes into `x`: its version; the sum of one that counts none."""
    return x._version if not x.is_inference() else x.double().sum().item()


def _kind(linear: nn.Linear) -> tuple[Any, ...]:
    """What siblings have in common."""
    return linear.in_features, linear.weight.dtype, execution_device(linear)


def _copied(leaf: Any, memo: dict[int, Any]) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    _detach_inside(leaf, memo)
    return copy.deepcopy(leaf, memo)


def _detach_inside(item: Any, memo: dict[int, Any], depth: int = 6) -> None:
    """Copies of the tensors inside an object, for deepcopy to use: it refuses those that have a gradient history."""
    if isinstance(item, Tensor):
        memo.setdefault(id(item), item.detach().clone())
    elif depth:
        inner = item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
        for part in (*inner, *getattr(item, "__dict__", {}).values()):
            _detach_inside(part, memo, depth - 1)


def _nbytes(items: Iterable[Any]) -> int:
    return sum(item.numel() * item.element_size() for item in items if isinstance(item, Tensor))


class _Reservoir:
    """A uniform sample of all rows seen: each row draws a random key, the largest keys stay (Efraimidis 2006)."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._generator = torch.Generator("cpu").manual_seed(seed)  # whatever device is the default
        self._keys = torch.empty(0, device="cpu")
        self._rows: Tensor | None = None

    def add(self, x: Tensor) -> None:
        keys = torch.rand(x.shape[0], generator=self._generator, device="cpu")
        floor = self._keys.min() if len(self._keys) == self._size else -1.0
        new = (keys > floor).nonzero().squeeze(1)
        rows = x[new.to(x.device)].cpu()
        if self._rows is not None:
            if rows.dtype != self._rows.dtype:
                rows = rows.to(self._rows.dtype)
            rows = torch.cat((self._rows, rows))
        keys = torch.cat((self._keys, keys[new]))
        best = keys.topk(min(self._size, len(keys))).indices.sort().values
        self._keys, self._rows = keys[best], rows[best].clone()

    def rows(self) -> Tensor:
        if self._rows is None:
            raise RecordingError("no rows were recorded")
        return self._rows


@contextmanager
def record(model: nn.Module, *, seed: int = 0) -> Iterator[Recording]:
    """Record what every Linear of `model` is given while the calls inside run, eagerly and unchanged.

    Every call inside counts; group calls with `recording.workload(name, weight=...)`. `seed` decides which input rows
    are sampled. Raises RecordingError when the model is planned already.
    """
    if not isinstance(model, nn.Module):
        raise RecordingError(f"record takes an nn.Module, not a {type(model).__name__}")
    with recorded(Recording(unwrap(model), seed)) as recording:
        yield recording


@contextmanager
def recorded(recording: Recording) -> Iterator[Recording]:
    """What the calls inside do goes into the recording."""
    root = recording.model
    handles = [
        root.register_forward_pre_hook(  # before the user's own hooks: they will see these inputs again in a replay
            lambda _, args, kwargs: recording._keep(args, kwargs), prepend=True, with_kwargs=True
        )
    ]
    for name, decision in recording.decisions.items():
        for layer in {id(m): m for m in map(root.get_submodule, decision.names)}.values():
            handles.append(layer.register_forward_pre_hook(_row_logger(recording, name), with_kwargs=True))
    try:
        with eagerly():
            yield recording
    finally:
        for handle in handles:
            handle.remove()


def _row_logger(recording: Recording, name: str) -> Any:
    def log(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recording._is_elsewhere():
            return
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor) and x.dim() and x.layout == torch.strided and not x.is_nested:
            recording._log(name, x)

    return log


_stance_lock = threading.Lock()
_stances: list[Any] = []


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled code eagerly inside. The process has one stance: the first in sets it, the last out resets it."""
    with _stance_lock:
        _stances.append(_stances[0] if _stances else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _stance_lock:
            stance = _stances.pop()
            if not _stances:
                stance.__exit__(None, None, None)


def refuse_planned(model: nn.Module) -> None:
    """Raise RecordingError when `model` carries a plan already."""
    if "_autoplan_plan" in vars(unwrap(model)):
        raise RecordingError(
            "this model is planned already: plan_of(model) shows the plan. To plan anew, start from the float model"
        )


def as_calls(example_inputs: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What `example_inputs` stand for, as (args, kwargs) per call of the model.

    A Tensor is one argument, a tuple the arguments, a Mapping the keyword arguments; a list or another iterable is
    batches of these, in which a list is arguments, as a DataLoader gives them. Raises RecordingError otherwise.
    """
    if isinstance(example_inputs, Tensor | tuple | Mapping):
        return [_one_call(example_inputs)]
    if isinstance(example_inputs, str) or not hasattr(example_inputs, "__iter__"):
        raise RecordingError(
            f"example_inputs must be a Tensor, a tuple of arguments, a mapping of keyword arguments, or an iterable of "
            f"these, not {type(example_inputs).__name__}"
        )
    calls = [_one_call(batch) for batch in example_inputs]
    if not calls:
        raise RecordingError("example_inputs holds no batch: give at least one input that the model can run on")
    return calls


def _one_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return tuple(batch), {}
    raise RecordingError(f"a batch must be a Tensor, a tuple or a mapping, not {type(batch).__name__}")


def match(names: Sequence[str], patterns: str | Sequence[str], argument: str) -> set[str]:
    """The layer names that any of the fnmatch `patterns` matches.

    Raises RecordingError when a pattern matches nothing, naming the layers there are.
    """
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            listed = ", ".join(list(names)[:20]) + (", ..." if len(names) > 20 else "")
            raise RecordingError(f"{argument}: the pattern {pattern!r} matches no layer; there are {listed or 'none'}")
        matched.update(hits)
    return matched

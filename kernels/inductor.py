"""What Inductor makes of `autoplan::linear` beside calling it, in the graphs that it compiles for a CPU.

An activation function: where it is all that the output of a layer is used for, a pattern in Inductor's pattern matcher
takes it into the layer, so that the output is written once, where otherwise it would be written, read and written
again. Kernels that cannot are left to Inductor, which fuses the function with its other neighbours. Inductor has taken
functions apart by then. What a function looks like is found by having it taken apart as well.

The call: the graph calls the kernel itself, not the op, whose way through torch's dispatcher and back takes longer than
the product of a small layer; and where it writes is memory that Inductor has planned, with the rest of the graph.

Only graphs with our op notice: no setting of Inductor's is changed. Both lean on parts of torch that come and go. In a
torch that has other ones, layers run as one op each.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autoplan.kernels import ops

_LINEAR = torch.ops.autoplan.linear.default
_RESHAPES = (torch.ops.aten.reshape.default, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_POST_GRAD = "torch._inductor.fx_passes.post_grad"
_logger = logging.getLogger(__name__)


def _install() -> None:
    """Tell Inductor, if it is at work."""
    if _POST_GRAD in sys.modules:
        _tell_inductor()


@functools.cache
def _tell_inductor() -> None:
    for what, tell in (("activation functions are not taken into layers", _fuse_activations),
                       ("layers are called as ops", _call_directly)):  # fmt: skip
        try:
            tell()
        except (ImportError, AttributeError, LookupError) as error:  # an Inductor of another kind
            _logger.info("%s: %s: %s", what, type(error).__name__, error)


ops.tracing_watchers.append(_install)

# Activation functions.


def _fuse_activations() -> None:
    from torch._inductor.pattern_matcher import Arg, CallFunction, register_graph_pattern

    patterns: Any = sys.modules[_POST_GRAD].pass_patterns[0]

    def fits(match: Any) -> bool:
        args = match.output_node().args
        return args[-1] == "none" and ops.writes_in_place(args[3])

    @register_graph_pattern(CallFunction(_LINEAR, *[Arg() for _ in range(7)]), extra_check=fits, pass_dict=patterns)
    def replace(match: Any, *_: Any) -> None:
        fuse(match.output_node())


def fuse(layer: fx.Node) -> None:
    """Take the activation function after a layer into it, if there is one that nothing else comes between."""
    output = layer
    if len(layer.users) == 1 and (use := next(iter(layer.users))).target in _RESHAPES:
        output = use
    looks = _looks(layer.args[5])  # type: ignore[arg-type]
    within: dict[fx.Node, str] = {output: "y"}  # what is computed of the output alone
    for node in _following(output):
        inputs = node.all_input_nodes
        if not inputs or any(source not in within for source in inputs):
            continue
        within[node] = _said(node, within)
        if name := looks.get(within[node]):
            between = [n for n in within if n is not node]
            if any(use not in within for n in between for use in n.users):
                return
            layer.args = (*layer.args[:-1], name)
            node.replace_all_uses_with(output)
            for gone in reversed([*between[1:], node]):
                node.graph.erase_node(gone)
            return


def _following(node: fx.Node, most: int = 40) -> list[fx.Node]:
    """The nodes after this one, in the order of the graph, as many as a function may be taken apart into."""
    found = []
    for _ in range(most):
        node = node.next
        found.append(node)
        if node.op == "output":
            break
    return found


def _said(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """What a node computes, in words, of nodes that have names."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: names[n])
    return f"{node.target}{args}{kwargs}"


@functools.cache
def _looks(dtype: torch.dtype) -> dict[str, str]:
    """{what the last node of a function computes: the function's name}, as this Inductor takes them apart."""
    try:
        return {_taken_apart(function, dtype): name for name, function in ops.ACTIVATIONS.items() if name != "none"}
    except Exception as error:  # private parts of torch, which come and go: without fusion, then
        _logger.info("activation functions are not taken into layers: %s: %s", type(error).__name__, error)
        return {}


def _taken_apart(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> str:
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        traced = make_fx(function, select_decomp_table())(torch.ones(2, 2, dtype=dtype))
    names: dict[fx.Node, str] = {}
    for node in traced.graph.nodes:
        if node.op == "output":
            break
        names[node] = "y" if node.op == "placeholder" else _said(node, names)
    return names[node.args[0]]


# Calls.


def _call_directly() -> None:
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    as_op = lowering.fallback_handler(_LINEAR, add_to_fallback_set=False)

    class Direct:
        def codegen(self, wrapper: Any) -> None:
            wrapper.add_import_once("from autoplan.kernels import inductor as autoplan_inductor")
            super().codegen(wrapper)  # type: ignore[misc]

    class Into(Direct, ir.ExternKernelOut):
        pass

    class Returning(Direct, ir.ExternKernelAlloc):
        pass

    def lower(
        x: Any, packed: Sequence[Any], bias: Any, program: str, out_features: int, dtype: torch.dtype, activation: str
    ) -> Any:
        x = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))
        if V.graph.cpp_wrapper or x.get_device().type != "cpu":
            return as_op(x, packed, bias, program, out_features, dtype, activation)
        layout = ir.FixedLayout(x.get_device(), dtype, [x.get_size()[0], out_features])
        tensors = [x, *packed] if bias is None else [x, bias, *packed]
        inputs = [ir.ExternKernel.realize_input(tensor) for tensor in tensors]
        settings = {"has_bias": bias is not None, "program": program, "activation": activation}
        call: Any
        if ops.writes_in_place(program):
            call = Into(layout, inputs, (), settings, None, "autoplan_inductor.linear_into")
        else:
            settings |= {"out_features": out_features, "dtype": dtype}
            call = Returning(layout, inputs, (), settings, "autoplan_inductor.linear")
        return ir.TensorBox.create(call)

    lowering.register_lowering(_LINEAR, type_promotion_kind=None)(lower)


# What the code that Inductor writes calls. It keeps that code: whoever changes what these take changes their names.


def linear_into(x: Tensor, *tensors: Tensor, has_bias: bool, program: str, activation: str, out: Tensor) -> None:
    """`ops.run_linear_into`, with the bias, if there is one, before the packed tensors."""
    bias, packed = (tensors[0], tensors[1:]) if has_bias else (None, tensors)
    ops.run_linear_into(x, packed, bias, program, out, activation)


def linear(
    x: Tensor, *tensors: Tensor, has_bias: bool, program: str, out_features: int, dtype: torch.dtype, activation: str
) -> Tensor:
    """`ops.run_linear`, with the bias, if there is one, before the packed tensors."""
    bias, packed = (tensors[0], tensors[1:]) if has_bias else (None, tensors)
    return ops.run_linear(x, packed, bias, program, out_features, dtype, activation)

"""Activation functions that a kernel applies to its output before it is stored, in graphs that Inductor compiles.

Where one activation function is all that the output of an `autoplan::linear` is used for, a pattern in Inductor's
pattern matcher takes the function into it: so the output is written once, where otherwise it would be written, read and
written again. Kernels that cannot are left to Inductor, which fuses the function with its other neighbours.

Inductor has taken functions apart by then. What a function looks like is found by having it taken apart as well.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {  # in the order of `enum Activation` in native/simd.h
    "none": lambda y: y,
    "relu": lambda y: F.relu(y),
    "silu": lambda y: F.silu(y),
    "gelu": lambda y: F.gelu(y),
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
_RESHAPES = (torch.ops.aten.reshape.default, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_logger = logging.getLogger(__name__)
_POST_GRAD = "torch._inductor.fx_passes.post_grad"


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
        return {_taken_apart(function, dtype): name for name, function in FUNCTIONS.items() if name != "none"}
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


@functools.cache
def _install(takes: Callable[[str], bool]) -> None:
    try:
        from torch._inductor.pattern_matcher import Arg, CallFunction, register_graph_pattern

        patterns: Any = sys.modules[_POST_GRAD].pass_patterns[0]
        layer = CallFunction(torch.ops.autoplan.linear.default, *[Arg() for _ in range(7)])
    except (ImportError, AttributeError, LookupError):  # an Inductor of another kind: without fusion, then
        return

    def fits(match: Any) -> bool:
        args = match.output_node().args
        return args[-1] == "none" and takes(args[3])

    @register_graph_pattern(layer, extra_check=fits, pass_dict=patterns)
    def replace(match: Any, *_: Any) -> None:
        fuse(match.output_node())


def install(takes: Callable[[str], bool]) -> None:
    """Have Inductor, where it is at work, fuse activations into layers whose program `takes` them.

    This adds a pattern that only layers of ours match; no setting of Inductor's is changed.
    """
    if _POST_GRAD in sys.modules:
        _install(takes)

"""Rewrites of a graph that Inductor compiles: what comes before and after a layer, taken into its kernel.

Casts: where a layer is given a copy in another dtype of what has to be in memory as it is, as in a region of autocast
what is a residual as well, the kernel reads that itself.

An activation function: where it is all that the output of a layer is used for, the output is written once, where
otherwise it would be written, read and written again. Kernels that cannot are left to Inductor, which fuses the
function with its other neighbours. Inductor has taken functions apart by then. What a function looks like is found by
having it taken apart as well.

Gates: where one half of a layer's output, after an activation, is multiplied with the other, as of gate and up
projections that run as one product, the kernel does that and writes half as much.

Norms: where all that the output of a layer is used for is to be added to a residual and normalized (as BERT does), the
kernel does that to rows while they are in a cache. In a region of autocast the residual is float32; so is the output.

Pieces: the product of siblings is written piece by piece, each with its bias, as each layer would have written its own.
Otherwise it would be read and written again to have pieces that are contiguous and have a bias.

Attention: torch's kernel for CPUs gives way to our own, which takes about half of its time (float32 without AMX: 0.4 to
0.9 of it). On AMX tiles float32 numbers are two of bfloat16 each, which leaves out less than 2^-15 of a product.

Pairs: where all that a layer gives, after its activation, is given to another layer, a kernel may run both in one call,
rows by rows, so that what lies between them is not written to memory and read again.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Collection, Mapping
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from autoplan.kernels import ops
from autoplan.kernels.native import attention as native_attention

LINEAR, PAIR = torch.ops.autoplan.linear.default, torch.ops.autoplan.pair.default
ATTENTION = torch.ops.autoplan.attention.default
_CAST = torch.ops.prims.convert_element_type.default
_RESHAPES = (torch.ops.aten.reshape.default, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_logger = logging.getLogger(__name__)


def rewrite(layer: fx.Node) -> None:
    """Take into a call of `autoplan::linear` what its kernel can do of what comes before and after it."""
    read_wide(layer)
    if gate(layer):
        return
    fuse(layer)
    if not (normalize(layer) or join(layer)):
        split(layer)


def _output(layer: fx.Node) -> fx.Node:
    """What the rest of the graph uses: the layer's output, or that in another shape."""
    if len(layer.users) == 1 and (use := next(iter(layer.users))).target in _RESHAPES:
        return use
    return layer


# Casts.


def read_wide(layer: fx.Node) -> None:
    """Have a layer read what was cast for it and for other layers alone, if that is in memory anyhow: for later."""
    given = cast("fx.Node", layer.args[0])
    narrow = cast("fx.Node", given.args[0]) if given.target in _RESHAPES else given
    if narrow.target is not _CAST or not _only_layers_read(narrow):
        return
    source = cast("fx.Node", narrow.args[0])
    value = source.meta["val"]
    if value.dtype not in ops.FLOATS or not value.is_contiguous():
        return
    if source.op != "placeholder" and not _leads_to(layer, source.users):
        return
    wide = source
    if given is not narrow:
        with layer.graph.inserting_before(layer):
            wide = _call(layer.graph, torch.ops.aten.reshape.default, source, *given.args[1:])
    layer.args = (wide, *layer.args[1:])
    for gone in dict.fromkeys((given, narrow)):
        if not gone.users:
            layer.graph.erase_node(gone)


def _leads_to(node: fx.Node, ends: Collection[fx.Node], most: int = 200) -> bool:
    """Whether one of `ends` depends on a node; as far as so many others that do show."""
    found, seen = [node], {node}
    for one in itertools.islice(found, most):  # which grows
        if one in ends:
            return True
        found += [use for use in one.users if use not in seen]
        seen.update(one.users)
    return False


def _only_layers_read(node: fx.Node) -> bool:
    """Whether it is used for nothing but to be given to layers that read any dtype, also in other shapes."""
    return all(
        _only_layers_read(use)
        if use.target in _RESHAPES
        else use.target is LINEAR and use.args[0] is node and ops.writes_in_place(cast("str", use.args[3]))
        for use in node.users
    )


# Activation functions.


def fuse(layer: fx.Node) -> None:
    """Take the activation function after a layer into it, if there is one that nothing else comes between."""
    output = _output(layer)
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
            layer.args = (*layer.args[:6], name, *layer.args[7:])
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
        y = torch.ones(2, 2, dtype=dtype)
        return {_taken_apart(function, y): name for name, function in ops.ACTIVATIONS.items() if name != "none"}
    except Exception as error:  # private parts of torch, which come and go: without fusion, then
        _logger.info("activation functions are not taken into layers: %s: %s", type(error).__name__, error)
        return {}


def _taken_apart(function: Callable[..., Tensor], *tensors: Tensor) -> str:
    """What it computes of these, of which the first is called y, the others 0, 1, ..."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        traced = make_fx(function, select_decomp_table())(*tensors)
    names: dict[fx.Node, str] = {}
    for node in traced.graph.nodes:
        if node.op == "output":
            break
        names[node] = (str(len(names) - 1) if names else "y") if node.op == "placeholder" else _said(node, names)
    return names[node.args[0]]


# Gates.


def gate(layer: fx.Node) -> bool:
    """Have a layer multiply one half of its output, after an activation, with the other, if that becomes of it."""
    output, features = _output(layer), cast("int", layer.args[4])
    slices, parts = {_part(use, features): use for use in output.users}, [(0, features // 2), (features // 2, features)]
    if features % (2 * ops.STRIP) or len(output.users) != 2 or any(part not in slices for part in parts):
        return False
    within = dict[fx.Node, str]()  # what is computed of both halves, which are called y and 0
    for called, part in zip("y0", parts, strict=True):
        half = slices[part]
        within |= dict.fromkeys([half, *(use for use in half.users if _copies(use))], called)
    looks = _gated_looks(layer.meta["val"].dtype)
    for node in _following(output):
        if node in within or not node.all_input_nodes or any(source not in within for source in node.all_input_nodes):
            continue
        within[node] = _said(node, within)
        if name := looks.get(within[node]):
            return _take_gate(layer, output, name, node, {*within} - {node})
    return False


def _copies(node: fx.Node) -> bool:
    """Whether it makes a contiguous copy."""
    return node.target is torch.ops.aten.clone.default and node.kwargs == {"memory_format": torch.contiguous_format}


def _take_gate(layer: fx.Node, output: fx.Node, name: str, last: fx.Node, between: set[fx.Node]) -> bool:
    if any(use not in between and use is not last for node in between for use in node.users):
        return False
    graph = last.graph
    with graph.inserting_before(last):
        own = _call(graph, LINEAR, *layer.args[:6], name, [], [], None)
        if output is not layer:
            own = _call(graph, torch.ops.aten.reshape.default, own, list(last.meta["val"].shape))
    last.replace_all_uses_with(own)
    for gone in [node for node in reversed(graph.nodes) if node is last or node in between]:
        graph.erase_node(gone)
    for gone in [output, layer] if output is not layer else [layer]:
        graph.erase_node(gone)
    return True


@functools.cache
def _gated_looks(dtype: torch.dtype) -> dict[str, str]:
    """{what the last node of a gate computes: its name}, as this Inductor takes them apart."""

    def look(activation: str, product: Callable[[Tensor, Tensor], Tensor]) -> str:
        def function(y: Tensor, up: Tensor) -> Tensor:
            return product(ops.ACTIVATIONS[activation](y), up)

        return _taken_apart(function, torch.ones(2, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype))

    try:
        products = (lambda gate, up: gate * up, lambda gate, up: up * gate)
        return {look(kind, product): name for name, kind in ops.GATED.items() for product in products}
    except Exception as error:  # as for activation functions
        _logger.info("gates are not taken into layers: %s: %s", type(error).__name__, error)
        return {}


# Norms.


def normalize(layer: fx.Node) -> bool:
    """Have a layer add the residual and do the layer norm that come after it, if that is all that becomes of it."""
    output = _output(layer)
    shape = _sizes(output)
    if len(output.users) != 1 or not shape or shape[-1] != layer.args[4]:
        return False
    total = next(iter(output.users))
    residual = _added(total, output)
    if residual is None:
        return False
    dtype = total.meta["val"].dtype
    within, given, numbers = {total: "y"}, dict[fx.Node, str](), []
    for node in _following(total):
        others = [source for source in node.all_input_nodes if source not in within]
        if len(node.all_input_nodes) == len(others) or any(_sizes(source) != shape[-1:] for source in others):
            continue
        for source in others:
            given.setdefault(source, str(len(given)))
        numbers += [number for number in node.args if isinstance(number, float)]
        within[node] = _said(node, {**within, **given})
        for eps in numbers:
            if within[node] == _look_of_norm(dtype, len(shape), shape[-1], eps):
                return _take_norm(layer, output, [residual, *given], eps, list(within))
    return False


def _sizes(node: fx.Node) -> tuple[int, ...] | None:
    """Of a tensor, if they are known."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return None
    return tuple(value.shape)


def _added(total: fx.Node, output: fx.Node) -> fx.Node | None:
    """What is added to an output, if `total` is such a sum of two tensors of one shape."""
    if total.target is not torch.ops.aten.add.Tensor or total.kwargs:
        return None
    residual = total.args[1] if total.args[0] is output else total.args[0]
    same = isinstance(residual, fx.Node) and residual is not output and _sizes(residual) == _sizes(output)
    return residual if same else None  # type: ignore[return-value]


def _take_norm(layer: fx.Node, output: fx.Node, norm: list[fx.Node], eps: float, within: list[fx.Node]) -> bool:
    *between, last = within
    if any(use not in within for node in between for use in node.users):
        return False
    dtype = last.meta["val"].dtype  # the residual's, which may be wider than the layer's
    if {node.meta["val"].dtype for node in norm} != {dtype}:
        return False
    with last.graph.inserting_before(last):
        own = _call(last.graph, LINEAR, *layer.args[:5], dtype, *layer.args[6:8], norm, eps)
        if output is not layer:
            own = _call(last.graph, torch.ops.aten.reshape.default, own, list(output.meta["val"].shape))
    last.replace_all_uses_with(own)
    for gone in [last, *reversed(between), *([output] if output is not layer else []), layer]:
        last.graph.erase_node(gone)
    return True


@functools.cache
def _look_of_norm(dtype: torch.dtype, dimensions: int, features: int, eps: float) -> str:
    """What the last node of a layer norm computes, as this Inductor takes it apart."""
    y, weight = torch.ones([2] * (dimensions - 1) + [features], dtype=dtype), torch.ones(features, dtype=dtype)
    try:
        return _taken_apart(lambda y, w, b: F.layer_norm(y, (features,), w, b, eps), y, weight, weight.clone())
    except Exception as error:  # as for activation functions
        _logger.info("norms are not taken into layers: %s: %s", type(error).__name__, error)
        return ""


# Pieces.


class _Piece(NamedTuple):
    """A slice of a layer's output, and what is made of it: a contiguous tensor of its own."""

    start: int
    size: int
    own: fx.Node
    bias: fx.Node | None
    between: tuple[fx.Node, ...]  # what own was made of


def split(layer: fx.Node) -> None:
    """Have a layer write its output in pieces, each with its bias, if that is all that becomes of it."""
    args: Any = layer.args
    x, packed, bias, program, features, dtype, activation, *_ = args
    output, rows = _output(layer), layer.meta["val"].shape[0]
    found = [_piece(use, features) for use in output.users]
    pieces = sorted((piece for piece in found if piece is not None), key=attrgetter("start"))
    ends = list(itertools.accumulate((piece.size for piece in pieces), initial=0))
    if bias is not None or activation != "none" or not isinstance(rows, int):
        return
    if len(pieces) < max(2, len(found)) or [*(piece.start for piece in pieces), features] != ends:
        return  # not all of it becomes pieces, each channel in one of them
    biases = [piece.bias for piece in pieces if piece.bias is not None]
    if len(biases) not in (0, len(pieces)) or len({node.meta["val"].dtype for node in biases}) > 1:
        return
    if any(piece.size % ops.STRIP for piece in pieces):
        return

    call = functools.partial(_call, layer.graph)
    aten = torch.ops.aten
    with layer.graph.inserting_before(layer):
        held = [layer.graph.node_copy(node) if node.op == "get_attr" else node for node in biases]
        joined = call(aten.cat.default, held) if held else None
        sizes = [piece.size for piece in pieces]
        memory = call(LINEAR, x, packed, joined, program, features, dtype, activation, sizes, [], None)
        memory = call(aten.reshape.default, memory, [rows * features])
        for piece in pieces:
            own = call(aten.slice.Tensor, memory, 0, rows * piece.start, rows * (piece.start + piece.size))
            own = call(aten.reshape.default, own, list(piece.own.meta["val"].shape))
            piece.own.replace_all_uses_with(own)
    for piece in pieces:
        for gone in (piece.own, *reversed(piece.between)):
            layer.graph.erase_node(gone)
    if output is not layer:
        layer.graph.erase_node(output)
    layer.graph.erase_node(layer)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A new node of the graph, which knows what it gives."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    return node


def _part(use: fx.Node, features: int) -> tuple[int, int] | None:
    """From which feature on, and up to which, `use` takes a layer's output, if it does that alone."""
    if use.target is not torch.ops.aten.slice.Tensor or len(use.args) > 4:
        return None
    value, source = use.meta["val"], cast("fx.Node", use.args[0]).meta["val"]
    if use.args[1] not in (-1, value.dim() - 1) or not isinstance(use.args[2], int):
        return None
    if source.shape[-1] != features:  # rows and features are no longer apart
        return None
    return use.args[2], use.args[2] + value.shape[-1]


def _piece(use: fx.Node, features: int) -> _Piece | None:
    """The piece that `use` of a layer's output takes, if it takes one and makes a tensor of its own of it."""
    aten, part = torch.ops.aten, _part(use, features)
    if part is None or len(use.users) != 1:
        return None
    value, own = use.meta["val"], next(iter(use.users))
    found = _Piece(part[0], value.shape[-1], own, None, (use,))
    if _copies(own):
        return found
    if own.target is not aten.add.Tensor or own.kwargs or own.args[0] is not use:
        return None
    bias = own.args[1]
    if not isinstance(bias, fx.Node) or bias.op not in ("placeholder", "get_attr"):
        return None
    if bias.meta["val"].shape != value.shape[-1:]:
        return None
    found = found._replace(bias=bias)
    if own.meta["val"].dtype == value.dtype:
        return found
    rounded = next(iter(own.users), None)  # from the dtype of a bias that is wider
    if rounded is None or len(own.users) > 1 or rounded.target is not _CAST or rounded.args[1] != value.dtype:
        return None
    return found._replace(own=rounded, between=(use, own))


# Pairs.


def join(layer: fx.Node) -> bool:
    """Have a layer and the one that is given all of its output run in one call, if a kernel can and it pays."""
    chain = [layer]  # and its output in other shapes
    while len(chain[-1].users) == 1 and (use := next(iter(chain[-1].users))).target in _RESHAPES:
        chain.append(use)
    then = next(iter(chain[-1].users), None)
    if then is None or len(chain[-1].users) > 1 or then.target is not LINEAR or then.args[0] is not chain[-1]:
        return False
    x, packed, bias, program, _, dtype, activation, *_ = cast("Any", layer.args)
    _, then_packed, then_bias, then_program, features, then_dtype, *after = cast("Any", then.args)
    then_activation, pieces, norm, eps = after
    value = layer.meta["val"]
    rows = value.shape[0]
    if not isinstance(rows, int) or x.meta["val"].dtype not in ops.FLOATS or then_dtype not in (dtype, torch.float32):
        return False
    if then_activation != "none" or pieces or chain[-1] in norm or chain[-1].meta["val"].shape != value.shape:
        return False
    (kernel, own), (then_kernel, then_own) = ops.step(program, rows), ops.step(then_program, rows)
    held = [*packed[own], *then_packed[then_own]]
    if kernel.pair is None or kernel is not then_kernel or len(held) != 2:
        return False
    sizes = [math.prod(node.meta["val"].shape) * node.meta["val"].itemsize for node in held]
    if not all(isinstance(size, int) for size in sizes) or not kernel.pair.pays(rows, sum(sizes)):
        return False
    with then.graph.inserting_before(then):
        first, second = (x, held[0], bias, dtype, activation), (held[1], then_bias, then_dtype)
        arguments = (*first, *second, kernel.name, features, norm, eps)
        then.replace_all_uses_with(_call(then.graph, PAIR, *arguments))
    for node in (then, *reversed(chain)):
        node.graph.erase_node(node)
    return True


# Attention.


def attend(graph: fx.Graph) -> None:
    """Have attention run on our kernel where that is faster, and nothing but its output is used."""
    theirs = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)  # private parts of torch
    for node in graph.find_nodes(op="call_function", target=theirs and theirs.default):
        q, k, v, dropout, causal = cast("Any", (*node.args, *(0.0, False)[len(node.args) - 3 :]))
        mask, scale = cast("Any", node.kwargs.get("attn_mask")), node.kwargs.get("scale")
        while mask is not None and mask.target is torch.ops.aten.expand.default and mask.args[0].meta["val"].dim() == 4:
            mask = mask.args[0]
        own_k, own_v = _unrepeated(k), _unrepeated(v)
        if own_k.meta["val"].shape[1] == own_v.meta["val"].shape[1]:
            k, v = own_k, own_v
        queries, keys = q.meta["val"], k.meta["val"]
        (_, heads, rows, features), (_, key_heads, count, _) = queries.shape, keys.shape
        if dropout or not all(isinstance(size, int) for size in (heads, rows, features, key_heads)):
            continue
        dtypes = {tensor.meta["val"].dtype for tensor in (q, k, v)}
        if len(dtypes) > 1 or queries.dtype not in native_attention.DTYPES or heads % key_heads:
            continue
        if mask is not None and not _is_mask(mask.meta["val"], queries, keys):
            continue
        if any(use.args[1] != 0 for use in node.users):
            continue
        known = count if isinstance(count, int) else None
        if not native_attention.pays(rows, known, features, heads // key_heads, queries.dtype):
            continue
        with graph.inserting_before(node):
            own = _call(graph, ATTENTION, q, k, v, mask, causal, features**-0.5 if scale is None else scale)
        for use in list(node.users):
            use.replace_all_uses_with(own)
            graph.erase_node(use)
        graph.erase_node(node)


def _unrepeated(repeated: fx.Node) -> fx.Node:
    """Keys or values whose heads were not yet copied for as many heads of queries; these, if they were not copied."""
    aten, expanded = torch.ops.aten, repeated
    while expanded.target in (aten.view.default, aten.reshape.default, aten.clone.default):  # all keep the order
        expanded = cast("fx.Node", expanded.args[0])
    if expanded.target is not aten.expand.default:
        return repeated
    unsqueezed = cast("fx.Node", expanded.args[0])
    if unsqueezed.target is not aten.unsqueeze.default or unsqueezed.args[1] != 2 or expanded.meta["val"].dim() != 5:
        return repeated
    heads = cast("fx.Node", unsqueezed.args[0])
    batch, count, times, *sizes = expanded.meta["val"].shape
    copied = (tuple(node.meta["val"].shape) for node in (heads, repeated))
    return heads if tuple(copied) == ((batch, count, *sizes), (batch, count * times, *sizes)) else repeated


def _is_mask(mask: Tensor, queries: Tensor, keys: Tensor) -> bool:
    sizes = (*queries.shape[:3], keys.shape[2])
    if mask.dim() != 4 or mask.dtype not in ops.FLOATS or mask.shape[3] != sizes[3]:
        return False
    return all(size in (1, whole) for size, whole in zip(mask.shape, sizes, strict=True))

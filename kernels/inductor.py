"""What Inductor makes of `autoplan::linear` beside calling it, in the graphs that it compiles for a CPU.

Inductor's pattern matcher shows each call to the rewrites, which take what comes after a layer into its kernel.

The graph calls the kernel itself, not the op, whose way through torch's dispatcher and back takes longer than the
product of a small layer; and where it writes is memory that Inductor has planned, with the rest of the graph. What does
not change from call to call (dtypes, the activation, the number of rows) is looked up once, as the code is loaded.

Only graphs with our op notice: of torch's settings, only the tag that tells cached graphs apart is changed. All of it
leans on parts of torch that come and go. In a torch that has other ones, layers run as one op each.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor

from autoplan.kernels import ops
from autoplan.kernels.native import attention as native_attention
from autoplan.kernels.rewrites import ATTENTION, LINEAR, PAIR, attend, rewrite

_POST_GRAD = "torch._inductor.fx_passes.post_grad"
_logger = logging.getLogger(__name__)


def _install() -> None:
    """Tell Inductor, if it is at work; and Dynamo's caches, which are asked before."""
    _tag_cached_graphs()
    if _POST_GRAD in sys.modules:
        _tell_inductor()


@functools.cache
def _tell_inductor() -> None:
    for tell, otherwise in (
        (_rewrite_graphs, "layers are not fused with what comes after them"),
        (_call_directly, "layers are called as ops"),
    ):
        try:
            tell()
        except (ImportError, AttributeError, LookupError) as error:  # an Inductor of another kind
            _logger.info("%s: %s: %s", otherwise, type(error).__name__, error)


def _tag_cached_graphs() -> None:
    """Graphs that are kept from one process to the next call our functions: another version's are none of ours."""
    tag = f" autoplan {_digest()}"
    with contextlib.suppress(AttributeError):  # a torch without such tags
        if tag not in torch.compiler.config.cache_key_tag:  # the user may have set it since
            torch.compiler.config.cache_key_tag += tag


@functools.cache
def _digest() -> str:
    """Of the source of all kernels."""
    sources = sorted(file for file in Path(__file__).parent.rglob("*") if file.suffix in (".py", ".cpp", ".h"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()


ops.tracing_watchers.append(_install)


def _rewrite_graphs() -> None:
    from torch._inductor.pattern_matcher import Arg, CallFunction, register_graph_pattern

    patterns: Any = sys.modules[_POST_GRAD].pass_patterns[0]

    def fits(match: Any) -> bool:
        *_, program, _, _, activation, pieces, _, eps = match.output_node().args
        return activation == "none" and not pieces and eps is None and ops.writes_in_place(program)

    @register_graph_pattern(CallFunction(LINEAR, *[Arg() for _ in range(10)]), extra_check=fits, pass_dict=patterns)
    def replace(match: Any, *_: Any) -> None:  # later layers first
        attend(match.output_node().graph)
        rewrite(match.output_node())


def _call_directly() -> None:
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    as_op = lowering.fallback_handler(LINEAR, add_to_fallback_set=False)
    pair_as_op = lowering.fallback_handler(PAIR, add_to_fallback_set=False)
    attention_as_op = lowering.fallback_handler(ATTENTION, add_to_fallback_set=False)

    class Direct:
        lines: tuple[str, ...] = ()  # that the code needs once, beside the call

        def codegen(self, wrapper: Any) -> None:
            for line in ("from autoplan.kernels import inductor as autoplan_inductor", *self.lines):
                wrapper.add_import_once(line)
            super().codegen(wrapper)  # type: ignore[misc]

    class Into(Direct, ir.ExternKernelOut):
        pass

    class Returning(Direct, ir.ExternKernelAlloc):
        pass

    def into(layout: Any, inputs: Sequence[Any], writer: str, *settings: object) -> Any:
        """A call of what `writer` gives for these settings: it is made once, under a name of its own."""
        made = f"autoplan_inductor.{writer}{settings!r}"
        name = f"autoplan_{hashlib.sha256(made.encode()).hexdigest()[:12]}"
        call = Into(layout, inputs, (), {}, None, name)
        call.lines = (f"{name} = {made}",)
        return ir.TensorBox.create(call)

    def contiguous(x: Any) -> Any:
        return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))

    def constants(numbers: Sequence[Any]) -> tuple[int | None, ...]:
        return tuple(int(number) if isinstance(number, int) or number.is_Integer else None for number in numbers)

    def memory(x: Any) -> tuple[Any, int | None]:
        """Where x [rows, in_features] is, contiguous, and how many rows it has, if that is known.

        Then it is not looked at as rows: making a view takes half a microsecond.
        """
        (rows,), view = constants(x.get_size()[:1]), x.data
        if rows is None or not isinstance(view, ir.ReinterpretView) or view.get_layout().offset != 0:
            return x, rows
        return ir.TensorBox(view.data), rows

    def lower(
        x: Any,
        packed: Sequence[Any],
        bias: Any,
        program: str,
        out_features: int,
        dtype: torch.dtype,
        activation: str,
        pieces: Sequence[int],
        norm: Sequence[Any],
        eps: float | None,
    ) -> Any:
        x, *norm = map(contiguous, [x, *norm])
        direct = x.get_device().type == "cpu" and x.get_dtype() in ops.FLOATS and not V.graph.cpp_wrapper
        if not direct or (norm and not ops.writes_in_place(program)):
            return as_op(x, packed, bias, program, out_features, dtype, activation, pieces, norm, eps)
        layout = ir.FixedLayout(x.get_device(), dtype, [x.get_size()[0], ops.width(out_features, activation)])
        others = [*map(ir.ExternKernel.realize_input, packed), *([] if bias is None else [contiguous(bias)])]
        if not ops.writes_in_place(program):
            settings = {"has_bias": bias is not None, "program": program, "activation": activation}
            settings |= {"pieces": tuple(pieces), "out_features": out_features, "dtype": dtype}
            return ir.TensorBox.create(Returning(layout, [x, *others], (), settings, "autoplan_inductor.run_linear"))
        x_dtype = x.get_dtype()
        x, rows = memory(x)
        bias_dtype = None if bias is None else str(bias.get_dtype())
        how = (program, str(dtype), bias_dtype, activation, tuple(pieces), rows, eps, str(x_dtype))
        return into(layout, [x, *others, *norm], "linear_writer", *how)

    def lower_pair(
        x: Any,
        packed: Any,
        bias: Any,
        dtype: torch.dtype,
        activation: str,
        then: Any,
        then_bias: Any,
        then_dtype: torch.dtype,
        kernel: str,
        out_features: int,
        norm: Sequence[Any],
        eps: float | None,
    ) -> Any:
        x, *norm = map(contiguous, [x, *norm])
        if V.graph.cpp_wrapper or x.get_device().type != "cpu":
            return pair_as_op(
                x, packed, bias, dtype, activation, then, then_bias, then_dtype, kernel, out_features, norm, eps
            )
        dtypes = (str(x.get_dtype()), str(dtype), str(then_dtype))
        layout = ir.FixedLayout(x.get_device(), then_dtype, [x.get_size()[0], out_features])
        biases = [contiguous(tensor) for tensor in (bias, then_bias) if tensor is not None]
        others = [*map(ir.ExternKernel.realize_input, (packed, then)), *biases]
        x, rows = memory(x)
        bias_dtypes = tuple(None if tensor is None else str(tensor.get_dtype()) for tensor in (bias, then_bias))
        return into(layout, [x, *others, *norm], "joined_writer", kernel, dtypes, activation, bias_dtypes, rows, eps)

    def lower_attention(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float) -> Any:
        if V.graph.cpp_wrapper:
            return attention_as_op(q, k, v, mask, causal, scale)
        batch, heads, rows, features = q.get_size()
        strides = [rows * heads * features, features, heads * features, 1]
        layout = ir.FixedLayout(q.get_device(), q.get_dtype(), [batch, heads, rows, features], strides)
        given = list(map(side_by_side, (q, k, v, *([] if mask is None else [mask]))))
        layouts = [*(ir.as_storage_and_layout(x)[1] for x in given), layout]
        known = [(constants(own.size), constants(own.stride), str(own.dtype)) for own in layouts]
        is_dynamic = any(None in (*sizes, *strides) for sizes, strides, _ in known)
        return into(layout, given, "attention_writer", causal, scale, *([] if is_dynamic else known))

    def side_by_side(x: Any) -> Any:
        """In memory, in whatever strides it has there, the last dimension's elements side by side."""
        x = ir.ExternKernel.realize_input(x)
        _, layout = ir.as_storage_and_layout(x, freeze=True)
        return x if layout.stride[-1] == 1 else contiguous(x)

    for op, own in ((LINEAR, lower), (PAIR, lower_pair), (ATTENTION, lower_attention)):
        lowering.register_lowering(op, type_promotion_kind=None)(own)


# What the code that Inductor writes calls, dtypes by name. It keeps that code by its graph as it is before any rewrite:
# whoever changes what these take, so that older calls of them fail, changes their names.


def linear_writer(
    program: str,
    dtype: str,
    bias_dtype: str | None,
    activation: str,
    pieces: tuple[int, ...],
    rows: int | None,
    eps: float | None,
    x_dtype: str | None = None,
) -> ops.Write:
    """`ops.writer`."""
    return ops.writer(program, _dtype(dtype), _dtype(bias_dtype), activation, pieces, rows, eps, _dtype(x_dtype))


def joined_writer(
    kernel: str,
    dtypes: tuple[str, str, str],
    activation: str,
    bias_dtypes: tuple[str | None, str | None],
    rows: int | None,
    eps: float | None,
) -> ops.Write:
    """`ops.pair_writer`."""
    x, between, out = dtypes
    first, then = bias_dtypes
    own = (_dtype(x), _dtype(between), _dtype(out))
    return ops.pair_writer(kernel, own, activation, (_dtype(first), _dtype(then)), rows, eps)


def attention_writer(causal: bool, scale: float, *known: tuple[tuple[int, ...], tuple[int, ...], str]) -> ops.Write:
    """`attention.writer`."""
    return native_attention.writer(causal, scale, *((sizes, strides, _dtype(name)) for sizes, strides, name in known))


@overload
def _dtype(name: str) -> torch.dtype: ...
@overload
def _dtype(name: str | None) -> torch.dtype | None: ...
def _dtype(name: str | None) -> torch.dtype | None:
    """Of the name that str() gives it."""
    return None if name is None else cast("torch.dtype", getattr(torch, name.removeprefix("torch.")))


def run_linear(
    x: Tensor,
    *tensors: Tensor,
    has_bias: bool,
    program: str,
    activation: str,
    pieces: tuple[int, ...],
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """`ops.run_linear`, with the bias, if there is one, after the packed tensors."""
    packed, bias = (tensors[:-1], tensors[-1]) if has_bias else (tensors, None)
    return ops.run_linear(x, packed, bias, program, out_features, dtype, activation, pieces)

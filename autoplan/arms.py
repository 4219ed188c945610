"""What runs in a race: the layers as the planned model will run them, over copies of a weight."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoplan.candidates import Candidate, find_candidate
from autoplan.kernels import packing, pages
from autoplan.kernels.ops import STRIP, Kernel, Packed, call_linear, find_kernel
from autoplan.layers import PlannedLinear, own_piece
from autoplan.records import EAGER, Part, Shape
from autoplan.siblings import Siblings

Call = Callable[[], object]
Maker = Callable[[], Call]  # each call makes one more copy of a packed weight, and what runs on it
Graph = Callable[..., object]  # what a compiled graph calls: a function of x [rows, in_features] and the packed tensors


@dataclass(frozen=True, slots=True)
class Contender:
    """A kernel of a candidate that has to be timed at a shape."""

    candidate: Candidate
    kernel: Kernel


class Arms:
    """Makes the arms of one race at `shape`, which have the float weight, the bias and the input in common.

    Arms of one layout use the same copies if they are `shared`, as on a GPU: there an arm's turn through the copies is
    long enough to leave the cache, memory has no favourite places, and there is less of it.
    """

    def __init__(self, shape: Shape, weight: Tensor, bias: Tensor | None, x: Tensor, shared: bool) -> None:
        self.shape, self.weight, self.bias, self.x = shape, weight, bias, x
        self._pools: dict[tuple[str, int, int, str], list[Packed]] | None = {} if shared else None
        self._quantized: dict[tuple[str, int, int], packing.Canonical] = {}

    def at(self, shape: Shape, x: Tensor) -> Arms:
        """Those at a shape that differs in rows or parts, with the same weight: what was quantized stays so."""
        moved = Arms(shape, self.weight, self.bias, x, shared=self._pools is not None)
        moved._quantized = self._quantized
        return moved

    def plain(self) -> Maker:
        """`F.linear`: in an `nn.Linear` or, in compiled mode, as the graph calls it."""
        x, weight = self.x, self.weight.to(self.x.dtype)  # under autocast, torch keeps the cast weight
        bias = None if self.bias is None else self.bias.to(x.dtype)

        def make() -> Call:
            copy = weight.clone()
            if self.shape.mode != EAGER:  # a compiled graph calls the matrix product without a module around it
                return _product(x, copy, bias) if x.is_cpu else functools.partial(F.linear, x, copy, bias)
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=x.dtype)
            layer.weight = nn.Parameter(copy, requires_grad=False)
            if bias is not None:
                layer.bias = nn.Parameter(bias, requires_grad=False)
            return functools.partial(layer, x)

        return make

    def planned(self, contender: Contender) -> Maker:
        """The layer as it runs planned: a module or, in compiled mode, what the graph calls for it."""
        part = _Part(contender, slice(0, self.shape.out_features), self.bias)
        copies = self._copies(part)
        if self.shape.mode == EAGER:
            return lambda: functools.partial(self._layer(part, next(copies)), self.x)
        graph: Graph = part.written(self.x) or part.graph(self.x.dtype)
        if contender.kernel.inline is not None:
            graph = _lowered(graph, self.x, self._pack(part))
        return lambda: functools.partial(graph, self.x, *next(copies))

    def apart(self) -> Maker:
        """The parts of the shape, one after another."""
        parts = [
            _Part(Contender(find_candidate(part.candidate), find_kernel(part.kernel)), rows, self._bias(part, rows))
            for part, rows in self._parts()
        ]
        copies = [self._copies(part) for part in parts]
        if self.shape.mode == EAGER:
            return lambda: self._in_turn(
                [self._layer(part, next(own)) for part, own in zip(parts, copies, strict=True)]
            )
        written = [part.written(self.x) for part in parts]
        graphs = [call or part.graph(self.x.dtype) for call, part in zip(written, parts, strict=True)]

        def graph(x: Tensor, *packed: Tensor) -> tuple[object, ...]:
            left = iter(packed)
            held = [tuple(itertools.islice(left, part.contender.kernel.layout.arity)) for part in parts]
            return tuple(graph(x, *own) for graph, own in zip(graphs, held, strict=True))

        in_graph: Graph = graph
        if not all(written):
            in_graph = _lowered(graph, self.x, [tensor for part in parts for tensor in self._pack(part)])
        return lambda: functools.partial(in_graph, self.x, *(tensor for own in copies for tensor in next(own)))

    def fused(self, contender: Contender) -> Maker:
        """The parts of the shape as siblings: one product, of which each takes its piece."""
        whole = _Part(contender, slice(0, self.shape.out_features), None)
        parts = [_Part(contender, rows, self._bias(part, rows)) for part, rows in self._parts()]
        copies = self._copies(whole)
        if self.shape.mode == EAGER:

            def make() -> Call:
                layers = [self._layer(part, None) for part in parts]
                siblings = Siblings("timed", f"1:{contender.kernel.name}", len(layers))
                for place, layer in enumerate(layers):
                    layer.become_sibling(siblings, place)
                siblings.unite(self._layer(whole, next(copies)))
                return self._in_turn(layers)

            return make
        if written := self._in_pieces(whole, parts):
            return lambda: functools.partial(written, self.x, *next(copies))
        product = whole.graph(self.x.dtype)

        def graph(x: Tensor, *packed: Tensor) -> tuple[Tensor, ...]:
            y = product(x, *packed)
            return tuple(own_piece(y[:, part.rows], part.bias) for part in parts)

        in_graph = _lowered(graph, self.x, self._pack(whole))
        return lambda: functools.partial(in_graph, self.x, *next(copies))

    def _in_pieces(self, whole: _Part, parts: Sequence[_Part]) -> Graph | None:
        """What the code of a graph calls for siblings, if it has the kernel write each its piece: `rewrites.split`."""
        sizes = [part.rows.stop - part.rows.start for part in parts]
        biases = [part.bias for part in parts if part.bias is not None]
        if len(biases) not in (0, len(parts)) or any(size % STRIP for size in sizes):
            return None
        return replace(whole, bias=torch.cat(biases) if biases else None).written(self.x, tuple(sizes))

    def _in_turn(self, layers: Sequence[nn.Module]) -> Call:
        def run() -> None:
            for layer in layers:
                layer(self.x)

        return run

    def _parts(self) -> Iterator[tuple[Part, slice]]:
        start = 0
        for part in self.shape.parts:
            yield part, slice(start, start + part.out_features)
            start += part.out_features

    def bytes_held(self, contender: Contender | None) -> int:
        """Of one copy of the weight: as the contender's candidate stores it; of the plain one for None."""
        if contender is None:
            return self.weight.numel() * self.x.itemsize
        whole = _Part(contender, slice(0, self.shape.out_features), None)
        return packing.nbytes(list(self._canonical(whole).values()))

    def _bias(self, part: Part, rows: slice) -> Tensor | None:
        return self.bias[rows].clone() if part.has_bias and self.bias is not None else None

    def _canonical(self, part: _Part) -> packing.Canonical:
        candidate = part.contender.candidate
        key = (candidate.name, part.rows.start, part.rows.stop)
        if key not in self._quantized:
            self._quantized[key] = candidate.quantize(self.weight[part.rows])
        return self._quantized[key]

    def _pack(self, part: _Part) -> Packed:
        return part.contender.kernel.layout.pack({key: t.clone() for key, t in self._canonical(part).items()})

    def _copies(self, part: _Part) -> Iterator[Packed]:
        """Copies of the packed weight, one for each call to come."""
        self._canonical(part)  # fails now, if it fails
        candidate, layout = part.contender.candidate, part.contender.kernel.layout
        key = (candidate.name, part.rows.start, part.rows.stop, layout.name)
        pool = [] if self._pools is None else self._pools.setdefault(key, [])

        def copies() -> Iterator[Packed]:
            for i in itertools.count():
                if i == len(pool):
                    opaque = not pool or any(tensor.is_mkldnn for tensor in pool[0])  # which cannot be cloned
                    copy = self._pack(part) if opaque else [tensor.clone() for tensor in pool[0]]
                    pool.append(pages.settle(copy, least=pages.HUGE))  # smaller ones share pages with plain weights
                yield pool[i]

        return copies()

    def _layer(self, part: _Part, packed: Packed | None) -> PlannedLinear:
        """A planned layer that holds these packed tensors; None for one that will be a sibling."""
        hollow = {key: torch.empty_like(tensor, device="meta") for key, tensor in self._canonical(part).items()}
        bias = None if part.bias is None else nn.Parameter(part.bias, requires_grad=False)
        size = (part.rows.stop - part.rows.start, self.shape.in_features)
        layer = PlannedLinear(
            "timed", part.contender.candidate.name, part.program, hollow, bias, size=size, dtype=self.x.dtype
        )
        layer._packed = None if packed is None else list(packed)
        return layer


@dataclass(frozen=True)
class _Part:
    """Some rows of the race's weight, on one kernel."""

    contender: Contender
    rows: slice
    bias: Tensor | None

    @property
    def program(self) -> str:
        return f"1:{self.contender.kernel.name}"

    def graph(self, dtype: torch.dtype) -> Callable[..., Tensor]:
        """What a graph is traced from, as a function of x and the packed tensors."""
        inline, bias, program, size = (
            self.contender.kernel.inline,
            self.bias,
            self.program,
            self.rows.stop - self.rows.start,
        )
        if inline is not None:
            return lambda x, *packed: inline(x, packed, bias, dtype)
        return lambda x, *packed: call_linear(x, packed, bias, program, size, dtype)

    def written(self, x: Tensor, pieces: tuple[int, ...] = ()) -> Callable[..., Tensor] | None:
        """What the code of a graph calls, as a function of x and the packed tensors, if it calls the kernel itself.

        With the sizes of `pieces`, these are written one after another, each [rows, size].
        """
        into, size = self.contender.kernel.into, self.rows.stop - self.rows.start
        if into is None:
            return None
        bias = () if self.bias is None else (self.bias,)
        write = into(x.dtype, None if self.bias is None else self.bias.dtype, "none", pieces, rows=x.shape[0])

        def call(x: Tensor, *packed: Tensor) -> Tensor:
            out = _empty((x.shape[0], size), (size, 1), x.dtype)
            write(x, *packed, *bias, out=out)
            return out

        return call


# How Inductor's code for CPUs makes memory and transposes a weight: torch's public ways take a microsecond longer, half
# of the time of a small layer.
_empty: Callable[..., Tensor] = getattr(
    torch._C._dynamo.guards,
    "_empty_strided_cpu",
    lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
)
_reinterpreted: Callable[..., Tensor] = getattr(torch._C._dynamo.guards, "_reinterpret_tensor", torch.as_strided)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Call:
    """`F.linear` as a compiled graph calls it on a CPU."""
    out_features, in_features = weight.shape

    def call() -> Tensor:
        out = _empty((x.shape[0], out_features), (out_features, 1), x.dtype)
        transposed = _reinterpreted(weight, (in_features, out_features), (1, in_features), 0)
        return torch.mm(x, transposed, out=out) if bias is None else torch.addmm(bias, x, transposed, out=out)

    return call


def _lowered(graph: Graph, x: Tensor, packed: Packed) -> Graph:
    """The graph as Inductor compiles it, where it has something to fuse.

    That goes round Dynamo, so that nothing counts against anyone's recompile limit.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(graph, tracing_mode="real")(x, *packed)
    if sum(node.op == "call_function" for node in traced.graph.nodes) <= 1:
        return graph
    from torch._inductor import compile as inductor_compile

    compiled: Graph = inductor_compile(traced, [x, *packed])
    return compiled

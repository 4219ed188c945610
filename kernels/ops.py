"""What a kernel is, the table of kernels, and the custom ops through which a compiled graph calls them.

Ops are defined with `torch.library.Library`: 2 us a call, against 17 us for `torch.library.custom_op`.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from autoplan.errors import KernelError
from autoplan.kernels import pages
from autoplan.kernels.packing import Canonical, dequantize

Packed = Sequence[Tensor]
Run = Callable[[Tensor, Packed, Tensor | None, torch.dtype], Tensor]
Write = Callable[..., None]  # see `Kernel.into`
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]  # see `Pair`

STRIP = 32  # features: pieces and halves of an output are multiples of it, see `Kernel.into`
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # that layers are given

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {  # in the order of `enum Activation` in native/simd.h
    "none": lambda y: y,
    "relu": lambda y: F.relu(y),
    "silu": lambda y: F.silu(y),
    "gelu": lambda y: F.gelu(y),
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


# Functions that halve what they are given: that activation of the first half of the features, times the second half.
GATED: Mapping[str, str] = {"reglu": "relu", "swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}


def activate(y: Tensor, activation: str) -> Tensor:
    """The function of that name of ACTIVATIONS or GATED."""
    if activation not in GATED:
        return ACTIVATIONS[activation](y)
    gate, up = y.chunk(2, dim=-1)
    return ACTIVATIONS[GATED[activation]](gate) * up


def width(out_features: int, activation: str) -> int:
    """How many features there are after the activation."""
    return out_features // 2 if activation in GATED else out_features


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """What decides whether a kernel can run a layer: sizes, the dtype that its input arrives in, and the GPU if any."""

    in_features: int
    out_features: int
    dtype: torch.dtype
    group_size: int | None = None
    capability: tuple[int, int] | None = None  # CUDA compute capability; None on a CPU


@dataclass(frozen=True)
class Layout:
    """One way to hold a weight in memory. Kernels with the same layout share one copy of it.

    `pack` turns a canonical weight (see `packing`) into always `arity` tensors, and `unpack` gives the canonical weight
    back exactly, so that only the packed form is held.
    """

    name: str
    arity: int
    pack: Callable[[Canonical], tuple[Tensor, ...]]
    unpack: Callable[[Packed], Canonical]

    @classmethod
    def canonical(cls, *keys: str) -> Layout:
        """The canonical tensors of these names, as they are."""
        return cls(
            name=",".join(keys),
            arity=len(keys),
            pack=lambda canonical: tuple(canonical[key].contiguous() for key in keys),
            unpack=lambda packed: dict(zip(keys, packed, strict=True)),
        )


class Into(Protocol):
    """How a kernel writes into memory that it is given. See `Kernel`."""

    def __call__(
        self,
        dtype: torch.dtype,
        bias_dtype: torch.dtype | None,
        activation: str,
        pieces: tuple[int, ...] = (),
        rows: int | None = None,
        eps: float | None = None,
        x_dtype: torch.dtype | None = None,
    ) -> Write: ...


class Pair(NamedTuple):
    """How a kernel runs two layers in one call, the second on what the first one gives.

    `into(dtypes, activation, bias_dtypes, rows, eps)` gives the function that does it, of (x, packed, then, *biases,
    *norm, out=...): the weight of the first layer, which `activation` follows, that of the second, and the biases that
    there are. `dtypes` are those of x, of what lies between the layers, and of out: that again, or float32. All else is
    as in `Kernel.into`. `pays(rows, nbytes)` says whether that is faster than two calls, where both weights take so
    many bytes.
    """

    into: Callable[[Dtypes, str, tuple[torch.dtype | None, torch.dtype | None], int | None, float | None], Write]
    pays: Callable[[int, int], bool]


@dataclass(frozen=True)
class Kernel:
    """One implementation of a linear layer: how it holds the weight, and how it runs.

    `run(x, packed, bias, dtype)` takes contiguous `x` [rows, in_features], rows >= 1, and `bias`, and returns a fresh
    [rows, out_features] of `dtype`. `inline`, where a kernel has it, computes the same in torch ops that Inductor may
    fuse with their neighbours (the matrix product itself stays a custom op), for compiled graphs; all else runs whole
    behind the op `autoplan::linear`.

    `into(dtype, bias_dtype, activation, pieces, rows, eps, x_dtype)`, where a kernel has it, gives a function of
    (x, *packed, *bias, *norm, out=...) that writes what `run` returns into `out`, after the function that
    ACTIVATIONS or GATED (with halves that are multiples of STRIP) has under that name. out is of `dtype`, and so is x
    unless `x_dtype` says another; without a `bias_dtype` there is no bias. So whatever does not change from call to
    call is looked up once. If it gets the sizes of `pieces`, multiples of STRIP that sum up to out_features, each
    piece of so many features lies in `out` by itself, contiguous, one after another. Where the number of rows is
    given, x may have any shape of so many rows. With `eps`, `norm` is a residual [rows, out_features], which is
    added, and the weight and the bias [out_features] of a layer norm that follows, all of `dtype`; without, there
    is none.

    `pair`, where a kernel has it, writes what two layers give, one after the other; their weights are one tensor each.

    A kernel made for few rows says in `most_rows` up to how many; it runs more, but dequantizing the weight is faster.

    A kernel with tile sizes to choose names those worth timing in `variants(spec, rows)`, best guess first; under the
    name "kernel@config" it is found as a kernel of its own, run by `configured(config)`, so that what was timed is what
    a plan names. Without a config it chooses one itself.
    """

    name: str
    devices: tuple[str, ...]
    layout: Layout
    supports: Callable[[LinearSpec], str | None]  # None, or why this layer cannot use the kernel
    probe: Callable[[], str | None]  # None, or why this machine cannot; run once, on first use
    run: Run
    inline: Run | None = None
    into: Into | None = None
    pair: Pair | None = None
    most_rows: int | None = None
    variants: Callable[[LinearSpec, int], Sequence[str]] | None = None
    configured: Callable[[str], Run] | None = None

    def rejects(self, spec: LinearSpec) -> str | None:
        """None when this kernel can run a layer of `spec` on this machine, else the reason."""
        return self.supports(spec) or self.lacks()

    def lacks(self) -> str | None:
        """None when this machine can run it, else what is missing."""
        return _probe_once(self if self.name == DEQUANTIZE else find_kernel(base_name(self.name)))


_KERNELS: dict[str, Kernel] = {}


def register_kernel(kernel: Kernel) -> Kernel:
    """Make `kernel` known by its name. Raises KernelError when the name is taken."""
    if kernel.name in _KERNELS:
        raise KernelError(f"a kernel named {kernel.name!r} is registered already; choose another name")
    _KERNELS[kernel.name] = kernel
    return kernel


def base_name(name: str) -> str:
    """The name of a kernel without its config: "kernel" of "kernel@config"."""
    return name.partition("@")[0]


def find_kernel(name: str) -> Kernel:
    """The kernel of that name, "kernel" or "kernel@config". Raises KernelError naming those there are."""
    base, _, config = name.partition("@")
    try:
        kernel = _KERNELS[base]
    except KeyError:
        raise KernelError(f"no kernel is named {base!r}; there are {', '.join(sorted(_KERNELS))}") from None
    if not config:
        return kernel
    if kernel.configured is None:
        raise KernelError(f"the kernel {base!r} has no variants, so there is none named {name!r}")
    return replace(kernel, name=name, run=kernel.configured(config))


@functools.cache
def _probe_once(kernel: Kernel) -> str | None:
    """The kernel's own probe; private torch ops come and go, so an exception there is an answer too."""
    try:
        with torch.device("cpu"):  # whatever the default is; those of GPUs say theirs
            return kernel.probe()
    except Exception as error:
        return f"its probe failed on this machine: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


DEQUANTIZE = "dequantize"  # in a program, after another kernel: F.linear on what that one's layout stands for


def _dequantizing(layout: Layout) -> Kernel:
    def run(x: Tensor, packed: Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        weight = dequantize(layout.unpack(packed), x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).to(dtype)

    return Kernel(DEQUANTIZE, ("cpu", "cuda"), layout, supports=lambda spec: None, probe=lambda: None, run=run)


@functools.cache
def parse_program(program: str) -> tuple[tuple[int, ...], tuple[Kernel, ...], tuple[slice, ...]]:
    """Read a program such as "1:int8pack,129:dequantize": from how many rows on, which kernel.

    Returns the thresholds, the kernels, and where among the packed tensors each finds its own.
    """
    thresholds: list[int] = []
    kernels: list[Kernel] = []
    start = 0
    held: dict[str, slice] = {}
    for step in program.split(","):
        rows, _, name = step.partition(":")
        kernel = _dequantizing(kernels[-1].layout) if name == DEQUANTIZE and kernels else find_kernel(name)
        thresholds.append(int(rows))
        kernels.append(kernel)
        if kernel.layout.name not in held:
            held[kernel.layout.name] = slice(start, start + kernel.layout.arity)
            start += kernel.layout.arity
    return tuple(thresholds), tuple(kernels), tuple(held[kernel.layout.name] for kernel in kernels)


def pack_program(program: str, canonical: Canonical) -> list[Tensor]:
    """The packed tensors that a program runs on: each layout once, in the order of `parse_program`."""
    layouts = {kernel.layout.name: kernel.layout for kernel in parse_program(program)[1]}
    return pages.settle([tensor for layout in layouts.values() for tensor in layout.pack(canonical)])


def unpack_program(program: str, packed: Packed) -> Canonical:
    """The canonical weight that the packed tensors of a program stand for."""
    _, kernels, slices = parse_program(program)
    return kernels[0].layout.unpack(packed[slices[0]])


def step(program: str, rows: int) -> tuple[Kernel, slice]:
    """The kernel that runs so many rows, and where among the packed tensors it finds its own."""
    _, kernels, slices = parse_program(program)
    i = _place(program, rows)
    return kernels[i], slices[i]


def _place(program: str, rows: int) -> int:
    """Which of the kernels of a program runs so many rows."""
    thresholds = parse_program(program)[0]
    return max(bisect.bisect_right(thresholds, rows) - 1, 0) if len(thresholds) > 1 else 0


def writes_in_place(program: str) -> bool:
    """Whether whatever kernel runs has an `into`."""
    return all(kernel.into is not None for kernel in parse_program(program)[1])


def kernel_at(program: str, rows: int) -> Kernel:
    """The kernel that `program` names for this many rows."""
    return step(program, rows)[0]


def run_linear(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    program: str,
    out_features: int,
    dtype: torch.dtype,
    activation: str = "none",
    pieces: Sequence[int] = (),
    norm: Sequence[Tensor] = (),
    eps: float | None = None,
) -> Tensor:
    """What `autoplan::linear` computes: the kernel for so many rows on `x` [rows, in_features], then the activation.

    [rows, `width` of out_features]; with `pieces`, in that shape and memory, [rows, size] for each of the sizes one
    after another.
    With `norm` and `eps`, a residual is added and a layer norm follows, as `Kernel` says.
    """
    rows = x.shape[0]
    kernel, own = step(program, rows)
    if rows and kernel.into is None:
        y = activate(kernel.run(x, packed[own], bias, dtype), activation)
        if eps is not None:
            y = F.layer_norm(y + norm[0].view_as(y), (out_features,), norm[1], norm[2], eps)
        return torch.cat([piece.flatten() for piece in y.split(list(pieces), 1)]).view_as(y) if pieces else y
    out = x.new_empty((rows, width(out_features, activation)), dtype=dtype)
    if rows and kernel.into is not None:
        if x.dtype not in FLOATS:
            x = x.to(dtype)
        bias_dtype = None if bias is None else bias.dtype
        write = kernel.into(dtype, bias_dtype, activation, tuple(pieces), None, eps, x.dtype)
        write(x, *packed[own], *([] if bias is None else [bias]), *norm, out=out)
    return out


def writer(
    program: str,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    activation: str,
    pieces: tuple[int, ...],
    rows: int | None,
    eps: float | None,
    x_dtype: torch.dtype | None = None,
) -> Write:
    """`Kernel.into` of a program that `writes_in_place`: the function runs whichever kernel its rows are for.

    Raises KernelError naming a kernel that does not write into an output that it is given.
    """
    _, kernels, slices = parse_program(program)
    writes = []
    for kernel in kernels:
        if kernel.into is None:
            raise KernelError(f"kernel {kernel.name!r} does not write into an output that it is given")
        writes.append(kernel.into(dtype, bias_dtype, activation, pieces, rows, eps, x_dtype))
    if len(writes) == 1:
        return writes[0]
    held = max(own.stop for own in slices)

    def write(x: Tensor, *tensors: Tensor, out: Tensor) -> None:
        i = _place(program, x.shape[0] if rows is None else rows)
        writes[i](x, *tensors[slices[i]], *tensors[held:], out=out)

    return write


# Each layer asks at each call: looking these up in torch would take a tenth of a microsecond.
_grad_enabled, _compiling = torch.is_grad_enabled, torch.compiler.is_compiling
_modes, _traced = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state


def call_linear(
    x: Tensor, packed: Packed, bias: Tensor | None, program: str, out_features: int, dtype: torch.dtype
) -> Tensor:
    """`autoplan::linear`, without the 20 us that calling an op takes where no gradient and no tracing needs one."""
    if _grad_enabled() or _compiling() or type(x) is not Tensor or _modes() or _traced() is not None:
        y: Tensor = torch.ops.autoplan.linear(x, packed, bias, program, out_features, dtype, "none", [], [], None)
        return y
    return run_linear(x, packed, bias, program, out_features, dtype)


# The one op that any kernel can run behind. `packed` may hold oneDNN's opaque tensors, hence the second dispatch key.
# Only Inductor's graphs give it an activation, pieces and a norm (see `inductor`): there, nothing needs gradients.
_LIBRARY = torch.library.Library("autoplan", "FRAGMENT")
tracing_watchers: list[Callable[[], None]] = []  # are called whenever a graph is traced through it


def define_op(schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Define `autoplan::<schema>` with one implementation for strided and opaque tensors, and its shape function."""
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    for key in ("CPU", "MkldnnCPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"autoplan::{name}", fake, lib=_LIBRARY)


def _linear_fake(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    program: str,
    out_features: int,
    dtype: torch.dtype,
    activation: str,
    *_: object,
) -> Tensor:
    for watcher in tracing_watchers:
        watcher()
    return x.new_empty((x.shape[0], width(out_features, activation)), dtype=dtype)


define_op(
    "linear(Tensor x, Tensor[] packed, Tensor? bias, str program, int out_features, ScalarType dtype, "
    "str activation, int[] pieces, Tensor[] norm, float? eps) -> Tensor",
    run_linear,
    _linear_fake,
)


def pair_writer(
    kernel: str,
    dtypes: Dtypes,
    activation: str,
    bias_dtypes: tuple[torch.dtype | None, torch.dtype | None],
    rows: int | None,
    eps: float | None,
) -> Write:
    """`Pair.into` of the kernel of that name. Raises KernelError if it has none."""
    pair = find_kernel(kernel).pair
    if pair is None:
        raise KernelError(f"kernel {kernel!r} does not run two layers in one call")
    return pair.into(dtypes, activation, bias_dtypes, rows, eps)


def _pair(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str,
    then: Tensor,
    then_bias: Tensor | None,
    then_dtype: torch.dtype,
    kernel: str,
    out_features: int,
    norm: Sequence[Tensor],
    eps: float | None,
) -> Tensor:
    out = x.new_empty((x.shape[0], out_features), dtype=then_dtype)
    bias_dtypes = (None if bias is None else bias.dtype, None if then_bias is None else then_bias.dtype)
    biases = [tensor for tensor in (bias, then_bias) if tensor is not None]
    write = pair_writer(kernel, (x.dtype, dtype, then_dtype), activation, bias_dtypes, None, eps)
    write(x, packed, then, *biases, *norm, out=out)
    return out


define_op(
    "pair(Tensor x, Tensor packed, Tensor? bias, ScalarType dtype, str activation, Tensor then, Tensor? then_bias, "
    "ScalarType then_dtype, str kernel, int out_features, Tensor[] norm, float? eps) -> Tensor",
    _pair,
    lambda x, *others: x.new_empty((x.shape[0], others[8]), dtype=others[6]),
)


def _dense_weight(packed: Packed, program: str, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The float weight [out_features, in_features] that the packed tensors of a program stand for."""
    weight = dequantize(unpack_program(program, packed), dtype)
    return weight.clone() if any(weight is tensor for tensor in packed) else weight  # an op's output is its own


def _dense_weight_fake(packed: Packed, program: str, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device=packed[0].device)


define_op(
    "dense_weight(Tensor[] packed, str program, SymInt[] size, ScalarType dtype) -> Tensor",
    _dense_weight,
    _dense_weight_fake,
)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, packed, bias, program, out_features, _, activation, pieces, norm, _ = inputs
    if activation != "none" or pieces or norm:
        how = f"the activation {activation!r}" if activation != "none" else "pieces" if pieces else "a norm"
        raise RuntimeError(f"autoplan::linear with {how} is for graphs that need no gradients")
    ctx.packed, ctx.program, ctx.size, ctx.dtype = packed, program, (out_features, x.shape[1]), x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Straight through: the gradient that a float layer with the dequantized weight would pass on."""
    grad_x = grad.to(ctx.dtype) @ torch.ops.autoplan.dense_weight(ctx.packed, ctx.program, ctx.size, ctx.dtype)
    grad_bias = grad.sum(dim=0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return grad_x, [None] * len(ctx.packed), grad_bias, None, None, None, None, [], [], None


torch.library.register_autograd("autoplan::linear", _linear_backward, setup_context=_save_for_backward, lib=_LIBRARY)

"""What a candidate is, and the table of those registered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from autoplan.errors import CandidateError
from autoplan.kernels.ops import Kernel, Layout, LinearSpec, Packed, find_kernel, register_kernel
from autoplan.kernels.packing import Canonical, dequantize
from autoplan.records import Device, LayerProfile


class Candidate(ABC):
    """A numeric recipe for a layer: how its weight is stored, and what the layer then computes.

    A subclass sets `name`, `tensors` (the names of the canonical tensors, in order) and `kernels` (the kernels that can
    run it, the most general last), and writes `quantize`. One that leaves `kernels` empty runs its own `linear`. One
    that may run as one candidate at some rows and as another at others, on the same codes, names them in `modes`; its
    kernels are theirs, timed under their names. `finer` names those that do the same with smaller groups or a
    bit or two more, `in_more_bits` the one that does it in twice as many. Both do less harm (but for channels with an
    outlier, where int8 can do more than groups of 6 bits): a candidate that is no faster than those, or not surely
    faster than this one, is left out (unless bytes are asked for).
    """

    name: str
    tensors: tuple[str, ...]
    kernels: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    group_size: int | None = None
    finer: tuple[str, ...] = ()
    in_more_bits: str | None = None

    def rejects(self, profile: LayerProfile, device: Device) -> str | None:
        """None when a layer of this profile may use the candidate on this device, else the reason."""
        if self.group_size and profile.in_features % self.group_size:
            return f"in_features {profile.in_features} is not a multiple of the group size {self.group_size}"
        return None

    @abstractmethod
    def quantize(self, weight: Tensor) -> Canonical:
        """The canonical tensors (see `autoplan.kernels.packing`) of a float `weight` [out_features, in_features]."""

    def linear(self, x: Tensor, canonical: Canonical, bias: Tensor | None) -> Tensor:
        """What the layer computes, plainly, in the dtype of `x` [rows, in_features]: what kernels are held to."""
        return F.linear(x, dequantize(canonical, x.dtype), None if bias is None else bias.to(x.dtype))

    def spec(self, profile: LayerProfile, dtype: str, device: Device) -> LinearSpec:
        """What kernels ask about a layer whose input comes in `dtype`."""
        return LinearSpec(
            profile.in_features, profile.out_features, getattr(torch, dtype), self.group_size, device.capability
        )

    def usable_kernels(self, profile: LayerProfile, device: Device) -> tuple[tuple[Kernel, ...], dict[str, str]]:
        """The kernels that can run this layer on every dtype it was called with, and why the others cannot."""
        dtypes = sorted({call.dtype for call in profile.calls} or {profile.dtype})
        usable, reasons = [], {}
        for kernel in map(find_kernel, self.kernels):
            if profile.device not in kernel.devices:
                continue
            for dtype in dtypes:
                if reason := kernel.rejects(self.spec(profile, dtype, device)):
                    reasons[kernel.name] = reason
                    break
            else:
                usable.append(kernel)
        return tuple(usable), reasons

    def mode(self, kernel: str) -> Candidate:
        """The candidate that this one is when it runs on `kernel`: itself, but for one with `modes`."""
        return next((mode for mode in map(find_candidate, self.modes) if kernel in mode.kernels), self)

    def __repr__(self) -> str:
        return f"<candidate {self.name}>"


_CANDIDATES: dict[str, Candidate] = {}


def register_candidate(candidate: Candidate) -> Candidate:
    """Make `candidate` known by its name, to plan with and to load plans with. Returns it.

    Raises CandidateError when another candidate holds the name.
    """
    holder = _CANDIDATES.get(candidate.name)
    if holder is candidate:
        return candidate
    if holder is not None:
        raise CandidateError(
            f"the name {candidate.name!r} is taken by {type(holder).__module__}.{type(holder).__qualname__}; "
            f"give {type(candidate).__qualname__} another name"
        )
    if not candidate.kernels:
        candidate.kernels = (_own_kernel(candidate).name,)
    _CANDIDATES[candidate.name] = candidate
    return candidate


def registered() -> tuple[Candidate, ...]:
    """All candidates in the one order used everywhere: `none`, then by name."""
    return tuple(sorted(_CANDIDATES.values(), key=lambda candidate: (candidate.name != "none", candidate.name)))


def find_candidate(name: str) -> Candidate:
    """The candidate of that name. Raises CandidateError naming those there are."""
    try:
        return _CANDIDATES[name]
    except KeyError:
        known = ", ".join(candidate.name for candidate in registered())
        raise CandidateError(
            f"no candidate is named {name!r}; there are {known}. Import the module that registers it first"
        ) from None


def _own_kernel(candidate: Candidate) -> Kernel:
    """Run a candidate that brings no kernel by its own `linear`."""

    layout = Layout.canonical(*candidate.tensors)

    def run(x: Tensor, packed: Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return candidate.linear(x, layout.unpack(packed), bias).to(dtype)

    return register_kernel(
        Kernel(
            name=f"{candidate.name}.linear",
            devices=("cpu", "cuda"),
            layout=layout,
            supports=lambda spec: None,
            probe=lambda: None,
            run=run,
        )
    )


def select(names: Sequence[str | Candidate] | None) -> tuple[Candidate, ...]:
    """The candidates a caller asked for, in registry order and with `none` always among them; all when `names` is None.

    Raises CandidateError for an unknown name, or an object that is no Candidate.
    """
    if names is None:
        return registered()
    if isinstance(names, str | Candidate):
        raise CandidateError(f"candidates must be a sequence of names or Candidate objects, not {names!r}")
    chosen = {"none"}
    for item in names:
        if isinstance(item, Candidate):
            chosen.add(register_candidate(item).name)
        elif item == "int4_grouped":
            chosen.update(candidate.name for candidate in registered() if candidate.name.startswith("int4_g"))
        elif isinstance(item, str):
            chosen.add(find_candidate(item).name)
        else:
            raise CandidateError(f"candidates must be names or Candidate objects, not {item!r}")
    return tuple(candidate for candidate in registered() if candidate.name in chosen)

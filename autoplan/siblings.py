"""Siblings: planned layers that are fed by one tensor, and run as one product."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from autoplan.errors import AutoplanError
from autoplan.layers import PlannedLinear

_State = tuple[int | None, object]


def _state(x: Tensor) -> _State:
    """The version of `x`, and the CUDA stream that works on it.

    Inference tensors count no versions: that nobody changes them between layers is what the recording has shown.
    """
    stream = torch.cuda.current_stream(x.device) if x.is_cuda and torch.cuda.is_initialized() else None
    return None if x.is_inference() else x._version, stream


class Siblings:
    """One weight for several planned layers of one candidate: theirs, one below the other.

    The first of them that is called with a tensor computes the product of all, and the others take their pieces when
    they are called with that very tensor. One that is called with any other tensor computes anew, so the answer is
    right whoever is called, in whatever order. Once all pieces are taken, nothing of the product stays.

    The layers stay modules of their own. If one is moved or loaded by itself, the weight is taken apart and everyone
    runs alone; as soon as all hold their weights alike again (on one device, for one dtype), they run as one again.

    Attributes:
        label: names the layers, for people.
        program: from how many rows on which kernel the product of all runs.
        whole: a layer of all their outputs, without a bias; None while they run alone.
        bounds: where among the outputs of the whole each layer finds its own.
    """

    def __init__(self, label: str, program: str, count: int) -> None:
        self.label, self.program = label, program
        self.whole: PlannedLinear | None = None
        # Weak references: whoever copies, saves or drops one of the layers does not do it to the others.
        self._members: list[weakref.ref[PlannedLinear] | None] = [None] * count
        self.bounds: list[tuple[int, int]] = []
        # The product that waits for the others, of which input, and the places that have not taken their piece.
        self._waiting: tuple[weakref.ref[Tensor], _State, Tensor, tuple[int, ...]] | None = None
        self._traced: tuple[Tensor, Tensor, tuple[int, ...]] | None = None  # for Dynamo, which knows no weak references

    def __reduce__(self) -> tuple[type[Siblings], tuple[str, str, int]]:
        """A copy waits for the copies of the layers, each of which enters by itself."""
        return Siblings, (self.label, self.program, len(self._members))

    # Running.

    def piece(self, whole: PlannedLinear, place: int, input: Tensor, dtype: torch.dtype) -> Tensor:
        """What the layer at `place` gives for `input` before its bias, in `dtype`: a view of the product of `whole`."""
        if torch.compiler.is_dynamo_compiling():
            product, places = self._find_traced(whole, place, input, dtype)
            places = tuple([other for other in places if other != place])
            self._traced = (input, product, places) if places else None
        else:
            product, state, places = self._find(whole, place, input, dtype)
            places = tuple([other for other in places if other != place])
            self._waiting = (weakref.ref(input, self._forget), state, product, places) if places else None
        start, stop = self.bounds[place]
        return product[..., start:stop]

    def _find(
        self, whole: PlannedLinear, place: int, input: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, _State, tuple[int, ...]]:
        """The product for `input`, its state, and who is left to take a piece. It is computed, unless it waits.

        What waits was made in the same grad mode, on the same CUDA stream, from the same values.
        """
        state = _state(input)
        if waiting := self._waiting:  # read once: other threads may change it, which costs no more than a product
            of, of_state, product, places = waiting
            if (
                of() is input
                and of_state == state
                and place in places
                and product.dtype == dtype
                and product.requires_grad == (input.requires_grad and torch.is_grad_enabled())
                and product.is_inference() == torch.is_inference_mode_enabled()
            ):
                return product, state, places
        return whole.forward(input), state, tuple(range(len(self.bounds)))

    def _find_traced(
        self, whole: PlannedLinear, place: int, input: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, tuple[int, ...]]:
        """The same while Dynamo traces, where a tensor shows no version: what the recording has shown must do.

        What is left at the end of a graph is nothing, as a rule, so no graph has a side effect that another one sees.
        """
        if self._traced is not None:
            of, product, places = self._traced
            asked = input.requires_grad and torch.is_grad_enabled()
            if of is input and place in places and product.dtype == dtype and product.requires_grad == asked:
                return product, places
        return whole.forward(input), tuple(range(len(self.bounds)))

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        waiting = self._waiting
        if waiting is not None and waiting[0] is gone:
            self._waiting = None

    # Who belongs to it, and their weights.

    def enter(self, place: int, layer: PlannedLinear) -> bool:
        """Make `layer` the one at `place`; False if another one is there already."""
        member = self._members[place]
        if member is not None and member() is not None:
            return False
        self._members[place] = weakref.ref(layer)
        self.gather()
        return True

    def gather(self) -> None:
        """Hold the weights as one, if all layers are here and hold theirs alike."""
        layers = [layer for layer in self._layers() if layer is not None]
        where = {layer.placement() for layer in layers}
        if self.whole is not None or len(layers) < len(self._members) or len(where) > 1 or None in where:
            return
        first, parts = layers[0], [layer.canonical() for layer in layers]
        canonical = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        size = (sum(layer.out_features for layer in layers), first.in_features)
        self.unite(
            PlannedLinear(self.label, first.candidate, self.program, canonical, None, size=size, dtype=first.dtype)
        )

    def unite(self, whole: PlannedLinear) -> None:
        """Run as `whole`, a layer of all outputs without a bias. All layers are here."""
        layers = [layer for layer in self._layers() if layer is not None]
        ends = itertools.accumulate((layer.out_features for layer in layers), initial=0)
        self.bounds = list(itertools.pairwise(ends))
        for layer in layers:
            layer.let_go()
        self.whole = whole

    def scatter(self) -> None:
        """Give every layer its weight back, to run alone."""
        if self.whole is None:
            return
        canonical = self.whole.canonical()
        self.whole = self._waiting = self._traced = None
        for layer, (start, stop) in zip(self._layers(), self.bounds, strict=True):
            if layer is not None:
                layer.hold({key: tensor[start:stop].clone() for key, tensor in canonical.items()})

    def _layers(self) -> list[PlannedLinear | None]:
        return [None if member is None else member() for member in self._members]


def join(label: str, layers: Sequence[PlannedLinear], program: str) -> None:
    """Let `layers`, which are fed by one tensor and run one candidate, run as one product on the kernels of `program`.

    Raises AutoplanError naming them when their weights cannot be held as one.
    """
    siblings = Siblings(label, program, len(layers))
    try:
        for place, layer in enumerate(layers):
            layer.become_sibling(siblings, place)
    except Exception as error:
        for layer in layers:
            layer.become_sibling(None)
        raise AutoplanError(
            f"layers {label} cannot run as one {layers[0].candidate} product on {program}: "
            f"{type(error).__name__}: {error}. Exclude one of them"
        ) from error

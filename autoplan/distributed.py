"""Planning under torch.distributed: who measures what, and one plan for all ranks.

Ranks talk by gathering plain values, each of them on every rank and in the same order. One that fails says so in place
of its next value, and so ends all: nobody waits for what will not come.
"""

from __future__ import annotations

import datetime
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from autoplan.apply import Swap, stand_ins
from autoplan.cache.fingerprint import digest
from autoplan.errors import AutoplanError
from autoplan.layers import PlannedLinear
from autoplan.recorder import device_of_model

PER_DEVICE = "per device"

_TIMEOUT = datetime.timedelta(minutes=30)  # of a group made here: how long ranks wait for each other
_PATIENCE = 30.0  # seconds until a rank that waits for the others says so
_TALK = {"c10d", "_c10d_functional", "c10d_functional"}  # where torch keeps its collectives

_logger = logging.getLogger("autoplan")

_Value = TypeVar("_Value")
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class _Introduction:
    """What a rank tells of itself."""

    place: tuple[str, str]  # host and device
    environment: Mapping[str, Any]
    options: Mapping[str, Any]
    layers: Mapping[str, tuple[Any, ...]]  # name -> shape and dtype
    model: str


class Ranks:
    """The ranks that make one plan together; without a group, this process alone."""

    def __init__(self, group: dist.ProcessGroup | None = None, per_device: bool = False) -> None:
        self._group, self._per_device = group, per_device
        self._rank = dist.get_rank(group) if group else 0
        self._ended: AutoplanError | None = None  # why nobody is left to talk to
        self.peers = list(range(dist.get_world_size(group))) if group else [0]  # those that share one plan
        self.turn, self.turns = 0, 1  # when this rank may time: those on one device must not disturb each other
        self.hold_shards = False  # whether peers have other weights: then all take part in each forward of the model

    @property
    def alone(self) -> bool:
        return self._group is None

    @property
    def is_first(self) -> bool:
        return self._rank == self.peers[0]

    def gather(self, value: _Value) -> list[_Value]:
        """What every peer gives, in the order of ranks. Raises AutoplanError where a rank fails, or is gone."""
        if self._group is None:
            return [value]
        answers = self._exchange("", value)
        return [answers[rank] for rank in self.peers]

    def from_first(self, value: Callable[[], _Value]) -> _Value:
        """What `value()` is on the first of the peers, where alone it is called."""
        made: Any = value() if self.is_first else None
        found: _Value = self.gather(made)[0]
        return found

    def share(self, items: Sequence[_Item]) -> list[_Item]:
        """This rank's part of what all peers have listed in the same order."""
        return list(items[self.peers.index(self._rank) :: len(self.peers)])

    def meet(
        self, prints: dict[str, Any], device: torch.device, layers: Mapping[str, tuple[Any, ...]]
    ) -> dict[str, Any]:
        """Learn who the peers are; returns the fingerprints, which hold the weights of all of them if they differ.

        Raises AutoplanError for ranks that cannot share a plan: on unlike devices (unless there is to be one for each
        kind), asked for different things, or with layers of different shapes.
        """
        if self._group is None:
            return prints
        own = _Introduction(
            _place(device), prints["environment"], prints["options"], layers, prints["model"]["digest"]
        )  # fmt: skip
        everyone: list[_Introduction] = self._exchange("", own)
        kinds = [digest(dict(other.environment)) for other in everyone]
        if not self._per_device:
            self._refuse_unlike("environment", "run on unlike devices", everyone,
                                f'plan with distributed="{PER_DEVICE}" for a plan per kind of device')  # fmt: skip
        self.peers = [rank for rank, kind in enumerate(kinds) if kind == kinds[self._rank]]
        self._refuse_unlike("options", "ask for different plans", everyone, "call with the same arguments on all ranks")
        self._refuse_unlike("layers", "have layers of different shapes", everyone,
                            "plan like ranks together, with distributed=<their process group>")  # fmt: skip
        places = [other.place for other in everyone]
        self.turn, self.turns = places[: self._rank].count(own.place), max(map(places.count, places))
        models = [everyone[rank].model for rank in self.peers]
        self.hold_shards = len(set(models)) > 1
        gathered = self.gather({name: layer["digest"] for name, layer in prints["model"]["layers"].items()})
        if not self.hold_shards:
            return prints
        shards = {
            name: {**layer, "shards": [own.get(name, "") for own in gathered]}
            for name, layer in prints["model"]["layers"].items()
        }
        model = {**prints["model"], "digest": digest(models), "layers": shards}
        return {**prints, "model": model}

    def _refuse_unlike(self, what: str, problem: str, everyone: Sequence[_Introduction], remedy: str) -> None:
        theirs = {rank: getattr(everyone[rank], what) for rank in self.peers}
        first = theirs[self.peers[0]]
        for rank, other in theirs.items():
            keys = [key for key in sorted({*first, *other}) if first.get(key) != other.get(key)]
            if keys:
                shown = "; ".join(f"{key} is {first.get(key)} and {other.get(key)}" for key in keys[:4])
                raise AutoplanError(
                    f"ranks {self.peers[0]} and {rank} {problem}, so no plan suits both ({shown}): {remedy}, or each "
                    f"rank on its own, with distributed=False"
                )

    def report(self, error: Exception) -> None:
        """Tell the others that this rank has failed, unless they know, or are gone."""
        if self._group is not None and self._ended is None:
            with suppress(AutoplanError):  # of what it says, this rank knows its own part, and that is raised
                self._exchange(f"{type(error).__name__}: {error}", None)

    def _exchange(self, problem: str, value: Any) -> list[Any]:
        if self._ended:
            raise self._ended
        answers: list[Any] = [None] * dist.get_world_size(self._group)
        try:
            dist.all_gather_object(answers, (problem, value), group=self._group)
        except Exception as error:
            self._ended = AutoplanError(
                f"planning on {len(answers)} ranks ended on rank {self._rank}, as another is gone or did not answer in "
                f"time: {error}"
            )
            raise self._ended from error
        failed = [f"rank {rank}: {said}" for rank, (said, _) in enumerate(answers) if said]
        if failed:
            self._ended = AutoplanError(f"planning failed on {'; '.join(failed)}")
            raise self._ended
        return [answer for _, answer in answers]


@contextmanager
def together(distributed: object) -> Iterator[Ranks]:
    """The ranks that plan together as `distributed=` asks; what one of them raises inside ends all of them.

    None: all ranks of torch.distributed, if it is initialised; False: this process alone; "per device": as None, with
    a plan for each kind of device; a process group: its ranks. They talk by gloo, over the group itself if that is its
    backend (then its timeout counts), else over one made for the purpose.

    Raises AutoplanError when another rank does not come, or fails.
    """
    if dist.is_available() and distributed is dist.GroupMember.NON_GROUP_MEMBER:  # what new_group gives to others
        raise AutoplanError("this rank is not in the process group that distributed= names")
    if not (distributed is None or distributed is False or distributed == PER_DEVICE or _is_group(distributed)):
        raise AutoplanError(
            f'distributed must be None, False, "{PER_DEVICE}" or a process group of torch.distributed, not '
            f"{distributed!r}"
        )
    if distributed is False or not (dist.is_available() and dist.is_initialized()):
        yield Ranks()
        return
    asked: Any = distributed if _is_group(distributed) else dist.group.WORLD
    if dist.get_world_size(asked) == 1:
        yield Ranks()
        return
    group = asked
    try:
        if dist.get_backend(asked) != "gloo":
            group = dist.new_group(
                dist.get_process_group_ranks(asked), timeout=_TIMEOUT, backend="gloo", use_local_synchronization=True
            )
        with _patience(dist.get_world_size(group)):
            dist.all_gather_object([None] * dist.get_world_size(group), None, group=group)
    except Exception as error:
        raise AutoplanError(
            f"not all {dist.get_world_size(asked)} ranks came to plan together: call autoplan on all of them, or with "
            f"distributed=False to plan on this rank alone ({error})"
        ) from error
    ranks = Ranks(group, distributed == PER_DEVICE)
    try:
        yield ranks
    except Exception as error:
        ranks.report(error)
        raise
    finally:
        if group is not asked:
            dist.destroy_process_group(group)


@contextmanager
def _patience(ranks: int) -> Iterator[None]:
    """Whoever waits long for other ranks is told what for."""
    said = "still waiting to plan together with all %d ranks: with distributed=False this rank plans on its own"
    timer = threading.Timer(_PATIENCE, _logger.warning, [said, ranks])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def in_shares(
    ranks: Ranks, wanted: Mapping[_Item, Sequence[Any]], measure: Callable[[Mapping[_Item, Any], bool], dict[Any, Any]]
) -> dict[Any, Any]:
    """All measurements that are wanted, each made by one rank: what `measure(part, from_cache_only)` returns, of all.

    Ranks that share a device (CPU ranks on one machine do) measure one after the other, as two that time at once would
    time each other; GPUs measure in parallel.
    """
    if ranks.alone:
        return measure(wanted, False)
    found: dict[Any, Any] = {}
    known = measure(wanted, True)
    for theirs in ranks.gather(known):
        found.update(theirs)
    missing = [shape for shape, own in wanted.items() if any((shape, *_names(c)) not in found for c in own)]
    mine = {
        shape: [item for item in wanted[shape] if (shape, *_names(item)) not in found] for shape in ranks.share(missing)
    }
    for turn in range(ranks.turns):
        for theirs in ranks.gather(measure(mine, False) if turn == ranks.turn else {}):
            found.update(theirs)
    return found


def from_leader(ranks: Ranks, model: nn.Module, decide: Callable[[], _Value]) -> _Value:
    """What `decide()` returns on the first rank, while the others run each forward of `model` that it makes along.

    So the shards of one model, which talk to each other in every forward, are judged as a whole, each with the layers
    that the first has swapped in. Call inside `undisturbed`.

    Raises AutoplanError when a forward does not talk: then these are no shards but models of their own.
    """
    if not ranks.is_first:
        _follow(ranks, model)
        return ranks.from_first(decide)
    listening = [True]

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError("ranks that hold shards of a model do not run its backward together")
        planned = {name: layer for name, layer in model.named_modules() if isinstance(layer, PlannedLinear)}
        layers = {name: (layer.candidate, layer.program) for name, layer in planned.items()}
        device = device_of_model(model).type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        ranks.gather((layers, *tree_map(_to_cpu, (args, kwargs)), autocast))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if listening:
            listening.clear()
            ranks.gather(None)  # the others have listened

    handles = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        decided = decide()
    finally:
        for handle in handles:
            handle.remove()
    ranks.gather(None)
    return ranks.from_first(lambda: decided)


def _follow(ranks: Ranks, model: nn.Module) -> None:
    made: dict[tuple[str, str, str], nn.Module] = {}
    device = device_of_model(model)
    listening = _Listening()
    while (order := ranks.gather(None)[0]) is not None:
        layers, args, kwargs, autocast = order
        for name, (candidate, program) in layers.items():
            if (name, candidate, program) not in made:
                made[name, candidate, program] = stand_ins(model, (name,), candidate, program)[name]
        args, kwargs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        with (
            Swap(model, {name: made[(name, *choice)] for name, choice in layers.items()}),
            torch.autocast(device.type, autocast, enabled=autocast is not None),
            nullcontext() if listening.done else listening,
        ):
            model(*args, **kwargs)
        if not listening.done:
            listening.done = True
            if not listening.heard:
                raise AutoplanError(
                    "ranks hold other weights, and do not talk in the model's forward: these are models of their own, "
                    "so plan each rank on its own, with distributed=False"
                )
            ranks.gather(None)


class _Listening(TorchDispatchMode):
    """Notices whether what runs inside talks to other ranks by torch.distributed: then `heard` is True."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heard = self.done = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard = self.heard or func.namespace in _TALK
        return func(*args, **(kwargs or {}))


def _to_cpu(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf


def _names(contender: Any) -> tuple[str, str]:
    return contender.candidate.name, contender.kernel.name


def _is_group(distributed: object) -> bool:
    return dist.is_available() and isinstance(distributed, dist.ProcessGroup)


def _place(device: torch.device) -> tuple[str, str]:
    """What ranks may share: a host's CPU, or one GPU of a host."""
    if device.type != "cuda":
        return socket.gethostname(), device.type
    return socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)

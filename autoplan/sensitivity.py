"""Predicted harm: what one candidate in one layer does to the model's output, and to the layer's own."""

from __future__ import annotations

import functools
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoplan.apply import Swap, stand_ins
from autoplan.cache.fingerprint import digest
from autoplan.cache.store import PlanCache, entry
from autoplan.divergence import OutputPicker, Reference, call, compare, in_parts, unmasked, weight
from autoplan.fisher import KEPT, Changes, GradientError, Loss, gradients, units
from autoplan.offload import weight_and_bias
from autoplan.options import SHOWN_DB, SQNR_FLOOR_DB
from autoplan.recorder import Recording
from autoplan.records import LayerPlan, LayerProfile, Sensitivity

Pair = tuple[str, str]  # layer, candidate
Size = tuple[str, str, int, int, str]  # candidate, program, in_features, out_features, dtype
Scores = dict[Pair, Sensitivity]

_ROWS_PER_BACKWARD = 2048  # of the layer that has most: what one backward pass holds of activations
_HELD_BYTES = 4 << 30  # of layers' inputs and gradients at a time, until their candidates have been tried
_FIRST_BLOCKS, _FIRST_SAMPLES = 512, 128  # of tokens, or of a pooled output, times the passes that scoring starts with
_PASSES = 16  # at most
_RELATIVE_ERROR = 0.15  # of the sum of scores, from which on no further pass is made
_AUDITED = 0.05  # of the pairs
_AUDITED_AT_LEAST, _AUDITED_AT_MOST = 3, 12
_AGREES = 2.0  # measured and predicted harm are less than this factor apart


@dataclass(frozen=True)
class Subject:
    """The model that is judged, as it is inside `undisturbed`, and what it is judged on."""

    model: nn.Module
    recording: Recording
    against: Sequence[Reference]  # the float model's outputs for the scoring inputs
    output: OutputPicker | None = None
    loss: Loss | None = None  # of what the model returns, a mean over its tokens or samples
    seed: int = 0
    nbytes: dict[Size, int] = field(default_factory=dict)  # of what was tried: nobody has to quantize it again for that

    def made(self, trial: Trial) -> Mapping[str, nn.Module]:
        """The stand-ins that a trial puts into the model."""
        made = trial.made(self.model)
        self.nbytes[size_of(trial.profile, trial.candidate, trial.program)] = made[trial.profile.name].nbytes()
        return made

    @functools.cached_property
    def rows(self) -> list[Counter[str]]:
        """How many rows each layer is given, by input."""
        found: list[Counter[str]] = []
        with ExitStack() as hooks:
            for name, decision in self.recording.decisions.items():
                for module in {id(m): m for m in map(self.model.get_submodule, decision.names)}.values():

                    def count(_: Any, __: Any, y: Tensor, name: str = name) -> None:
                        found[-1][name] += math.prod(y.shape[:-1])

                    hooks.callback(module.register_forward_hook(count, prepend=True).remove)
            for reference in self.against:
                found.append(Counter())
                call(self.model, reference.model_input)
        return found

    def has_rows(self, layer: str) -> bool:
        return any(rows[layer] for rows in self.rows)


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate, with the kernels it would run on, to be tried in one layer."""

    profile: LayerProfile
    candidate: str
    program: str

    @property
    def pair(self) -> Pair:
        return self.profile.name, self.candidate

    def made(self, model: nn.Module) -> Mapping[str, Any]:
        return stand_ins(model, (self.profile.name, *self.profile.aliases), self.candidate, self.program)


def size_of(layer: LayerProfile | LayerPlan, candidate: str, program: str) -> Size:
    """All that the bytes of a stand-in depend on."""
    return candidate, program, layer.in_features, layer.out_features, layer.dtype


def measure(
    layers: Sequence[LayerPlan],
    profiles: Sequence[LayerProfile],
    subject: Subject,
    prints: Mapping[str, Any],
    cache: PlanCache | None,
    *,
    limit: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    seconds_left: Callable[[], float] = lambda: math.inf,
) -> tuple[Scores, list[str]]:
    """A score for every open option, from the cache or measured now, and notes for the report.

    The strategy is `fisher`; where the model gives no gradients all is scored by `kl`, and a note says why. A layer
    that was recorded but is given no rows by the scoring inputs (an expert that none of them was sent to) gets the mean
    of the layers whose names differ in numbers only, and a note names it. Scores are kept in `cache` as they are found.
    Once `seconds_left()` says none, what was not scored is absent from the answer. Call inside `undisturbed`.

    What `fisher` finds is audited: of the pairs that a plan may choose (a harm within `limit`, the budget) the most
    harmful 5 %, from three to twelve, are measured by `kl` too, and keep what was measured. If that is in total over
    twice or under half of what was predicted, all other scores are multiplied by the ratio. A note says what came out.
    """
    by_name = {profile.name: profile for profile in profiles}
    trials = [
        Trial(by_name[layer.name], option.candidate, option.program)
        for layer in layers
        for option in layer.options
        if not option.rejected and option.candidate != "none"
    ]
    book = _Book(subject, prints, cache, len(trials), progress, seconds_left)
    try:
        scores = book.audited(book.scored("fisher", trials), trials, limit)
    except GradientError as error:
        book.notes.append(f"harm was measured one candidate at a time (kl), not predicted from gradients: {error}")
        scores = book.scored("kl", trials)
    if missing := len(trials) - len(scores):
        book.notes.append(f"max_seconds ran out with {missing} of {len(trials)} scores missing")
    return scores, book.notes


@dataclass
class _Book:
    """Scores by strategy: those that are known, and those measured now, which are kept at once."""

    subject: Subject
    prints: Mapping[str, Any]
    cache: PlanCache | None
    total: int
    progress: Callable[[str, int, int], None] | None
    seconds_left: Callable[[], float]
    notes: list[str] = field(default_factory=list)
    assumed: set[Pair] = field(default_factory=set)  # of layers without rows

    def scored(self, strategy: str, trials: Sequence[Trial]) -> Scores:
        """All that is known, or is measured in time."""
        scores = {trial.pair: known for trial in trials if (known := self._known(strategy, trial))}
        unknown = {trial.pair: trial for trial in trials if trial.pair not in scores}
        seen = [trial for trial in unknown.values() if self.subject.has_rows(trial.profile.name)]
        before = len(scores)
        for found in STRATEGIES[strategy](self.subject, seen, lambda done: self._go_on(before + done)):
            scores |= {(score.layer, score.candidate): score for score in found}
            if self.cache:
                prints = [self._fingerprint(strategy, unknown[score.layer, score.candidate]) for score in found]
                values = [_to_value(score) for score in found]
                self.cache.put_many("sensitivities", dict(map(entry, prints, values)))
        unseen = [trial for trial in unknown.values() if trial not in seen]
        return scores | self._assumed(unseen, scores)

    def audited(self, scores: Scores, trials: Sequence[Trial], limit: float | None) -> Scores:
        """The scores, checked on the most harmful pairs that may be chosen: see `measure`."""
        limit = sys.float_info.max if limit is None else limit

        def harm(trial: Trial) -> float:
            return scores[trial.pair].harm if trial.pair in scores else math.inf

        open_ = [trial for trial in trials if 0 < harm(trial) <= limit and trial.pair not in self.assumed]
        count = min(max(_AUDITED_AT_LEAST, math.ceil(_AUDITED * len(trials))), _AUDITED_AT_MOST)
        measured = self.scored("kl", sorted(open_, key=lambda trial: (-harm(trial), trial.pair))[:count])
        finite = [pair for pair, score in measured.items() if score.harm < math.inf]
        if not finite:
            return scores
        ratio = sum(measured[pair].harm for pair in finite) / sum(scores[pair].harm for pair in finite)
        note = f"harm was predicted from gradients (fisher); the {len(finite)} most harmful choices inside the budget "
        note += f"measured {ratio:.2f} times as much"
        if not 1 / _AGREES <= ratio <= _AGREES:
            note += ", and so all were scaled"
            scores = {pair: replace(score, harm=score.harm * ratio) for pair, score in scores.items()}
        self.notes.append(note)
        return scores | measured

    def _assumed(self, trials: Sequence[Trial], scores: Scores) -> Scores:
        """For layers without rows: the mean of their kind, else the relative error of the layer's own output."""
        found: Scores = {}
        for trial in trials:
            if not self._go_on(len(scores)):
                break
            kind = _kind(trial.profile.name)
            alike = [
                score.harm
                for score in scores.values()
                if score.candidate == trial.candidate and _kind(score.layer) == kind and score.harm < math.inf
            ]
            sqnr = Gate(self.subject.recording, trial.profile).sqnr_db(self.subject.made(trial))
            harm = math.inf if sqnr < SQNR_FLOOR_DB else sum(alike) / len(alike) if alike else 10 ** (-sqnr / 10)
            found[trial.pair] = Sensitivity(*trial.pair, harm, sqnr)
        self.assumed |= set(found)
        if found:
            names = ", ".join(dict.fromkeys(layer for layer, _ in found))
            self.notes.append(
                f"the scoring inputs gave these layers no rows, so their harm is the mean of their kind: {names}"
            )
        return found

    def _go_on(self, done: int) -> bool:
        if self.progress:
            self.progress("scoring", min(done, self.total), self.total)
        return self.seconds_left() > 0

    def _known(self, strategy: str, trial: Trial) -> Sensitivity | None:
        record = self.cache.get("sensitivities", digest(self._fingerprint(strategy, trial))) if self.cache else None
        if record is None:
            return None
        harm, sqnr = record["value"].get("harm"), record["value"].get("sqnr_db")
        harm, sqnr = math.inf if harm is None else harm, -math.inf if sqnr is None else sqnr
        sound = isinstance(harm, float) and isinstance(sqnr, float) and harm >= 0
        return Sensitivity(*trial.pair, harm, sqnr) if sound else None

    def _fingerprint(self, strategy: str, trial: Trial) -> dict[str, Any]:
        asked = self.prints["options"]
        return {name: self.prints[name] for name in ("model", "data", "environment", "planner")} | {
            "strategy": strategy,
            "output": asked["output"],
            "loss": asked["loss"],
            "autocast": asked.get("autocast"),
            "seed": self.subject.seed,
            "layer": trial.profile.name,
            "program": trial.program,
            "candidate": asked["candidates"][trial.candidate],
        }


def _to_value(score: Sensitivity) -> dict[str, float | None]:
    """Files hold finite numbers only: None stands for infinity."""
    values = {"harm": score.harm, "sqnr_db": min(score.sqnr_db, SHOWN_DB)}
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


# A strategy yields scores as they are final, while `go_on(trials done)` lets it. A trial whose layer falls below the
# SQNR floor is infinitely harmful, and not tried in the model.
Strategy = Callable[[Subject, Sequence[Trial], Callable[[int], bool]], Iterator[list[Sensitivity]]]


def kl(subject: Subject, trials: Sequence[Trial], go_on: Callable[[int], bool]) -> Iterator[list[Sensitivity]]:
    """One at a time: swap the candidate into its layer, run the model, measure the divergence of its output."""
    done = 0
    for own in _by_layer(trials):
        gate = Gate(subject.recording, own[0].profile)
        for trial in own:
            if not go_on(done):
                return
            made = subject.made(trial)
            sqnr = gate.sqnr_db(made)
            harm = _divergence(subject, made) if sqnr >= SQNR_FLOOR_DB else math.inf
            yield [Sensitivity(*trial.pair, harm, sqnr)]
            done += 1


def fisher(subject: Subject, trials: Sequence[Trial], go_on: Callable[[int], bool]) -> Iterator[list[Sensitivity]]:
    """Sampled Fisher, see `fisher.py`: a few passes over the scoring inputs serve every candidate of every layer.

    The layers are taken in groups whose inputs and gradients fit in `_HELD_BYTES`. A group gets as many passes as bring
    the standard error of its sum of scores below 15 %, up to 16; every further round quantizes its layers once more.
    Raises GradientError.
    """
    if not trials:
        return
    against = [
        piece
        for reference, rows in zip(subject.against, subject.rows, strict=True)
        for piece in in_parts(subject.model, reference, math.ceil(max(rows.values(), default=1) / _ROWS_PER_BACKWARD))
    ]
    per_position = subject.loss or subject.against[0].logits
    total = (sum(map(unmasked, subject.against)) if per_position else weight(subject.against)) or 1.0
    wanted = _FIRST_BLOCKS if any(reference.output.dim() > 2 for reference in subject.against) else _FIRST_SAMPLES
    first = 1 if subject.loss else min(math.ceil(wanted / max(sum(map(units, subject.against)), 1)), _PASSES)
    done = 0
    for group in _groups(subject, trials, first):
        names = {name: layer for layer, own in group.items() for name in (layer, *own[0].profile.aliases)}
        sqnr: dict[Pair, float] = {}
        harm: dict[Pair, float] = {}
        squares: dict[Pair, float] = {}
        spread: dict[Hashable, Tensor] = {}  # the sum over all pairs, by pass and unit
        passes = range(first)
        while passes:
            held = gradients(subject.model, names, against, subject.output, subject.loss, passes, subject.seed)
            for layer, own in group.items():
                if not go_on(done):
                    break
                changes, gate = Changes(subject.model, held.pop(layer)), Gate(subject.recording, own[0].profile)
                for trial in own:
                    pair = trial.pair
                    if harm.get(pair) == math.inf:
                        continue
                    made = subject.made(trial)
                    if pair not in sqnr:
                        sqnr[pair] = gate.sqnr_db(made)
                        done += 1
                    if sqnr[pair] < SQNR_FLOOR_DB:
                        harm[pair] = math.inf
                        continue
                    if changes.dead and _divergence(subject, made) > 0:
                        raise GradientError(f"no gradient reaches layer {layer!r}, but the output depends on it")
                    found = changes.squares(made)
                    squares[pair] = squares.get(pair, 0.0) + sum(float(value.sum()) for value in found.values())
                    harm[pair] = squares[pair] / passes.stop / total if math.isfinite(squares[pair]) else math.inf
                    if harm[pair] < math.inf:
                        for key, value in found.items():
                            key = (passes, key, value.shape)
                            spread[key] = spread[key] + value if key in spread else value
            passes = _further(passes, spread) if go_on(done) and not subject.loss else range(0)
        yield [Sensitivity(*pair, harm[pair], sqnr[pair]) for pair in harm]


STRATEGIES: dict[str, Strategy] = {"fisher": fisher, "kl": kl}


def _by_layer(trials: Sequence[Trial]) -> Iterator[list[Trial]]:
    for _, own in itertools.groupby(trials, key=lambda trial: trial.profile.name):
        yield list(own)


def _groups(subject: Subject, trials: Sequence[Trial], passes: int) -> Iterator[dict[str, list[Trial]]]:
    """Trials by layer, in order, as many layers at a time as may be held."""
    held, group = 0, dict[str, list[Trial]]()
    for own in _by_layer(trials):
        layer = own[0].profile
        in_bytes = layer.in_features * int(getattr(torch, layer.dtype).itemsize)
        out_bytes = layer.out_features * passes * KEPT.itemsize
        size = sum(rows[layer.name] for rows in subject.rows) * (in_bytes + out_bytes)
        if group and held + size > _HELD_BYTES:
            yield group
            held, group = 0, {}
        held, group[layer.name] = held + size, own
    if group:
        yield group


def _further(passes: range, spread: Mapping[Hashable, Tensor]) -> range:
    """The passes that are still missing, by the standard error of the sum of scores over units and passes."""
    total = sum(float(value.sum()) for value in spread.values())
    variance = sum(float(value.var(correction=0)) * value.numel() for value in spread.values())
    relative = math.sqrt(variance) / total if total else 0.0
    needed = math.ceil(passes.stop * (relative / _RELATIVE_ERROR) ** 2)
    return range(passes.stop, min(needed, _PASSES))


def _divergence(subject: Subject, made: Mapping[str, nn.Module]) -> float:
    with Swap(subject.model, made):
        return compare(subject.model, subject.against, subject.output).divergence()


class Gate:
    """How far a layer's own output is off, on the real input rows that were recorded of it."""

    def __init__(self, recording: Recording, profile: LayerProfile) -> None:
        linear = recording.decisions[profile.name].module
        weight, bias = weight_and_bias(linear)
        self._name, self._dtype = profile.name, getattr(torch, profile.calls[0].dtype)
        self._autocast = self._dtype != weight.dtype
        self._x = recording.rows(profile.name).to(weight.device)
        self._y = F.linear(self._x.float(), weight.float(), None if bias is None else bias.float())
        self._signal = _norm(self._y)

    def sqnr_db(self, made: Mapping[str, nn.Module]) -> float:
        """20 log10(norm(y) / norm(y - q)), dB: y of the float layer in float32, q of the planned one.

        The planned layer gets the rows in the dtype that it will see. -inf for a q that is not finite; inf if equal.
        """
        x, y = self._x, self._y
        with torch.autocast(x.device.type, self._dtype, enabled=self._autocast):
            q = made[self._name].forward(x.to(self._dtype)).float()  # not the user's hooks: these are only rows
        noise = _norm(q - y)
        if not math.isfinite(noise):
            return -math.inf
        if noise == 0:
            return math.inf
        return 20 * math.log10(self._signal / noise) if self._signal else -math.inf


def _norm(y: Tensor) -> float:
    """Of rows in float32, so for values between 1e-19 and 1e18; of all rows in float64."""
    rows = torch.linalg.vector_norm(y, dim=-1)
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64))

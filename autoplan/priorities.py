"""What to measure first, and what not at all: by what there is to gain."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from autoplan.arms import Contender
from autoplan.benchmark import shapes_of
from autoplan.records import LayerPlan, LayerProfile, LeftAlone, Shape

_SMALL, _SMALL_TOGETHER = 0.005, 0.01  # of the time of all layers
_ROWS = 64  # up to about so many rows a layer waits for its weight; from there on, time grows with them

NOT_WORTH_IT = "under 0.5 % of the layers' time (estimated; all such layers together under 1 %): not worth planning"


def work(profile: LayerProfile, call_weights: Mapping[str, float]) -> float:
    """What a layer's time is about proportional to: its weight, read for few rows and computed with for many."""
    return sum(
        call_weights.get(call.workload, 1.0) * call.count * _work(profile.out_features, profile.in_features, call.rows)
        for call in profile.calls
    )


def _work(out_features: int, in_features: int, rows: int) -> float:
    return out_features * in_features * max(rows, _ROWS) if rows else 0.0


def worth_planning(
    profiles: Sequence[LayerProfile],
    call_weights: Mapping[str, float],
    group_of: Mapping[str, str],
    keep: Collection[str],
) -> tuple[list[LayerProfile], list[LeftAlone]]:
    """The layers, and those too small to plan: each under 0.5 % of the time, and all of them together under 1 %.

    So what is given up is under 1 %. Of layers that are alike all are too small, or none: a model of hundreds of equal
    layers, each of them under 0.5 %, is planned. Layers of a group, and siblings, count as one; those to `keep` stay.
    """
    units: dict[str, list[LayerProfile]] = {}
    for profile in profiles:
        units.setdefault(group_of.get(profile.name) or profile.siblings or profile.name, []).append(profile)
    alike: dict[float, list[list[LayerProfile]]] = {}  # by what one of them takes
    for unit in units.values():
        alike.setdefault(sum(work(profile, call_weights) for profile in unit), []).append(unit)
    total = sum(size * len(same) for size, same in alike.items())
    small: set[str] = set()
    room = _SMALL_TOGETHER * total
    for size, same in sorted(alike.items()):
        room -= size * len(same)
        if size >= _SMALL * total or room <= 0:
            break
        small |= {p.name for unit in same if not any(q.name in keep for q in unit) for p in unit}
    left_alone = [LeftAlone(profile.name, NOT_WORTH_IT) for profile in profiles if profile.name in small]
    return [profile for profile in profiles if profile.name not in small], left_alone


def largest_first(
    wanted: Mapping[Shape, Sequence[Contender]],
    profiles: Sequence[LayerProfile],
    call_weights: Mapping[str, float],
    mode: str,
) -> dict[Shape, Sequence[Contender]]:
    """What is to be timed, weights in which the model spends most of its time first, and each at all its rows.

    A layer can be planned once all its rows are timed.
    """
    spent: dict[Shape, float] = {}  # by weight: its shape at one row
    for profile in profiles:
        for shape, counts in shapes_of(profile, mode).items():
            calls = sum(call_weights.get(workload, 1.0) * count for workload, count in counts.items())
            weight = replace(shape, rows=1)
            spent[weight] = spent.get(weight, 0.0) + calls * _work(shape.out_features, shape.in_features, shape.rows)
    place = {weight: i for i, weight in enumerate(sorted(spent, key=lambda weight: -spent[weight]))}
    return dict(sorted(wanted.items(), key=lambda item: place.get(replace(item[0], rows=1), len(place))))


def most_to_save_first(layers: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The layers in the order of the time that the fastest of their open options would save."""

    def saved(layer: LayerPlan) -> float:
        times = [option.us for option in layer.options if not option.rejected and option.us is not None]
        return layer.baseline_us - min(times, default=layer.baseline_us)

    return sorted(layers, key=saved, reverse=True)

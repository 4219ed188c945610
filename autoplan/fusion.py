"""What siblings gain by running as one product: what has to be timed for it, and which options it makes faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from autoplan import benchmark, options
from autoplan.arms import Contender
from autoplan.benchmark import MARGIN, Key
from autoplan.candidates import Candidate, find_candidate
from autoplan.kernels.ops import base_name, kernel_at
from autoplan.options import Menu, Rules
from autoplan.records import Fused, LayerPlan, Measurement, Part, Shape
from autoplan.selection import siblings_of


def to_time(layers: Sequence[LayerPlan], menus: Sequence[Menu], rules: Rules) -> dict[Shape, list[Contender]]:
    """The races of every set of siblings: for each candidate still open to all of them, one product against many.

    Only kernels that some of them chose take part, with their best guesses for the larger weight. `menus` are those
    that the layers were made of.
    """
    wanted: dict[Shape, dict[tuple[str, str], Contender]] = {}
    for members, menu in _sets(layers, menus):
        for candidate in _open_to_all(members):
            for shape, contenders in _races(members, menu, candidate, rules).items():
                known = wanted.setdefault(shape, {})
                known.update({(contender.candidate.name, contender.kernel.name): contender for contender in contenders})
    return {shape: list(contenders.values()) for shape, contenders in wanted.items()}


def with_times(
    layers: Sequence[LayerPlan], menus: Sequence[Menu], found: Mapping[Key, Measurement], rules: Rules
) -> list[LayerPlan]:
    """The layers, their options with what these take as one product where that is surely faster than one by one."""
    fused: dict[tuple[str, str], Fused] = {}
    for members, menu in _sets(layers, menus):
        for candidate in _open_to_all(members):
            races = _races(members, menu, candidate, rules)
            calls = dict(zip(races, options.weighted_calls(menu.profile, rules).values(), strict=True))
            whole = options.timed(candidate, found, calls, rules.batch_invariant) if all(races.values()) else None
            if whole is None or whole.us is None or whole.us_low is None or whole.us_high is None:
                continue
            apart = sum(
                found[shape, candidate.mode(base_name(kernel)).name, kernel].baseline_us * times
                for shape, times in calls.items()
                for kernel in [kernel_at(whole.program, shape.rows).name]
            )
            if whole.us_high > (1 - MARGIN) * apart:
                continue
            for layer in members:
                alone = layer.option(candidate.name)
                fused[layer.name, candidate.name] = Fused(
                    whole.program,
                    (alone.us or 0.0) * whole.us / apart,
                    (alone.us_low or 0.0) * whole.us_low / apart,
                    (alone.us_high or 0.0) * whole.us_high / apart,
                )
    return [
        replace(
            layer,
            options=tuple(replace(option, fused=fused.get((layer.name, option.candidate))) for option in layer.options),
        )
        for layer in layers
    ]


def _sets(layers: Sequence[LayerPlan], menus: Sequence[Menu]) -> Iterator[tuple[list[LayerPlan], Menu]]:
    """The sets of siblings, each with the menu of a layer of all their outputs."""
    for places in siblings_of(layers):
        members = [layers[i] for i in places]
        menu = menus[places[0]]
        profile = replace(
            menu.profile,
            name=members[0].siblings,
            out_features=sum(layer.out_features for layer in members),
            has_bias=any(layer.has_bias for layer in members),
        )
        yield members, options.screen(profile, menu.kernels, menu.device)


def _open_to_all(members: Sequence[LayerPlan]) -> list[Candidate]:
    """The candidates that none of the layers rejected; not `none`, which leaves them as they are."""
    menus = [{option.candidate for option in layer.options if not option.rejected} for layer in members]
    return [find_candidate(name) for name in sorted(set(menus[0]).intersection(*menus) - {"none"})]


def _races(
    members: Sequence[LayerPlan], menu: Menu, candidate: Candidate, rules: Rules
) -> dict[Shape, list[Contender]]:
    """The races for one candidate, by rows: the kernels that the layers chose, on the weights of all."""
    programs = [layer.option(candidate.name).program for layer in members]
    rows = [shape.rows for shape in benchmark.shapes_of(menu.profile, rules.mode)]
    chosen = {base_name(kernel_at(program, count).name) for program in programs for count in rows}
    kernels = tuple(kernel for kernel in menu.kernels.get(candidate, ()) if kernel.name in chosen)
    races = options.to_time([replace(menu, kernels={candidate: kernels})], rules.mode, rules.batch_invariant)
    return {_with_parts(shape, members, candidate, programs): contenders for shape, contenders in races.items()}


def _with_parts(shape: Shape, members: Sequence[LayerPlan], candidate: Candidate, programs: Sequence[str]) -> Shape:
    parts = []
    for layer, program in zip(members, programs, strict=True):
        kernel = kernel_at(program, shape.rows).name
        parts.append(Part(candidate.mode(base_name(kernel)).name, layer.out_features, layer.has_bias, kernel))
    return replace(shape, parts=tuple(parts))

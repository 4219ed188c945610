"""What a layer may choose from: each candidate's kernels, time and harm, or the reason it is out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoplan import benchmark
from autoplan.arms import Contender
from autoplan.benchmark import BASELINE, MARGIN, Key
from autoplan.candidates import Candidate
from autoplan.kernels.ops import DEQUANTIZE, Kernel, LinearSpec, base_name, find_kernel, parse_program
from autoplan.records import Device, LayerPlan, LayerProfile, Measurement, Option, Sensitivity, Shape
from autoplan.selection import PLAIN, kernel_names

SQNR_FLOOR_DB = 10.0
_HALF_THE_BITS = 0.1  # of the time that twice the bits take: what half of them have to save
_TUNED_CONFIGS = 4  # of a kernel's variants that a race tries: they come best guess first
_NOT_TIMED = "not timed: max_seconds ran out"
SHOWN_DB = 999.0  # stands for a layer output that is exactly equal


@dataclass(frozen=True, slots=True)
class Rules:
    """What the caller asked for that bears on single layers."""

    mode: str  # EAGER, COMPILED or WITHOUT_GRAPHS, of records
    call_weights: Mapping[str, float]  # workload -> what one recorded call of it counts
    pinned: Mapping[str, str] = field(default_factory=dict)  # layer -> candidate
    group_of: Mapping[str, str] = field(default_factory=dict)  # layer -> group
    wants_bytes: bool = False  # then what is smaller stays in, even if it is slower
    batch_invariant: bool = False  # one kernel per layer


@dataclass(frozen=True, slots=True)
class Menu:
    """The candidates of one layer before anything is measured."""

    profile: LayerProfile
    device: Device
    kernels: Mapping[Candidate, tuple[Kernel, ...]]
    rejected: Mapping[Candidate, str]


def screen(profile: LayerProfile, candidates: Iterable[Candidate], device: Device) -> Menu:
    """Which candidates the layer can use at all, on which kernels, and why not the others."""
    usable: dict[Candidate, tuple[Kernel, ...]] = {}
    rejected: dict[Candidate, str] = {}
    for candidate in candidates:
        kernels, reasons = candidate.usable_kernels(profile, device)
        reason = candidate.rejects(profile, device)
        if reason is None and not kernels:
            listed = "; ".join(f"{name}: {why}" for name, why in reasons.items())
            reason = listed or f"it has no kernel for {profile.device}"
        if reason is None:
            usable[candidate] = kernels
        else:
            rejected[candidate] = reason
    return Menu(profile, device, usable, rejected)


def to_time(menus: Iterable[Menu], mode: str, batch_invariant: bool = False) -> dict[Shape, list[Contender]]:
    """Every kernel of every candidate at every shape that some layer needs, each once.

    Kernels with variants take part as the best guesses among these for the shape's rows: so the race tunes them. One
    that must serve all rows (`batch_invariant`) takes part with the best guesses for any of them. Of kernels made for
    fewer rows, none is timed.
    """
    wanted: dict[Shape, dict[tuple[str, str], Contender]] = {}
    for menu in menus:
        shapes = benchmark.shapes_of(menu.profile, mode)
        for shape in shapes:
            contenders = wanted.setdefault(shape, {})
            for candidate, kernels in menu.kernels.items():
                spec = candidate.spec(menu.profile, shape.dtype, menu.device)
                rows = [other.rows for other in shapes] if batch_invariant else [shape.rows]
                for kernel in kernels:
                    if kernel.most_rows is not None and shape.rows > kernel.most_rows and not batch_invariant:
                        continue
                    timed_as = candidate.mode(kernel.name)
                    for variant in (variant for r in rows for variant in _variants(kernel, spec, r)):
                        contenders[timed_as.name, variant.name] = Contender(timed_as, variant)
    return {shape: list(contenders.values()) for shape, contenders in wanted.items()}


def _variants(kernel: Kernel, spec: LinearSpec, rows: int) -> Sequence[Kernel]:
    """The kernel as it is worth timing: as it is, or under the first of its configs; not at all if it names none."""
    if kernel.variants is None:
        return [kernel]
    return [find_kernel(f"{kernel.name}@{config}") for config in kernel.variants(spec, rows)[:_TUNED_CONFIGS]]


def with_times(menu: Menu, found: Mapping[Key, Measurement], rules: Rules) -> LayerPlan:
    """The layer with every candidate's time, those rejected that cannot win. Nothing is chosen yet (`none` stands)."""
    profile = menu.profile
    calls = weighted_calls(profile, rules)
    plain = [found.get((shape, *BASELINE)) for shape in calls]
    baseline_us = sum(m.baseline_us * times for m, times in zip(plain, calls.values(), strict=True) if m)
    options = [Option(candidate.name, rejected=reason) for candidate, reason in menu.rejected.items()]
    for candidate in menu.kernels:
        if all(plain):
            option = timed(candidate, found, calls, rules.batch_invariant)
            mode = _only_mode(candidate, option)
            if mode is not None and mode in menu.kernels and candidate.name != rules.pinned.get(profile.name):
                option = Option(candidate.name, rejected=f"at these rows it is {mode.name}")
            options.append(option)
        elif candidate.name == "none":
            options.append(Option("none", PLAIN, us=0.0, us_low=0.0, us_high=0.0))
        elif candidate.name == rules.pinned.get(profile.name):
            options.append(
                Option(candidate.name, f"1:{menu.kernels[candidate][0].name}", us=0.0, us_low=0.0, us_high=0.0)
            )
        else:
            options.append(Option(candidate.name, rejected=_NOT_TIMED))
    options.sort(key=lambda option: (option.candidate != "none", option.candidate))
    return LayerPlan(
        name=profile.name,
        aliases=profile.aliases,
        in_features=profile.in_features,
        out_features=profile.out_features,
        has_bias=profile.has_bias,
        dtype=profile.dtype,
        calls=profile.calls,
        baseline_us=baseline_us,
        chosen="none",
        reason="",
        options=tuple(_gate(options, menu.kernels, baseline_us, rules.pinned.get(profile.name), rules.wants_bytes)),
        group=rules.group_of.get(profile.name, ""),
        siblings=profile.siblings,
    )


def with_scores(
    layer: LayerPlan, scores: Mapping[tuple[str, str], Sensitivity], nbytes: Callable[[LayerPlan, Option], int]
) -> LayerPlan:
    """The layer with every open option's harm, SQNR and bytes, those rejected that fall below the SQNR floor.

    A layer that changes nothing in the output that is judged stays as it is, unless it is pinned: somebody may use what
    it does change, and how much that is off, nothing tells.
    """
    pinned = bool(layer.option("none").rejected)
    options = []
    for option in layer.options:
        if option.rejected:
            options.append(option)
        elif option.candidate == "none":
            options.append(replace(option, harm=0.0, nbytes=nbytes(layer, option)))
        else:
            score = scores.get((layer.name, option.candidate))
            options.append(
                _scored(replace(option, nbytes=nbytes(layer, option)), score, pinned)
                if score
                else replace(option, rejected="not scored: max_seconds ran out")
            )
    return replace(layer, options=tuple(options))


def _scored(option: Option, score: Sensitivity, pinned: bool) -> Option:
    option = replace(
        option,
        harm=score.harm if math.isfinite(score.harm) else None,
        sqnr_db=None if score.sqnr_db == -math.inf else min(score.sqnr_db, SHOWN_DB),
    )
    if score.sqnr_db < SQNR_FLOOR_DB:
        shown = "not finite" if option.sqnr_db is None else f"{score.sqnr_db:.1f} dB, below {SQNR_FLOOR_DB:.0f} dB"
        return replace(option, rejected=f"SQNR on recorded rows is {shown}")
    if option.harm is None:
        return replace(option, rejected="the model's output is not finite with it")
    if option.harm == 0 and score.sqnr_db < SHOWN_DB and not pinned:
        return replace(option, rejected="it does not reach the output that is judged: see output= and pin=")
    return option


def weighted_calls(profile: LayerProfile, rules: Rules) -> dict[Shape, float]:
    """How often the layer is called at each shape in one forward of the model, or of all workloads times weights."""
    return {
        shape: sum(rules.call_weights.get(workload, 1.0) * count for workload, count in counts.items())
        for shape, counts in benchmark.shapes_of(profile, rules.mode).items()
    }


def timed(
    candidate: Candidate, found: Mapping[Key, Measurement], calls: Mapping[Shape, float], batch_invariant: bool
) -> Option:
    """The candidate on its best kernels: one for all rows, unless several are faster by more than the margin."""
    times = list(calls.values())

    def total(measurements: Sequence[Measurement], bound: str = "ratio") -> float:
        return sum(float(m.baseline_us * getattr(m, bound) * n) for m, n in zip(measurements, times, strict=True))

    measured: list[dict[str, Measurement]] = [
        {
            kernel: measurement
            for name in candidate.modes or (candidate.name,)
            for kernel, measurement in benchmark.kernel_measurements(found, shape, name).items()
        }
        for shape in calls
    ]
    broken = {kernel for own in measured for kernel, m in own.items() if m.ratio == math.inf}
    usable = [
        {kernel: m for kernel, m in own.items() if kernel not in broken and m.ratio_high < math.inf} for own in measured
    ]
    everywhere = set(usable[0]).intersection(*usable)
    if not all(usable) or (batch_invariant and not everywhere):
        return Option(candidate.name, rejected=_why_not_timed(measured) if all(measured) else _NOT_TIMED)
    mixed = [min(own.values(), key=lambda m: (m.ratio, m.kernel)) for own in usable]
    best, program = mixed, _program(mixed)
    if everywhere:
        alone = {kernel: [own[kernel] for own in usable] for kernel in everywhere}
        single = min(alone, key=lambda kernel: (total(alone[kernel]), kernel))
        plain = alone.get(BASELINE[1]) if candidate.name == "none" else None
        if plain and total(alone[single], "ratio_high") >= (1 - MARGIN) * total(plain):
            single = BASELINE[1]  # ties go to the layer as it is
        if batch_invariant or len(times) == 1 or total(mixed) >= (1 - MARGIN) * total(alone[single]):
            best, program = alone[single], f"1:{single}"
    if not batch_invariant:
        program = _beyond(program, max(shape.rows for shape in calls))
    return Option(candidate.name, program, total(best), total(best, "ratio_low"), total(best, "ratio_high"))


def _beyond(program: str, rows: int) -> str:
    """The program with what to do at more than `rows`, the most that were seen, if its last kernel is for few."""
    most = find_kernel(program.rpartition(":")[2]).most_rows
    return program if most is None else f"{program},{max(most, rows) + 1}:{DEQUANTIZE}"


def _only_mode(candidate: Candidate, option: Option) -> Candidate | None:
    """The one candidate that a candidate of several modes would always run as, if there is only one."""
    if not candidate.modes or option.rejected:
        return None
    kernels = parse_program(option.program)[1]
    modes = {candidate.mode(base_name(kernel.name)) for kernel in kernels} - {candidate}
    return modes.pop() if len(modes) == 1 else None


def _why_not_timed(measured: Iterable[Mapping[str, Measurement]]) -> str:
    """What is noted of the kernels, of each with configs what is noted of the best one."""
    notes: dict[str, str] = {}
    for m in sorted((m for own in measured for m in own.values()), key=lambda m: m.ratio):
        if m.note:
            notes.setdefault(base_name(m.kernel), m.note)
    return "; ".join(f"{kernel}: {note}" for kernel, note in sorted(notes.items())) or _NOT_TIMED


def _program(measurements: Sequence[Measurement]) -> str:
    """Kernels by rows; rows that were never seen go to the nearest ones that were, on a logarithmic scale."""
    by_rows: dict[int, str] = {}
    for m in measurements:
        by_rows.setdefault(m.shape.rows, m.kernel)
    steps: list[tuple[int, str]] = []
    previous = 0
    for rows, kernel in sorted(by_rows.items()):
        if not steps or steps[-1][1] != kernel:
            steps.append((int(math.sqrt(previous * rows)) + 1, kernel))
        previous = rows
    return ",".join(f"{start}:{kernel}" for start, kernel in steps)


def _gate(
    options: list[Option], candidates: Iterable[Candidate], baseline_us: float, pinned: str | None, wants_bytes: bool
) -> list[Option]:
    """Reject what cannot be worth its harm: not surely faster than the plain layer, or than `none` at its best."""
    if pinned is not None:
        return [
            option if option.candidate == pinned or option.rejected else replace(option, rejected=f"pinned to {pinned}")
            for option in options
        ]
    if wants_bytes:
        return options
    none = next(option for option in options if option.candidate == "none")
    gated = []
    for option in options:
        us = option.us
        if not option.rejected and option is not none and us is not None:
            ratio = us / baseline_us
            if option.us_high is None or option.us_high >= (1 - MARGIN) * baseline_us:
                option = replace(option, rejected=f"not surely faster ({ratio:.2f}x the time)")
            elif none.us is not None and us >= none.us:
                option = replace(
                    option, rejected=f"not faster than none on {kernel_names(none.program)}, which is exact"
                )
        gated.append(option)
    coarse = _not_faster_than_finer(gated, candidates)
    return [replace(option, rejected=coarse.get(option.candidate, option.rejected)) for option in gated]


def _not_faster_than_finer(options: Sequence[Option], candidates: Iterable[Candidate]) -> dict[str, str]:
    """Candidates that do what another does, with more harm, and are not worth it; and why.

    Faster than those that are a little finer they have to be by the margin; than twice the bits, which do many times
    less harm, surely, their intervals apart, and by a tenth: layers alone that gained less made models slower.
    """
    usable = {option.candidate: option for option in options if not option.rejected}
    found: dict[str, str] = {}
    for candidate in sorted(candidates, key=lambda candidate: len(candidate.finer)):
        option, wider = usable.get(candidate.name), usable.get(candidate.in_more_bits or "")
        if option is None or option.us is None:
            continue
        if wider and wider.us is not None and wider.us_low is not None:
            if option.us_high is None or option.us_high >= wider.us_low:
                found[candidate.name] = f"not surely faster than {wider.candidate}, whose weights are finer"
                continue
            if option.us > (1 - _HALF_THE_BITS) * wider.us:
                found[candidate.name] = (
                    f"not {_HALF_THE_BITS:.0%} faster than {wider.candidate}, whose weights are finer"
                )
                continue
        for name in candidate.finer:
            us = usable[name].us if name in usable and name not in found else None
            if us is not None and option.us > (1 - MARGIN) * us:
                found.setdefault(candidate.name, f"not {MARGIN:.0%} faster than {name}, whose weights are finer")
    return found

"""Frozen records that cross rooms: plain data only, units in the names. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

# How a model runs, as far as times depend on it. On a GPU, COMPILED replays CUDA graphs: no launch costs anything then.
EAGER, COMPILED, WITHOUT_GRAPHS = "eager", "compiled", "compiled without CUDA graphs"


@dataclass(frozen=True, slots=True)
class Device:
    """What a kernel or candidate may ask about the machine a layer runs on."""

    type: str  # "cpu" or "cuda"
    name: str
    capability: tuple[int, int] | None = None  # CUDA compute capability; None on a CPU
    features: tuple[str, ...] = ()  # instruction sets on a CPU


@dataclass(frozen=True, slots=True)
class Call:
    """How often a layer ran on `rows` rows of effective dtype `dtype` in one workload."""

    workload: str
    rows: int
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One decision of the planner: a layer (or several that share one weight) and how it was called."""

    name: str
    aliases: tuple[str, ...]  # the other dotted names that run the same weight
    in_features: int
    out_features: int
    has_bias: bool
    dtype: str  # of the weight
    device: str
    calls: tuple[Call, ...]
    siblings: str = ""  # names the layers that are fed by one tensor with it, see `label`; "" if there are none


def label(names: Sequence[str]) -> str:
    """A word for several layers: "block.query+key+value" for those under one prefix, else all their names."""
    prefixes = {name.rpartition(".")[0] for name in names}
    if len(prefixes) > 1 or "" in prefixes:
        return "+".join(names)
    return f"{prefixes.pop()}." + "+".join(name.rpartition(".")[2] for name in names)


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """A layer (or module) that the planner does not touch, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Part:
    """One of several layers that are fed by one tensor, as it runs by itself."""

    candidate: str
    out_features: int
    has_bias: bool
    kernel: str


@dataclass(frozen=True, slots=True)
class Shape:
    """What is timed once, whatever the number of layers: all that a kernel's time depends on.

    One with `parts` is that of siblings: their products one after another, against one product of all.
    """

    rows: int  # a bucket, see benchmark.bucket_rows
    in_features: int
    out_features: int
    has_bias: bool
    dtype: str  # of the input, as it reaches the layer (autocast applied)
    weight_dtype: str
    device: str
    mode: str  # EAGER, COMPILED or WITHOUT_GRAPHS
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class Autocast:
    """A region of autocast that a planned float32 model enters by itself, in calls that are not too small."""

    device_type: str
    dtype: str
    least: int  # the size of a call, see `region.size`, from which on it is entered


@dataclass(frozen=True, slots=True)
class Measurement:
    """Paired timing of one kernel of one candidate against plain `F.linear` at one shape.

    At a shape with parts the baseline is the candidate itself, in one layer after another.
    """

    shape: Shape
    candidate: str
    kernel: str
    baseline_us: float  # median of the baseline in the same run
    ratio: float  # time / baseline, the median of paired ratios; below 1 is faster
    ratio_low: float  # 95 % confidence interval of `ratio`
    ratio_high: float
    rounds: int
    note: str = ""  # why timing ended early, or why the kernel failed (then ratio is inf)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Predicted harm to the model's output from one candidate in one layer."""

    layer: str
    candidate: str
    harm: float  # divergence of the model's output when only this layer uses the candidate
    sqnr_db: float  # of the layer's own output on recorded rows, with the kernel that will run


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


NO_DIVERGENCE = Estimate(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Fused:
    """What an option takes where the layer and its siblings, all with this candidate, run as one product."""

    program: str  # of the one product
    us: float  # this layer's share, as the times of `Option`
    us_low: float
    us_high: float


@dataclass(frozen=True, slots=True)
class Option:
    """One candidate for one layer: what was measured, and why it cannot or need not be used.

    Times are microseconds in one forward of the model, over all the layer's calls; with several workloads, in one
    forward of each, times its weight.
    """

    candidate: str
    program: str = ""  # from how many rows on which kernel, e.g. "1:int8pack,24:dequantize_int8"; "" if never runnable
    us: float | None = None
    us_low: float | None = None
    us_high: float | None = None
    nbytes: int | None = None
    sqnr_db: float | None = None
    harm: float | None = None  # predicted divergence of the model's output from this choice alone
    rejected: str = ""  # the reason; empty for an option the solver was free to choose
    fused: Fused | None = None  # None: not surely faster than each for itself, or nobody to run with


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The decision for one layer, and every option that was looked at."""

    name: str
    aliases: tuple[str, ...]
    in_features: int
    out_features: int
    has_bias: bool
    dtype: str
    calls: tuple[Call, ...]
    baseline_us: float  # plain F.linear, same unit as Option.us
    chosen: str  # a candidate's name
    reason: str
    options: tuple[Option, ...]
    group: str = ""  # layers of one group (see `groups=`) get one candidate; "" stands for a decision of its own
    siblings: str = ""  # names the layers that are fed by one tensor with it, itself included
    runs_fused: bool = False  # the siblings chose alike, and run as one product: see `selection.choosing`

    def option(self, candidate: str) -> Option:
        return next(option for option in self.options if option.candidate == candidate)

    @property
    def choice(self) -> Option:
        """The chosen option, as it runs."""
        option = self.option(self.chosen)
        if not self.runs_fused or option.fused is None:
            return option
        fused = option.fused
        return replace(option, program=fused.program, us=fused.us, us_low=fused.us_low, us_high=fused.us_high)


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One point of the frontier: the least predicted time (us) for its predicted divergence."""

    divergence: float
    us: float
    nbytes: int
    switched: int  # layers that do not run plain F.linear


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured on the whole model."""

    speedup: Estimate | None  # float time / planned time, paired
    uniform: str  # the best uniform plan: one candidate wherever it is eligible
    versus_uniform: Estimate | None  # uniform time / planned time, paired; None when the two are the same plan
    divergence: Estimate  # on the final split
    logits: bool
    held_out: bool
    kappa: float  # measured over predicted divergence, as used in the last round
    rounds: int
    notes: tuple[str, ...] = ()
    # The rest is None where it was not measured, and in plans that an older version saved.
    divergence_bound: float | None = None  # one-sided 95 % upper bound, on the final split: what is held to the budget
    divergence_p99: float | None = None  # of the tokens' KL; of the samples' relative squared errors
    top1_agreement: float | None = None  # logits only: share of the positions whose most likely class is the same
    perplexity_ratio: float | None = None  # planned / float, of the input's own next tokens; language models only
    other_side: Estimate | None = None  # time outside the region of autocast / time, where the plan is for one; where
    # it is for outside, and would keep the budget inside of one: time in there / time; of the solver's plan
    float_us: float | None = None  # the float model in one forward of each workload times its weight, if all were timed

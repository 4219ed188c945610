"""How often does the racing timer switch when it must not, and when it should? On real work, on this machine.

A call runs UNITS equal matrix products, so that an arm with 19 of 20 units is 5 % faster by construction, and identical
arms differ in nothing but where their weights lie in memory. That matters: allocated one arm after the other ("apart"),
a twin can truly be some percent faster or slower than its double, and no timer can tell that from a better kernel.
Dealt out at random from one pool ("mixed"), identical arms are identical. Not in turn: then the arms of a round use
neighbouring pages, and the first fetches for the second. Prints rates with 95 % Wilson intervals.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from autoplan.timing import Arm, Timing, race, switch

UNITS = 20
WEIGHT_BYTES = 8 * 2**20  # per arm, over all copies: more than a core's own cache


def mixed(size: int, units: Mapping[str, int]) -> list[Arm]:
    """Arms whose call runs so many products of `[16, size]` with weights `[size, size]`, dealt from one pool."""
    x = torch.randn(16, size)
    copies = max(4, WEIGHT_BYTES // (4 * size * size * UNITS))
    pool = [torch.randn(size, size) for _ in range(copies * sum(units.values()))]
    random.Random(0).shuffle(pool)

    def call(count: int) -> Callable[[], object]:
        weights = [pool.pop() for _ in range(count)]
        return lambda: [F.linear(x, weight) for weight in weights]

    return [Arm(name, name, [call(count) for _ in range(copies)]) for name, count in units.items()]


def apart(size: int, units: Mapping[str, int]) -> list[Arm]:
    """The same, each arm with a stretch of memory of its own."""
    return [arm for name, count in units.items() for arm in mixed(size, {name: count})]


def races(arms: Sequence[Arm], count: int, seeds: itertools.count[int]) -> list[dict[str, Timing]]:
    return [race(arms, baseline="none", seed=next(seeds)) for _ in range(count)]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927)."""
    z2 = 1.96**2
    middle = (hits + z2 / 2) / (count + z2)
    half = math.sqrt(z2 * (hits * (count - hits) / count + z2 / 4)) / (count + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def report(results: Sequence[dict[str, Timing]], seconds: float) -> None:
    count = len(results)
    switched = sum(any(switch(timing) for timing in result.values()) for result in results)
    low, high = wilson(switched, count)
    rounds = statistics.median(result["none"].rounds for result in results)
    print(
        f"  n={count}  switched {switched / count:6.1%} [{low:.1%}, {high:.1%}]  "
        f"median rounds {rounds:g}  {1000 * seconds / count:.0f} ms per race  {seconds:.1f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--races", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} thread(s), load {os.getloadavg()}")
    seeds = itertools.count()
    twins = {f"twin {i + 1}": UNITS for i in range(6)}
    for what, layout, size, units in (
        ("A/A, 6 twins", mixed, 32, twins),
        ("5 % faster", mixed, 32, {"faster": UNITS - 1}),
        ("A/A, 1 twin", mixed, 64, {"twin": UNITS}),
        ("5 % faster", mixed, 64, {"faster": UNITS - 1}),
        ("A/A, 1 twin", apart, 64, {"twin": UNITS}),
    ):
        arms = layout(size, {"none": UNITS, **units})
        print(f"{what}, {layout.__name__}: {UNITS} x F.linear 16x{size}x{size}")
        for rival in arms[1:]:
            # One race that no verdict ends: how fast the arm truly is, here and now.
            known = race([arms[0], rival], baseline="none", min_rounds=300, max_rounds=300)[rival.name]
            print(
                f"  {rival.name:<8} {known.ratio:.4f} [{known.ratio_low:.4f}, {known.ratio_high:.4f}] of none,"
                f" which takes {known.baseline_us:.0f} us"
            )
        began = time.perf_counter()
        results = races(arms, options.races, seeds)
        report(results, time.perf_counter() - began)


if __name__ == "__main__":
    with torch.inference_mode():
        main()

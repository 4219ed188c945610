"""How often does the racing timer switch when it must not, and when it should? On real work, on this machine.

A call runs UNITS equal matrix products, so that an arm with 19 of 20 units is 5 % faster by construction, and identical
arms differ in nothing but where their weights lie in memory (hence the many copies: with few, on the edge of a cache,
that alone was seen to make a twin 5 % faster, race after race). Prints rates with 95 % Wilson intervals.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from autoplan.timing import Arm, Timing, race, switch

UNITS = 20
WEIGHT_BYTES = 8 * 2**20  # per arm, over all copies: more than a core's own cache


def arm(name: str, size: int, units: int = UNITS) -> Arm:
    """An arm whose call runs `units` products of `[16, size]` with weights `[size, size]` of its own."""
    x = torch.randn(16, size)

    def copy() -> Callable[[], object]:
        weights = [torch.randn(size, size) for _ in range(units)]
        return lambda: [F.linear(x, weight) for weight in weights]

    return Arm(name, name, [copy() for _ in range(max(4, WEIGHT_BYTES // (4 * size * size * UNITS)))])


def races(arms: Sequence[Arm], count: int, seeds: itertools.count[int]) -> list[dict[str, Timing]]:
    return [race(arms, baseline="none", seed=next(seeds)) for _ in range(count)]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927)."""
    z2 = 1.96**2
    middle = (hits + z2 / 2) / (count + z2)
    half = math.sqrt(z2 * (hits * (count - hits) / count + z2 / 4)) / (count + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def report(what: str, results: Sequence[dict[str, Timing]], seconds: float) -> None:
    count = len(results)
    switched = sum(any(switch(timing) for timing in result.values()) for result in results)
    low, high = wilson(switched, count)
    rounds = statistics.median(result["none"].rounds for result in results)
    print(
        f"  {what:<16} n={count}  switched {switched / count:6.1%} [{low:.1%}, {high:.1%}]  "
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
    for size, twins in ((32, 6), (64, 1)):
        none = arm("none", size)
        same = [arm(f"twin {i + 1}", size) for i in range(twins)]
        faster = arm("faster", size, units=UNITS - 1)
        print(f"{UNITS} x F.linear 16x{size}x{size}")
        for rival in (faster, *same):
            # One race that no verdict ends: how fast the arm truly is, here and now.
            known = race([none, rival], baseline="none", min_rounds=500, max_rounds=500)[rival.name]
            print(
                f"  {rival.name:<8} {known.ratio:.4f} [{known.ratio_low:.4f}, {known.ratio_high:.4f}] of none,"
                f" which takes {known.baseline_us:.0f} us"
            )
        for what, rivals in ((f"A/A, {twins} twin(s)", same), ("5 % faster", [faster])):
            began = time.perf_counter()
            results = races([none, *rivals], options.races, seeds)
            report(what, results, time.perf_counter() - began)


if __name__ == "__main__":
    with torch.inference_mode():
        main()

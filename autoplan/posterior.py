"""What measured plans teach about the harms of their parts.

The harms of single layers are predictions, and those of a plan's layers do not quite add up. Every true share is taken
as the predicted harm times a factor near 1, with parts of it common to the whole, to a candidate, and to a layer, all
normally distributed; a measured plan is the sum of its shares, and so each one sharpens all factors that it touches
(Bayesian linear regression). Samples are drawn by Matheron's rule, which needs no matrix but that of the measured plans
(Wilson et al., "Pathwise Conditioning of Gaussian Processes", JMLR 22, 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Pair = tuple[str, str]  # layer, candidate
Harms = Mapping[Pair, float]
Assignment = Mapping[str, str]  # layer -> candidate

# Standard deviations of the factors' parts: .34 in all, about what predictions for single layers are off by.
_OF_ALL, _OF_CANDIDATE, _OF_LAYER, _OWN = 0.2, 0.1, 0.15, 0.2
_NOISE = 0.02  # of a measured plan, relative: what does not add up
_LEAST = 0.1  # of the predicted harm: no share is negative

_Floats = NDArray[np.float64]


class Posterior:
    """The harm of every pair, given what has been measured of plans so far. Pairs of infinite harm keep it."""

    def __init__(self, harms: Harms, seed: int = 0) -> None:
        self._predicted = dict(harms)
        self._pairs = [pair for pair, harm in harms.items() if np.isfinite(harm)]
        self._place = {pair: i for i, pair in enumerate(self._pairs)}
        self._prior = np.array([harms[pair] for pair in self._pairs])
        self._layer, self._candidate = (
            np.unique([pair[part] for pair in self._pairs], return_inverse=True)[1] for part in (0, 1)
        )
        self._plans: list[_Floats] = []
        self._values: list[float] = []
        self._random = np.random.default_rng(seed)

    def observe(self, plan: Assignment, value: float) -> None:
        """A plan's measured harm, in the unit of the predicted ones. Nothing is learnt from one that is not finite."""
        if not 0 < value < np.inf:
            return
        taken = np.zeros(len(self._pairs))
        taken[[self._place[pair] for pair in plan.items() if pair in self._place]] = 1
        self._plans.append(taken)
        self._values.append(value)

    def mean(self) -> dict[Pair, float]:
        """What is expected of each pair."""
        return self._given_all(self._prior, np.zeros(len(self._plans)))

    def draw(self) -> dict[Pair, float]:
        """What may well be: likelier the better it agrees with what was measured."""
        normal = self._random.standard_normal
        factors = 1 + _OF_ALL * normal() + _OWN * normal(len(self._pairs))
        factors += _OF_CANDIDATE * normal(len(self._pairs))[self._candidate]
        factors += _OF_LAYER * normal(len(self._pairs))[self._layer]
        return self._given_all(factors * self._prior, _NOISE * np.array(self._values) * normal(len(self._plans)))

    def _given_all(self, shares: _Floats, noise: _Floats) -> dict[Pair, float]:
        """These shares, moved by what the measured plans do not agree with."""
        if self._plans:
            plans, values = np.stack(self._plans), np.array(self._values)
            spread = self._covariance_times(plans.T)
            seen = plans @ spread + np.diag((_NOISE * values) ** 2)
            shares = shares + spread @ np.linalg.solve(seen, values - plans @ shares - noise)
        shares = np.maximum(shares, _LEAST * self._prior)
        return self._predicted | dict(zip(self._pairs, shares.tolist(), strict=True))

    def _covariance_times(self, plans: _Floats) -> _Floats:
        """The prior covariance of all pairs, times [pairs, plans]."""
        scaled = self._prior[:, None] * plans
        found = _OWN**2 * scaled + _OF_ALL**2 * scaled.sum(axis=0)
        for place, deviation in ((self._layer, _OF_LAYER), (self._candidate, _OF_CANDIDATE)):
            sums = np.zeros_like(scaled)
            np.add.at(sums, place, scaled)
            found += deviation**2 * sums[place]
        covariance: _Floats = self._prior[:, None] * found
        return covariance


def measured_best(
    posterior: Posterior,
    solve: Callable[[Harms], Assignment],
    measure: Callable[[Assignment], float],
    plans: int,
    go_on: Callable[[], bool] = lambda: True,
) -> Assignment:
    """The plan that measures best, of so many that are optimal for harms that may well be (Thompson sampling).

    `solve` finds the best plan for given harms. The first one is that for the expected harms, and is always measured;
    the others while `go_on()`, and fewer than `plans` where draws lead to the same ones again and again. Every one
    teaches the posterior (Thompson, "On the Likelihood that One Unknown Probability Exceeds Another", Biometrika 25,
    1933; for plans of many parts: Wang & Chen, "Thompson Sampling for Combinatorial Semi-Bandits", ICML 2018).
    """
    found: dict[tuple[Pair, ...], float] = {}
    for turn in range(3 * plans):
        if found and (len(found) == plans or not go_on()):
            break
        plan = solve(posterior.draw() if turn % 3 else posterior.mean())
        key = tuple(sorted(plan.items()))
        if key not in found:
            found[key] = measure(plan)
            posterior.observe(plan, found[key])
    return dict(min(found.items(), key=lambda item: item[1])[0])

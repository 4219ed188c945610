"""What measured plans teach, against the dense formulas; and plans found by it, against trying all."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from autoplan import posterior as room
from autoplan.posterior import Harms, Posterior, measured_best

LAYERS, CANDIDATES = [f"layer.{i}" for i in range(4)], ["int4", "int8"]
PAIRS = list(itertools.product(LAYERS, CANDIDATES))


def predicted(seed: int = 0) -> dict[tuple[str, str], float]:
    random = np.random.default_rng(seed)
    return {pair: float(random.lognormal(-3, 0.5)) for pair in PAIRS}


def plans(seed: int, count: int) -> list[dict[str, str]]:
    random = np.random.default_rng(seed)
    return [dict(zip(LAYERS, random.choice([*CANDIDATES, "none"], len(LAYERS)), strict=True)) for _ in range(count)]


def dense(harms: Harms, seen: list[tuple[dict[str, str], float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the pairs' harms by the textbook formulas of Gaussian conditioning."""
    h = np.array([harms[pair] for pair in PAIRS])
    same = [[[a[part] == b[part] for b in PAIRS] for a in PAIRS] for part in (0, 1)]
    factors = room._OF_ALL**2 + room._OWN**2 * np.eye(len(PAIRS))
    factors = factors + room._OF_LAYER**2 * np.array(same[0]) + room._OF_CANDIDATE**2 * np.array(same[1])
    prior = np.outer(h, h) * factors
    x = np.array([[float(plan[layer] == candidate) for layer, candidate in PAIRS] for plan, _ in seen])
    y = np.array([value for _, value in seen])
    gain = prior @ x.T @ np.linalg.inv(x @ prior @ x.T + np.diag((room._NOISE * y) ** 2))
    return h + gain @ (y - x @ h), prior - gain @ x @ prior


def told(harms: Harms, factor: float = 1.3) -> tuple[Posterior, list[tuple[dict[str, str], float]]]:
    posterior = Posterior(harms, seed=5)
    seen = [(plan, factor * sum(harms.get(pair, 0.0) for pair in plan.items())) for plan in plans(1, 5)]
    for plan, value in seen:
        posterior.observe(plan, value)
    return posterior, seen


def test_nothing_measured_means_what_was_predicted() -> None:
    assert Posterior(predicted()).mean() == predicted()


def test_the_mean_is_that_of_the_dense_formula() -> None:
    posterior, seen = told(predicted())
    expected, _ = dense(predicted(), seen)
    assert [posterior.mean()[pair] for pair in PAIRS] == pytest.approx(expected.tolist(), rel=1e-9)


def test_draws_spread_as_the_dense_formula_says() -> None:
    posterior, seen = told(predicted())
    draws = np.array([[drawn[pair] for pair in PAIRS] for drawn in (posterior.draw() for _ in range(20_000))])
    mean, covariance = dense(predicted(), seen)
    deviation = np.sqrt(np.diag(covariance))
    assert draws.mean(axis=0) == pytest.approx(mean, abs=0.03 * deviation.max())
    assert np.cov(draws.T) / np.outer(deviation, deviation) == pytest.approx(
        covariance / np.outer(deviation, deviation), abs=0.05
    )


def test_a_measured_plan_is_predicted_as_measured_afterwards() -> None:
    posterior, seen = told(predicted())
    for plan, value in seen:
        found = sum(posterior.mean().get(pair, 0.0) for pair in plan.items())
        assert found == pytest.approx(value, rel=2 * room._NOISE)


def test_infinite_harms_stay_and_what_is_not_a_number_teaches_nothing() -> None:
    harms = predicted() | {("layer.0", "int4"): math.inf}
    posterior = Posterior(harms)
    for value in (math.inf, math.nan, 0.0):
        posterior.observe(plans(1, 1)[0], value)
    assert posterior.mean() == harms
    posterior.observe({"layer.0": "int4", "layer.1": "int8"}, 1.0)  # measured nevertheless
    assert posterior.mean()["layer.0", "int4"] == math.inf
    assert posterior.draw()["layer.0", "int4"] == math.inf


def test_harms_stay_positive_whatever_is_measured() -> None:
    posterior = Posterior(predicted())
    for plan in plans(2, 20):
        posterior.observe(plan, 1e-9)
    for harms in (posterior.mean(), posterior.draw()):
        assert all(harms[pair] >= 0.1 * predicted()[pair] for pair in PAIRS)


def lightest(harms: Harms, most: int) -> dict[str, str]:
    """The least harm with at most so many layers on "none" and at most as many on "int8", by trying all."""
    every = itertools.product([*CANDIDATES, "none"], repeat=len(LAYERS))
    fitting = (names for names in every if names.count("none") <= most and names.count("int8") <= most)
    best = min(fitting, key=lambda names: sum(harms.get(pair, 0.0) for pair in zip(LAYERS, names, strict=True)))
    return dict(zip(LAYERS, best, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_a_dozen_measured_plans_find_the_best_or_nearly(seed: int) -> None:
    harms = predicted(seed)
    random = np.random.default_rng(100 + seed)
    true = {pair: harm * float(random.lognormal(0, 0.25)) for pair, harm in harms.items()}
    asked = []

    def measure(plan: dict[str, str]) -> float:
        asked.append(plan)
        return sum(true.get(pair, 0.0) for pair in plan.items())

    found = measured_best(Posterior(harms, seed), lambda h: lightest(h, 1), measure, 12)  # type: ignore[arg-type]
    first, best = measure(lightest(harms, 1)), measure(lightest(true, 1))
    assert asked[0] == lightest(harms, 1)
    assert len(asked) <= 12 + 2
    assert measure(found) == min(measure(plan) for plan in asked[:-2])
    assert measure(found) <= first
    assert measure(found) <= 1.05 * best


def test_without_time_the_first_plan_is_measured_and_taken() -> None:
    asked = []
    harms = predicted()
    found = measured_best(
        Posterior(harms), lambda h: lightest(h, 1), lambda plan: asked.append(plan) or 1.0, 12, lambda: False
    )
    assert asked == [found] == [lightest(harms, 1)]

"""The knapsack against brute force, its certificate, its ties and its speed."""

from __future__ import annotations

import ast
import math
import statistics
import sys
import time as clock
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from autoplan import solve as solve_module
from autoplan.errors import BudgetError
from autoplan.solve import Solution, solve

pytestmark = pytest.mark.filterwarnings("error")

Table = NDArray[np.float64]

# Halves and tenths make ties (exact ones, and ones that rounding breaks); the rest is far apart in magnitude.
VALUES = st.one_of(
    st.sampled_from([0.0, 0.5, 1.0, 1.5]),
    st.sampled_from([0.0, 0.1, 0.2, 0.3]),
    st.floats(0.0, 1.0),
    st.integers(-12, 3).map(lambda exponent: 10.0**exponent),
)


@st.composite
def tables(draw: st.DrawFn, largest: int = 6) -> tuple[Table, Table, Table]:
    """`time`, `harm` and `nbytes` of a small problem, some choices impossible."""
    layers, choices = draw(st.integers(0, largest)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pools = [np.array(draw(st.lists(VALUES, min_size=1, max_size=8))) for _ in range(2)]
    time, harm = (rng.choice(pool, (layers, choices)) for pool in pools)
    for table in (time, harm):
        if draw(st.booleans()):
            table[:] = 10.0 ** rng.uniform(-12, 3, table.shape)
    harm[:, :1] = 0.0
    time[:, 1:][rng.uniform(size=time[:, 1:].shape) < 0.15] = np.inf
    nbytes: Table = rng.integers(1, 6, (layers, choices)).astype(np.float64) * 512
    return time, harm, nbytes


def total(table: Table, choice: Sequence[int]) -> float:
    return math.fsum(row[k] for row, k in zip(table.tolist(), choice, strict=True))


def brute_force(time: Table, harm: Table, *limits: tuple[Table, float]) -> tuple[float, float] | None:
    """Least time inside all `(table, limit)`, and the least harm that goes with it, both as math.fsum has them."""
    layers, choices = time.shape
    every = np.indices((choices,) * layers).reshape(layers, choices**layers).T  # [plans, layers]
    times = time[np.arange(layers), every].sum(axis=1)
    best: tuple[float, float] | None = None
    for plan in every[np.argsort(times, kind="stable")].tolist():
        t = total(time, plan)
        if t == math.inf or (best and t > best[0] * (1 + 1e-12)):
            break
        if (not best or (t, total(harm, plan)) < best) and all(total(table, plan) <= limit for table, limit in limits):
            best = t, total(harm, plan)
    return best


def budgets(harm: Table) -> st.SearchStrategy[float]:
    """Anything, with a liking for budgets that some plan uses up exactly."""
    spent = st.tuples(*[st.sampled_from(row.tolist()) for row in harm]).map(math.fsum)
    return st.one_of(spent, spent, st.just(0.0), st.just(math.inf), st.floats(0.0, 10.0))


def check_optimal(solution: Solution, best: tuple[float, float], time: Table) -> None:
    # Times are added on a grid of the largest total that can matter; below, the exact sums decide.
    assert solution.time == pytest.approx(best[0], rel=1e-12, abs=1e-15 * time[:, 0].sum())
    assert (solution.gap, solution.lower_bound) == (0.0, solution.time)
    if solution.time == best[0]:
        assert solution.harm <= best[1] * (1 + 1e-15) or not is_plain(time)


def is_plain(time: Table) -> bool:
    """Whether sums of these times are exact, so that there is no doubt about what a tie is."""
    finite = time[np.isfinite(time)]
    return bool((finite * 2 == np.round(finite * 2)).all())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_optimal_against_brute_force(data: st.DataObject) -> None:
    time, harm, _ = data.draw(tables())
    budget = data.draw(budgets(harm))
    solution = solve(time, harm, budget)
    best = brute_force(time, harm, (harm, budget))
    assert best is not None
    check_optimal(solution, best, time)
    assert solution.time == total(time, solution.choice)
    assert solution.harm == total(harm, solution.choice) <= budget
    assert solution.price >= 0
    assert solve(time, harm, budget) == solution


def test_optimal_on_thousands_of_small_problems() -> None:
    rng = np.random.default_rng(1)
    for _ in range(2000):
        layers, choices = rng.integers(1, 5), rng.integers(2, 5)
        time = rng.choice([rng.uniform(0, 1, (layers, choices)), rng.integers(0, 5, (layers, choices)) / 4])
        harm = rng.choice([10.0 ** rng.uniform(-12, 3, time.shape), rng.integers(0, 4, time.shape) / 10])
        harm[:, 0] = 0.0
        budget = total(harm, rng.integers(0, choices, layers).tolist())
        best = brute_force(time, harm, (harm, budget))
        assert best is not None
        solution = solve(time, harm, budget)
        assert solution.harm <= budget
        check_optimal(solution, best, time)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_optimal_with_bytes_against_brute_force(data: st.DataObject) -> None:
    time, harm, nbytes = data.draw(tables(largest=5))
    budget = data.draw(budgets(harm))
    max_nbytes = data.draw(st.one_of(budgets(nbytes), st.integers(0, 20).map(lambda blocks: blocks * 512.0)))
    best = brute_force(time, harm, (harm, budget), (nbytes, max_nbytes))
    if best is None:
        smallest = brute_force(np.where(np.isfinite(time), nbytes, np.inf), harm, (harm, budget))
        assert smallest is not None
        with pytest.raises(BudgetError, match=f"smallest takes {smallest[0]:,.0f};"):
            solve(time, harm, budget, nbytes=nbytes, max_nbytes=max_nbytes)
        return
    solution = solve(time, harm, budget, nbytes=nbytes, max_nbytes=max_nbytes)
    check_optimal(solution, best, time)
    assert total(harm, solution.choice) <= budget
    assert total(nbytes, solution.choice) <= max_nbytes


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_column_order_matters_only_for_ties(data: st.DataObject) -> None:
    time, harm, _ = data.draw(tables())
    budget = data.draw(budgets(harm))
    order = [0, *data.draw(st.permutations(range(1, time.shape[1])))]
    before, after = solve(time, harm, budget), solve(time[:, order], harm[:, order], budget)
    assert (after.time, after.price) == (before.time, before.price)
    if is_plain(time) and is_plain(harm):
        assert after.harm == before.harm


def test_column_order_does_not_matter_without_ties() -> None:
    time, harm, _ = model(40, 6)
    order = [0, 4, 2, 5, 1, 3]
    budget = 0.1 * harm.max(axis=1).sum()
    shuffled = solve(time[:, order], harm[:, order], budget)
    assert tuple(order[k] for k in shuffled.choice) == solve(time, harm, budget).choice


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_bound_holds_when_the_search_is_cut_short(data: st.DataObject) -> None:
    time, harm, _ = data.draw(tables())
    budget = data.draw(budgets(harm))
    exact = solve(time, harm, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solve_module, "_WORK", 0)
        patch.setattr(solve_module, "_BEAM", 1)
        cut = solve(time, harm, budget)
    assert cut.harm <= budget
    rounding = 1e-15 * time[:, 0].sum() + 1e-12 * exact.time
    assert cut.lower_bound - rounding <= exact.time <= cut.time + rounding
    assert cut.gap == pytest.approx((cut.time - cut.lower_bound) / cut.time if cut.time else 0.0)


def subset_sum(layers: int) -> tuple[Table, Table]:
    """Time is an exact linear function of harm, so no bound can tell plans apart: the worst case."""
    harm = np.exp(np.random.default_rng(0).normal(0, 2, (layers, 6)))
    harm[:, 0] = 0.0
    return harm.max(axis=1, keepdims=True) - harm, harm


def test_gap_is_reported_when_it_is_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve_module, "_WORK", 100_000)
    time, harm = subset_sum(60)
    solution = solve(time, harm, harm.max(axis=1).sum() * 0.3)
    assert 0.0 < solution.gap < 1e-3
    assert solution.gap == (solution.time - solution.lower_bound) / solution.time


def test_ties_go_to_none_then_to_less_harm_then_to_the_lower_column() -> None:
    same = np.full((2, 3), 5.0)
    assert solve(same, np.array([[0.0, 0.1, 0.2], [0.0, 0.0, 0.0]]), 1.0).choice == (0, 0)
    time = np.array([[5.0, 4.0, 4.0, 4.0]])
    assert solve(time, np.array([[0.0, 0.3, 0.2, 0.2]]), 1.0).choice == (2,)
    # Either layer may be the fast one: the less harmful plan wins, also when the budget forces the choice.
    time, harm = np.array([[5.0, 4.0], [5.0, 4.0]]), np.array([[0.0, 0.6], [0.0, 0.5]])
    assert solve(time, harm, 1.0).choice == (0, 1)


def test_equal_sums_are_ties_in_whatever_order_they_are_added() -> None:
    rows = np.array([[1.1, 0.7], [0.3, 0.2], [1e-9, 3e-10]])
    time = np.tile(rows, (4, 1))
    harm = np.zeros_like(time)
    harm[:, 1] = np.linspace(1.0, 2.0, len(time))
    chosen = solve(time, harm, 2.5).choice
    backwards = solve(time[::-1], harm[::-1], 2.5).choice
    assert chosen == backwards[::-1]
    assert chosen.index(1) == 0  # the least harmful of the four layers that gain the most


def test_budget_is_met_exactly() -> None:
    time, harm = np.array([[2.0, 1.0], [2.0, 1.0]]), np.array([[0.0, 0.1], [0.0, 0.2]])
    assert 0.1 + 0.2 > 0.3
    assert solve(time, harm, 0.3).choice == (1, 0)
    assert solve(time, harm, 0.1 + 0.2).choice == (1, 1)
    assert solve(time, harm, 0.1).choice == (1, 0)
    assert solve(time, harm, math.nextafter(0.1, 0)).choice == (0, 0)


def test_degenerate_problems() -> None:
    assert solve(np.zeros((0, 3)), np.zeros((0, 3)), 0.0) == Solution((), 0.0, 0.0, 0.0, 0.0, 0.0)
    assert solve(np.array([[3.0], [2.0]]), np.zeros((2, 1)), 0.0).choice == (0, 0)
    time = np.array([[3.0, 2.0, 1.0, math.inf]])
    assert solve(time, np.zeros((1, 4)), 0.0).choice == (2,)
    assert solve(time, np.array([[0.0, 0.1, 9.0, math.nan]]), math.inf).choice == (2,)
    assert solve(time, np.array([[0.0, 0.1, math.inf, 0.0]]), math.inf).choice == (1,)
    assert solve(time, np.array([[0.0, 0.1, 5e-324, 0.0]]), 0.0).choice == (0,)
    assert solve(time, np.array([[0.0, 1e-310, 5e-324, 0.0]]), 5e-324).choice == (2,)
    assert solve(np.zeros((3, 2)), np.ones((3, 2)) * [0.0, 1.0], 1.0).choice == (0, 0, 0)


def test_price_is_the_marginal_time_per_harm() -> None:
    time, harm = np.array([[5.0, 1.0], [5.0, 3.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])
    assert [solve(time, harm, budget).price for budget in (0.0, 0.5, 1.0, 1.5, 2.0)] == [4.0, 4.0, 2.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("time", "harm", "message"),
    [
        ([[1.0, -1.0]], [[0.0, 0.1]], "time of layer 0, choice 1 must be a number >= 0, not -1.0"),
        ([[1.0, math.nan]], [[0.0, 0.1]], "time of layer 0, choice 1 .* nan"),
        ([[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.1], [0.0, -0.1]], "harm of layer 1, choice 1 .* -0.1"),
        ([[1.0, 1.0]], [[0.0, math.nan]], "harm of layer 0, choice 1 .* nan"),
        ([[1.0], [math.inf]], [[0.0], [0.0]], "choice 0 must be `none`.* layer 1 has time inf"),
        ([[1.0]], [[0.1]], "choice 0 must be `none`.* harm 0.1"),
        ([[1.0]], [[0.0, 0.0]], r"\[layers, choices\]"),
        ([1.0], [0.0], r"\[layers, choices\]"),
        ([[]], [[]], r"\[layers, choices\]"),
    ],
)
def test_malformed_tables(time: list[list[float]], harm: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(np.array(time), np.array(harm), 1.0)


def test_malformed_limits() -> None:
    time, harm = np.ones((1, 2)), np.zeros((1, 2))
    for budget in (-1.0, math.nan):
        with pytest.raises(BudgetError, match="harm budget"):
            solve(time, harm, budget)
        with pytest.raises(BudgetError, match="max_nbytes"):
            solve(time, harm, 1.0, nbytes=time, max_nbytes=budget)
    with pytest.raises(ValueError, match="needs nbytes"):
        solve(time, harm, 1.0, max_nbytes=1.0)
    assert solve(time, harm, 1.0, nbytes=time) == solve(time, harm, 1.0)  # no limit
    with pytest.raises(ValueError, match="nbytes of layer 0, choice 1"):
        solve(time, harm, 1.0, nbytes=np.array([[1.0, math.nan]]), max_nbytes=1.0)
    with pytest.raises(ValueError, match="nbytes must be"):
        solve(time, harm, 1.0, nbytes=np.ones((2, 2)), max_nbytes=1.0)


# --- sizes that occur ---


def model(layers: int, choices: int, *, distinct: int | None = None) -> tuple[Table, Table, Table]:
    """Times, harms and bytes as a language model of `layers` Linears has them; `distinct` limits the rows of times."""
    rng = np.random.default_rng(0)
    ratio = np.array([1, 0.8, 0.62, 0.7, 0.45, 0.55, 0.5, 0.4])[:choices]
    level = np.array([0, 1, 3, 6, 40, 15, 60, 120.0])[:choices]
    rows = distinct or layers
    time = rng.choice([20.0, 45, 60, 140], (rows, 1)) * np.clip(ratio * rng.uniform(0.8, 1.25, (rows, choices)), 0.3, 2)
    time = time[rng.integers(0, rows, layers)] if distinct else time
    harm = 1e-4 * level * rng.lognormal(0, 1.6, (layers, 1)) * rng.uniform(0.5, 1.5, (layers, choices))
    nbytes = rng.choice([16.0, 44, 32], (layers, 1)) * 2**20
    return time, harm, nbytes * np.array([1, 0.5, 0.5, 0.5, 0.28, 0.28, 0.5, 0.25])[:choices]


def median_seconds(function: Callable[[], object], runs: int = 5) -> float:
    seconds = []
    for _ in range(runs):
        start = clock.perf_counter()
        function()
        seconds.append(clock.perf_counter() - start)
    return statistics.median(seconds)


@pytest.mark.parametrize("distinct", [None, 4])
@pytest.mark.parametrize("share", [0.001, 0.05, 0.4])
def test_exact_and_quick_at_the_size_of_an_8b_model(distinct: int | None, share: float) -> None:
    time, harm, _ = model(224, 6, distinct=distinct)
    budget = harm.max(axis=1).sum() * share
    solution = solve(time, harm, budget)
    assert solution.gap == 0.0
    assert 0.9 * budget < solution.harm <= budget
    assert median_seconds(lambda: solve(time, harm, budget)) < 0.5  # a few milliseconds on a quiet machine


def test_identical_layers_are_quick() -> None:
    time, harm = np.tile([3.0, 2.0, 1.0], (224, 1)), np.tile([0.0, 0.1, 0.3], (224, 1))
    solution = solve(time, harm, 30.0)
    assert solution.gap == 0.0
    assert solution.harm <= 30.0
    assert median_seconds(lambda: solve(time, harm, 30.0)) < 0.5


def test_bytes_at_the_size_of_an_8b_model() -> None:
    time, harm, nbytes = model(224, 6)
    budget = harm.max(axis=1).sum() * 0.05
    free = solve(time, harm, budget)
    lightest = solve(nbytes, harm, budget).time
    max_nbytes = 0.5 * (total(nbytes, free.choice) + lightest)
    assert lightest < max_nbytes < total(nbytes, free.choice)
    solution = solve(time, harm, budget, nbytes=nbytes, max_nbytes=max_nbytes)
    assert solution.harm <= budget
    assert total(nbytes, solution.choice) <= max_nbytes
    assert solution.gap < 0.01
    assert free.time <= solution.lower_bound <= solution.time


def test_worst_case_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve_module, "_WORK", 500_000)
    time, harm = subset_sum(224)
    budget = harm.max(axis=1).sum() * 0.3
    start = clock.perf_counter()
    solution = solve(time, harm, budget)
    assert solution.harm <= budget
    assert solution.gap < 1e-4
    assert clock.perf_counter() - start < 15.0


def test_imports_numpy_and_the_standard_library_only() -> None:
    tree = ast.parse(Path(solve_module.__file__ or "").read_text(encoding="utf-8"))
    names = {
        name.split(".")[0] if not name.startswith("autoplan") else name
        for node in ast.walk(tree)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [])
        + ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
    }
    assert names - sys.stdlib_module_names - {"numpy", "autoplan.errors", "autoplan.records"} == set()

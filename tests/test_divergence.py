"""Divergence against figures worked out by hand, what may never look close, and inputs split without overlap."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoplan.divergence import Terms, call, compare, main_output, references, split_inputs, undisturbed
from autoplan.errors import AutoplanError
from autoplan.recorder import ModelInput


class Answer(nn.Module):
    """Gives what it is told to, whatever it is given."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        return self.answer


def given(*args: Any, workload: str = "default", **kwargs: Any) -> ModelInput:
    return ModelInput(workload, args, kwargs)


def terms(float_answer: Any, changed_answer: Any, model_input: ModelInput | None = None, picker: Any = None) -> Terms:
    model = Answer(float_answer)
    against = references(model, [model_input or given()], picker)
    model.answer = changed_answer
    return compare(model, against, picker)


def logits(values: Tensor) -> Any:
    return SimpleNamespace(logits=values)


# Values.


def test_relative_squared_error_by_hand() -> None:
    y = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    q = torch.tensor([[3.0, 5.0], [2.0, 5.0]])
    found = terms(y, q)
    assert found.values.tolist() == [[1.0, 25.0], [4.0, 25.0]]  # one row per sample
    assert found.divergence() == pytest.approx(5 / 50)


def test_an_output_without_a_batch_is_one_sample() -> None:
    assert terms(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])).values.tolist() == [[1.0, 25.0]]
    assert terms(torch.tensor(2.0), torch.tensor(1.0)).values.tolist() == [[1.0, 4.0]]


def test_kl_of_logits_by_hand() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    y = torch.tensor(np.log([[p, p], [p, p]])) + 7.0  # a shift of all logits changes nothing
    changed = torch.tensor(np.log([[q, p], [p, p]]))
    found = terms(logits(y), logits(changed))
    np.testing.assert_allclose(found.values, [[expected, 2], [0, 2]], atol=1e-6)
    assert found.divergence() == pytest.approx(expected / 4, rel=1e-5)  # mean nats per token


def test_kl_is_never_negative() -> None:
    y = torch.randn(64, 16, 100) * 5
    found = terms(logits(y), logits(y * (1 + 1e-7)))
    assert (found.values[:, 0] >= 0).all()
    assert found.divergence() < 1e-6
    assert terms(logits(y), logits(y)).divergence() == 0


def test_a_masked_position_does_not_count_by_keyword_or_position() -> None:
    y, q = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    q[0, 2], q[1, 1] = 100.0, 2.0
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = [[0.0, 8.0], [4.0, 12.0]]
    ids = torch.zeros(2, 3)
    assert terms(y, q, given(input_ids=ids, attention_mask=mask)).values.tolist() == expected
    assert terms(y, q, given(ids, mask)).values.tolist() == expected
    assert terms(y, q, given(ids, attention_mask=mask)).values.tolist() == expected
    kl = terms(logits(y), logits(q), given(ids, mask)).values
    assert kl[:, 1].tolist() == [2.0, 3.0]
    q[0, 2], y[0, 2] = math.nan, math.inf  # nothing there is looked at
    assert terms(y, q, given(ids, mask)).values.tolist() == expected


def test_a_mask_over_something_else_is_no_mask() -> None:
    ids, mask = torch.zeros(2, 3), torch.tensor([[1, 0, 0], [1, 0, 0]])
    y, q = torch.ones(2, 3), torch.ones(2, 3)
    q[:, 2] = 2.0  # 3 features, not 3 tokens
    assert terms(y, q, given(ids, mask)).values.tolist() == [[1.0, 3.0], [1.0, 3.0]]
    assert terms(torch.ones(2, 5, 4), torch.ones(2, 5, 4), given(ids, mask)).values[:, 1].tolist() == [20.0, 20.0]
    square = torch.ones(2, 2)
    assert terms(square, square, given(torch.zeros(2, 2), torch.eye(2))).divergence() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrap", [logits, lambda y: y])
@pytest.mark.parametrize("where", [(0, 0, 0), ...])
def test_what_is_not_finite_never_looks_close(bad: float, wrap: Any, where: Any) -> None:
    y = torch.randn(3, 2, 4)
    q = y.clone()
    q[where] = bad
    found = terms(wrap(y), wrap(q))
    assert found.divergence() == math.inf
    estimate = found.estimate()
    assert estimate.value == estimate.high == math.inf
    assert not math.isnan(estimate.low)


def test_a_float_model_that_is_not_finite_is_refused() -> None:
    with pytest.raises(AutoplanError, match="float model's own output is not finite"):
        terms(torch.tensor([[math.nan, 1.0]]), torch.ones(1, 2))


def test_an_output_that_changes_shape_is_refused() -> None:
    with pytest.raises(AutoplanError, match=r"changed its shape from \[1, 2\] to \[1, 3\]"):
        terms(torch.ones(1, 2), torch.ones(1, 3))


def test_half_precision_is_compared_in_float32() -> None:
    y = torch.full((1, 8), 300.0, dtype=torch.float16)  # squares overflow float16
    assert terms(y, y + 1).divergence() == pytest.approx((1 / 300) ** 2, rel=1e-3)


def test_an_output_that_the_model_writes_over_is_kept() -> None:
    class Static(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.out = 1.0, torch.zeros(1, 2)

        def forward(self) -> Tensor:
            return self.out.fill_(self.value)

    model = Static()
    against = references(model, [given()], None)
    model.value = 2.0
    assert compare(model, against, None).divergence() == pytest.approx(1.0)


# Which output.


def test_the_main_output() -> None:
    y, z = torch.ones(2, 3), torch.zeros(2, 3)
    assert main_output(logits(y)) == (y, True)
    assert main_output({"loss": z, "logits": y})[1]
    for result in (y, (torch.ones(2, dtype=torch.int64), y, z), [[y], z], {"a": y, "b": z}):
        found, is_logits = main_output(result)
        assert found is y
        assert not is_logits
    assert main_output({"a": y, "b": z}, lambda result: result["b"]) == (z, False)
    assert main_output(y, lambda result: {"logits": result}) == (y, True)
    with pytest.raises(AutoplanError, match="returned dict with no floating tensor"):
        main_output({"ids": torch.ones(2, dtype=torch.int64)})
    for wrong in (3, torch.ones(2, dtype=torch.int64), None, {"logits": 3}, {"a": y}):
        with pytest.raises(AutoplanError, match="output= must return a floating tensor"):
            main_output(y, lambda result, wrong=wrong: wrong)


# The interval.


def test_the_bootstrap_interval_covers_and_narrows() -> None:
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for trial in range(200):
        found = Terms(np.stack([rng.exponential(2.0, 40), np.ones(40)], axis=1)).estimate(seed=trial)
        covered += found.low <= 2.0 <= found.high
        assert found.low <= found.value <= found.high
        widths.append(found.high - found.low)
    assert 0.85 <= covered / 200 <= 0.99
    more = Terms(np.stack([rng.exponential(2.0, 4000), np.ones(4000)], axis=1)).estimate()
    assert more.high - more.low < np.mean(widths) / 5


@pytest.mark.parametrize(("samples", "least"), [(4, 0.78), (8, 0.88), (16, 0.90), (64, 0.92)])
def test_the_upper_bound_holds_for_few_and_skewed_samples(samples: int, least: float) -> None:
    """One-sided, 95 %: of percentiles of resampled means, only 0.74, 0.83, 0.87 and 0.92 hold here."""
    rng, trials = np.random.default_rng(0), 500
    held = 0
    for trial in range(trials):
        found = Terms(np.stack([rng.lognormal(0.0, 0.6, samples), np.ones(samples)], axis=1))
        held += found.upper_bound(seed=trial) >= math.exp(0.18)
        assert found.divergence() <= found.upper_bound(seed=trial) <= found.values[:, 0].max() + 1e-12
    assert held / trials >= least


def test_the_upper_bound_is_below_that_of_the_two_sided_interval() -> None:
    found = Terms(np.random.default_rng(3).exponential(1.0, (30, 2)))
    assert found.divergence() < found.upper_bound() < found.estimate().high


def test_the_interval_is_seeded_and_of_no_width_for_one_sample() -> None:
    values = Terms(np.random.default_rng(1).random((20, 2)))
    assert values.estimate(seed=1) == values.estimate(seed=1) != values.estimate(seed=2)
    one = Terms(np.array([[1.0, 4.0]])).estimate()
    assert (one.value, one.low, one.high) == (0.25, 0.25, 0.25)


def test_nothing_to_divide_by() -> None:
    assert Terms(np.zeros((3, 2))).estimate().high == 0
    found = Terms(np.array([[2.0, 0.0]])).estimate()  # the float output is all zero, and the changed one is not
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


# No trace.


class Stateful(nn.Module):
    """Keeps state in every way that modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("made", None)
        self.register_buffer("odd", torch.full((2,), math.nan))
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.written += torch.rand(2)
        self.replaced = self.replaced + 1
        self.made = x
        self.odd.zero_()
        self.norm.train()
        return self.norm(self.inner(x)) * self.w


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_undisturbed_restores_buffers_rng_and_flags(fails: bool, training: bool) -> None:
    model = Stateful().train(training)
    model.inner.train(not training)
    before, held = copy.deepcopy(model.state_dict()), dict(model.named_buffers())
    torch.compile(model)  # imports dynamo
    stance = torch._dynamo.eval_frame._stance
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)

    def run() -> None:
        with undisturbed(model):
            assert not model.training
            assert not model.inner.training
            assert not torch.is_grad_enabled()
            assert torch._dynamo.eval_frame._stance.stance == "force_eager"
            for _ in range(2):
                call(model, given(torch.rand(3, 4)))
            if fails:
                raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            run()
    else:
        run()
    assert torch.equal(torch.rand(3), drawn)
    assert torch._dynamo.eval_frame._stance == stance
    assert model.training is training
    assert model.inner.training is not training
    assert model.norm.training is training
    assert model.made is None
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key].nan_to_num(9), value.nan_to_num(9)) for key, value in before.items())
    assert all(buffer is held[name] for name, buffer in model.named_buffers())  # the very tensors that were there
    assert model.w.grad is None


def test_undisturbed_may_leave_compiling_on() -> None:
    with undisturbed(nn.Linear(2, 2), eager=False):
        assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_call_leaves_the_recorded_input_as_it_is() -> None:
    class Greedy(nn.Module):
        def forward(self, x: Tensor, options: dict[str, int]) -> Tensor:
            options["seen"] = 1
            return x.zero_()

    item = given(torch.ones(2), options={})
    call(Greedy(), item)
    assert torch.equal(item.args[0], torch.ones(2))
    assert item.kwargs == {"options": {}}


# Splits.


class Double(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        return x * scale


def sizes(part: tuple[ModelInput, ...]) -> list[int]:
    return [item.args[0].shape[0] for item in part]


def values(part: tuple[ModelInput, ...]) -> set[float]:
    return {value for item in part for value in item.args[0].flatten().tolist()}


def test_three_batches_or_more_are_kept_whole() -> None:
    items = [given(torch.full((2, 1), float(i))) for i in range(7)]
    split = split_inputs(Double(), items)
    assert split.held_out
    assert [values(part) for part in (split.scoring, split.validation, split.final)] == [{0, 3, 6}, {1, 4}, {2, 5}]
    assert sizes(split.scoring) == [2, 2, 2]


@pytest.mark.parametrize("rows", [3, 4, 32])
def test_one_batch_is_cut_by_sample(rows: int) -> None:
    x = torch.arange(float(rows)).unsqueeze(1)
    split = split_inputs(Double(), [given(x, mask=torch.ones(rows, 1), scale=3.0)])
    assert split.held_out
    parts = [values(part) for part in (split.scoring, split.validation, split.final)]
    assert set.union(*parts) == set(range(rows))
    assert sum(map(len, parts)) == rows  # disjoint
    for item in (*split.scoring, *split.validation, *split.final):
        assert item.kwargs["mask"].shape[0] == item.args[0].shape[0]
        assert item.kwargs["scale"] == 3.0


def test_two_batches_are_cut_too() -> None:
    split = split_inputs(Double(), [given(torch.full((6, 1), 1.0)), given(torch.full((6, 1), 2.0))])
    assert split.held_out
    assert [sizes(part) for part in (split.scoring, split.validation, split.final)] == [[2, 2]] * 3


@pytest.mark.parametrize("rows", [1, 2])
def test_a_sample_or_two_serve_three_times_and_say_so(rows: int) -> None:
    item = given(torch.ones(rows, 1))
    split = split_inputs(Double(), [item])
    assert not split.held_out
    assert split.scoring == split.validation == split.final == (item,)


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(6, -1)


class AcrossBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0)


@pytest.mark.parametrize("model", [FixedBatch(), AcrossBatch()])
def test_a_model_that_does_not_bear_smaller_batches_keeps_them_whole(model: nn.Module) -> None:
    item = given(torch.ones(6, 6))
    split = split_inputs(model, [item])
    assert not split.held_out
    assert sizes(split.final) == [6]


def test_each_workload_is_split_by_itself() -> None:
    items = [given(torch.full((9, 1), 1.0), workload="a")]
    items += [given(torch.full((1, 1), 2.0 + i), workload="b") for i in range(3)]
    split = split_inputs(Double(), items)
    assert split.held_out
    for part in (split.scoring, split.validation, split.final):
        assert [item.workload for item in part] == ["a", "b"]


def test_parts_take_about_as_many_samples_as_they_may() -> None:
    items = [given(torch.ones(5, 1)) for _ in range(60)]
    split = split_inputs(Double(), items)
    assert sizes(split.scoring) == [5, 5, 5]  # at most 16
    assert len(split.validation) == len(split.final) == 12  # at most 64: their float outputs are kept in memory
    assert sizes(split_inputs(Double(), [given(torch.ones(90, 1))]).scoring) == [30]  # never none

"""Models are called in many ways: every way of the zoo is recorded, replayed and served."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from animals import SAMPLES, TOKENS, ZOO, call, padded, tokens, transformers
from torch import Tensor, nn

from autoplan import Budget, Plan, apply_plan, autoplan, make_plan, plan_of, record
from autoplan.layers import PlannedLinear

ANIMALS = {animal.name: animal for animal in ZOO}
LOOSE = Budget(divergence=0.1)
QUICK: dict[str, Any] = {"budget": LOOSE, "candidates": ["int8_dynamic"], "cache": False, "progress": False}


@pytest.fixture(autouse=True)
def int8_wins(timer: Any) -> None:
    """int8_dynamic takes half the time of the float layer."""
    timer.ratios = {"int8_dynamic": 0.5}


def relative_error(expected: Tensor, output: Tensor) -> float:
    y, q = expected.double(), output.double()
    return float(((y - q) ** 2).sum() / (y**2).sum())


def switched(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, PlannedLinear)}


def reasons(plan: Plan) -> dict[str, str]:
    return {item.name: item.reason for item in plan.left_alone}


def hooks(model: nn.Module) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for kind, table in vars(module).items()
        if kind.endswith("_hooks")
        for hook in table.values()
    ]


# The inputs.


def test_a_batch_encoding_is_keyword_arguments() -> None:
    bert = ANIMALS["bert"].make()
    encoding = transformers.BatchEncoding(padded())
    expected = call(bert, encoding).last_hidden_state
    autoplan(bert, encoding, **QUICK)
    assert "encoder.layer.0.intermediate.dense" in switched(bert)
    assert 0 < relative_error(expected, call(bert, encoding).last_hidden_state) < 0.1


def test_embeddings_instead_of_ids() -> None:
    llama = ANIMALS["llama"].make()
    embeddings = llama.get_input_embeddings()(tokens()).detach()
    expected = call(llama, {"inputs_embeds": embeddings}).logits
    autoplan(llama, {"inputs_embeds": embeddings}, **QUICK)
    assert len(switched(llama)) == 15
    assert 0 < relative_error(expected, call(llama, {"inputs_embeds": embeddings}).logits) < 0.1


def test_an_encoder_that_ran_before_is_left_alone() -> None:
    t5 = ANIMALS["t5"].make()
    encoded = t5.get_encoder()(tokens())
    batch = {"encoder_outputs": encoded, "decoder_input_ids": tokens(7)}
    expected = call(t5, batch).logits
    autoplan(t5, batch, **QUICK)
    assert switched(t5)
    assert all(name.startswith(("decoder", "lm_head")) for name in switched(t5))
    assert reasons(plan_of(t5))["encoder.block.0.layer.0.SelfAttention.q"] == "saw no input while recording"
    assert relative_error(expected, call(t5, batch).logits) < 0.1


def test_a_key_value_cache_is_taken_and_given_and_stays_the_users() -> None:
    llama = ANIMALS["llama"].make()
    prompt, token = tokens(), tokens(1)
    with torch.no_grad(), record(llama) as recording:
        with recording.workload("prefill"):
            cache = llama(prompt, use_cache=True).past_key_values
        with recording.workload("decode", weight=16):
            expected = llama(token, past_key_values=cache, use_cache=True).logits
    keys = cache.layers[0].keys.clone()
    plan = make_plan(llama, recording, **QUICK)
    assert cache.get_seq_length() == TOKENS + 1
    assert torch.equal(cache.layers[0].keys, keys)
    assert plan.workloads == {"prefill": 1.0, "decode": 16.0}
    apply_plan(llama, plan)
    with torch.no_grad():
        cache = llama(prompt, use_cache=True).past_key_values
        output = llama(token, past_key_values=cache, use_cache=True).logits
    assert 0 < relative_error(expected, output) < 0.1


@pytest.mark.parametrize("name", ["llama", "t5", "whisper"])
def test_the_first_call_of_generate_makes_the_plan(name: str) -> None:
    animal = ANIMALS[name]
    expected, model = animal.generate(animal.make()), autoplan(animal.make(), **QUICK)  # type: ignore[misc]
    generated = animal.generate(model)  # type: ignore[misc]
    assert generated.shape == expected.shape
    assert torch.equal(generated[:, : -4 + 1], expected[:, : -4 + 1])  # its first new token came from the float model
    assert switched(model)
    assert hooks(model) == []
    assert animal.generate(model).shape == expected.shape  # type: ignore[misc]


def test_a_recording_of_generate_holds_prefill_and_decode() -> None:
    llama = ANIMALS["llama"].make()
    with record(llama) as recording:
        ANIMALS["llama"].generate(llama)  # type: ignore[misc]
    plan = make_plan(llama, recording, **QUICK)
    query = next(layer for layer in plan.layers if layer.name == "model.layers.0.self_attn.q_proj")
    assert {item.rows: item.count for item in query.calls} == {SAMPLES * 5: 1, SAMPLES: 3}


# The outputs.


@pytest.mark.parametrize("give", [dict, tuple, list], ids=["dict", "tuple", "list"])
def test_what_forward_gives_is_given_still(give: type) -> None:
    class Giving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Any:
            y = self.linear(x)
            return {"count": 3, "y": y} if give is dict else give((3, None, y))

    model, x = Giving(), torch.randn(SAMPLES, 64)
    key = "y" if give is dict else 2
    expected = call(model, x)[key]
    autoplan(model, x, **QUICK)
    assert type(call(model, x)) is give
    assert 0 < relative_error(expected, call(model, x)[key]) < 0.1


def test_a_tuple_instead_of_a_model_output() -> None:
    llama = ANIMALS["llama"].make()
    batch = {**padded(), "return_dict": False, "use_cache": False}
    expected = call(llama, batch)[0]
    autoplan(llama, batch, **QUICK)
    assert 0 < relative_error(expected, call(llama, batch)[0]) < 0.1


# The weights, and the state that the model is in.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_half_precision_weights(name: str, dtype: torch.dtype) -> None:
    animal = ANIMALS[name]
    model, batch = animal.make().to(dtype), padded()
    expected = animal.output(call(model, batch))
    autoplan(model, batch, **QUICK)
    assert switched(model)
    output = animal.output(call(model, batch))
    assert output.dtype == expected.dtype == dtype
    assert 0 < relative_error(expected, output) < 0.1


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_under_autocast(name: str) -> None:
    animal = ANIMALS[name]
    model, batch = animal.make(), animal.batches()[0]
    with torch.autocast("cpu", torch.bfloat16):
        expected = animal.output(call(model, batch))
        autoplan(model, batch, **QUICK)
        output = animal.output(call(model, batch))
    assert switched(model)
    assert {item.dtype for layer in plan_of(model).layers for item in layer.calls} <= {"bfloat16", "float32"}
    assert output.dtype == expected.dtype
    assert 0 < relative_error(expected, output) < 0.1


def test_dropout_of_a_model_in_train_mode_is_not_taken_for_harm() -> None:
    animal = ANIMALS["bert"]
    model = animal.make().train()
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    autoplan(model, animal.batches(), **QUICK)
    assert all(module.training for module in model.modules())
    assert switched(model)
    outcome = plan_of(model).outcome
    assert outcome is not None
    expected = [animal.output(call(animal.make(), batch)) for batch in animal.batches()]
    outputs = [animal.output(call(copy.deepcopy(model).eval(), batch)) for batch in animal.batches()]
    measured = [relative_error(y, q) for y, q in zip(expected, outputs, strict=True)]
    assert outcome.divergence.value == pytest.approx(sum(measured) / len(measured), rel=0.5)  # dropout alone is far off


def test_a_head_tied_to_the_embedding_stays_tied() -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(ANIMALS["llama"].make().config)
    config.tie_word_embeddings = True
    llama = transformers.LlamaForCausalLM(config).eval()
    autoplan(llama, padded(), **QUICK)
    assert reasons(plan_of(llama))["lm_head"] == "its weight is tied to model.embed_tokens.weight"
    assert llama.lm_head.weight is llama.model.embed_tokens.weight


class Looped(nn.Module):
    """Calls one Linear twice, and another never."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(x).relu())


def test_a_linear_called_twice_and_one_never_called() -> None:
    model, x = Looped(), torch.randn(SAMPLES, 64)
    expected = call(model, x)
    autoplan(model, x, **QUICK)
    (layer,) = plan_of(model).layers
    assert [item.count for item in layer.calls] == [2]
    assert layer.baseline_us == pytest.approx(200.0)  # both calls of 100 us
    assert reasons(plan_of(model)) == {"never": "saw no input while recording"}
    assert 0 < relative_error(expected, call(model, x)) < 0.1


# Experts.


class Experts(nn.Module):
    """A mixture of Linears, as models wrote it before their experts were 3-D parameters: each token goes to one."""

    def __init__(self, calls_idle_experts: bool) -> None:
        super().__init__()
        self.calls_idle_experts = calls_idle_experts
        self.embedding = nn.Embedding(4, 64)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            routed = ids == i
            if self.calls_idle_experts or bool(routed.any()):
                y[routed] = expert(x[routed])
        return y


@pytest.mark.parametrize("calls_idle_experts", [False, True])
def test_experts_that_no_token_reached_are_left_alone(calls_idle_experts: bool) -> None:
    model = Experts(calls_idle_experts)
    seen, all_experts = torch.randint(0, 3, (SAMPLES, TOKENS)), torch.arange(4).repeat(SAMPLES, 3)
    expected = call(model, all_experts)
    autoplan(model, [seen] * 3, **QUICK)
    assert reasons(plan_of(model)) == {"experts.3": "saw no input while recording"}
    assert switched(model) == {"experts.0", "experts.1", "experts.2"}
    assert 0 < relative_error(expected, call(model, all_experts)) < 0.1
    nobody = call(model, torch.full((SAMPLES, TOKENS), 3))  # planned experts that get no row
    assert torch.equal(nobody, model.experts[3](model.embedding(torch.full((SAMPLES, TOKENS), 3))))


# Compiled.


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """What is compiled here counts against nobody's recompile limit."""
    torch._dynamo.reset()  # noqa: TID251
    yield
    torch._dynamo.reset()  # noqa: TID251


@pytest.mark.parametrize("name", ["mlp", pytest.param("bert", marks=pytest.mark.slow)])
def test_compiled(name: str, fresh_dynamo: None) -> None:
    animal = ANIMALS[name]
    model = animal.make()
    compiled: Callable[..., Any] = torch.compile(model)  # type: ignore[assignment]
    assert autoplan(compiled, animal.batches(), **QUICK) is compiled  # type: ignore[type-var]
    assert switched(model)
    assert plan_of(compiled).mode == "compiled"  # type: ignore[arg-type]
    batch = animal.batches()[0]
    output = animal.output(call(compiled, batch))  # type: ignore[arg-type]
    assert relative_error(animal.output(call(model, batch)), output) < 1e-4  # compiled as eager
    assert 0 < relative_error(animal.output(call(animal.make(), batch)), output) < 0.1

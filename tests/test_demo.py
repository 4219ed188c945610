"""The demo's parts that need no minutes: the sentences, the embedder, and the measures of fidelity."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoplan import demo
from autoplan.errors import AutoplanError


def test_sentences_are_many_distinct_prose_and_always_the_same() -> None:
    found = demo.sentences()
    assert len(found) >= demo.JUDGED + demo.PLANNING_BATCHES * 32
    assert len(set(found)) == len(found)
    assert found == demo.sentences()
    for sentence in found:
        assert sentence[0].isupper()
        assert sentence[-1] in ".!?"
        assert 8 <= len(sentence.split()) <= 40
        assert not set("=<>*`{}[]|_\\/\n") - {"_"} & set(sentence)


@pytest.mark.parametrize(
    "text",
    [
        "class Cls:\n    x = 3",
        "Too short to say much.",
        "Lists The items of a list are arbitrary Python objects.",
        "It is torn in the mid- dle of a word that was long.",
        'An open "quotation is not a whole sentence to embed.',
        "The value of ``x`` is taken from the enclosing scope here.",
        "x = y + z is what this very line of code does.",
        "This one has no full stop at all, though it has words",
    ],
)
def test_what_is_no_plain_sentence_is_left_out(text: str) -> None:
    assert not demo._is_prose(text)


def test_items_of_a_list_are_paragraphs_of_their_own() -> None:
    text = "An introduction\nover two lines:\n\n* First item,\n  going on.\n* Second item.\n\nThe end."
    paragraphs = [paragraph for paragraph in demo._paragraphs(text) if paragraph]
    assert paragraphs == ["An introduction over two lines:", "First item, going on.", "Second item.", "The end."]


class Encoder(nn.Module):
    """As much of a transformer as the embedder sees."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Any:
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


def test_the_embedding_is_the_unit_mean_over_unmasked_tokens() -> None:
    embedder = demo.Embedder(Encoder())
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with torch.no_grad():
        embeddings = embedder(input_ids=ids, attention_mask=mask)
        table = embedder.bert.table.weight  # type: ignore[union-attr]
        expected = torch.stack(((table[1] + table[2]) / 2, table[4]))
    torch.testing.assert_close(embeddings, expected / expected.norm(dim=1, keepdim=True))


def test_eager_forwards_are_counted() -> None:
    embedder = demo.Embedder(Encoder())
    before = demo.Embedder.forwards
    embedder(torch.tensor([[1]]), torch.tensor([[1]]))
    assert demo.Embedder.forwards == before + 1


def test_equal_embeddings_agree_in_everything() -> None:
    embeddings = torch.randn(40, 8)
    found = demo.fidelity(embeddings, embeddings.clone())
    assert found.cosine == pytest.approx(1.0)
    assert (found.relative_error, found.top_1, found.top_10) == (0.0, 1.0, 1.0)


def test_fidelity_sees_a_wrong_scale_that_cosine_does_not() -> None:
    embeddings = torch.randn(40, 8)
    found = demo.fidelity(embeddings, embeddings * 1.1)
    assert found.cosine == pytest.approx(1.0)
    assert found.relative_error == pytest.approx(0.01)
    assert (found.top_1, found.top_10) == (1.0, 1.0)


def test_neighbour_agreement_counts_what_both_find() -> None:
    # points on a circle: moving the last one past another changes one nearest neighbour and nothing else
    def circle(*degrees: float) -> Tensor:
        return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])

    found = demo.fidelity(circle(0, 10, 30, 60), circle(0, 10, 30, 15))
    # nearest before: 1, 0, 1, 2; after: 1, 3, 3, 1
    assert found.top_1 == pytest.approx(1 / 4)
    assert found.top_10 == 1.0  # of four rows, all three others are neighbours


def test_missing_packages_are_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AutoplanError, match=r'pip install "autoplan\[demo\]"'):
        demo.load(torch.float32)


@pytest.mark.parametrize("batch", [0, 10_000])
def test_a_batch_that_the_sentences_cannot_fill_is_an_error(batch: int) -> None:
    with pytest.raises(AutoplanError, match="1 to"):
        demo.run(batch=batch, say=lambda text: None)


def figures() -> dict[str, Any]:
    """What `run` returns, made up."""
    names = ("float32 eager", "float32 torch.compile", "bfloat16 torch.compile", "bfloat16 planned")
    speed = {
        name: {"ms_per_batch": 400.0 / n, "sentences_per_second": 80.0 * n, "speedup": float(n), "speedup_low": n - 0.1,
               "speedup_high": n + 0.1}
        for n, name in enumerate(names, 1)
    }  # fmt: skip
    own = {"cosine": 0.998, "relative_error": 4e-3, "top_1": 0.93, "top_10": 0.95}
    ratio = {"speedup": 1.3, "speedup_low": 1.2, "speedup_high": 1.4}
    planned = {
        "seconds": 2.5,
        "timing_samples": 0,
        "forwards": 6,
        "reused": True,
        "relative_error": 5e-3,
        "within_budget": True,
        "plan": {"budget": {"divergence": 0.01}},
        "versus": {"float32 torch.compile": ratio, "bfloat16 torch.compile": ratio},
    }
    return {
        "batch": 32,
        "tokens": 64,
        "sentences": {"corpus": 1000, "planned_with": 192, "judged": 512},
        "speed": speed,
        "fidelity": dict.fromkeys(names[2:], own),
        "planned": {"bfloat16": planned},
    }


def test_the_summary_shows_speed_fidelity_and_reuse() -> None:
    text = demo.summary(figures())
    for part in (
        "4.00x [3.90, 4.10]",
        "320",
        "1.30x [1.20, 1.40] bfloat16 torch.compile",
        "0.99800",
        "93.0%",
        "5.00e-03 to the bfloat16 model, within the budget of 0.01",
        "reused from the cache: 2.5 s, nothing timed, 6 forwards",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_summary_says_when_the_budget_or_the_cache_was_missed() -> None:
    missed = figures()
    missed["planned"]["bfloat16"] |= {"within_budget": False, "reused": False, "timing_samples": 1234}
    text = demo.summary(missed)
    assert "ABOVE the budget" in text
    assert "made in this run: 2.5 s, 1234 timing samples" in text

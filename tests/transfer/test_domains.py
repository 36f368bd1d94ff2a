"""Distances between domains: against plain computation, on sets that lie together and apart, and through the bank."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from ptengine.backbone import is_patched
from ptengine.data import EmbeddingTask, QuestionAnsweringTask, Task, TokenClassificationTask
from ptengine.errors import InputError, UnsupportedModelError
from ptengine.transfer import PromptBank, domain_embeddings, maximum_mean_discrepancy, proxy_a_distance
from ptengine.transfer.domains import domain_texts


def normal(seed: int, count: int = 40, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_embeddings_are_means_of_the_stock_hidden_states(tiny: ModuleType, kind: str) -> None:
    model, tokens = getattr(tiny, kind)().eval(), tiny.tokenizer()
    texts = [row["text"] for row in tiny.rows(40, 1)]  # two batches
    found = domain_embeddings(model, tokens, texts)
    assert not is_patched(model)
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            ids = torch.tensor([tokens(text)["input_ids"]])
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0]
        # fp32 through two layers of width 16
        assert torch.allclose(vector, hidden.mean(dim=0), rtol=1e-4, atol=1e-5)
    long = "fine " * 200
    assert torch.equal(domain_embeddings(model, tokens, [long]), domain_embeddings(model, tokens, [long + long]))
    with pytest.raises(InputError, match="text 1: expected at least one token"):
        domain_embeddings(model, tokens, ["fine", ""])
    with pytest.raises(InputError, match="at least one text"):
        domain_embeddings(model, tokens, [])


def test_mmd_is_the_plain_sum_over_pairs() -> None:
    a, b = normal(0, 4).double(), normal(1, 3).double()
    both = [*a, *b]
    distances = sorted(float((both[i] - both[j]).norm()) ** 2 for i in range(7) for j in range(i + 1, 7))
    width = distances[10]  # the lower median of 21

    def kernel(xs: torch.Tensor, ys: torch.Tensor) -> float:
        values = [torch.exp(-(x - y).square().sum() / (2 * width)).item() for x in xs for y in ys]
        return sum(values) / len(values)

    wanted = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    assert maximum_mean_discrepancy(a, b) == pytest.approx(wanted, rel=1e-9)
    assert maximum_mean_discrepancy(b, a) == pytest.approx(wanted, rel=1e-9)


def test_distances_grow_as_domains_move_apart() -> None:
    for distance, most in ((maximum_mean_discrepancy, 2.0), (proxy_a_distance, 2.0)):
        values = [distance(normal(0), normal(1, shift=shift)) for shift in (0.0, 1.0, 5.0)]
        assert values[0] < values[1] < values[2] <= most
        assert distance(normal(0), normal(0)) <= values[0]
    assert maximum_mean_discrepancy(normal(0), normal(0)) == pytest.approx(0, abs=1e-12)
    assert proxy_a_distance(normal(0), normal(1, shift=9.0)) == 2.0
    assert proxy_a_distance(normal(0, 200), normal(1, 200)) < 0.3  # 400 draws tell chance to about 2.5 points of error
    assert maximum_mean_discrepancy(torch.ones(3, 2), torch.ones(2, 2)) == 0


def test_bad_vectors_are_refused() -> None:
    for a, b in ((normal(0)[:0], normal(1)), (normal(0)[:, :2], normal(1)), (normal(0)[0], normal(1))):
        with pytest.raises(InputError, match="on both sides"):
            maximum_mean_discrepancy(a, b)
    with pytest.raises(InputError, match="finite"):
        proxy_a_distance(normal(0) / 0, normal(1))
    with pytest.raises(InputError, match="at least 5 texts"):
        proxy_a_distance(normal(0, 4), normal(1))


def test_a_bank_knows_which_texts_lie_near(tiny: ModuleType, tmp_path: Path) -> None:
    model, tokens, bank = tiny.gpt2(), tiny.tokenizer(), PromptBank(tmp_path)
    asked = {"model": model, "tokenizer": tokens, "task": tiny.words_task()}
    near = [{"text": f"film {word} very", "label": "pos"} for word in tiny.WORDS]
    far = [{"text": f"not {word} the meal room walk", "label": "pos"} for word in tiny.WORDS]
    for name, data in (("near", [*near, {"text": " ", "label": "pos"}]), ("far", far), ("none", None)):
        bank.add(name, tiny.soft(model, 1), data=data, **asked)
    card = bank.entry("near").card
    assert card.domain_texts == len(near)
    assert torch.equal(bank.entry("near").domain(), domain_embeddings(model, tokens, [row["text"] for row in near]))
    shots = [{"text": f"film {word} very"} for word in tiny.OTHER]
    for measure in ("mmd", "proxy_a_distance"):
        found = bank.search(measure=measure, shots=shots, **asked)
        assert [match.entry.name for match in found.matches] == ["near", "far"]
        assert found.matches[0].score < found.matches[1].score
        assert "added without" in found.refused["none"]
        table = bank.compare(measure, ["near", "far"])
        assert table["near"]["far"] == pytest.approx(table["far"]["near"])
        assert table["near"]["near"] <= table["near"]["far"]
        with pytest.raises(InputError, match="added without"):
            bank.compare(measure)
    with pytest.raises(InputError, match="expected shots"):
        bank.search(measure="mmd", **asked)
    (tmp_path / "near" / "domain.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="expected embeddings in the file"):
        bank.entry("near").domain()


@pytest.mark.parametrize(
    ("task", "row", "texts"),
    [
        (QuestionAnsweringTask(), {"question": "who", "context": "a man"}, ["who\na man"]),
        (TokenClassificationTask(labels=("O", "X")), {"tokens": ["a", "man"]}, ["a man"]),
        (EmbeddingTask(), {"text": "a", "text_pair": None}, ["a\n"]),
    ],
)
def test_texts_of_tasks_without_a_template_were_an_attribute_error(
    task: Task, row: dict[str, Any], texts: list[str]
) -> None:
    assert domain_texts([row, dict.fromkeys(row)], task) == texts  # a row of nulls alone has none


def test_texts_of_a_sorted_file_were_those_of_its_first_label(tiny: ModuleType) -> None:
    rows = [{"text": f"film {i}", "label": "pos" if i < 250 else "neg"} for i in range(500)]
    texts = domain_texts(rows, tiny.words_task())
    assert len(set(texts)) == 200
    assert sum(text in {row["text"] for row in rows[:250]} for text in texts) == 100
    assert domain_texts(rows[:3], tiny.words_task()) == ["film 0", "film 1", "film 2"]


def test_a_file_without_the_column_is_called_by_its_name(tiny: ModuleType, tmp_path: Path) -> None:
    """It was called "rows"."""
    path = tmp_path / "wrap.json"
    path.write_text('{"data": [{"text": "a"}]}')
    with pytest.raises(InputError, match=re.escape(f"{path}: expected column 'text', got the columns 'data'")):
        domain_texts(path, tiny.words_task())


def test_an_encoder_decoder_embeds_no_text_alone(tiny: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=tiny.SIZE, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=4,
            pad_token_id=4,
        )
    )  # fmt: skip
    tokens = tiny.tokenizer()
    with pytest.raises(UnsupportedModelError, match="embeds no text alone"):
        domain_embeddings(model, tokens, ["film"])
    prompt = tiny.soft(model)
    entry = PromptBank(tmp_path).add(
        "t5", prompt, model=model, tokenizer=tokens, task=tiny.words_task(), data=tiny.rows(3)
    )
    assert entry.card.domain_texts == 0


def test_an_encoder_embeds_too(tiny: ModuleType) -> None:
    model, tokens = tiny.bert().eval(), tiny.tokenizer(special=True)
    (found,) = domain_embeddings(model, tokens, ["film song"])
    with torch.no_grad():
        hidden = model.bert(torch.tensor([tokens("film song")["input_ids"]])).last_hidden_state[0]
    assert torch.allclose(found, hidden.mean(dim=0), rtol=1e-4, atol=1e-5)


def test_equal_vectors_were_taken_for_different_ones() -> None:
    """Beyond 25 rows the distances came from products, of which equal vectors leave rounding: it was the median."""
    kinds = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).double()
    a, b = kinds[[0] * 38 + [1] * 2], kinds[[0] * 35 + [1] * 5]
    # The kernel is 1 for equal vectors and exp(-1/2) for different ones.
    shares = torch.tensor([38 / 40 - 35 / 40, 2 / 40 - 5 / 40]).double()
    kernel = torch.tensor([[1, math.exp(-0.5)], [math.exp(-0.5), 1]]).double()
    assert maximum_mean_discrepancy(a, b) == pytest.approx(float(shares @ kernel @ shares), rel=1e-6)

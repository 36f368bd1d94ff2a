"""Prompt words: candidates, rankings against counts by hand, and what is made of them."""

from __future__ import annotations

import math
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from ptengine.assets import backbone_path
from ptengine.data import Template
from ptengine.errors import InputError
from ptengine.transfer import words as module
from ptengine.transfer.words import PromptWord, attention_words, domain_terms, segments, with_words, words_prompt

FILMS = ["the film had a dull plot", "a lovely plot in a film", "the film was fine"]
MEALS = ["the meal was fine", "a lovely soup and a meal", "the soup was poor"]


def test_candidates_and_where_they_stand() -> None:
    assert segments("It's OK, 3x!") == [("it's", 0, 4), ("ok", 5, 7), ("3x", 9, 11)]
    text = "电池耐用 OK好"
    found = segments(text)
    assert [word for word, _, _ in found] == ["电池", "池耐", "耐用", "电池耐", "池耐用", "电池耐用", "ok", "好"]
    assert all(text[start:end].lower() == word for word, start, end in found)


def test_log_odds_by_hand() -> None:
    found = {word.text: word for word in domain_terms(FILMS, MEALS, min_count=1, top_k=50)}
    stop = module.ENGLISH_STOP_WORDS
    mine, theirs = (Counter(w for t in texts for w in t.split() if w not in stop) for texts in (FILMS, MEALS))
    whole = mine.total() + theirs.total()
    prior = 500 * (mine["film"] + theirs["film"]) / whole
    first = math.log((mine["film"] + prior) / (mine.total() + 500 - mine["film"] - prior))
    second = math.log(prior / (theirs.total() + 500 - prior))
    wanted = (first - second) / math.sqrt(1 / (mine["film"] + prior) + 1 / prior)
    assert found["film"].score == pytest.approx(wanted)
    assert found["film"].count == 3
    assert found["fine"].score < 0.2 < found["film"].score
    assert "the" not in found


@pytest.mark.parametrize("measure", ["log_odds", "tfidf"])
def test_a_domains_own_words_come_first(measure: str) -> None:
    assert [word.text for word in domain_terms(FILMS, MEALS, measure=measure, top_k=2)] == ["film", "plot"]
    phones = ["手机电池耐用", "电池不错", "电池很差，屏幕好"]
    fruit = ["苹果很甜", "水果不错", "很差，苹果坏了"]
    (best,) = domain_terms(phones, fruit, measure=measure, top_k=1)
    assert best.text == "电池"
    names = [word.text for word in domain_terms(phones, fruit, measure=measure, min_count=1, top_k=99)]
    assert not any(one != other and one in other for one in names for other in names)


@pytest.fixture
def spotlight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that we know: 3 for the token "film", 2 for "plot" and "soup", 1 for all others."""

    def received(model: Any, ids: list[int], layers: Any) -> torch.Tensor:
        by_id = {
            model.known.convert_tokens_to_ids(word): value for word, value in (("film", 3), ("book", 2), ("song", 2))
        }
        return torch.tensor([float(by_id.get(token, 1)) for token in ids])

    monkeypatch.setattr(module, "attention_received", received)


@pytest.mark.usefixtures("spotlight")
def test_attention_words_are_measured_against_the_background(tiny: ModuleType) -> None:
    model, tokens = tiny.gpt2(), tiny.tokenizer()
    model.known = tokens
    target, background = ["the film was fine book", "song film it"], ["the song was fine", "song walk film"]
    found = {w.text: w for w in attention_words(model, tokens, target, background, min_count=1, diversity=0.0, top_k=9)}
    # Background: song 2, 2; film 3; fine, walk 1 (the rest are stop words), of mean 9 / 5.
    usual = 9 / 5
    assert found["film"].score == pytest.approx(3 / ((3 + 5 * usual) / 6), rel=1e-6)
    assert found["book"].score == pytest.approx(2 / usual, rel=1e-6)
    assert found["song"].score == pytest.approx(2 / ((4 + 5 * usual) / 7), rel=1e-6)
    assert (found["film"].count, "the" in found) == (2, False)
    assert next(iter(found)) == "film"


def test_attention_words_of_the_embedded_tokenizer_hold_whole_words(tiny: ModuleType) -> None:
    """Pieces of words, and bytes of Chinese characters, are put together again."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = AutoTokenizer.from_pretrained(backbone_path())
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64,
        )
    )  # fmt: skip
    texts = ["extraordinary battery 电池", "battery extraordinary 电池"]
    found = attention_words(model, tokens, texts, ["screen 屏幕", "keyboard"], layers=[1])
    assert {word.text for word in found} == {"extraordinary", "battery", "电池"}
    assert all(math.isfinite(word.score) and word.count == 2 for word in found)


def test_diversity_passes_over_what_is_alike() -> None:
    ranked = [PromptWord("a", 1.0, 1), PromptWord("b", 0.9, 1), PromptWord("c", 0.8, 1)]
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert [w.text for w in module._diverse(ranked, vectors, 2, 0.0)] == ["a", "b"]
    assert [w.text for w in module._diverse(ranked, vectors, 2, 0.3)] == ["a", "c"]


def test_hard_prompts_keep_columns_and_braces() -> None:
    template = with_words("About {words}.\n{text}", [PromptWord("plot", 1.0, 2), "a{b}"])
    assert template == Template("About plot, a{{b}}.\n{text}")
    assert template.render({"text": "x"}, 0) == "About plot, a{b}.\nx"
    with pytest.raises(InputError, match=r"\{words\}"):
        with_words("{text}", ["a"])
    with pytest.raises(InputError, match="0 words"):
        with_words("{words} {text}", [])


def test_soft_prompts_start_from_words(tiny: ModuleType) -> None:
    model, tokens = tiny.gpt2(), tiny.tokenizer()
    prompt = words_prompt(model, tokens, [PromptWord("film", 1.0, 1), "good"], 3)
    table = model.get_input_embeddings().weight
    for row, word in enumerate(("film", "good")):
        assert torch.equal(prompt.embeds[row], table[tokens.convert_tokens_to_ids(word)])
    assert words_prompt(model, tokens, ["film", "good"], 1).embeds.shape == (1, 16)
    with pytest.raises(InputError, match="at least one word"):
        words_prompt(model, tokens, [], 3)


def test_bad_input_is_refused(tiny: ModuleType) -> None:
    for more, said in (
        ({"measure": "luck"}, "log_odds"),
        ({"top_k": 0}, "top_k"),
        ({"min_count": 9}, "stands 9 times"),
    ):
        with pytest.raises(InputError, match=said):
            domain_terms(FILMS, MEALS, **more)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="both sides"):
        domain_terms([], MEALS)
    with pytest.raises(InputError, match="different words in the texts to compare, got 'film' alone"):
        domain_terms(["film film"], ["film"])
    for measure in ("log_odds", "tfidf"):
        with pytest.raises(InputError, match="stands 2 times"):
            domain_terms(["the"], ["of"], measure=measure)
    model, tokens = tiny.gpt2(), tiny.tokenizer()
    with pytest.raises(InputError, match="diversity"):
        attention_words(model, tokens, FILMS, MEALS, diversity=1.0)
    with pytest.raises(InputError, match="fast tokenizer"):
        attention_words(model, object(), FILMS, MEALS)


def test_punctuation_cuts_chinese() -> None:
    """A full stop was a letter, and the best term of two texts one with it."""
    assert {text for text, _, _ in segments("很好吃。不错「人々」")} == {"很好", "好吃", "很好吃", "不错", "人々"}
    terms = domain_terms(["菜很好吃。推荐", "面很好吃。推荐"], ["手机很好用。推荐", "电池很好用。推荐"])
    assert not [term.text for term in terms if "。" in term.text]

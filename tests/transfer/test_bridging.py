"""Bridging in rounds: what competes, what goes on, and that the best of all rounds is kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ptengine.errors import InputError
from ptengine.prompts import SoftPrompt, load_prompt
from ptengine.training import TrainingConfig, evaluate
from ptengine.transfer import bridge, bridging, nearest_words, words_prompt
from ptengine.transfer.guard import folds

CONFIG = TrainingConfig(
    output_dir="unset", max_steps=4, per_device_train_batch_size=4, disable_tqdm=True, seed=3, save_steps=2
)


def run(tiny: ModuleType, folder: Path, **more: Any) -> Any:
    model, draw = tiny.gpt2(dropout=0.0), tiny.rows(60, 9)
    shots = [row for label in ("pos", "neg") for row in [r for r in draw if r["label"] == label][:5]]
    given = {
        "task": tiny.words_task(), "shots": shots, "training": replace(CONFIG, output_dir=str(folder)),
        "texts": ["film film film song song walk", "walk talk", "talk great", "great song"],
        "background": ["meal room", "room meal book", "song meal great"],
        "sources": {"other": tiny.soft(model, 5)}, "num_virtual_tokens": 3, "rounds": 2,
    }  # fmt: skip
    return bridge(model, tiny.tokenizer(), **(given | more)), model, shots


def test_rounds_generate_optimise_and_select(tiny: ModuleType, tmp_path: Path) -> None:
    result, model, shots = run(tiny, tmp_path)
    first, second = result.rounds
    assert set(first.losses) == {"log_odds", "tfidf", "sample-0", "sample-1", "scratch", "other"}
    assert set(first.words) == {"log_odds", "tfidf", "sample-0", "sample-1"}
    assert "film" in first.words["log_odds"]
    assert not set(first.words["log_odds"]) & {"meal", "room", "book"}
    assert list(first.kept) == sorted(first.losses, key=first.losses.__getitem__)[:2]
    assert set(second.losses) == {*first.kept, *second.words}
    assert second.words.keys() <= {f"{name}-read" for name in first.kept}
    lists = [tuple(words) for one in result.rounds for words in one.words.values()]
    assert len(set(lists)) == len(lists)
    everything = [loss for one in result.rounds for loss in one.losses.values()]
    assert result.loss == min(everything) == result.rounds[result.round].losses[result.name]
    told = json.loads((tmp_path / "bridge.json").read_text())
    assert (told["name"], told["loss"]) == (result.name, result.loss)
    assert torch.equal(load_prompt(tmp_path / "prompt", model).embeds, result.prompt.embeds)
    # The loss is that on the rows held back, which nothing was trained on.
    _, away = folds([row["label"] for row in shots], len(shots), 4, CONFIG.seed)[0]
    held = [shots[i] for i in away]
    found = evaluate(model, result.prompt, tiny.words_task(), held, tiny.tokenizer()).metrics["loss"]
    assert found == pytest.approx(result.loss, abs=1e-6)
    # A survivor's words are those that its virtual tokens lay nearest to.
    survivor = load_prompt(tmp_path / "round-0" / first.kept[0] / "prompt", model)
    read = nearest_words(model, tiny.tokenizer(), survivor)
    assert list(second.words[f"{first.kept[0]}-read"])[: len(read)] == read


def test_words_that_have_been_tried_are_not_embedded_again(tiny: ModuleType, tmp_path: Path) -> None:
    """Three words for three virtual tokens: both measures and all that is read back agree on them."""
    texts = ["film song film", "song film walk walk"]
    result, *_ = run(tiny, tmp_path, texts=texts, background=["meal room"], samples=0, sources={}, rounds=1)
    assert set(result.rounds[0].losses) == {"log_odds", "scratch"}
    assert set(result.rounds[0].words["log_odds"]) == {"film", "song", "walk"}


def test_a_bridge_that_was_cut_off_goes_on_to_the_same_result(tiny: ModuleType, tmp_path: Path) -> None:
    whole, *_ = run(tiny, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("prompt", "round-1/checkpoint-4"):
        shutil.rmtree(tmp_path / "cut" / name)
    again, *_ = run(tiny, tmp_path / "cut", resume=True)
    assert again.to_json() == whole.to_json()
    assert torch.equal(again.prompt.embeds, whole.prompt.embeds)
    with pytest.raises(InputError, match="resume=True"):
        run(tiny, tmp_path / "cut")


def test_words_are_read_back_from_a_prompt_made_of_them(tiny: ModuleType) -> None:
    model, tokens = tiny.llama(), tiny.tokenizer()
    prompt = words_prompt(model, tokens, ["song", "great", "walk"], 3)
    assert nearest_words(model, tokens, prompt) == ["song", "great", "walk"]
    twice = SoftPrompt(model, init="array", array=prompt.embeds[[0, 0, 2]].detach() * 3)
    assert nearest_words(model, tokens, twice) == ["song", "walk"]
    tokens.add_special_tokens({"additional_special_tokens": ["song"]})  # special by name, a word by its looks
    (first, *_) = nearest_words(model, tokens, prompt)
    assert first != "song"
    assert first in tiny.WORDS
    with pytest.raises(InputError, match="folds to a SoftPrompt"):
        nearest_words(model, tokens, tiny.prefix(model))


def test_bad_input_is_refused_before_anything_is_written(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.gpt2(dropout=0.0)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rounds": 0}, "expected rounds"),
        ({"samples": -1}, "expected samples"),
        ({"keep": True}, "expected keep"),
        # It was told that a top_k was wrong.
        ({"num_virtual_tokens": 0}, "expected num_virtual_tokens, .* got 0"),
        ({"task": tiny.text_task()}, "labels are words"),
        ({"shots": tiny.rows(3)}, "for 4 folds"),
        ({"texts": ["once"]}, "stands 2 times"),
        ({"sources": {"deep": tiny.prefix(model)}}, "folds to a SoftPrompt"),
        ({"sources": {"scratch": tiny.soft(model)}}, "got 'scratch'"),
        ({"sources": {"a/b": tiny.soft(model)}}, "got 'a/b'"),
        # The system refused a folder of this name, after prompts had been made.
        ({"sources": {"\U00020000" * 70: tiny.soft(model)}}, "at most 240 bytes"),
        # It was counted as a label called 'None'.
        ({"shots": [*tiny.rows(12, 9), {"text": "it was", "label": None}]}, "row 12 .*column 'label', got"),
        ({"training": replace(CONFIG, output_dir=str(tmp_path), eval_strategy="epoch")}, "eval_strategy off"),
    ]
    for more, words in cases:
        with pytest.raises(InputError, match=words):
            run(tiny, tmp_path / "out", **more)
        assert not (tmp_path / "out").exists(), words


def test_other_words_and_sources_were_taken_up_as_those_of_before(tiny: ModuleType, tmp_path: Path) -> None:
    """A run that was done said the new words of the old prompts."""
    model, folder = tiny.gpt2(dropout=0.0), tmp_path / "out"
    settings = {"rounds": 1, "samples": 0}
    result, *_ = run(tiny, folder, **settings)
    other = {"texts": ["book book meal meal room room"], "background": ["film", "song"]}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"sources": {"other": tiny.soft(model, 6)}}, r"expected starts\.other='\w+' as in"),
        (other, r"expected terms\.log_odds=\['film', .* got \['book', "),
        ({"keep": 1}, "expected keep=2 as in"),
    ]
    for more, words in cases:
        with pytest.raises(InputError, match=words):
            run(tiny, folder, resume=True, **(settings | more))
    again, *_ = run(tiny, folder, resume=True, rounds=2, samples=0)
    assert again.rounds[0] == result.rounds[0]


def test_a_survivor_was_not_read_where_an_earlier_reading_of_it_survived_too(tiny: ModuleType, tmp_path: Path) -> None:
    """The new candidate would have had its name."""
    model, tokens = tiny.gpt2(dropout=0.0), tiny.tokenizer()
    work = bridging._Work(model, tokens, tiny.words_task(), replace(CONFIG, output_dir=str(tmp_path)), [], [], 2)
    made = {"a": ["song", "great"], "a-read": ["film", "walk"], "a-read-read": ["film", "walk"]}
    survivors = {name: words_prompt(model, tokens, words, 2) for name, words in made.items()}
    _, words = work.following(survivors, {"log_odds": []}, set())
    assert sorted(words.values()) == [["film", "walk"], ["song", "great"]]
    assert not words.keys() & survivors.keys()

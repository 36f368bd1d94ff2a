"""The bank: entries come back as they went in, appear whole or not at all, and are refused to another backbone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ptengine.errors import InputError
from ptengine.prompts import SoftPrompt
from ptengine.training import evaluate
from ptengine.training.folders import exclusive
from ptengine.transfer import PromptBank
from ptengine.transfer.identity import tokenizer_sha256


def add(bank: PromptBank, tiny: ModuleType, name: str, prompt: Any, model: Any, **more: Any) -> Any:
    return bank.add(name, prompt, model=model, tokenizer=tiny.tokenizer(), task=tiny.words_task(), **more)


def test_an_entry_comes_back_as_it_went_in(tiny: ModuleType, tmp_path: Path) -> None:
    model, tokens = tiny.gpt2(), tiny.tokenizer()
    data = tmp_path / "films.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(5)), encoding="utf-8")
    prompt, initial = tiny.soft(model, 1), tiny.soft(model, 2)
    bank = PromptBank(tmp_path / "bank")
    assert bank.list() == ()
    added = add(bank, tiny, "影评-1", prompt, model, data=data, metrics={"accuracy": 0.5}, initial=initial, note="n")
    (entry,) = PromptBank(tmp_path / "bank").list()
    assert entry == added
    assert entry.card.task == tiny.words_task()
    assert entry.card.data is not None
    assert (entry.card.data.name, entry.card.data.rows) == ("films.jsonl", 5)
    assert entry.card.data.sha256 == hashlib.sha256(data.read_bytes()).hexdigest()
    assert entry.card.metrics == {"accuracy": 0.5}
    assert torch.equal(entry.load(model, tokens).embeds, prompt.embeds)
    assert torch.equal(entry.load_initial(model, tokens).embeds, initial.embeds)
    assert str(tmp_path) not in (entry.path / "card.json").read_text(encoding="utf-8")


def test_another_backbone_or_tokenizer_is_refused_with_the_reason(tiny: ModuleType, tmp_path: Path) -> None:
    model, tokens = tiny.gpt2(), tiny.tokenizer()
    entry = add(PromptBank(tmp_path), tiny, "a", tiny.soft(model), model)
    with pytest.raises(InputError, match=r"model_type 'gpt2', this one has 'llama'"):
        entry.load(tiny.llama(), tokens)
    with pytest.raises(InputError, match="in float32, this one is loaded in bfloat16"):
        entry.load(tiny.gpt2().to(torch.bfloat16), tokens)
    other = tiny.gpt2()
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight.add_(1)
    with pytest.raises(InputError, match="same shape with other weights"):
        entry.load(other, tokens)
    with pytest.raises(InputError, match="another tokenizer"):
        entry.load(model, tiny.tokenizer(special=True))
    with pytest.raises(InputError, match="added without"):
        entry.load_initial(model, tokens)


def test_the_tokenizer_is_the_same_after_a_call_that_truncates(tiny: ModuleType) -> None:
    """A fast tokenizer remembers truncation and padding of its last call, which are no part of what it is."""
    tokens = tiny.tokenizer()
    before = tokenizer_sha256(tokens)
    tokens(["it was fine", "it"], truncation=True, max_length=2, padding=True)
    assert tokenizer_sha256(tokens) == before
    tokens.add_special_tokens({"additional_special_tokens": ["[X]"]})
    assert tokenizer_sha256(tokens) != before


def test_a_failed_write_leaves_the_bank_as_it_was(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bank = tiny.gpt2(), PromptBank(tmp_path / "bank")
    add(bank, tiny, "a", tiny.soft(model, 1), model)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ptengine.transfer.bank.write_json_atomic", full)
        for name, replace in (("a", True), ("b", False)):
            with pytest.raises(OSError, match="No space"):
                add(bank, tiny, name, tiny.soft(model, 2), model, replace=replace)
    assert sorted(path.name for path in (tmp_path / "bank").iterdir()) == [".lock", "a"]
    assert torch.equal(bank.entry("a").load(model, tiny.tokenizer()).embeds, tiny.soft(model, 1).embeds)
    add(bank, tiny, "a", tiny.soft(model, 2), model, replace=True)
    assert torch.equal(bank.entry("a").load(model, tiny.tokenizer()).embeds, tiny.soft(model, 2).embeds)
    bank.remove("a")
    assert bank.list() == ()


def test_what_a_killed_change_left_behind_is_put_right(tiny: ModuleType, tmp_path: Path) -> None:
    """A kill between the two renames of a replacement leaves the old entry aside and none in its place."""
    model, bank = tiny.gpt2(), PromptBank(tmp_path)
    entry = add(bank, tiny, "a", tiny.soft(model, 1), model)
    entry.path.rename(tmp_path / ".old-a-12345678")
    (tmp_path / ".tmp-a-12345678").mkdir()
    assert bank.list() == ()
    add(bank, tiny, "b", tiny.soft(model, 2), model)
    assert [one.name for one in bank.list()] == ["a", "b"]
    assert not list(tmp_path.glob(".tmp-*"))
    with exclusive(tmp_path), pytest.raises(InputError, match="another process is changing it"):
        bank.remove("a")


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../a", "x" * 81, 3])
def test_names_that_are_no_folder_are_refused(tiny: ModuleType, tmp_path: Path, name: Any) -> None:
    model = tiny.gpt2()
    with pytest.raises(InputError, match="expected a name of at most 80"):
        add(PromptBank(tmp_path / "bank"), tiny, name, tiny.soft(model), model)
    assert not (tmp_path / "bank").exists()


def test_bad_additions_are_refused_before_anything_is_written(tiny: ModuleType, tmp_path: Path) -> None:
    model, bank = tiny.gpt2(), PromptBank(tmp_path / "bank")
    with pytest.raises(InputError, match="another backbone"):
        add(bank, tiny, "a", tiny.soft(tiny.llama()), model)
    with pytest.raises(InputError, match="finite numbers"):
        add(bank, tiny, "a", tiny.soft(model), model, metrics={"loss": float("nan")})
    with pytest.raises(InputError, match="initial prompt of the form"):
        add(bank, tiny, "a", tiny.soft(model), model, initial=SoftPrompt(model, 3))
    with pytest.raises(InputError, match="expected a task"):
        bank.add("a", tiny.soft(model), model=model, tokenizer=tiny.tokenizer(), task="sentiment")  # type: ignore[arg-type]
    assert not (tmp_path / "bank").exists()
    add(bank, tiny, "a", tiny.soft(model), model)
    with pytest.raises(InputError, match=r"name that is free.*--replace"):
        add(bank, tiny, "a", tiny.soft(model), model)
    with pytest.raises(InputError, match=r"one of a, got 'b'"):
        bank.entry("b")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no folder"):
        PromptBank(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "format version 1"),
        ({"name": "b"}, "got that of 'b'"),
        ({"metrics": {"loss": "low"}}, "finite numbers"),
        ({"task": {"kind": "other"}}, "expected a task"),
        ({"backbone": {"facts": {}}}, "'fingerprint'"),
        ({"num_virtual_tokens": "4"}, "'num_virtual_tokens'"),
        ({"data": "films.csv"}, "'data'"),
    ],
)
def test_a_damaged_card_names_its_file(tiny: ModuleType, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    model, bank = tiny.gpt2(), PromptBank(tmp_path)
    path = add(bank, tiny, "a", tiny.soft(model), model).path / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=words) as raised:
        bank.list()
    assert "a" in str(raised.value)


def test_search_by_the_loss_on_a_few_shots(tiny: ModuleType, tmp_path: Path) -> None:
    model, bank, shots = tiny.gpt2(), PromptBank(tmp_path), tiny.rows(6, 3)
    losses = {}
    for seed in range(3):
        prompt = tiny.soft(model, seed)
        add(bank, tiny, f"p{seed}", prompt, model)
        losses[f"p{seed}"] = evaluate(model, prompt, tiny.words_task(), shots, tiny.tokenizer()).metrics["loss"]
    found = bank.search(model=model, tokenizer=tiny.tokenizer(), task=tiny.words_task(), shots=shots, exclude=["p1"])
    assert [match.entry.name for match in found.matches] == sorted(["p0", "p2"], key=losses.__getitem__)
    assert [match.score for match in found.matches] == sorted([losses["p0"], losses["p2"]])
    assert found.refused == {}


def test_one_damaged_entry_ended_a_search_by_shots(tiny: ModuleType, tmp_path: Path) -> None:
    model, bank = tiny.gpt2(), PromptBank(tmp_path)
    for seed in range(2):
        add(bank, tiny, f"p{seed}", tiny.soft(model, seed), model)
    weights = tmp_path / "p0" / "prompt.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    found = bank.search(model=model, tokenizer=tiny.tokenizer(), task=tiny.words_task(), shots=tiny.rows(6, 3))
    assert [match.entry.name for match in found.matches] == ["p1"]
    assert str(weights) in found.refused["p0"]


def test_an_entry_that_is_gone_cannot_be_taken(tiny: ModuleType, tmp_path: Path) -> None:
    """FileNotFoundError, and a bank's folder made for nothing."""
    model, bank = tiny.gpt2(), PromptBank(tmp_path / "one")
    entry = add(bank, tiny, "a", tiny.soft(model, 1), model)
    bank.remove("a")
    with pytest.raises(InputError, match="got 'a'"):
        PromptBank(tmp_path / "other").take(entry)
    assert not (tmp_path / "other").exists()


def test_search_by_similarity_names_what_it_could_not_ask(tiny: ModuleType, tmp_path: Path) -> None:
    model, llama, bank = tiny.gpt2(), tiny.llama(), PromptBank(tmp_path)
    mine = tiny.soft(model, 1)
    add(bank, tiny, "same", mine, model)
    add(bank, tiny, "else", tiny.soft(model, 2), model)
    add(bank, tiny, "prefix", tiny.prefix(model), model)
    add(bank, tiny, "llama", tiny.soft(llama, 1), llama)
    asked = {"model": model, "tokenizer": tiny.tokenizer()}
    found = bank.search(**asked, measure="mean_token_cosine", prompt=mine)
    assert [match.entry.name for match in found.matches] == ["same", "else"]
    assert found.matches[0].score == pytest.approx(1)
    assert set(found.refused) == {"prefix", "llama"}
    assert "model_type" in found.refused["llama"]
    with pytest.raises(InputError, match="expected shots"):
        bank.search(**asked, task=tiny.words_task())
    with pytest.raises(InputError, match="expected measure"):
        bank.search(**asked, measure="luck")
    # What nothing read was taken, under any name.
    with pytest.raises(InputError, match="expected no max_length to search by mean_token_cosine"):
        bank.search(**asked, measure="mean_token_cosine", prompt=mine, max_length=3)
    with pytest.raises(TypeError, match="nonsense"):
        bank.search(**asked, measure="mean_token_cosine", prompt=mine, nonsense=3)
    with pytest.raises(InputError, match="with none"):
        PromptBank(tmp_path / "empty").search(**asked, measure="token_cosine", prompt=mine)


def test_compare_gives_a_symmetric_table(tiny: ModuleType, tmp_path: Path) -> None:
    model, bank = tiny.gpt2(), PromptBank(tmp_path)
    start = tiny.soft(model, 0)
    for seed in (1, 2):
        add(bank, tiny, f"p{seed}", tiny.soft(model, seed), model, initial=start)
    for measure in ("mean_token_cosine", "task_vector_cosine"):
        table = bank.compare(measure)
        assert table["p1"]["p2"] == table["p2"]["p1"]
        assert table["p1"]["p1"] == pytest.approx(1)
    add(bank, tiny, "p3", tiny.soft(model, 3), model)
    with pytest.raises(InputError, match="P0"):
        bank.compare("task_vector_cosine")
    assert set(bank.compare("task_vector_cosine", ["p2", "p1"])) == {"p1", "p2"}
    with pytest.raises(InputError, match="expected measure"):
        bank.compare("shot_loss")


@pytest.mark.parametrize("key", ["data", "initial_sha256", "note"])
def test_a_card_without_a_key_was_a_key_error(tiny: ModuleType, tmp_path: Path, key: str) -> None:
    model, bank = tiny.gpt2(), PromptBank(tmp_path)
    path = add(bank, tiny, "a", tiny.soft(model), model).path / "card.json"
    card = json.loads(path.read_text())
    del card[key]
    path.write_text(json.dumps(card))
    with pytest.raises(InputError, match=f"expected '{key}' on the card, got 'no such key'") as raised:
        bank.list()
    assert str(path) in str(raised.value)


def broken(prompt: Any, value: float = float("nan")) -> Any:
    with torch.no_grad():
        prompt.embeds[0, 0] = value
    return prompt


def test_prompts_with_nan_were_ranked_first(tiny: ModuleType, tmp_path: Path) -> None:
    """They can no longer be added; one that lies there is refused by every measure."""
    model, bank, shots = tiny.gpt2(), PromptBank(tmp_path), tiny.rows(6, 3)
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="expected a prompt of finite numbers"):
            add(bank, tiny, "a", broken(tiny.soft(model), value), model)
    with pytest.raises(InputError, match="expected a prompt of finite numbers"):
        add(bank, tiny, "a", tiny.soft(model), model, initial=broken(tiny.soft(model)))
    assert not bank.list()
    for seed in range(2):
        add(bank, tiny, f"p{seed}", tiny.soft(model, seed), model, data=tiny.rows(6, seed))
    broken(tiny.soft(model)).save(tmp_path / "p0")
    asked = {"model": model, "tokenizer": tiny.tokenizer(), "task": tiny.words_task()}
    for measure, given in (
        ("shot_loss", {"shots": shots}),
        ("mmd", {"shots": shots}),
        ("token_cosine", {"prompt": tiny.soft(model, 3)}),
    ):
        found = bank.search(measure=measure, **given, **asked)
        assert [match.entry.name for match in found.matches] == ["p1"]
        assert "finite numbers" in found.refused["p0"]
    with pytest.raises(InputError, match=r"cannot compare 'p0' with 'p0': expected a prompt of finite numbers"):
        bank.compare("token_cosine")
    with pytest.raises(InputError, match="expected a prompt of finite numbers"):
        bank.search(measure="token_cosine", prompt=broken(tiny.soft(model)), **asked)


def test_a_loss_that_is_not_finite_was_a_score(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bank = tiny.gpt2(), PromptBank(tmp_path)
    add(bank, tiny, "a", tiny.soft(model), model)
    monkeypatch.setattr("ptengine.transfer.bank.shot_metrics", lambda *_, **__: {"loss": float("nan")})
    found = bank.search(model=model, tokenizer=tiny.tokenizer(), task=tiny.words_task(), shots=tiny.rows(4))
    assert (found.matches, dict(found.refused)) == ((), {"a": "its loss on the shots is nan"})


def test_a_name_of_more_bytes_than_a_folder_s_was_taken(tiny: ModuleType, tmp_path: Path) -> None:
    model, bank = tiny.gpt2(), PromptBank(tmp_path / "bank")
    with pytest.raises(InputError, match="at most 240 bytes in UTF-8, got 320"):
        add(bank, tiny, "𠀀" * 80, tiny.soft(model), model)
    assert not bank.list()
    assert add(bank, tiny, "好" * 80, tiny.soft(model), model).name == "好" * 80


def test_files_of_a_killed_write_stayed_for_ever(tiny: ModuleType, tmp_path: Path) -> None:
    model, bank = tiny.gpt2(), PromptBank(tmp_path)
    (tmp_path / ".tmp-card.json-abcdefgh").write_text("{")
    (tmp_path / "mine.tmp-1").write_text("")
    add(bank, tiny, "a", tiny.soft(model), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a", "mine.tmp-1"]


def test_an_entry_whose_removal_was_killed_stayed_half_there(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bank = tiny.gpt2(), PromptBank(tmp_path)
    add(bank, tiny, "a", tiny.soft(model, 1), model)
    with monkeypatch.context() as patch:

        def killed(folder: Path) -> None:
            (folder / "prompt.safetensors").unlink()
            raise KeyboardInterrupt

        patch.setattr("ptengine.transfer.bank.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            bank.remove("a")
    assert bank.list() == ()
    add(bank, tiny, "b", tiny.soft(model, 2), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "b"]

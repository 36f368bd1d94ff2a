"""The whole flow on tiny files: every stage leaves what it says, nothing leaks, and it goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ptengine.errors import InputError
from ptengine.prompts import SoftPrompt, load_prompt
from ptengine.training import TrainingConfig
from ptengine.transfer import Augmentation, Guard, Joint, PromptBank, SelfTrain, Strategy
from ptengine.transfer.cleaning import Cleaning
from ptengine.transfer.flow import CONTROL, FROZEN, FlowSettings, run_flow
from ptengine.transfer.flow_report import flow_report
from ptengine.transfer.report import write_report

SETTINGS = FlowSettings(num_virtual_tokens=3, shots=4, source_steps=4, guard=Guard(folds=2))


def run(tiny: ModuleType, output: Path, settings: FlowSettings = SETTINGS, **more: Any) -> Any:
    model, target = tiny.gpt2(dropout=0.0), tiny.rows(40, 2)
    training = TrainingConfig(
        output_dir=str(output), max_steps=3, per_device_train_batch_size=4, disable_tqdm=True, save_steps=2, seed=5
    )
    given: dict[str, Any] = {
        "sources": {"a": [*tiny.rows(20, 0), target[0], {"text": "", "label": "pos"}], "b": tiny.rows(20, 1)},
        "target": target[:30],
        "test": target[30:],
        "task": tiny.words_task(),
    }
    return run_flow(model, tiny.tokenizer(), settings=settings, training=training, **(given | more))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def done(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    output = tmp_path_factory.mktemp("flow") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        patch.setattr("ptengine.training.trainer.draw_curve", lambda path, *_: path)
        return run(tiny, output), output


def test_every_stage_leaves_what_it_says(done: tuple[Any, Path], tiny: ModuleType) -> None:
    result, output = done
    clean = output / "clean"
    assert Counter(row["label"] for row in lines(clean / "shots.jsonl")) == {"pos": 4, "neg": 4}
    bank = PromptBank(output / "bank")
    assert [entry.name for entry in bank.list()] == ["a", "b"]
    assert all(entry.card.initial_sha256 for entry in bank.list())
    assert bank.entry("a").card.metrics["accuracy"] >= 0
    assert set(result.test) == {FROZEN, CONTROL, "scratch", "source", "transferred"}
    assert set(result.sources) == {"a", "b"}
    assert set(result.baselines) == {"majority class", "bag of characters"}
    kept = load_prompt(output / "prompt", tiny.gpt2())
    assert torch.equal(kept.embeds, result.transfer.prompt.embeds)
    (selected,) = result.transfer.selected
    assert result.test["source"] == result.sources[selected]
    assert set(result.curves) == {"scratch", "transferred"}
    assert set(result.adaptivity) == set(result.test)
    assert result.adaptivity[FROZEN].num_virtual_tokens == 0
    # The control is another prompt: its source saw the labels in another order.
    assert result.test[CONTROL].metrics["loss"] != result.test["transferred"].metrics["loss"]


def test_no_text_of_the_test_or_the_shots_is_trained_on(done: tuple[Any, Path]) -> None:
    _, output = done
    parts = {path.stem: {row["text"] for row in lines(path)} for path in (output / "clean").glob("*.jsonl")}
    assert set(parts) == {"shots", "test", "source-a", "source-b"}
    assert not parts["test"] & (parts["shots"] | parts["source-a"] | parts["source-b"])
    assert not parts["shots"] & (parts["source-a"] | parts["source-b"])
    reports = {report["source"]: report for report in json.loads((output / "clean" / "cleaning.json").read_text())}
    assert reports["a"]["dropped"]["a text is missing"] == 1


def test_the_report_says_what_the_result_says(done: tuple[Any, Path], tiny: ModuleType, tmp_path: Path) -> None:
    result, _ = done
    report = flow_report(result, tiny.words_task(), "films")
    gain = result.test["transferred"].metrics["accuracy"] - result.test["scratch"].metrics["accuracy"]
    assert report.data["measures"]["absolute_gain"]["value"] == pytest.approx(gain)
    assert report.summary[0] == f"The guard: {result.transfer.decision.reason}."
    assert f"{100 * gain:+.1f} points" in report.summary[2]
    assert {figure.name for figure in report.figures} == {"curves", "gains", "similarity"}
    said = write_report(tmp_path, report)["markdown"].read_text(encoding="utf-8")
    for name, judged in result.test.items():
        assert f"| {name} | {judged.metrics['accuracy']:.4f} |" in said
    assert f"| source | {result.adaptivity['source'].text_loss:.4f} |" in said
    kept = result.test[result.transfer.chosen]
    assert f"| pos | {kept.confusion[1][0]} | {kept.confusion[1][1]} |" in said


def test_a_flow_that_was_cut_off_goes_on_to_the_same_result(
    done: tuple[Any, Path], tiny: ModuleType, tmp_path: Path
) -> None:
    whole, output = done
    cut = tmp_path / "cut"
    shutil.copytree(output, cut)
    for name in ("control", "prompt", "target/transferred", "sources/b/prompt", "sources/b/checkpoint-4", "bank/b"):
        shutil.rmtree(cut / name)
    again = run(tiny, cut)
    assert again.test == whole.test
    assert again.transfer.decision == whole.transfer.decision
    with pytest.raises(InputError, match="another output_dir"):
        run(tiny, cut, replace(SETTINGS, source_steps=5))


def test_without_a_test_file_the_rest_of_the_target_judges(tiny: ModuleType, tmp_path: Path) -> None:
    settings = replace(SETTINGS, control=False, test_rows=7)
    result = run(tiny, tmp_path, settings, test=None)
    assert CONTROL not in result.test
    test, shots = lines(tmp_path / "clean" / "test.jsonl"), lines(tmp_path / "clean" / "shots.jsonl")
    assert len(test) == 7
    assert not {row["text"] for row in test} & {row["text"] for row in shots}
    assert "shuffled_gain" not in flow_report(result, tiny.words_task(), "t").data["measures"]


def test_pooled_sources_are_one_source_of_all_their_rows(tiny: ModuleType, tmp_path: Path) -> None:
    pooled = replace(SETTINGS, pool_sources=True)
    result = run(tiny, tmp_path / "out", pooled)
    bank = PromptBank(tmp_path / "out" / "bank")
    assert [entry.name for entry in bank.list()] == ["pooled"]
    rows = [lines(tmp_path / "out" / "clean" / f"source-{name}.jsonl") for name in "ab"]
    held = (len(rows[0]) + len(rows[1])) // 5
    assert bank.entry("pooled").card.data.rows == len(rows[0]) + len(rows[1]) - held
    assert set(result.sources) == {"pooled"}
    assert result.test["source"] == result.sources["pooled"]
    assert CONTROL in result.test
    other = SoftPrompt(tiny.gpt2(dropout=0.0), 3)
    taken = PromptBank(tmp_path / "bank")
    taken.add("pooled", other, model=tiny.gpt2(dropout=0.0), tokenizer=tiny.tokenizer(), task=tiny.words_task())
    for message, more in (
        ("at least two sources to pool, got 1", {"sources": {"a": tiny.rows(20, 0)}}),
        ("other names than the bank's prompts, got 'pooled' in both", {"bank": taken}),
    ):
        with pytest.raises(InputError, match=message):
            run(tiny, tmp_path / "refused", pooled, **more)
    assert not (tmp_path / "refused").exists()


def test_unlabelled_texts_and_changed_copies_go_all_the_way(tiny: ModuleType, tmp_path: Path) -> None:
    target = tiny.rows(40, 2)
    texts = [{"text": row["text"]} for row in [*tiny.rows(10, 6), *target]]
    strategy = Strategy(self_train=SelfTrain(0.5, 0.5))
    settings = replace(SETTINGS, control=False, strategy=strategy, augmentation=Augmentation(copies=1, delete=0.4))
    result = run(tiny, tmp_path, settings, unlabelled=texts)
    clean = {path.stem: {row["text"] for row in lines(path)} for path in (tmp_path / "clean").glob("*.jsonl")}
    assert clean["unlabelled"]
    assert not clean["unlabelled"] & (clean["test"] | clean["shots"])
    assert result.transfer.taught.texts == len(clean["unlabelled"])
    assert result.transfer.augmented.rows == 8
    # The source's card says that it was tuned on more rows than were left of the file but for those held back.
    assert (
        PromptBank(tmp_path / "bank").entry("a").card.data.rows > len(clean["source-a"]) - len(clean["source-a"]) // 5
    )
    notes = flow_report(result, tiny.words_task(), "t").notes
    assert any(note.startswith(f"Of {len(clean['unlabelled'])} unlabelled texts") for note in notes)
    assert any("changed copies of the 8 shots" in note for note in notes)
    with pytest.raises(InputError, match="unlabelled texts with a strategy"):
        run(tiny, tmp_path / "out", unlabelled=texts)
    assert not (tmp_path / "out").exists()


def test_banked_prompts_are_sources_too(tiny: ModuleType, tmp_path: Path) -> None:
    model, tokens, bank = tiny.gpt2(dropout=0.0), tiny.tokenizer(), PromptBank(tmp_path / "bank")
    asked: dict[str, Any] = {"model": model, "tokenizer": tokens, "task": tiny.words_task(), "data": tiny.rows(9)}
    for name, seed in (("one", 1), ("two", 2)):
        bank.add(name, SoftPrompt(model, 3, seed=seed), **asked)
    bank.add("long", SoftPrompt(model, 4), **asked)
    bank.add("deep", tiny.prefix(model), **asked)
    before = sorted(path.name for path in bank.path.rglob("*"))
    result = run(tiny, tmp_path / "out", sources={}, bank=bank)
    assert sorted(path.name for path in bank.path.rglob("*")) == before
    assert set(result.sources) == {"one", "two"}
    (selected,) = result.transfer.selected
    assert result.test["source"] == result.sources[selected]
    assert PromptBank(tmp_path / "out" / "bank").entry("one").card == bank.entry("one").card
    assert CONTROL not in result.test
    notes = flow_report(result, tiny.words_task(), "t").notes
    assert any(f"no control with shuffled labels: the data of {selected}" in note for note in notes)
    assert set(result.left_out) == {"long", "deep"}
    assert any("long was left out: it is a soft_prompt of 4 tokens" in note for note in notes)
    assert run(tiny, tmp_path / "out", sources={}, bank=bank).test == result.test  # goes on
    both = run(tiny, tmp_path / "both", sources={"a": tiny.rows(20, 0)}, bank=bank)
    assert set(both.sources) == {"a", "one", "two"}
    joint = replace(SETTINGS, strategy=Strategy(joint=Joint()))
    for more, words in (
        ({"sources": {"one": tiny.rows(20, 0)}, "bank": bank}, "'one' in both"),
        ({"sources": {}, "bank": PromptBank(tmp_path / "none")}, "a prompt to transfer from"),
        ({"sources": {}, "bank": bank, "settings": joint}, "sources with their rows"),
    ):
        with pytest.raises(InputError, match=words):
            run(tiny, tmp_path / "bad", **more)
        assert not (tmp_path / "bad").exists()


def test_bad_input_is_refused_before_anything_is_written(tiny: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for more, words in (
        ({"sources": {}}, "at least one source"),
        ({"sources": {"a": [{"review": "x", "label": "pos"}]}}, "'text'"),
        ({"target": [{"text": "fine", "label": "pos"}], "test": None}, "got neither"),
        ({"settings": replace(SETTINGS, source_learning_rate=1e30)}, "learning_rate to be a number below 1e"),
    ):
        with pytest.raises(InputError, match=words):
            run(tiny, output, **more)
        assert not output.exists()
    for bad in ({"shots": 0}, {"source_steps": 0}, {"num_virtual_tokens": None}, {"test_rows": True}):
        with pytest.raises(InputError, match="whole number"):
            replace(SETTINGS, **bad)  # type: ignore[arg-type]
    assert SETTINGS.cleaning == Cleaning()

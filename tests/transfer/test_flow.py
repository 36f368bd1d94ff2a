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

from ptengine.data import Template
from ptengine.errors import InputError
from ptengine.prompts import SoftPrompt, load_prompt
from ptengine.training import TrainingConfig
from ptengine.training.folders import exclusive
from ptengine.transfer import Augmentation, Guard, Initialize, Joint, PromptBank, SelfTrain, Strategy, transfer
from ptengine.transfer.bank import weights_sha256
from ptengine.transfer.cleaning import Cleaning
from ptengine.transfer.flow import CONTROL, CURVE_ROWS, FROZEN, FlowSettings, run_flow
from ptengine.transfer.flow_data import prepared
from ptengine.transfer.flow_report import flow_report
from ptengine.transfer.report import write_report
from ptengine.transfer.self_training import teach

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
        "training": training,
    }
    return run_flow(model, tiny.tokenizer(), settings=settings, **(given | more))


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
    assert "accuracy" in bank.entry("a").card.metrics
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
    with pytest.raises(InputError, match=r"expected source_steps=4 as in the transfer in .*, got 5"):
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
    rows, a, b = (lines(tmp_path / "out" / "clean" / f"source-{name}.jsonl") for name in ("pooled", "a", "b"))
    assert {row["text"] for row in rows} == {row["text"] for row in [*a, *b]}
    assert bank.entry("pooled").card.data.rows == len(rows) - len(rows) // 5
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
        ({"settings": replace(SETTINGS, source_learning_rate=1e30)}, "learning_rate, a number below 1e"),
    ):
        with pytest.raises(InputError, match=words):
            run(tiny, output, **more)
        assert not output.exists()
    for bad in ({"shots": 0}, {"source_steps": 0}, {"num_virtual_tokens": None}, {"test_rows": True}):
        with pytest.raises(InputError, match="whole number"):
            replace(SETTINGS, **bad)  # type: ignore[arg-type]
    assert SETTINGS.cleaning == Cleaning()


def test_test_rows_leaked_into_sources_whose_columns_have_other_names(tiny: ModuleType, tmp_path: Path) -> None:
    target = tiny.rows(40, 2)
    source = [{"review": row["text"], "label": row["label"]} for row in [*target, *tiny.rows(20, 0)]]
    task = replace(tiny.words_task(), template=Template("{review} it was"))
    run(tiny, tmp_path, replace(SETTINGS, control=False), sources={"a": source}, source_task=task)
    clean = {path.stem: lines(path) for path in (tmp_path / "clean").glob("*.jsonl")}
    kept = {row["review"] for row in clean["source-a"]}
    assert kept
    assert not kept & {row["text"] for row in [*clean["test"], *clean["shots"]]}
    reports = {report["source"]: report for report in json.loads((tmp_path / "clean" / "cleaning.json").read_text())}
    assert reports["a"]["dropped"]["the text is also in the rows to keep apart"] >= len(clean["test"])


def test_a_control_that_cannot_be_made_ended_the_run(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It describes and decides nothing: the report says why there is none."""

    def unsure_when_shuffled(*asked: Any) -> Any:
        own = {weights_sha256(entry.read()[0]) for entry in PromptBank(tmp_path / "bank").list()}
        if weights_sha256(asked[4].fold()) not in own:
            raise InputError("the source prompt is sure of none")
        return teach(*asked)

    monkeypatch.setattr("ptengine.transfer.procedure.teach", unsure_when_shuffled)
    texts = [{"text": row["text"]} for row in tiny.rows(10, 6)]
    settings = replace(SETTINGS, strategy=Strategy(self_train=SelfTrain(0.5, 0.0)))
    result = run(tiny, tmp_path, settings, unlabelled=texts)
    assert CONTROL not in result.test
    report = flow_report(result, tiny.words_task(), "t")
    assert "There is no control with shuffled labels: the source prompt is sure of none." in report.notes
    assert report.data["uncontrolled"] == "the source prompt is sure of none"


@pytest.mark.parametrize("joint", [False, True])
def test_sources_trained_on_together_kept_what_they_share(
    tiny: ModuleType, tmp_path: Path, joint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Duplicates and contradictions from file to file, some of them held out and trained on."""
    a = [{"text": f"film {word} very", "label": "pos"} for word in tiny.WORDS]
    shared = [a[0], {"text": "FILM  lovely very", "label": "neg"}]
    b = [*shared, *({"text": f"room {word} very", "label": "neg"} for word in tiny.WORDS)]
    trained: list[Any] = []

    def noted(*asked: Any, **more: Any) -> Any:
        trained.append([row["text"] for row in more["source_data"]])
        return transfer(*asked, **more)

    monkeypatch.setattr("ptengine.transfer.flow.transfer", noted)
    settings = replace(SETTINGS, pool_sources=not joint, strategy=Strategy(joint=Joint() if joint else None))
    result = run(tiny, tmp_path, settings, sources={"a": a, "b": b})
    wanted = [row["text"] for row in [*a, *b] if row["text"].casefold().split() != ["film", "lovely", "very"]]
    wanted.remove(a[0]["text"])
    assert trained[0] == [a[0]["text"], *[text for text in wanted if text != a[0]["text"]]]
    assert set(trained[1]) <= set(trained[0])  # the control's
    (report,) = [one for one in result.cleaning if one.source == "all sources together"]
    assert report.dropped == {"a duplicate of an earlier row": 1, "the text occurs with several labels": 2}
    assert any(note.startswith("all sources together: ") for note in flow_report(result, tiny.words_task(), "t").notes)


@pytest.mark.parametrize("measure", ["mmd", "task_vector_cosine", "proxy_a_distance"])
def test_what_a_later_stage_lacks_was_refused_after_tuning(tiny: ModuleType, tmp_path: Path, measure: str) -> None:
    model = tiny.gpt2(dropout=0.0)
    bank = PromptBank(tmp_path / "bank")
    data = {"data": tiny.rows(3)} if measure == "proxy_a_distance" else {}
    bank.add("old", SoftPrompt(model, 3), model=model, tokenizer=tiny.tokenizer(), task=tiny.words_task(), **data)
    settings = replace(SETTINGS, strategy=Strategy(Initialize(measure=measure)))
    words = {
        "mmd": r"with their data to search by mmd, got \['old'\]",
        "task_vector_cosine": "one initial prompt P0 for task vectors, got {'old': None, 'a'",
        "proxy_a_distance": "at least 5 shots to search by proxy_a_distance",
    }
    with pytest.raises(InputError, match=words[measure]):
        run(tiny, tmp_path / "out", settings, sources={"a": tiny.rows(20, 0)}, bank=bank)
    if measure == "proxy_a_distance":
        many = replace(settings, guard=Guard(folds=4))
        with pytest.raises(InputError, match=r"prompts with 5 texts .* got \{'old': 3\}"):
            run(tiny, tmp_path / "out", many, sources={}, bank=bank)
    assert not (tmp_path / "out").exists()


def test_a_source_of_few_rows_was_refused_after_the_others_were_tuned(tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 5 rows of source 'b', got 4"):
        run(tiny, tmp_path / "out", sources={"a": tiny.rows(20, 0), "b": tiny.rows(4, 1)})
    assert not (tmp_path / "out").exists()


def test_banked_prompts_with_nan_are_left_out(tiny: ModuleType, tmp_path: Path) -> None:
    """The report of a run with one could not be written."""
    model, bank = tiny.gpt2(dropout=0.0), PromptBank(tmp_path / "bank")
    for seed, name in enumerate(("good", "bad")):
        prompt = SoftPrompt(model, 3, seed=seed)
        entry = bank.add(name, prompt, model=model, tokenizer=tiny.tokenizer(), task=tiny.words_task())
    torch.nn.init.constant_(prompt.embeds, float("nan"))
    prompt.save(entry.path)
    result = run(tiny, tmp_path / "out", sources={}, bank=bank)
    assert set(result.sources) == {"good"}
    assert "finite numbers" in result.left_out["bad"]
    write_report(tmp_path / "out", flow_report(result, tiny.words_task(), "t"))


def test_other_options_of_the_target_were_refused_after_the_sources(
    done: tuple[Any, Path], tiny: ModuleType, tmp_path: Path
) -> None:
    """What was killed of the sources was tuned again first."""
    cut = tmp_path / "cut"
    shutil.copytree(done[1], cut)
    shutil.rmtree(cut / "sources" / "b")
    with pytest.raises(InputError, match=r"expected strategy\.joint=None as in the transfer in .*target"):
        run(tiny, cut, replace(SETTINGS, strategy=Strategy(joint=Joint())))
    with pytest.raises(InputError, match=r"expected guard\.min_gain=0\.0 as in .*, got 0\.5$"):
        run(tiny, cut, replace(SETTINGS, guard=Guard(folds=2, min_gain=0.5)))
    assert not (cut / "sources" / "b").exists()


def test_files_of_a_killed_write_stayed_for_ever(done: tuple[Any, Path], tiny: ModuleType, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(done[1], cut)
    for folder in ("", "clean", "target", "target/fold-0"):
        (cut / folder / ".tmp-plan.json-abcdefgh").write_text("{")
    with exclusive(cut), pytest.raises(InputError, match="another run"):
        run(tiny, cut)
    assert len([*cut.rglob(".tmp-*")]) == 4
    run(tiny, cut)
    assert not [*cut.rglob(".tmp-*")]


def test_a_label_without_shots_was_not_spoken_of(tiny: ModuleType, tmp_path: Path) -> None:
    target = [row for row in tiny.rows(60, 2) if row["label"] == "pos"]
    settings = replace(SETTINGS, control=False)
    result = run(tiny, tmp_path, settings, target=target[:10], test=tiny.rows(20, 7))
    assert result.unseen == ["neg"]
    summary = flow_report(result, tiny.words_task(), "t").summary
    assert any(line.startswith("No shot has the label neg: ") for line in summary)


@pytest.mark.parametrize(
    ("text", "cleaning"),
    [("the film was {}, no doubt", Cleaning(max_characters=14, too_long="cut")), ("cafe\u200b\u0301 {}", Cleaning())],
    ids=["cut at a blank", "cleaned twice"],
)
def test_shots_were_judged_on_too(tiny: ModuleType, text: str, cleaning: Cleaning) -> None:
    """Cleaned once more, a text that was cut at a blank was no longer the one among the target's rows."""
    target = [{"text": f"{i:04} " + text.format(i), "label": ("pos", "neg")[i % 2]} for i in range(20)]
    task = tiny.words_task()
    data = prepared({}, target, None, None, task, task, cleaning, 4, None, 0, at_once=False)
    assert len(data.shots) == 8
    assert sorted(row["text"][:4] for row in [*data.shots, *data.test]) == [f"{i:04}" for i in range(20)]


def test_scratch_without_an_error_left_a_run_without_a_report(done: tuple[Any, Path], tiny: ModuleType) -> None:
    result, _ = done
    judged = result.test["scratch"]
    easy = replace(result, test=result.test | {"scratch": replace(judged, correct=(1.0,) * len(judged.correct))})
    measures = flow_report(easy, tiny.words_task(), "t").data["measures"]
    assert "relative_error_reduction" not in measures
    assert measures["wins"]["value"] == 0


def test_a_text_that_is_too_long_was_named_by_its_row_after_cleaning(tiny: ModuleType, tmp_path: Path) -> None:
    """The row of the file is what one looks for."""
    long, blank = {"text": "film " * 60, "label": "pos"}, {"text": "", "label": "pos"}
    target = tiny.rows(40, 2)
    with_rows = {
        "a": {"sources": {"a": [blank, *tiny.rows(20, 0)[:5], long, *tiny.rows(20, 0)[5:]]}},
        "test": {"test": [blank, *target[30:34], blank, long]},
        "target": {"target": [blank, blank, *target[:4], long, *target[4:6]], "test": None},
        "unlabelled": {"unlabelled": [*tiny.rows(5, 4), blank, long]},
    }
    settings = replace(SETTINGS, shots=None, strategy=Strategy(self_train=SelfTrain(0.5)))
    for name, more in with_rows.items():
        how = settings if name == "unlabelled" else replace(SETTINGS, shots=2 if name == "target" else 4)
        with pytest.raises(InputError, match=rf"^{name}, row 6 \(counting from 0\): expected at most"):
            run(tiny, tmp_path, how, **more)
    both = {"a": tiny.rows(20, 0), "b": [blank, long, *tiny.rows(20, 1)]}
    with pytest.raises(InputError, match=r"^b, row 1 \(counting from 0\): expected at most"):
        run(tiny, tmp_path, replace(SETTINGS, pool_sources=True), sources=both)
    assert not [*tmp_path.iterdir()]


def test_a_run_went_on_with_or_without_another_s_control(
    done: tuple[Any, Path], tiny: ModuleType, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(done[1], cut)
    with pytest.raises(InputError, match=r"expected control=True as in the transfer in .*, got False"):
        run(tiny, cut, replace(SETTINGS, control=False))


class Stopped(Exception):
    pass


def test_domain_terms_stood_out_from_the_first_source_alone(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two hundred texts of all sources were those of the first."""

    def noted(*_: Any, background: list[str], **__: Any) -> Any:
        raise Stopped(background)

    monkeypatch.setattr("ptengine.transfer.flow.prompt_adaptivity", noted)
    sources = {name: [{"text": f"{name} {i}", "label": "pos"} for i in range(210)] for name in ("film", "meal")}
    with pytest.raises(Stopped) as stopped:
        run(tiny, tmp_path, replace(SETTINGS, control=False, source_steps=1), sources=sources)
    assert stopped.value.args == (sorted(row["text"] for rows in sources.values() for row in rows),)


def test_curves_were_of_one_label_where_the_test_is_sorted(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def noted(*_: Any, **more: Any) -> Any:
        asked.append(more["eval_data"])
        raise Stopped

    monkeypatch.setattr("ptengine.transfer.flow.transfer", noted)
    test = [{"text": f"film {i}", "label": "pos" if i < CURVE_ROWS else "neg"} for i in range(2 * CURVE_ROWS)]
    for folder in ("one", "two"):
        with pytest.raises(Stopped):
            run(tiny, tmp_path / folder, sources={"a": tiny.rows(20, 0)}, test=test)
    assert asked[0] == asked[1]
    assert len(asked[0]) == CURVE_ROWS
    assert {row["label"] for row in asked[0]} == {"pos", "neg"}


def test_other_steps_on_sources_without_checkpoints_changed_the_bank(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were tuned anew and banked, and only then the run was refused."""

    def stop(*_: Any, **__: Any) -> Any:
        raise Stopped

    monkeypatch.setattr("ptengine.transfer.flow.transfer", stop)
    training = TrainingConfig(output_dir=str(tmp_path), max_steps=3, disable_tqdm=True, save_strategy="no")
    asked: dict[str, Any] = {"sources": {"a": tiny.rows(20, 0)}, "training": training}
    with pytest.raises(Stopped):
        run(tiny, tmp_path, **asked)
    before = weights_sha256(PromptBank(tmp_path / "bank").entry("a").read()[0])
    with pytest.raises(InputError, match=r"expected source_steps=4 as in the transfer in .*, got 5"):
        run(tiny, tmp_path, replace(SETTINGS, source_steps=5), **asked)
    assert weights_sha256(PromptBank(tmp_path / "bank").entry("a").read()[0]) == before

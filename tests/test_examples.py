"""The examples of every task: each runs from its data to its table, and says what is missing."""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ptengine

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "examples"
# Name to the metric that decides; the first three bring their data along.
EXAMPLES = {
    "classification": "accuracy",
    "table_to_text": "bleu",
    "code_completion": "chrf",
    "pair_classification": "accuracy",
    "question_answering": "rouge_l",
    "summarization": "rouge_l",
    "dialogue": "perplexity",
    "translation": "chrf",
}
WITH_DATA = list(EXAMPLES)[:3]
NEED_SHARED = list(EXAMPLES)[3:]


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As `python benchmarks/examples/NAME.py` has it; their short names are nobody else's afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("common", *EXAMPLES):
        sys.modules.pop(name, None)


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def run(name: str, folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and written scores of two steps."""
    path = folder / "scores.json"
    status = load(name).main(["--steps", "2", "--test-rows", "2", "--json", str(path), *options])
    return status, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def check(name: str, found: dict[str, Any], printed: str) -> None:
    scores = found["scores"]
    assert list(scores)[-2] == "frozen model, template only"
    tuned = list(scores)[-1]
    assert tuned.startswith("tuned ")
    assert len(scores) >= 3  # a trivial baseline is among them
    metric = EXAMPLES[name]
    assert all(metric in entry for entry in scores.values())
    assert found["steps"] == 2
    assert scores[tuned]["loss"] != scores["frozen model, template only"]["loss"]  # it is the prompt that was scored
    assert f"{tuned}: {metric} {scores[tuned][metric]:.4f}, " in printed


def test_every_example_is_tried() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} - {"common"} == set(EXAMPLES)


@pytest.mark.parametrize("name", WITH_DATA)
def test_runs_on_data_that_is_always_there(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(name, tmp_path)
    assert (status, found["test_rows"]) == (0, 2)
    check(name, found, capsys.readouterr().out)


@pytest.mark.parametrize("name", NEED_SHARED)
def test_runs_on_shared_data(name: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del shared  # where it is missing, this skips
    # Two rows of short contexts are not sure to be among two questions.
    status, found = run(name, tmp_path, *(["--test-rows", "6"] if name == "question_answering" else []))
    assert status == 0
    check(name, found, capsys.readouterr().out)


@pytest.mark.parametrize("name", NEED_SHARED)
def test_missing_data_is_one_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load(name)
    monkeypatch.setattr(load("common"), "SHARED", tmp_path / "shared" / "data")
    assert module.main(["--steps", "2"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: expected the data ")
    assert line.endswith("in ../shared/data beside the checkout, or --data FILE, got none")


def test_own_data_is_divided_and_the_prompt_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = tmp_path / "own.csv", tmp_path / "out"
    with data.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"message {i}", "spam" if i % 2 else "ham"] for i in range(10))
    status, found = run("classification", tmp_path, "--data", str(data), "--output", str(output))
    assert (status, found["train_rows"], found["test_rows"]) == (0, 8, 2)
    check("classification", found, capsys.readouterr().out)
    model, _ = load("common").backbone(None)
    assert ptengine.load_prompt(output / "prompt", model).num_virtual_tokens == 16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "absent.jsonl"], "absent.jsonl: expected a file"),
        (["--model", "absent"], "expected --model, the folder of a Hugging Face checkpoint, got 'absent'"),
        (["--json", "absent/scores.json"], "expected --json in a folder that exists, got 'absent/scores.json'"),
    ],
)
def test_bad_options_are_one_error(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("classification").main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "See you", "label": "ham"}], "expected at least two rows"),
        (
            [{"text": "See you", "label": "ham"}, {"text": None, "label": "ham"}],
            "row 1 .*expected text in column 'text'",
        ),
        ([{"text": "See you", "label": "ham"}, {"text": "Hello", "label": "eggs"}], "'eggs'"),
    ],
)
def test_bad_rows_are_one_error(
    rows: list[dict[str, Any]], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert load("classification").main(["--data", str(data), "--steps", "1"]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert re.search(said, line)


@pytest.mark.parametrize(
    ("metric", "tuned", "words"),
    [("accuracy", 0.8, "better than"), ("accuracy", 0.7, "no better than"), ("perplexity", 0.8, "no better than")],
)
def test_the_verdict_compares_with_the_best(metric: str, tuned: float, words: str) -> None:
    scores = {"low": {metric: 0.6}, "high": {metric: 0.7}, "other": {}, "tuned prefix": {metric: tuned}}
    best = "low, 0.6000" if metric == "perplexity" else "high, 0.7000"
    assert load("common").verdict(scores, metric) == (
        f"tuned prefix: {metric} {tuned:.4f}, {words} the best of the others ({best})"
    )


def test_turns_of_a_play_follow_each_other() -> None:
    play = "A:\nOne.\n\nB:\nTwo,\nand more.\n\nA:\nThree.\n\nC:\nFour.\n\nB:\nFive."
    rows = load("dialogue").play_rows(play)
    assert [(row["speaker"], row["reply"]) for row in rows] == [("C", "Four."), ("B", "Five.")]
    assert rows[0]["turns"] == "A: One.\nB: Two, and more.\nA: Three."


def test_the_nearest_row_is_found() -> None:
    train = [{"s": "a red house", "t": "1"}, {"s": "the blue sea", "t": "2"}]
    assert load("common").nearest(train, [{"s": "blue seas"}, {"s": "one red house"}], "s", "t") == ["2", "1"]

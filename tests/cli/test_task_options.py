"""Tasks of the command line that other tests have not: tuned, judged and used from their folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import BAD, GOOD, write_rows

PLACED = "{prompt:2} {text} {mask} {prompt:3}"


def tune(world: Any, output: Path, model: str, *more: str) -> list[str]:
    return [
        "tune", "--model", model, "--train", world.train, "--test", world.test, "--max-steps", "3", "--disable-tqdm",
        "--output", str(output), "--json", *more,
    ]  # fmt: skip


def test_masked_classification(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    """The prompt is as long as the template says, and stands there again in every later command."""
    output = tmp_path / "out"
    words = ("--label-words", "good=great,bad=poor")
    tuned = call(*tune(world, output, world.masked, "--template", PLACED, *words))
    assert (tuned.status, tuned.err) == (0, "")
    judged = call("eval", "--prompt", output, "--data", world.test, "--json")
    assert judged.json["metrics"] == tuned.json["test"]["metrics"]
    hard = call("eval", "--prompt", output, "--data", world.test, "--hard-prompt-only", "--json")
    assert hard.json["metrics"]["loss"] != judged.json["metrics"]["loss"]
    assert call("generate", "--prompt", output, "--text", "it was fine", "--json").json["texts"][0] in ("good", "bad")
    exported = call("export", "--prompt", output, "--format", "prompt_embeds", "--output", tmp_path / "other")
    assert exported.status == 2
    assert "stand before the text" in exported.err


def test_a_causal_prompt_between_words(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    tuned = call(*tune(world, tmp_path / "out", world.llama, "--template", "{text} is{prompt:3} so"))
    assert tuned.status == 0
    assert "behind text, so every row runs its own" in tuned.err
    judged = call("eval", "--prompt", tmp_path / "out", "--data", world.test, "--json")
    assert judged.json["metrics"] == tuned.json["test"]["metrics"]


def test_question_answering(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    """Long texts in windows; the trained head comes back with the prompt; new questions need no answer."""
    rows = [{"question": "was it great", "context": f"film film it was {x} film it", "answer": x} for x in GOOD + BAD]
    data, output = write_rows(tmp_path / "qa.jsonl", rows), tmp_path / "out"
    tuned = call(
        "tune", "--model", world.bert, "--train", data, "--test", data, "--question-column", "question", "--stride",
        "2", "--max-length", "11", "--max-steps", "3", "--disable-tqdm", "--output", output, "--json",
    )  # fmt: skip
    assert (tuned.status, tuned.err) == (0, "")
    assert set(tuned.json["test"]["metrics"]) == {"loss", "exact_match", "f1"}
    lines = tmp_path / "answers.jsonl"
    judged = call(
        "eval", "--prompt", output, "--data", data, "--max-length", "11", "--predictions", lines, "--json"
    )  # fmt: skip
    assert judged.json["metrics"] == tuned.json["test"]["metrics"]
    assert judged.json["rows"] == len(rows)
    new = ("--column", "question=was it great", "--column", "context=it was fine")
    assert call("generate", "--prompt", output, *new, "--json").json["texts"][0] in "it was fine"
    assert len(lines.read_text().splitlines()) == len(rows)
    # The answer was blamed, a column that nobody gave.
    empty = call("generate", "--prompt", output, "--column", "question=was it", "--column", "context= ")
    assert (empty.status, empty.err) == (
        2, "error: --column, row 0 (counting from 0): expected text in column 'context', got str ' '\n",
    )  # fmt: skip
    # Tasks without a template were an AttributeError.
    asked = ("bank", "add", "--bank", tmp_path / "bank", "--name", "qa", "--prompt", output, "--data", data, "--json")
    assert call(*asked).json["entry"]["domain_texts"] == len(rows)


def test_token_classification(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"tokens": ["it", "was", word], "tags": ["O", "O", "B-X"]} for word in GOOD + BAD]
    data, output = write_rows(tmp_path / "words.jsonl", rows), tmp_path / "out"
    tuned = call(
        "tune", "--model", world.bert, "--train", data, "--test", data, "--tokens-column", "tokens", "--method",
        "prefix", "--max-steps", "3", "--num-virtual-tokens", "3", "--disable-tqdm", "--output", output, "--json",
    )  # fmt: skip
    assert (tuned.status, tuned.err) == (0, "")
    assert "entity_f1" in tuned.json["test"]["metrics"]
    judged = call("eval", "--prompt", output, "--data", data, "--json")
    assert judged.json["metrics"] == tuned.json["test"]["metrics"]
    new = write_rows(tmp_path / "new.jsonl", [{"tokens": ["it", "was"]}])
    [text] = call("generate", "--prompt", output, "--data", new, "--json").json["texts"]
    assert set(text.split()) <= {"O", "B-X"}
    assert len(text.split()) == 2
    for bad in (None, 5, "it was"):  # the first two were a traceback, and the file was called "data"
        odd = write_rows(tmp_path / "odd.jsonl", [{"tokens": ["it"]}, {"tokens": bad}])
        refused = call("generate", "--prompt", output, "--data", odd)
        assert refused.status == 2
        assert f"{odd}, row 1 (counting from 0): expected a list of words in column 'tokens'" in refused.err
    refused = call("generate", "--prompt", output, "--text", "it was")
    assert (refused.status, "expected --data with a list of words in column 'tokens'" in refused.err) == (2, True)
    asked = ("bank", "add", "--bank", tmp_path / "bank", "--name", "t", "--prompt", output, "--data", data, "--json")
    assert call(*asked).json["entry"]["domain_texts"] == len(rows)


def test_words_without_a_label(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    """-100 became a label that the head learned."""
    rows = [{"tokens": ["it", "was", word], "tags": [-100, 0, 1]} for word in GOOD + BAD]
    data, output = write_rows(tmp_path / "words.jsonl", rows), tmp_path / "out"
    tuned = call(
        "tune", "--model", world.bert, "--train", data, "--test", data, "--tokens-column", "tokens", "--max-steps", "2",
        "--num-virtual-tokens", "3", "--disable-tqdm", "--output", output, "--json",
    )  # fmt: skip
    assert (tuned.status, tuned.err) == (0, "")
    assert json.loads((output / "task.json").read_text())["task"]["labels"] == ["0", "1"]
    judged = call("eval", "--prompt", output, "--data", data, "--json")
    assert judged.json["metrics"] == tuned.json["test"]["metrics"]
    [text, *_] = call("generate", "--prompt", output, "--data", data, "--json").json["texts"]
    assert len(text.split()) == 3


@pytest.mark.parametrize("model", ["bert", "masked"])  # the latter has no pooler, which nothing reads
def test_embeddings(world: Any, call: Callable[..., Any], tmp_path: Path, model: str) -> None:
    rows = [{"text": f"it was {x}", "text_pair": f"film {x}", "label": "same"} for x in GOOD + BAD]
    rows += [{"text": "it was", "text_pair": "film", "label": "other"}]
    data, output = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out"
    tuned = call(
        "tune", "--model", getattr(world, model), "--train", data, "--test", data, "--embedding", "--positive-label",
        "same", "--max-steps", "3", "--num-virtual-tokens", "3", "--disable-tqdm", "--output", output, "--json",
    )  # fmt: skip
    assert (tuned.status, tuned.err) == (0, "")
    judged = call("eval", "--prompt", output, "--data", data, "--json")
    assert judged.json["metrics"] == tuned.json["test"]["metrics"]
    assert set(judged.json["metrics"]) == {"loss", "mrr", "recall_at_1", "average_precision", "roc_auc"}
    refused = call("generate", "--prompt", output, "--text", "it")
    assert refused.status == 2
    assert "ptengine.embed" in refused.err
    asked = ("bank", "add", "--bank", tmp_path / "bank", "--name", "e", "--prompt", output, "--data", data, "--json")
    assert call(*asked).json["entry"]["domain_texts"] == len(rows)


@pytest.mark.parametrize(
    "other", [["--template", "{text} so"], ["--label-words", "good= bad,bad= good"], ["--target-column", "label"]]
)
def test_an_ensemble_took_prompts_of_other_tasks(
    world: Any, call: Callable[..., Any], tmp_path: Path, other: list[str]
) -> None:
    """They answered the first prompt's task, without a word."""
    for name, more in (("a", []), ("b", other)):
        arguments = [*world.tune(tmp_path / name), *more]
        assert call(*arguments).status == 0
    refused = call("eval", "--prompt", tmp_path / "a", "--ensemble", tmp_path / "b", "--data", world.test)
    assert refused.status == 2
    assert "expected prompts of one task in an ensemble" in refused.err
    assert refused.err.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("masked", ["--template", PLACED, "--num-virtual-tokens", "4"], "--num-virtual-tokens 5, as many"),
        (
            "masked",
            ["--template", PLACED, "--label-words", "good=great,bad=poor", "--method", "prefix"],
            "5 that the template places, got Prefix",
        ),
        ("llama", ["--template", PLACED], "a template with a {mask} is for encoders"),
        ("bert", ["--template", PLACED], "all weights of the frozen model"),
        ("bert", ["--positive-label", "a"], "--embedding with --positive-label"),
        ("bert", ["--embedding", "--template", "x"], "no --template with --embedding"),
        ("bert", ["--embedding", "--label-column", "label"], "label_column and positive_label, both or neither"),
        ("bert", ["--tags-column", "tags"], "--tokens-column with --tags-column"),
        ("bert", ["--tokens-column", "tokens", "--template", "x"], "no --template with --tokens-column"),
        ("bert", ["--stride", "3"], "--question-column with --stride, got --stride alone"),
        ("bert", ["--question-column", "q", "--text-column", "text"], "no --text-column with --question-column"),
        ("llama", ["--question-column", "q"], "--question-column is for encoders"),
        ("llama", ["--template", "{text}{prompt:0}"], "virtual tokens as '{prompt:10}'"),
    ],
)
def test_bad_input(
    world: Any, call: Callable[..., Any], tmp_path: Path, model: str, arguments: list[str], message: str
) -> None:
    refused = call(*tune(world, tmp_path / "out", getattr(world, model), *arguments))
    assert refused.status == 2
    assert message in refused.err
    assert not (tmp_path / "out").exists()


def test_an_instruction_tuned_model_is_asked_in_its_chat_template(
    world: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    model = tmp_path / "chat"
    shutil.copytree(world.llama, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}so")
    output = tmp_path / "out"
    tuned = call(*tune(world, output, str(model), "--template", "{text}?", "--chat", "--system", "{{be terse}}"))
    assert tuned.status == 0, tuned.err
    task = next(found for found in output.rglob("*.json") if "template" in found.read_text())
    assert "system: {{be terse}}\\nuser: {text}?\\nso" in task.read_text()
    judged = call("eval", "--prompt", output, "--data", world.test, "--json")
    assert judged.json["metrics"] == tuned.json["test"]["metrics"]


def test_chat_options_alone_are_refused(world: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    for more, message in (
        (("--template", "{text}", "--system", "x"), "expected --chat with --system"),
        (("--text-column", "text", "--chat"), "expected no --chat with --text-column"),
        (("--tokens-column", "text", "--chat"), "expected no --chat with --tokens-column"),
        (("--question-column", "text", "--chat"), "expected no --chat with --question-column"),
        (("--embedding", "--chat"), "expected no --chat with --embedding"),
    ):
        refused = call(*tune(world, tmp_path / "out", world.llama, *more))
        assert refused.status == 2
        assert message in refused.err

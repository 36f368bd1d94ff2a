"""`ptengine bank search` by a prompt of the target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ptengine.data import SequenceClassificationTask
from ptengine.prompts import HeadedPrompt, SoftPrompt
from ptengine.transfer import PromptBank


def test_prompts_with_heads_of_other_labels_were_ranked(
    world: Any, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`transfer` leaves them out; the search was not told the task of the prompt."""
    monkeypatch.setattr("ptengine.training.trainer.draw_curve", lambda path, *_: path)
    tuned = call(
        "tune", "--model", world.bert, "--train", world.train, "--text-column", "text", "--output", tmp_path / "tuned",
        "--num-virtual-tokens", "3", "--max-steps", "2", "--disable-tqdm",
    )  # fmt: skip
    assert tuned.status == 0, tuned.err
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(world.bert),
        AutoTokenizer.from_pretrained(world.bert),
    )
    bank = PromptBank(tmp_path / "bank")
    for name, labels in (("same", ("bad", "good")), ("other", ("no", "yes", "maybe"))):
        prompt = HeadedPrompt(model, SoftPrompt(model, 3), labels)
        bank.add(name, prompt, model=model, tokenizer=tokenizer, task=SequenceClassificationTask(labels=labels))
    asked = ["bank", "search", "--bank", bank.path, "--prompt", tmp_path / "tuned"]
    found = call(*asked, "--json").json
    assert [match["name"] for match in found["matches"]] == ["same"]
    assert "its head has the labels" in found["refused"]["other"]
    # No prompt of the target comes with its first numbers: every entry was refused, and the exit status was 0.
    refused = call(*asked, "--measure", "task_vector_cosine")
    assert (refused.status, "or --prompt with mean_token_cosine or token_cosine, got" in refused.err) == (2, True)

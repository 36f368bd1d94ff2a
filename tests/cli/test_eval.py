"""`ptengine eval`: what its options reach."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sacrebleu.metrics import BLEU

WRITTEN = "这部电影很好看,真的"


def test_bleu_of_chinese_texts_took_each_for_one_word(
    world: Any, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was no way to another tokenizer than 13a."""
    target = "这部电影很好看,我喜欢"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"source": "fine", "target": target}))
    output = tmp_path / "out"
    arguments = world.tune(output, "--target-column", "target", "--max-steps", "1")
    arguments[arguments.index(world.train)] = str(rows)
    arguments[arguments.index("{text} is")] = "{source}"
    assert call(*arguments).status == 0
    monkeypatch.setattr("ptengine.training.evaluation.generate_in_batches", lambda *given, **more: [WRITTEN])
    asked = ("eval", "--prompt", output, "--data", rows, "--json")
    writing = (*asked, "--write-texts", "--max-new-tokens", "1")
    for name, more in (("13a", ()), ("zh", ("--bleu-tokenizer", "zh"))):
        exact = BLEU(tokenize=name, force=True).corpus_score([WRITTEN], [[target]]).score
        assert call(*writing, *more).json["metrics"]["bleu"] == pytest.approx(exact)
    for refused, message in (
        (call(*asked, "--bleu-tokenizer", "zh"), "expected --write-texts with --bleu-tokenizer"),
        (call(*writing, "--bleu-tokenizer", "cn"), "expected bleu_tokenizer among 13a, zh, intl, char, got 'cn'"),
    ):
        assert (refused.status, message in refused.err) == (2, True), refused.err

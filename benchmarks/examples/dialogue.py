"""Dialogue turns: what does the next speaker say?

    python benchmarks/examples/dialogue.py --json turns.json

Three turns and the name of the next speaker, and the model writes the turn. The plays of ../shared/data/corpora, or
--data with the columns `turns`, `speaker` and `reply`. A reply has no one right wording, so the perplexity of the real
one decides, beside that of word pieces by their counts. The embedded model has read parts of these plays, held-out
turns among them: its perplexity is lower here than it would be on a play that it does not know.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import common

import ptengine
from ptengine.data import GenerationTask, Template
from ptengine.training import evaluate

LONGEST = 200  # characters of a turn


def play_rows(text: str) -> common.Rows:
    """Each turn of a play with the three before it; a turn is `NAME:` and lines, and a blank line ends it."""
    turns = [turn.split(":\n", 1) for turn in text.split("\n\n") if ":\n" in turn and len(turn) <= LONGEST]
    said = [(speaker, " ".join(words.split())) for speaker, words in turns if words.strip()]
    before = ["\n".join(f"{who}: {what}" for who, what in said[i - 3 : i]) for i in range(3, len(said))]
    return [
        {"turns": turns, "speaker": who, "reply": what} for turns, (who, what) in zip(before, said[3:], strict=True)
    ]


def count_perplexity(tokenizer: Any, train: common.Rows, test: common.Rows) -> float:
    """Perplexity of the test replies by token counts of the training replies, plus one each."""
    known, held = (
        [
            token
            for row in part
            for token in [*tokenizer(row["reply"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ]
        for part in (train, test)
    )
    counts, total = Counter(known), len(known) + len(tokenizer)
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in held) / len(held))


@common.example
def main(argv: Sequence[str] | None = None) -> None:
    args = common.arguments(__doc__, argv, steps=80)
    if args.data is not None:
        train, test = common.rows(args, common.SHARED, ("turns", "speaker", "reply"))
    else:
        play = common.SHARED / "corpora" / "tinyshakespeare.txt"
        if not play.is_file():
            raise common.missing(play)
        found = play_rows(play.read_text(encoding="utf-8"))
        cut = round((1 - common.HELD_OUT) * len(found))  # the last plays are held out, not turns in between
        train, test = found[:cut], found[cut:][: args.test_rows]
    train, test = common.spaced(train, "reply"), common.spaced(test, "reply")
    model, tokenizer = common.backbone(args.model)

    task = GenerationTask(Template("{turns}\n{speaker}:"), target_column="reply")
    scores = {"counts of word pieces": {"perplexity": count_perplexity(tokenizer, train, test)}}
    scores["frozen model, template only"] = evaluate(model, None, task, test, tokenizer).metrics

    prompt = ptengine.Prefix(model, 16)
    with common.output(args) as folder:
        config = ptengine.TrainingConfig(
            folder, max_steps=args.steps, per_device_train_batch_size=16, warmup_ratio=0.05, save_strategy="no"
        )
        ptengine.Trainer(model, prompt, train, None, config, task=task, tokenizer=tokenizer).fit()

    scores["tuned prefix"] = evaluate(model, prompt, task, test, tokenizer).metrics
    text = task.template.render(test[0], 0)
    (reply,) = ptengine.generate(model, prompt, [text], tokenizer, max_new_tokens=32, do_sample=False)
    common.report(args, (len(train), len(test)), scores, ("perplexity", "loss"), {text: reply})


if __name__ == "__main__":
    sys.exit(main())

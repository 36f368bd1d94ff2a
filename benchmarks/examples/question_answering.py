"""Question answering: what in the text answers the question?

    python benchmarks/examples/question_answering.py --json qa.json

The model writes a short answer, which is a part of the text. XQuAD (English) of ../shared/data, or --data with the
columns `context`, `question` and `answer`. Rows with a text of over 1,000 characters are left out: the embedded model
has 512 positions, and a text that is cut may lose its answer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import common

import ptengine
from ptengine.data import GenerationTask, Template, generation_metrics
from ptengine.errors import InputError
from ptengine.training import evaluate

LONGEST_CONTEXT = 1000  # characters


def likely_sentence(row: dict[str, str]) -> str:
    """The sentence of the text that shares most words with the question: an answer without a model."""
    asked = set(re.findall(r"\w+", row["question"].lower()))
    sentences = re.split(r"(?<=[.!?。！？])\s*", row["context"])
    return max(sentences, key=lambda sentence: len(asked & set(re.findall(r"\w+", sentence.lower()))))


@common.example
def main(argv: Sequence[str] | None = None) -> None:
    args = common.arguments(__doc__, argv, steps=60)
    splits = common.rows(args, common.SHARED / "xquad_en", ("context", "question", "answer"))
    train, test = ([row for row in part if len(row["context"]) <= LONGEST_CONTEXT] for part in splits)
    if not train or not test:
        raise InputError(f"expected contexts of at most {LONGEST_CONTEXT} characters in both splits, got none in one")
    train, test = common.spaced(train, "answer"), common.spaced(test, "answer")
    model, tokenizer = common.backbone(args.model)

    task = GenerationTask(Template("{context}\nQuestion: {question}\nAnswer:"), target_column="answer")
    guess = [likely_sentence(row) for row in test]
    scores = {"likeliest sentence": generation_metrics(guess, common.references(test, "answer"))}
    scores["frozen model, template only"] = evaluate(
        model, None, task, test, tokenizer, generate=True, max_new_tokens=24
    ).metrics

    prompt = ptengine.Prefix(model, 16)
    with common.output(args) as folder:
        config = ptengine.TrainingConfig(
            folder, max_steps=args.steps, per_device_train_batch_size=8, warmup_ratio=0.05, save_strategy="no"
        )
        ptengine.Trainer(model, prompt, train, None, config, task=task, tokenizer=tokenizer).fit()

    found = evaluate(model, prompt, task, test, tokenizer, generate=True, max_new_tokens=24)
    scores["tuned prefix"] = found.metrics
    shown = {test[0]["question"]: found.predictions[0]}
    common.report(args, (len(train), len(test)), scores, ("rouge_l", "exact_match", "perplexity"), shown)


if __name__ == "__main__":
    sys.exit(main())

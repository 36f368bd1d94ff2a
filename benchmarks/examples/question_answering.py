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
    train, test = common.spaced(train, "answer"), common.spaced(test, "answer")
    model, tokenizer = common.backbone(args.model)

    task = GenerationTask(Template("{context}\nQuestion: {question}\nAnswer:"), target_column="answer")
    prompt = ptengine.Prefix(model, 16)
    with common.output(args) as folder:
        config = ptengine.TrainingConfig(
            folder, max_steps=args.steps, per_device_train_batch_size=8, warmup_ratio=0.05, save_strategy="no"
        )
        ptengine.Trainer(model, prompt, train, None, config, task=task, tokenizer=tokenizer).fit()

    guess = [likely_sentence(row) for row in test]
    scores = {"likeliest sentence": generation_metrics(guess, common.references(test, "answer"))}
    for name, tuned in (("frozen model, template only", None), ("tuned prefix", prompt)):
        found = evaluate(model, tuned, task, test, tokenizer, generate=True, max_new_tokens=24)
        scores[name] = found.metrics
    shown = {test[0]["question"]: found.predictions[0]}
    common.report(args, (len(train), len(test)), scores, ("rouge_l", "exact_match", "perplexity"), shown)


if __name__ == "__main__":
    sys.exit(main())

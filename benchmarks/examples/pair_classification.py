"""Pair classification: does one text follow from another?

    python benchmarks/examples/pair_classification.py --json rte.json

Both texts stand in the template, and the answer is a word. RTE of ../shared/data, or --data with the columns `text`,
`text_pair` and `label` (entailment or not_entailment). This is hard: a bag of words hardly passes the majority class,
and neither will a tiny model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import common

import ptengine
from ptengine.data import ClassificationTask, Template, Verbalizer
from ptengine.training import evaluate

CUT = {"truncation": True, "max_length": 256}  # a longer row loses the end of its longer text


@common.example
def main(argv: Sequence[str] | None = None) -> None:
    args = common.arguments(__doc__, argv, steps=60)
    train, test = common.rows(args, common.SHARED / "rte", ("text", "text_pair", "label"))
    model, tokenizer = common.backbone(args.model)

    task = ClassificationTask(
        Template("{text}\nQuestion: Is it true that {text_pair}\nAnswer:"),
        Verbalizer({"entailment": [" yes", " Yes"], "not_entailment": [" no", " No"]}),  # a label may have many words
    )
    scores = common.label_baselines(train, test, ["text", "text_pair"])
    scores["frozen model, template only"] = evaluate(model, None, task, test, tokenizer, **CUT).metrics

    prompt = ptengine.SoftPrompt(
        model, 16, "text", init_text="Read the text and answer the question with yes or no.", tokenizer=tokenizer
    )
    with common.output(args) as folder:
        config = ptengine.TrainingConfig(
            folder, max_steps=args.steps, per_device_train_batch_size=16, save_strategy="no", **CUT
        )
        ptengine.Trainer(model, prompt, train, None, config, task=task, tokenizer=tokenizer).fit()

    found = evaluate(model, prompt, task, test, tokenizer, **CUT)
    scores["tuned soft prompt"] = found.metrics
    common.report(
        args, (len(train), len(test)), scores, ("accuracy", "macro_f1"), {test[0]["text_pair"]: found.predictions[0]}
    )


if __name__ == "__main__":
    sys.exit(main())

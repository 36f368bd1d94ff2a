"""Table to text: a sentence or two for the fields of a record.

    python benchmarks/examples/table_to_text.py --json restaurants.json

The embedded E2E restaurants, or --data with the columns `source` (the record as text), `target` and, if there are
several right texts, `references`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import common

import ptengine
from ptengine.assets import data_path
from ptengine.data import GenerationTask, Template, generation_metrics
from ptengine.training import evaluate


@common.example
def main(argv: Sequence[str] | None = None) -> None:
    args = common.arguments(__doc__, argv, steps=120)
    train, test = common.rows(args, data_path("e2e_nlg"), ("source", "target"))
    train, test = common.spaced(train, "target"), common.spaced(test, "target")
    model, tokenizer = common.backbone(args.model)

    task = GenerationTask(Template("{source}\nDescription:"))
    right = common.references(test, "target")
    scores = {
        "the record itself": generation_metrics([row["source"] for row in test], right),
        "text of the nearest training record": generation_metrics(
            common.nearest(train, test, "source", "target"), right
        ),
    }
    scores["frozen model, template only"] = evaluate(
        model, None, task, test, tokenizer, generate=True, max_new_tokens=64
    ).metrics

    prompt = ptengine.Prefix(model, 16)
    with common.output(args) as folder:
        config = ptengine.TrainingConfig(
            folder, max_steps=args.steps, per_device_train_batch_size=16, warmup_ratio=0.05, save_strategy="no",
            learning_rate=0.1 if args.model is None else None,  # as in `ptengine demo`, else the method's own
        )  # fmt: skip
        ptengine.Trainer(model, prompt, train, None, config, task=task, tokenizer=tokenizer).fit()

    scores["tuned prefix"] = evaluate(model, prompt, task, test, tokenizer, generate=True, max_new_tokens=64).metrics
    record = "name[Aromi], eatType[coffee shop], food[Chinese], area[riverside]"
    text = f"{record}\nDescription:"
    (written,) = ptengine.generate(model, prompt, [text], tokenizer, max_new_tokens=48, do_sample=False)
    common.report(args, (len(train), len(test)), scores, ("bleu", "rouge_l", "perplexity"), {record: written})


if __name__ == "__main__":
    sys.exit(main())

"""Summarisation: the one sentence that says what an abstract says.

    python benchmarks/examples/summarization.py --json summaries.json

SciTLDR of ../shared/data, or --data with the columns `source` and `target`. The first sentence of a text is the
baseline to beat.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import common

import ptengine
from ptengine.data import GenerationTask, Template, generation_metrics
from ptengine.training import evaluate

CUT = {"truncation": True, "max_length": 384}  # a longer row loses the end of its source, never its target


@common.example
def main(argv: Sequence[str] | None = None) -> None:
    args = common.arguments(__doc__, argv, steps=40)
    train, test = common.rows(args, common.SHARED / "scitldr", ("source", "target"))
    train, test = common.spaced(train, "target"), common.spaced(test, "target")
    model, tokenizer = common.backbone(args.model)

    task = GenerationTask(Template("{source}\nSummary:"))
    lead = [re.split(r"(?<=[.!?。！？])\s*", row["source"])[0] for row in test]
    scores = {"first sentence": generation_metrics(lead, common.references(test, "target"))}
    scores["frozen model, template only"] = evaluate(
        model, None, task, test, tokenizer, generate=True, max_new_tokens=64, **CUT
    ).metrics

    prompt = ptengine.Prefix(model, 16)
    with common.output(args) as folder:
        config = ptengine.TrainingConfig(
            folder, max_steps=args.steps, per_device_train_batch_size=8, warmup_ratio=0.05, save_strategy="no", **CUT
        )
        ptengine.Trainer(model, prompt, train, None, config, task=task, tokenizer=tokenizer).fit()

    found = evaluate(model, prompt, task, test, tokenizer, generate=True, max_new_tokens=64, **CUT)
    scores["tuned prefix"] = found.metrics
    shown = {test[0]["source"][:100] + "...": found.predictions[0]}
    common.report(args, (len(train), len(test)), scores, ("rouge_l", "chrf", "perplexity"), shown)


if __name__ == "__main__":
    sys.exit(main())

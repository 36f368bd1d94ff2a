"""Translation: Chinese questions in English.

    python benchmarks/examples/translation.py --json translation.json

The questions of XQuAD (../shared/data) are the same in both languages and share their `id`; or --data with the columns
`source` and `target`. The embedded model has read hardly any Chinese, so it cannot translate, and a prompt cannot teach
it to: expect the answer of a translation memory to be as good. A model that knows both languages goes to --model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import common

import ptengine
from ptengine.data import GenerationTask, Template, generation_metrics
from ptengine.training import evaluate


def aligned(split: str) -> common.Rows:
    """Questions of both languages, paired by their id."""
    chinese, english = (
        common.load_columns(common.SHARED / name / f"{split}.jsonl", ("id", "question"))
        for name in ("xquad_zh", "xquad_en")
    )
    wording = {row["id"]: row["question"] for row in english}
    return [{"source": row["question"], "target": wording[row["id"]]} for row in chinese if row["id"] in wording]


@common.example
def main(argv: Sequence[str] | None = None) -> None:
    args = common.arguments(__doc__, argv, steps=80)
    if args.data is not None:
        train, test = common.rows(args, common.SHARED, ("source", "target"))
    else:
        for folder in (common.SHARED / "xquad_zh", common.SHARED / "xquad_en"):
            if not folder.is_dir():
                raise common.missing(folder)
        train, test = aligned("train"), aligned("test")[: args.test_rows]
    train, test = common.spaced(train, "target"), common.spaced(test, "target")
    model, tokenizer = common.backbone(args.model)

    task = GenerationTask(Template("Chinese: {source}\nEnglish:"))
    memory = common.nearest(train, test, "source", "target")
    scores = {"translation of the nearest source": generation_metrics(memory, common.references(test, "target"))}
    scores["frozen model, template only"] = evaluate(
        model, None, task, test, tokenizer, generate=True, max_new_tokens=32
    ).metrics

    prompt = ptengine.Prefix(model, 16)
    with common.output(args) as folder:
        config = ptengine.TrainingConfig(
            folder, max_steps=args.steps, per_device_train_batch_size=16, warmup_ratio=0.05, save_strategy="no"
        )
        ptengine.Trainer(model, prompt, train, None, config, task=task, tokenizer=tokenizer).fit()

    found = evaluate(model, prompt, task, test, tokenizer, generate=True, max_new_tokens=32)
    scores["tuned prefix"] = found.metrics
    shown = {test[0]["source"]: found.predictions[0]}
    common.report(args, (len(train), len(test)), scores, ("chrf", "bleu", "perplexity"), shown)


if __name__ == "__main__":
    sys.exit(main())

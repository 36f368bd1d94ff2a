"""Classification: is a text message spam?

    python benchmarks/examples/classification.py --json spam.json

The model reads the message and names the label by a word. The embedded SMS Spam collection, or --data with the columns
`text` and `label` (ham or spam).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import common

import ptengine
from ptengine.assets import data_path
from ptengine.data import ClassificationTask, Template, Verbalizer
from ptengine.training import evaluate


@common.example
def main(argv: Sequence[str] | None = None) -> None:
    args = common.arguments(__doc__, argv, steps=150)
    train, test = common.rows(args, data_path("sms_spam"), ("text", "label"))
    model, tokenizer = common.backbone(args.model)

    task = ClassificationTask(Template("Message: {text}\nSpam:"), Verbalizer({"ham": " no", "spam": " yes"}))
    scores = common.label_baselines(train, test, ["text"])
    scores["frozen model, template only"] = evaluate(
        model, None, task, test, tokenizer, truncation=True, max_length=256
    ).metrics

    prompt = ptengine.Prefix(model, 16)  # keys and values in every layer
    with common.output(args) as folder:
        config = ptengine.TrainingConfig(
            folder, max_steps=args.steps, per_device_train_batch_size=32, warmup_ratio=0.05, save_strategy="no",
            learning_rate=0.1 if args.model is None else None,  # as in `ptengine demo`, else the method's own
            truncation=True, max_length=256,
        )  # fmt: skip
        ptengine.Trainer(model, prompt, train, None, config, task=task, tokenizer=tokenizer).fit()

    scores["tuned prefix"] = evaluate(model, prompt, task, test, tokenizer, truncation=True, max_length=256).metrics
    text = "Message: You have won a free phone. Call 09061701461 now\nSpam:"
    (answer,) = ptengine.generate(model, prompt, [text], tokenizer, max_new_tokens=1, do_sample=False)
    common.report(args, (len(train), len(test)), scores, ("accuracy", "macro_f1"), {text: answer})


if __name__ == "__main__":
    sys.exit(main())

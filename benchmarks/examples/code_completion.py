"""Code completion: the next line of a Python file.

    python benchmarks/examples/code_completion.py --json lines.json

Six lines, and the model writes the seventh. Modules of the running Python's own standard library, some for training
and others for the scores; or --data with the columns `context` and `line`. The embedded model has read no code.
"""

from __future__ import annotations

import random
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import common

import ptengine
from ptengine.data import GenerationTask, Template, generation_metrics
from ptengine.errors import InputError
from ptengine.training import evaluate

TRAIN = ("argparse", "ast", "calendar", "configparser", "csv", "gettext", "mailbox", "shutil", "tarfile")
TEST = ("fractions", "shelve", "textwrap", "queue", "statistics")
BEFORE, LONGEST, MOST = 6, 80, 2000  # lines before the one to write; characters of a line; rows


def lines_of(modules: Iterable[str]) -> common.Rows:
    """Every line of code with the six lines before it."""
    library, found = Path(sysconfig.get_path("stdlib")), []
    for module in modules:
        path = library / f"{module}.py"
        if not path.is_file():
            raise InputError(f"expected the source {module}.py in Python's standard library, or --data FILE, got none")
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found += [
            {"context": "\n".join(lines[i - BEFORE : i]), "line": lines[i]}
            for i in range(BEFORE, len(lines))
            if max(map(len, lines[i - BEFORE : i + 1])) <= LONGEST
        ]
    return random.Random(0).sample(found, min(MOST, len(found)))


@common.example
def main(argv: Sequence[str] | None = None) -> None:
    args = common.arguments(__doc__, argv, steps=80)
    if args.data is not None:
        train, test = common.rows(args, common.SHARED, ("context", "line"))
    else:
        train, test = lines_of(TRAIN), lines_of(TEST)[: args.test_rows]
    model, tokenizer = common.backbone(args.model)

    task = GenerationTask(Template("{context}\n"), target_column="line")
    right = common.references(test, "line")
    again = [row["context"].rsplit("\n", 1)[-1] for row in test]
    scores = {
        "the line before, once more": generation_metrics(again, right),
        "line after the nearest context": generation_metrics(common.nearest(train, test, "context", "line"), right),
    }
    scores["frozen model, template only"] = evaluate(
        model, None, task, test, tokenizer, generate=True, max_new_tokens=40
    ).metrics

    prompt = ptengine.Prefix(model, 16)
    with common.output(args) as folder:
        config = ptengine.TrainingConfig(
            folder, max_steps=args.steps, per_device_train_batch_size=16, warmup_ratio=0.05, save_strategy="no"
        )
        ptengine.Trainer(model, prompt, train, None, config, task=task, tokenizer=tokenizer).fit()

    found = evaluate(model, prompt, task, test, tokenizer, generate=True, max_new_tokens=40)
    scores["tuned prefix"] = found.metrics
    shown = {test[0]["context"]: found.predictions[0]}
    common.report(args, (len(train), len(test)), scores, ("chrf", "exact_match", "perplexity"), shown)


if __name__ == "__main__":
    sys.exit(main())

"""`ptengine demo`: the main job once through, on what the package ships: a tiny model and a real data set."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptengine.commands import Outcome
from ptengine.commands.options import check_output, choice, seed

if TYPE_CHECKING:
    from ptengine.data import Task

EXAMPLE = """  ptengine demo
  ptengine demo --task e2e_nlg --output out"""


@dataclass(frozen=True)
class DemoSettings:
    """One demo. The numbers were chosen on the validation split; the test split is only read to fill the table.

    Attributes:
        template: text of a row.
        label_words: for classification; None means the demo writes texts.
        method, prompt: the prompt's method and its options.
        training: fields of `TrainingConfig`.
        columns: the metrics of the table.
        sample: what `ptengine generate` is shown on.
        max_new_tokens: longest text written.
        constant: fields of `TrainingConfig` that all demos share.
    """

    template: str
    label_words: dict[str, str] | None
    method: str
    prompt: dict[str, Any]
    training: dict[str, Any]
    columns: tuple[str, ...]
    sample: str
    max_new_tokens: int = 64
    constant: dict[str, Any] = field(default_factory=lambda: {"load_best_model_at_end": True, "save_strategy": "epoch"})


DEMOS = {
    "sms_spam": DemoSettings(
        template="Message: {text}\nSpam:",
        label_words={"ham": " no", "spam": " yes"},
        method="prefix",
        prompt={"num_virtual_tokens": 16, "init": "random"},
        training={
            "max_steps": 200,
            "per_device_train_batch_size": 32,
            "learning_rate": 0.1,
            "warmup_ratio": 0.05,
            "eval_strategy": "steps",
            "eval_steps": 50,
        },
        columns=("accuracy", "macro_f1"),
        sample="Congratulations! You have won a free phone. Call 09061701461 now",
    ),
    "e2e_nlg": DemoSettings(
        template="{source}\n",
        label_words=None,
        method="prefix",
        prompt={"num_virtual_tokens": 16, "init": "random"},
        training={
            "max_steps": 240,
            "per_device_train_batch_size": 16,
            "learning_rate": 0.1,
            "warmup_ratio": 0.05,
            "eval_strategy": "steps",
            "eval_steps": 80,
        },
        columns=("bleu", "rouge_l", "loss"),
        sample="name[Aromi], eatType[coffee shop], food[Chinese], area[riverside]",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task", type=choice(*DEMOS), default="sms_spam", metavar="NAME",
        help="sms_spam: label messages; e2e_nlg: describe restaurants (default: sms_spam)",
    )  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help="new folder for all results (default: ptengine-out/NAME)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of prompt and training (default: 0)")


def run(args: argparse.Namespace) -> Outcome:
    from ptengine.assets import data_path
    from ptengine.commands.loading import load_model, load_tokenizer, pick_device
    from ptengine.commands.recipe import Recipe, model_fingerprint
    from ptengine.files import make_directory, write_json_atomic
    from ptengine.prompts import create
    from ptengine.training import Trainer, TrainingConfig

    started = time.perf_counter()
    settings = DEMOS[args.task]
    output = _output(args.output, args.task)
    config = TrainingConfig(output_dir=str(output), seed=args.seed, **settings.training, **settings.constant)
    task = _make_task(settings)
    device = pick_device(None)
    make_directory(output)  # before the minutes that a run takes, and after what refuses it
    folder = data_path(args.task)
    train, validation, test = (str(folder / f"{split}.jsonl") for split in ("train", "validation", "test"))
    _say(f"1/4 loading the embedded model and {args.task}")
    tokenizer, model = load_tokenizer(None, None), load_model(None, device, "float32")
    prompt = create(settings.method, model, seed=args.seed, **settings.prompt)
    trainer = Trainer(model, prompt, train, validation, config, task=task, tokenizer=tokenizer)

    _say("2/4 baselines on the test split")
    table = _baselines(train, test) if settings.label_words is not None else {}
    table["frozen model, hard prompt only"] = _judge(settings, model, None, task, test, tokenizer)
    _say(f"3/4 tuning a {settings.method} of {prompt.num_virtual_tokens} virtual tokens, the model stays frozen")
    Recipe(task, None, None, "float32", model_fingerprint(model, task)).write(output)
    result = trainer.fit()
    _say("4/4 the tuned prompt on the test split")
    table["tuned prompt"] = _judge(settings, model, prompt, task, test, tokenizer)

    data: dict[str, Any] = {
        "command": "demo",
        "task": args.task,
        "output": str(output),
        "test": table,
        "validation": result.metrics,
        "steps": result.steps,
        "tokens_per_second": result.tokens_per_second,
        "training_seconds": result.seconds,
        "prompt": str(result.prompt_path),
        "curve": str(result.curve_path),
        "next": [
            f"ptengine eval --prompt {shlex.quote(str(output))} --data {shlex.quote(test)}",
            f"ptengine generate --prompt {shlex.quote(str(output))} --text {shlex.quote(settings.sample)}",
        ],
        "seconds": time.perf_counter() - started,
    }
    write_json_atomic(output / "metrics.json", data)
    return Outcome(data, _shown(settings, data))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _output(given: str | None, task: str) -> Path:
    """The folder asked for, if it is free; else the first free one of the demo's own."""
    if given is not None:
        check_output(given)
        return Path(given)
    path, count = Path("ptengine-out") / task, 1
    while path.exists():
        count += 1
        path = Path("ptengine-out") / f"{task}-{count}"
    return path


def _make_task(settings: DemoSettings) -> Task:
    from ptengine.data import ClassificationTask, GenerationTask, Template, Verbalizer

    template = Template(settings.template)
    if settings.label_words is None:
        return GenerationTask(template)
    return ClassificationTask(template, Verbalizer(settings.label_words))


def _judge(settings: DemoSettings, model: Any, prompt: Any, task: Task, data: str, tokenizer: Any) -> dict[str, float]:
    """The table's metrics on `data`."""
    from ptengine.training import evaluate

    writes = settings.label_words is None
    result = evaluate(
        model, prompt, task, data, tokenizer, batch_size=64, generate=writes, max_new_tokens=settings.max_new_tokens
    )
    return {name: result.metrics[name] for name in settings.columns}


def _baselines(train: str, test: str) -> dict[str, dict[str, float]]:
    """What needs no language model: the most frequent label, and naive Bayes on word counts."""
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    from ptengine.data import load_rows

    rows, held = load_rows(train), load_rows(test)
    scores = {}
    for name, model in (
        ("majority class", DummyClassifier(strategy="most_frequent")),
        ("bag of words, naive Bayes", make_pipeline(CountVectorizer(), MultinomialNB())),
    ):
        predicted: Sequence[str] = model.fit(rows["text"], rows["label"]).predict(held["text"])
        scores[name] = {
            "accuracy": float(accuracy_score(held["label"], predicted)),
            "macro_f1": float(f1_score(held["label"], predicted, average="macro", zero_division=0)),
        }
    return scores


def _shown(settings: DemoSettings, data: dict[str, Any]) -> tuple[Any, ...]:
    from rich.table import Table

    table = Table(title=f"{data['task']}, held-out test split")
    table.add_column("")
    for name in settings.columns:
        table.add_column(name.replace("_", "-").replace("macro-f1", "macro-F1"), justify="right")
    for name, scores in data["test"].items():
        table.add_row(name, *(f"{scores[column]:.4f}" for column in settings.columns))
    return (
        table,
        f"prompt in {data['prompt']}, numbers in {data['output']}/metrics.json, curve in {data['curve']}",
        f"{data['steps']} steps, {data['tokens_per_second']:.0f} tokens/s, {data['seconds']:.0f} s in all",
        "next:",
        *(f"  {line}" for line in data["next"]),
    )

"""Few-shot transfer across review domains: is a prompt that starts from another domain's better than one from scratch?

    python benchmarks/transfer_fewshot.py --model PATH --language en --json benchmarks/results/transfer_fewshot_en.json
    python benchmarks/transfer_fewshot.py --model PATH --language zh --json FILE --minutes 15

Every domain of `../shared/data/fdu_mtl` (en) or `online_shopping_zh` (zh) has a source prompt, tuned on its training
rows, and a control prompt, tuned on the same rows with shuffled labels. For every target, seed and number of shots per
class, on the same shots and in the same order:

    scratch       best of four learning rates and of one, two and three times the steps. The configuration is the one
                  with the best mean over all pairs, picked on the test rows: a bound that favours scratch.
    source_only   the other domain's prompt with the least loss on the shots, untouched
    plain         started from it and tuned on the shots
    joint         the same with 0.5 * source loss + 0.5 * target loss
    anchor        the same with a penalty on the distance from the start
    shuffled      plain, from the control prompt of the same source

Accuracy on the target's test rows; nothing but the scratch configuration is picked on them. Intervals resample pairs
(target, seed). Every finished run is written at once, and a run that was cut off goes on; with `--minutes` it stops in
time, and seeds are the outer loop, so that what is finished is balanced.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from train_step import SHARED, environment
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptengine
from ptengine.assets import backbone_path
from ptengine.data import ClassificationTask, Template, Verbalizer
from ptengine.files import write_json_atomic
from ptengine.training import Trainer, TrainingConfig, evaluate
from ptengine.transfer import Anchor, Joint, PromptBank, Strategy, transfer_measures
from ptengine.transfer.arithmetic import start_from
from ptengine.transfer.cleaning import Cleaning, clean
from ptengine.transfer.losses import TransferLoss

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Language:
    """Attributes: `folder` of the domains, those that are targets, and the `task` of a row."""

    folder: str
    targets: tuple[str, ...]
    task: ClassificationTask


LANGUAGES = {
    "en": Language(
        "fdu_mtl",
        ("music", "health", "apparel", "kitchen"),
        ClassificationTask(Template("{text}\nGood or bad?"), Verbalizer({"negative": " bad", "positive": " good"})),
    ),
    "zh": Language(
        "online_shopping_zh",
        ("fruit", "shampoo", "computer", "clothes"),
        ClassificationTask(Template("{text}\n评价："), Verbalizer({"negative": "差", "positive": "好"})),
    ),
}
METHODS = {"soft": "soft_prompt", "deep": "prefix"}
INITS = {"soft": "sampled_vocab", "deep": "random"}
VIRTUAL_TOKENS = 8
RATES = (3.0, 1.0, 0.3, 0.1)
"""Of scratch and, for the source prompts, the best on their own validation rows; times the method's own rate."""
STRATEGIES = {
    "plain": Strategy(),
    "joint": Strategy(joint=Joint(0.5)),
    "anchor": Strategy(anchor=Anchor(1.0)),
}
SHORT = {"shots": [16], "methods": ["soft"], "seeds": 2, "steps": 30, "source_steps": 120, "test_rows": 120}
FULL = {"shots": [16, 32], "methods": ["soft", "deep"], "seeds": 6, "steps": 60, "source_steps": 300, "test_rows": 300}


class OutOfTime(Exception):
    """The minutes are over; what is finished is written."""


@dataclass
class Store:
    """The result file: finished runs by name, written one by one."""

    path: Path
    settings: dict[str, Any]
    deadline: float
    runs: dict[str, Any]

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any], minutes: float | None) -> Store:
        runs: dict[str, Any] = {}
        if path.exists():
            before = json.loads(path.read_text())
            if before["settings"] != settings:
                sys.exit(f"{path} holds runs with {before['settings']}, not {settings}: choose another file")
            runs = before["runs"]
        deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        return cls(path, settings, deadline, runs)

    def once(self, name: str, run: Callable[[], Any]) -> Any:
        """The result called `name`, computed unless it is there."""
        if name not in self.runs:
            if time.monotonic() > self.deadline:
                raise OutOfTime
            self.runs[name] = run()
            print(f"{name}: {self.runs[name]}", flush=True)
            self.write()
        return self.runs[name]

    def write(self) -> None:
        command = "python " + " ".join(["benchmarks/transfer_fewshot.py", *sys.argv[1:]])
        write_json_atomic(
            self.path,
            {
                "command": command,
                "environment": environment(),
                "settings": self.settings,
                "summary": summary(self.runs),
                "runs": self.runs,
            },
        )


@dataclass(frozen=True)
class Lab:
    """One language on one backbone."""

    language: Language
    model: Any
    tokenizer: Any
    settings: Mapping[str, Any]
    cache: Path

    def rows(self, domain: str, split: str) -> Rows:
        path = SHARED / "data" / self.language.folder / domain / f"{split}.jsonl"
        return clean(path, text_columns=["text"], label_column="label").rows

    def config(self, folder: str, seed: int, **options: Any) -> TrainingConfig:
        return TrainingConfig(
            folder, per_device_train_batch_size=16, per_device_eval_batch_size=64, seed=seed, save_strategy="no",
            disable_tqdm=True, truncation=True, max_length=self.settings["max_length"], logging_steps=10**6, **options,
        )  # fmt: skip

    def fresh(self, method: str, seed: int) -> Any:
        options = {"tokenizer": self.tokenizer} if INITS[method] == "sampled_vocab" else {}
        cls = ptengine.SoftPrompt if method == "soft" else ptengine.Prefix
        return cls(self.model, VIRTUAL_TOKENS, init=INITS[method], seed=seed, **options)  # type: ignore[arg-type]

    def fit(self, prompt: Any, train: Rows, held: Rows | None, loss: TransferLoss | None = None, **options: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            config = self.config(folder, options.pop("seed"), **options)
            trainer = Trainer(
                self.model, prompt, train, held, config, task=self.language.task, tokenizer=self.tokenizer,
                step_loss=loss,
            )  # fmt: skip
            return trainer.fit()

    def accuracy(self, prompt: Any, rows: Rows) -> float:
        result = evaluate(
            self.model, prompt, self.language.task, rows, self.tokenizer, batch_size=64, truncation=True,
            max_length=self.settings["max_length"],
        )  # fmt: skip
        return result.metrics["accuracy"]

    def source(self, method: str, domain: str, shuffled: bool) -> dict[str, float]:
        """Tune a domain's prompt at each rate, bank the best on validation rows, and say how good it is there."""
        rows, held = self.rows(domain, "train"), self.rows(domain, "validation")
        if shuffled:
            labels = [row["label"] for row in rows]
            random.Random(0).shuffle(labels)
            rows = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
        best: tuple[float, float, Any] | None = None
        for rate in RATES[:3]:
            prompt = self.fresh(method, 0)
            steps = self.settings["source_steps"]
            result = self.fit(
                prompt, rows, held, seed=0, max_steps=steps, learning_rate=prompt.default_learning_rate() * rate,
                warmup_ratio=0.05, eval_strategy="steps", eval_steps=max(steps // 6, 1), load_best_model_at_end=True,
            )  # fmt: skip
            found = (result.metrics["accuracy"], -result.metrics["loss"], prompt)
            if best is None or found[:2] > best[:2]:
                best = found
        assert best is not None
        self.bank(method, shuffled).add(
            domain, best[2], model=self.model, tokenizer=self.tokenizer, task=self.language.task, data=rows,
            metrics={"accuracy": best[0]}, replace=True,
        )  # fmt: skip
        return {"validation_accuracy": best[0]}

    def bank(self, method: str, shuffled: bool) -> PromptBank:
        return PromptBank(self.cache / f"{method}-{'shuffled' if shuffled else 'sources'}")

    def shots(self, target: str, count: int, seed: int) -> Rows:
        drawn = Cleaning(per_label=count, seed=seed)
        return clean(self.rows(target, "train"), text_columns=["text"], label_column="label", settings=drawn).rows

    def scratch(self, method: str, target: str, count: int, seed: int) -> dict[str, float]:
        """Test accuracy of every configuration: a constant rate, read after one, two and three times the steps."""
        test, steps = self.test(target), self.settings["steps"]
        found = {}
        for rate in RATES:
            prompt = self.fresh(method, seed)
            result = self.fit(
                prompt, self.shots(target, count, seed), test, seed=seed, max_steps=3 * steps,
                learning_rate=prompt.default_learning_rate() * rate, lr_scheduler_type="constant",
                eval_strategy="steps", eval_steps=steps,
            )  # fmt: skip
            found |= {f"{rate:g} x rate, {e['step'] // steps:g} x steps": e["accuracy"] for e in result.evaluations}
        return found

    def test(self, target: str) -> Rows:
        return self.rows(target, "test")[: self.settings["test_rows"]]

    def select(self, method: str, target: str, count: int, seed: int) -> str:
        search = self.bank(method, False).search(
            model=self.model, tokenizer=self.tokenizer, task=self.language.task, shots=self.shots(target, count, seed),
            exclude=[target], truncation=True, max_length=self.settings["max_length"],
        )  # fmt: skip
        return search.matches[0].entry.name

    def moved(self, method: str, target: str, count: int, seed: int, source: str, name: str) -> float:
        """Test accuracy of one strategy from `source`; ``source_only`` tunes nothing, ``shuffled`` is the control."""
        start = self.bank(method, name == "shuffled").entry(source).load(self.model, self.tokenizer)
        if name == "source_only":
            return self.accuracy(start, self.test(target))
        prompt = start_from(self.model, start)
        loss = TransferLoss(
            STRATEGIES.get(name, Strategy()), model=self.model, tokenizer=self.tokenizer, start=start,
            config=self.config("unused", seed), source_task=self.language.task, source_data=self.rows(source, "train"),
        )  # fmt: skip
        self.fit(prompt, self.shots(target, count, seed), None, loss, seed=seed, max_steps=self.settings["steps"])
        return self.accuracy(prompt, self.test(target))


def pairs(lab: Lab) -> Iterator[tuple[int, int, str, str]]:
    for seed in range(lab.settings["seeds"]):
        for count in lab.settings["shots"]:
            for method in lab.settings["methods"]:
                for target in lab.language.targets[: lab.settings["targets"]]:
                    yield seed, count, method, target


def run(lab: Lab, store: Store) -> None:
    domains = sorted(path.name for path in (SHARED / "data" / lab.language.folder).iterdir() if path.is_dir())
    for method in lab.settings["methods"]:
        for domain in domains[: lab.settings["sources"]]:
            store.once(f"source/{method}/{domain}", lambda m=method, d=domain: lab.source(m, d, False))  # type: ignore[misc]
    for seed, count, method, target in pairs(lab):
        where = (method, target, count, seed)
        key = f"{method}/{count}/{target}/{seed}"
        source = store.once(f"{key}/selected", lambda w=where: lab.select(*w))  # type: ignore[misc]
        store.once(f"control/{method}/{source}", lambda m=method, s=source: lab.source(m, s, True))  # type: ignore[misc]
        for name in ("source_only", *STRATEGIES, "shuffled"):
            store.once(f"{key}/{name}", lambda w=where, s=source, n=name: lab.moved(*w, s, n))  # type: ignore[misc]
        store.once(f"{key}/scratch", lambda w=where: lab.scratch(*w))  # type: ignore[misc]


def summary(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Mean accuracies and measures by method and shots, over the pairs whose runs are all finished."""
    groups: dict[str, list[str]] = {}
    for key in runs:
        method, _, rest = key.partition("/")
        if key.endswith("/scratch") and method in METHODS:
            groups.setdefault(f"{method}/{rest.partition('/')[0]}", []).append(key.removesuffix("/scratch"))
    found = {}
    for group, keys in groups.items():
        configurations = runs[f"{keys[0]}/scratch"]
        mean = {name: sum(runs[f"{key}/scratch"][name] for key in keys) / len(keys) for name in configurations}
        best = max(mean, key=mean.__getitem__)
        scratch = [runs[f"{key}/scratch"][best] for key in keys]
        scores = {name: [runs[f"{key}/{name}"] for key in keys] for name in ("source_only", *STRATEGIES, "shuffled")}
        measures = {
            name: transfer_measures(
                scratch, scores[name], source_only=scores["source_only"], shuffled=scores["shuffled"]
            )
            for name in STRATEGIES
        }
        found[group] = {
            "pairs": len(keys),
            "scratch_configuration": best,
            "accuracy": {"scratch": mean[best], **{name: sum(x) / len(x) for name, x in scores.items()}},
            "measures": {
                name: {measure: value.to_json() for measure, value in of.items()} for name, of in measures.items()
            },
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", choices=tuple(LANGUAGES), required=True)
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    parser.add_argument("--model", type=Path, metavar="PATH", help="causal checkpoint (default: the embedded one)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of the prompts (default: beside --json)")
    parser.add_argument("--minutes", type=float, help="stop in time; also a smaller experiment unless set otherwise")
    parser.add_argument("--shots", type=int, nargs="+", help="per class (default 16 32; 16 with --minutes)")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), help="(default both; soft with --minutes)")
    parser.add_argument("--seeds", type=int, help="(default 6; 2 with --minutes)")
    parser.add_argument("--steps", type=int, help="on the shots (default 60; 30 with --minutes)")
    parser.add_argument("--source-steps", type=int, help="on a source (default 300; 120 with --minutes)")
    parser.add_argument("--test-rows", type=int, help="of a target (default 300; 120 with --minutes)")
    parser.add_argument("--targets", type=int, default=4, help="how many (default 4)")
    parser.add_argument("--sources", type=int, help="how many domains have a source prompt (default all)")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text (default 64)")
    args = parser.parse_args()
    settings: dict[str, Any] = dict(SHORT if args.minutes is not None else FULL)
    settings |= {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    settings |= {"language": args.language, "targets": args.targets, "sources": args.sources}
    settings |= {"max_length": args.max_length, "virtual_tokens": VIRTUAL_TOKENS, "rates": list(RATES)}
    settings["model"] = "embedded" if args.model is None else args.model.name
    folder = backbone_path() if args.model is None else args.model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache = args.cache or args.json.with_suffix(".prompts")
    store = Store.open(args.json, settings, args.minutes)
    lab = Lab(LANGUAGES[args.language], model, AutoTokenizer.from_pretrained(folder), settings, cache)
    try:
        run(lab, store)
    except OutOfTime:
        print(f"stopped after {args.minutes:g} minutes; the same command goes on", file=sys.stderr)
    store.write()
    for group, found in summary(store.runs).items():
        print(f"\n{group} shots, {found['pairs']} pairs, scratch: {found['scratch_configuration']}")
        for name, value in found["accuracy"].items():
            print(f"  {name:12} {100 * value:6.2f}")
        for name, measures in found["measures"].items():
            for measure in ("absolute_gain", "shuffled_gain", "wins"):
                value = measures[measure]
                if value["low"] is not None:
                    low, high = 100 * value["low"], 100 * value["high"]
                    print(f"  {name} {measure} {100 * value['value']:+.2f} [{low:+.2f}, {high:+.2f}]")


if __name__ == "__main__":
    main()

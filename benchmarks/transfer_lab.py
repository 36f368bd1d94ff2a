"""What the transfer experiments share: domains, tasks, one frozen backbone, and how prompts are tuned and judged on it.

Source prompts lie in banks, one per method and kind: `sources` (tuned on a domain's training rows), `shuffled` (the
control: the same rows, validation rows too, with their labels shuffled) and `unrelated` (another task with the same
label words, for the guard), `pooled` (for every target one prompt, tuned on all other domains' rows together) and
`pooled-shuffled` (the control of those).
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from train_step import SHARED
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import ptengine
from ptengine.backbone.spec import kind_of
from ptengine.data import (
    ClassificationTask,
    EncodedSplit,
    MaskedClassificationTask,
    SequenceClassificationTask,
    Template,
    VerbalizedTask,
    Verbalizer,
    load_rows,
)
from ptengine.prompts.base import Prompt
from ptengine.prompts.headed import HeadedPrompt
from ptengine.training import PromptSet, Trainer, TrainingConfig, TrainingResult, evaluate
from ptengine.training.preparation import for_task
from ptengine.transfer import PromptBank
from ptengine.transfer.cleaning import Cleaning, clean
from ptengine.transfer.losses import TransferLoss

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Language:
    """Attributes: `folder` of the domains, those that are `targets`, the `task` of a row for causal models, the same as
    a blank to fill in for masked language models, and the `unrelated` tasks: data set to (label to the experiment's
    label), rows of other labels left out. Encoders that write no words have `HEADED_TASK`."""

    folder: str
    targets: tuple[str, ...]
    task: ClassificationTask
    masked_task: MaskedClassificationTask
    unrelated: Mapping[str, Mapping[str, str]]


LANGUAGES = {
    "en": Language(
        "fdu_mtl",
        ("music", "health", "apparel", "kitchen"),
        ClassificationTask(Template("{text}\nAnswer:"), Verbalizer({"negative": " bad", "positive": " good"})),
        MaskedClassificationTask(
            Template("it was {mask} . {text}"), Verbalizer({"negative": "bad", "positive": "good"})
        ),
        {
            "subj": {"objective": "negative", "subjective": "positive"},
            "sms_spam": {"spam": "negative", "ham": "positive"},
            "trec6": {"human": "negative", "location": "positive"},
        },
    ),
    "zh": Language(
        "online_shopping_zh",
        ("fruit", "shampoo", "computer", "clothes"),
        ClassificationTask(Template("{text}\n回答："), Verbalizer({"negative": "差", "positive": "好"})),
        MaskedClassificationTask(Template("很{mask}，{text}"), Verbalizer({"negative": "差", "positive": "好"})),
        {
            "thucnews_title": {"finance": "negative", "sports": "positive"},
            "csl_category": {"engineering": "negative", "medicine": "positive"},
            "tnews": {"car": "negative", "world": "positive"},
        },
    ),
}
METHODS = ("soft", "deep")
KINDS = ("sources", "shuffled", "unrelated")
POOLED_KINDS = ("pooled", "pooled-shuffled")
HEADED_TASK = SequenceClassificationTask(labels=("negative", "positive"))
HEAD_RATE = 0.005
"""Of a head, where the prompt learns at its method's own rate; chosen on validation rows of SST-2 (quality.py)."""
POOLED_STEPS = 1.5
"""Of a pooled prompt, times those of a source."""
SOURCE_RATES = (3.0, 1.0)
"""Of source prompts, times the method's own rate; the best on their validation rows counts."""


def shuffled(rows: Rows) -> Rows:
    """The rows with their labels in another order."""
    labels = [row["label"] for row in rows]
    random.Random(0).shuffle(labels)
    return [row | {"label": label} for row, label in zip(rows, labels, strict=True)]


@dataclass(frozen=True)
class Fit:
    """One prompt to tune: on `rows` for `steps` at a constant `rate`, evaluated on `held` every `every` steps."""

    prompt: Prompt
    rows: Any
    held: Any
    steps: int
    every: int
    rate: float
    seed: int
    best: bool = False


@dataclass
class Lab:
    """One language on one frozen backbone."""

    language: Language
    model: Any
    tokenizer: Any
    data: Path
    cache: Path
    max_length: int
    virtual_tokens: int
    source_steps: int = 0
    bf16: bool = False
    encoded: dict[tuple[str, str], EncodedSplit] = field(default_factory=dict)
    prompts: dict[tuple[str, str, str], Prompt] = field(default_factory=dict)

    @classmethod
    def open(
        cls, folder: Path, language: str, device: str, cache: Path, data: Path = SHARED / "data", **rest: Any
    ) -> Lab:
        config = AutoConfig.from_pretrained(folder)
        auto: Any = AutoModelForCausalLM
        if kind_of(config.model_type) == "encoder":
            speaks = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
            auto = AutoModelForMaskedLM if speaks else AutoModelForSequenceClassification
        model = auto.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        return cls(LANGUAGES[language], model, AutoTokenizer.from_pretrained(folder), data, cache, **rest)

    def domains(self) -> list[str]:
        return sorted(path.name for path in (self.data / self.language.folder).iterdir() if path.is_dir())

    def rows(self, domain: str, split: str) -> Rows:
        """A domain's rows, or those of an unrelated task with the experiment's labels."""
        folder = self.data / (domain if domain in self.language.unrelated else f"{self.language.folder}/{domain}")
        rows = clean(folder / f"{split}.jsonl", text_columns=["text"], label_column="label").rows
        names = self.language.unrelated.get(domain)
        return (
            rows if names is None else [row | {"label": names[row["label"]]} for row in rows if row["label"] in names]
        )

    def sample(self, domain: str, split: str, most: int | None) -> Rows:
        """At most `most` of the rows, always the same ones."""
        rows = self.rows(domain, split)
        return rows if most is None or most >= len(rows) else random.Random(0).sample(rows, most)

    def encode(self, domain: str, split: str, most: int | None = None) -> EncodedSplit:
        """The rows as tokens, read once; `most` of them, a seeded sample."""
        if (domain, split) not in self.encoded:
            self.encoded[domain, split] = self.encoding(self.sample(domain, split, most), domain)
        return self.encoded[domain, split]

    def encoding(self, rows: Rows, name: str) -> EncodedSplit:
        return self.task.encode(
            load_rows(rows), self.tokenizer, max_tokens=self.max_length, truncation=True, source_name=name
        )

    @property
    def task(self) -> VerbalizedTask | SequenceClassificationTask:
        if self.has_head:
            return HEADED_TASK
        masked = kind_of(self.model.config.model_type) == "encoder"
        return self.language.masked_task if masked else self.language.task

    @property
    def has_head(self) -> bool:
        return type(self.model).__name__.endswith("ForSequenceClassification")

    def shots(self, target: str, count: int, seed: int) -> Rows:
        drawn = Cleaning(per_label=count, seed=seed)
        return clean(self.rows(target, "train"), text_columns=["text"], label_column="label", settings=drawn).rows

    def fresh(self, method: str, seed: int) -> Prompt:
        return for_task(self.model, self.bare(method, seed), self.task, seed)

    def bare(self, method: str, seed: int) -> Prompt:
        if method == "soft":
            return ptengine.SoftPrompt(
                self.model, self.virtual_tokens, init="sampled_vocab", tokenizer=self.tokenizer, seed=seed
            )
        return ptengine.Prefix(self.model, self.virtual_tokens, init="random", seed=seed)

    def config(self, folder: str, seed: int, **options: Any) -> TrainingConfig:
        return TrainingConfig(
            folder, per_device_train_batch_size=16, per_device_eval_batch_size=256, seed=seed, save_strategy="no",
            disable_tqdm=True, truncation=True, max_length=self.max_length, logging_steps=10**6,
            lr_scheduler_type="constant", bf16=self.bf16, **options,
        )  # fmt: skip

    def fit_all(self, fits: Sequence[Fit]) -> list[TrainingResult]:
        """Tune many prompts of one kind in one batch a step; a run that diverged ends the experiment."""
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        with tempfile.TemporaryDirectory() as folder:
            members = [self._trainer(one, f"{folder}/{index}") for index, one in enumerate(fits)]
            found = PromptSet(members, folder, max_tokens_per_batch=8192 if on_cpu else None).fit().members
        for result in found:
            if not isinstance(result, TrainingResult):
                raise result
        return found  # type: ignore[return-value]

    def fit(self, one: Fit, loss: TransferLoss | None = None) -> TrainingResult:
        with tempfile.TemporaryDirectory() as folder:
            return self._trainer(one, folder, loss).fit()

    def _trainer(self, one: Fit, folder: str, loss: TransferLoss | None = None) -> Trainer:
        options: dict[str, Any] = {}
        if one.held is not None:
            options = {"eval_strategy": "steps", "eval_steps": one.every, "load_best_model_at_end": one.best}
        if isinstance(one.prompt, HeadedPrompt):
            own = self.bare("soft" if isinstance(one.prompt.prompt, ptengine.SoftPrompt) else "deep", 0)
            options["head_learning_rate"] = HEAD_RATE * one.rate / own.default_learning_rate()
        config = self.config(folder, one.seed, max_steps=one.steps, learning_rate=one.rate, **options)
        return Trainer(
            self.model, one.prompt, one.rows, one.held, config, task=self.task, tokenizer=self.tokenizer, step_loss=loss
        )

    def accuracy(self, prompt: Prompt | None, rows: Any) -> float:
        return evaluate(
            self.model, prompt, self.task, rows, self.tokenizer, batch_size=256, truncation=True,
            max_length=self.max_length, bf16=self.bf16,
        ).metrics["accuracy"]  # fmt: skip

    def bank(self, method: str, kind: str) -> PromptBank:
        return PromptBank(self.cache / f"{method}-{kind}")

    def source_names(self, kind: str) -> list[str]:
        if kind in POOLED_KINDS:
            return list(self.language.targets)
        return list(self.language.unrelated if kind == "unrelated" else self.domains())

    def other_domains(self, target: str) -> list[str]:
        return [domain for domain in self.domains() if domain != target]

    def other_rows(self, target: str) -> EncodedSplit:
        """The training rows of all domains but the target's."""
        return self.encoding(self.lesson("pooled", target)[0], target)

    def lesson(self, kind: str, name: str) -> tuple[Rows, EncodedSplit]:
        """What a banked prompt is tuned on, and the rows that choose its best step."""
        if kind in POOLED_KINDS:
            others = self.other_domains(name)
            rows = [row for domain in others for row in self.rows(domain, "train")]
            held = [row for domain in others for row in self.sample(domain, "validation", 30)]
        else:
            rows, held = self.rows(name, "train"), self.sample(name, "validation", 120)
        if kind.endswith("shuffled"):  # also the rows that choose the best step: right labels there would teach
            rows, held = shuffled(rows), shuffled(held)
        return rows, self.encoding(held, name)

    def make_sources(self, method: str, kind: str) -> None:
        """Tune the bank's missing prompts, all in one batch: every source at each rate."""
        bank = self.bank(method, kind)
        there = {entry.name for entry in bank.list()}
        missing = [name for name in self.source_names(kind) if name not in there]
        steps = round(self.source_steps * (POOLED_STEPS if kind in POOLED_KINDS else 1))
        fits, facts = [], []
        for name in missing:
            rows, held = self.lesson(kind, name)
            for rate in SOURCE_RATES:
                prompt = self.fresh(method, 0)
                every = max(steps // 5, 1)
                scaled = prompt.default_learning_rate() * rate
                fits.append(Fit(prompt, rows, held, steps, every, scaled, 0, best=True))
                facts.append((name, rows))
        results = self.fit_all(fits) if fits else []
        for name in missing:
            mine = [i for i, (its, _) in enumerate(facts) if its == name]
            best = max(mine, key=lambda i: (results[i].metrics["accuracy"], -results[i].metrics["loss"]))
            metrics = {"accuracy": results[best].metrics["accuracy"]}
            bank.add(
                name, fits[best].prompt, model=self.model, tokenizer=self.tokenizer, task=self.task,
                data=facts[best][1], metrics=metrics, initial=self.fresh(method, 0),
            )  # fmt: skip
            print(f"{method} {kind} {name}: validation accuracy {results[best].metrics['accuracy']:.3f}", flush=True)

    def source(self, method: str, kind: str, name: str) -> Prompt:
        key = (method, kind, name)
        if key not in self.prompts:
            self.prompts[key] = self.bank(method, kind).entry(name).load(self.model, self.tokenizer)
        return self.prompts[key]

    def source_accuracies(self, method: str, kind: str) -> dict[str, float]:
        return {entry.name: dict(entry.card.metrics)["accuracy"] for entry in self.bank(method, kind).list()}

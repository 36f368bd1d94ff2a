"""One pass of a transfer on given shots: scratch, search, start, transferred.

The guard runs it on parts of the shots, and at last it runs on all of them; each pass in a folder of its own, whose
runs go on where they stopped. Knows banks, strategies and the trainer; nothing of what is decided.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ptengine.backbone.spec import backbone_spec
from ptengine.data import LabelledTask, Task
from ptengine.data.serialization import task_to_json
from ptengine.errors import InputError
from ptengine.files import make_directory
from ptengine.prompts.base import Prompt
from ptengine.prompts.registry import create
from ptengine.training import EvalResult, Trainer, TrainingConfig, TrainingResult, evaluate
from ptengine.training.evaluation import evaluation_options
from ptengine.training.folders import clean_leftovers, write_folder
from ptengine.training.identity import FREE_SETTINGS
from ptengine.training.preparation import DataSource, encode, for_task, row_limits
from ptengine.transfer.arithmetic import add_task_vectors, start_from, weighted_mean
from ptengine.transfer.augmentation import Augmentation, AugmentationReport, augment
from ptengine.transfer.bank import BankEntry, PromptBank, Search, weights_sha256
from ptengine.transfer.cards import data_facts
from ptengine.transfer.domains import DOMAIN_MEASURES, LEAST_TEXTS
from ptengine.transfer.guard import SCRATCH, SOURCE, TRANSFERRED
from ptengine.transfer.identity import BackboneIdentity, identify
from ptengine.transfer.losses import TransferLoss
from ptengine.transfer.self_training import NothingTaught, Taught, teach
from ptengine.transfer.similarity import PROMPT_MEASURES, prompt_similarity
from ptengine.transfer.strategies import Guard, Initialize, Strategy, rate_name
from ptengine.transfer.word_scores import bound_words

__all__ = ["Procedure", "Rows", "Trained", "require_comparable", "scratch_rate", "stage"]

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    """One pass of the procedure: every candidate, by name."""

    prompts: dict[str, Prompt]
    runs: dict[str, TrainingResult]
    search: Search
    selected: dict[str, float]
    likeness: float | None
    taught: Taught | None
    augmented: AugmentationReport | None
    untaught: str | None


@dataclass(frozen=True)
class _Probe:
    """A prompt of the target alone, and the P0 of the bank that it was tuned from, or None."""

    prompt: Prompt
    initial: Prompt | None


@dataclass(frozen=True)
class Procedure:
    """What every pass shares; attributes as the arguments of `ptengine.transfer.transfer`."""

    model: Any
    tokenizer: Any
    task: Task
    bank: PromptBank
    training: TrainingConfig
    strategy: Strategy
    guard: Guard | None
    source_task: Task | None
    source_data: DataSource | None
    exclude: tuple[str, ...]
    unlabelled: Rows | None
    augmentation: Augmentation | None

    def check(self, rows: Rows, eval_data: DataSource | None, fewest: int) -> None:
        """Meet the errors of settings, bank and data before the first step; `fewest` is the shots of the least fold."""
        entries = self.usable()
        wanted = self.strategy.initialize
        if wanted.top_k > len(entries):
            raise InputError(
                f"expected at least top_k={wanted.top_k} prompts to combine in the bank, got {len(entries)}"
            )
        require_comparable(
            self.strategy, {entry.name: entry.card.domain_texts for entry in entries},
            {entry.name: entry.card.initial_sha256 for entry in entries}, fewest,
        )  # fmt: skip
        distill = self.strategy.distill
        start = start_from(self.model, entries[0].load(self.model, self.tokenizer))
        if (self.strategy.self_train is None) != (self.unlabelled is None):
            raise InputError("expected unlabelled texts with a strategy that has self_train, and not without, got one")
        if self.unlabelled is not None:
            self.readable(self.unlabelled, start)
        replace(self, strategy=replace(self.strategy, initialize=Initialize(), self_train=None)).loss(start)
        self.trainer(start, rows, self.training.output_dir, None, eval_data, None)
        if self.guard is not None or wanted.fresh or (distill is not None and distill.similarity is not None):
            self.fresh()
        if wanted.measure not in PROMPT_MEASURES:  # for which a prompt must first be tuned
            self.teach(self.combine(self.search(rows, None))[0])

    @cached_property
    def identity(self) -> BackboneIdentity:
        """Of the frozen backbone and its tokenizer, which every pass asks for."""
        return identify(self.model, self.tokenizer)

    @cached_property
    def label_tokens(self) -> dict[str, int]:
        """How many tokens the loss of a row with each label stands on: those of its first word, or one of a head's."""
        if not isinstance(self.task, LabelledTask):
            return {}
        bound = bound_words(self.task, self.tokenizer)
        if bound is None:
            return dict.fromkeys(self.task.labels, 1)
        return {label: len(words[0]) for label, words in zip(bound.labels, bound.token_ids, strict=True)}

    def usable(self) -> list[BankEntry]:
        """The bank's entries of this backbone, all of one method and length, so that scratch can be like them."""
        entries = [entry for entry in self.bank.list() if entry.name not in self.exclude]
        reasons = {entry.name: entry.card.refusal(self.identity, self.task) for entry in entries}
        good = [entry for entry in entries if reasons[entry.name] is None]
        if not good:
            raise InputError(
                f"expected a bank with prompts of this backbone and tokenizer, got {str(self.bank.path)!r} with "
                f"{reasons or 'none'}"
            )
        forms = {(entry.card.method, entry.card.num_virtual_tokens): entry.name for entry in good}
        if len(forms) > 1:
            raise InputError(
                f"expected prompts of one method and length to choose among, got {list(forms.values())} with "
                f"{list(forms)}; exclude the others"
            )
        return good

    def plan(self, rows: Rows) -> dict[str, Any]:
        """Json values that must be equal for a run to go on."""
        return {**self.asked(rows), "bank": {entry.name: weights_sha256(entry.read()[0]) for entry in self.usable()}}

    def asked(self, rows: Rows) -> dict[str, Any]:
        """`plan` but for the bank."""
        settings = {name: value for name, value in asdict(self.training).items() if name not in FREE_SETTINGS}
        return {
            "training": settings,
            "strategy": asdict(self.strategy),
            "guard": None
            if self.guard is None
            else asdict(self.guard) | {"scratch_rates": [*self.guard.scratch_rates]},
            "task": task_to_json(self.task),
            "shots": asdict(data_facts(rows, "shots")),
            "source_task": None if self.source_task is None else task_to_json(self.source_task),
            "source_data": None if self.source_data is None else asdict(data_facts(self.source_data, "source")),
            "backbone": {"fingerprint": self.identity.fingerprint, "tokenizer": self.identity.tokenizer},
            "unlabelled": None if self.unlabelled is None else asdict(data_facts(self.unlabelled, "unlabelled")),
            "augmentation": None if self.augmentation is None else asdict(self.augmentation),
        }

    def run(
        self,
        rows: Rows,
        folder: Path,
        *,
        scratch: tuple[float, ...],
        eval_data: DataSource | None = None,
        is_fold: bool = False,
    ) -> Trained:
        """Scratch at each of the rates, and transfer, on `rows` and their changed copies, if any.

        `folder` is held or in one that is. A fold whose teacher has no unlabelled text to teach goes without, since the
        guard judges by all folds.
        """
        clean_leftovers(make_directory(folder))
        shots, augmented = rows, None
        if self.augmentation is not None:
            copies = augment(rows, self.task.text_columns, self.augmentation)
            rows, augmented = [*rows, *copies.rows], copies.report
        prompts: dict[str, Prompt] = {}
        runs: dict[str, TrainingResult] = {}
        for rate in scratch:
            name = scratch_name(rate)
            prompts[name] = fresh = self.fresh()
            learning_rate = fresh.default_learning_rate() * rate
            runs[name] = stage(self.trainer(fresh, rows, folder / name, learning_rate, eval_data, None))
        wanted, distill = self.strategy.initialize, self.strategy.distill
        similarity = None if distill is None else distill.similarity
        probe = self.probe(rows, folder) if wanted.measure in PROMPT_MEASURES or similarity is not None else None
        search = self.search(shots, probe)
        start, selected = self.combine(search)
        write_folder(folder / "start", start.save)
        likeness = None
        if similarity is not None and probe is not None:
            likeness = max(prompt_similarity(similarity, start, probe.prompt, probe.initial, probe.initial), 0.0)
        prompts[SOURCE] = start
        prompts[TRANSFERRED] = moved = self.fresh() if wanted.fresh else start_from(self.model, start)
        student, taught, untaught = self, None, None
        try:
            taught = self.teach(start)
        except NothingTaught as error:
            if not is_fold:
                raise
            student, untaught = replace(self, strategy=replace(self.strategy, self_train=None)), str(error)
        loss = student.loss(start, 1.0 if likeness is None else likeness, taught)
        runs[TRANSFERRED] = stage(self.trainer(moved, rows, folder / TRANSFERRED, None, eval_data, loss))
        return Trained(prompts, runs, search, selected, likeness, taught, augmented, untaught)

    def fresh(self) -> Prompt:
        """A prompt like the bank's, from scratch."""
        card, init = self.usable()[0].card, "random" if self.guard is None else self.guard.scratch_init
        options: dict[str, Any] = {"tokenizer": self.tokenizer} if init == "sampled_vocab" else {}
        prompt = create(
            card.method, self.model, num_virtual_tokens=card.num_virtual_tokens, init=init, seed=self.training.seed,
            **options,
        )  # fmt: skip
        return for_task(self.model, prompt, self.task, self.training.seed)

    def probe(self, rows: Rows, folder: Path) -> _Probe:
        """A prompt tuned on `rows` alone, from the bank's P0 where its entries share one, for cosines with it."""
        entries = self.usable()
        starts = {entry.card.initial_sha256 for entry in entries}
        initial = None
        if len(starts) == 1 and None not in starts:
            initial = entries[0].load_initial(self.model, self.tokenizer)
        probe = self.fresh() if initial is None else start_from(self.model, initial)
        rate = self.fresh().default_learning_rate()
        stage(self.trainer(probe, rows, folder / "probe", rate, None, None))
        return _Probe(probe, initial)

    def search(self, rows: Rows, probe: _Probe | None) -> Search:
        """The bank's entries by the strategy's measure: on `rows`, or a cosine with `probe`."""
        measure = self.strategy.initialize.measure
        asked: dict[str, Any] = {"model": self.model, "tokenizer": self.tokenizer, "exclude": self.exclude}
        if measure == "shot_loss":
            return self.bank.search(task=self.task, shots=rows, **evaluation_options(self.training), **asked)
        if measure in DOMAIN_MEASURES:
            return self.bank.search(measure=measure, task=self.task, shots=rows, **asked)
        assert probe is not None  # made for every other measure
        return self.bank.search(measure=measure, task=self.task, prompt=probe.prompt, initial=probe.initial, **asked)

    def combine(self, search: Search) -> tuple[Prompt, dict[str, float]]:
        """The start, and the entries it is made of with their weights."""
        wanted = self.strategy.initialize
        if len(search.matches) < wanted.top_k:
            raise InputError(
                f"expected at least top_k={wanted.top_k} prompts of the bank that {search.measure} can rank, got "
                f"{len(search.matches)}; refused: {dict(search.refused)}"
            )
        matches = search.matches[: wanted.top_k]
        entries = [match.entry for match in matches]
        prompts = [entry.load(self.model, self.tokenizer) for entry in entries]
        scores = [match.score for match in matches]
        if wanted.combine in ("best", "mean"):
            weights = [1.0] * len(matches)
        elif search.measure not in PROMPT_MEASURES:
            weights = [math.exp(scores[0] - score) for score in scores]  # over that of the best
        else:
            weights = [max(score, 0.0) for score in scores]
        if wanted.combine == "task_vectors":
            initial = entries[0].load_initial(self.model, self.tokenizer)
            start = add_task_vectors(prompts, initial, weights, wanted.scale)
        else:
            start = weighted_mean(prompts, weights)
        return start, {entry.name: weight / sum(weights) for entry, weight in zip(entries, weights, strict=True)}

    def teach(self, teacher: Prompt) -> Taught | None:
        """What `teacher` says of the unlabelled texts; None without any."""
        settings = self.strategy.self_train
        if settings is None or self.unlabelled is None:
            return None
        task: Any = self.task  # of labels: `unlabelled_rows` took it
        return teach(self.model, self.tokenizer, task, self.unlabelled, teacher, settings, self.training)

    def readable(self, rows: Rows, prompt: Prompt) -> None:
        """Refuse unlabelled rows that do not fit beside `prompt`."""
        spec, limits = backbone_spec(self.model), row_limits(self.training)
        encode(self.task, rows, self.tokenizer, prompt, spec, name="unlabelled", **limits)

    def loss(self, start: Prompt, likeness: float = 1.0, taught: Taught | None = None) -> TransferLoss:
        return TransferLoss(
            self.strategy, model=self.model, tokenizer=self.tokenizer, start=start, config=self.training,
            task=self.task, source_task=self.source_task, source_data=self.source_data, likeness=likeness,
            taught=taught,
        )  # fmt: skip

    def trainer(
        self,
        prompt: Prompt,
        rows: Rows,
        folder: str | Path,
        rate: float | None,
        eval_data: DataSource | None,
        step_loss: TransferLoss | None,
    ) -> Trainer:
        """A run on `rows`; without `rate` at the configured one; without `eval_data` nothing is evaluated."""
        changes: dict[str, Any] = {} if eval_data is not None else {"eval_strategy": "no", "eval_steps": None}
        config = replace(
            self.training, output_dir=str(folder), learning_rate=rate or self.training.learning_rate, **changes
        )
        return Trainer(
            self.model, prompt, rows, eval_data, config, task=self.task, tokenizer=self.tokenizer, step_loss=step_loss
        )

    def score(self, prompt: Prompt, rows: Rows) -> EvalResult:
        return evaluate(self.model, prompt, self.task, rows, self.tokenizer, **evaluation_options(self.training))


def stage(trainer: Trainer) -> TrainingResult:
    """Run or go on with one training run of a held plan; one that keeps no checkpoints is done anew."""
    if trainer.config.save_strategy != "no":
        return trainer.fit(resume=True)
    folder = Path(trainer.config.output_dir)
    if folder.exists():
        shutil.rmtree(folder)
    return trainer.fit()


def require_comparable(
    strategy: Strategy, texts: Mapping[str, int], starts: Mapping[str, str | None], shots: int
) -> None:
    """Refuse prompts, or shots, without what the strategy's measures and combination need.

    Args:
        texts: name of each prompt to of how many texts the embeddings are banked.
        starts: name of each prompt to the sha256 of its P0, None without one.
        shots: the fewest that are compared with the texts.

    Raises:
        InputError: naming what is missing.
    """
    wanted, distill = strategy.initialize, strategy.distill
    if wanted.measure in DOMAIN_MEASURES:
        without = [name for name, count in texts.items() if not count]
        if without:
            raise InputError(f"expected prompts added with their data to search by {wanted.measure}, got {without}")
        least = LEAST_TEXTS[wanted.measure]
        if shots < least:
            raise InputError(
                f"expected at least {least} shots to search by {wanted.measure}, in every fold but the part held back, "
                f"got {shots}"
            )
        enough = [name for name, count in texts.items() if count >= least]
        if len(enough) < wanted.top_k:
            raise InputError(
                f"expected at least top_k={wanted.top_k} prompts with {least} texts to search by {wanted.measure}, got "
                f"{dict(texts)} (name: its texts)"
            )
    likeness = "" if distill is None or distill.similarity is None else distill.similarity
    by_start = "task_vector" in wanted.measure + wanted.combine + likeness
    if by_start and (None in starts.values() or len(set(starts.values())) > 1):
        raise InputError(
            f"expected prompts with one initial prompt P0 for task vectors, got {dict(starts)} (name: its sha256)"
        )


def scratch_name(rate: float) -> str:
    return f"{SCRATCH}-{rate_name(rate)}"


def scratch_rate(name: str, guard: Guard) -> float:
    return next(rate for rate in guard.scratch_rates if scratch_name(rate) == name)

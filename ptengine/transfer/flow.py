"""The whole way from files to a report: clean, tune the sources, bank them, transfer, check, judge on a test set.

    output/clean/*.jsonl        the rows that are left, with cleaning.json
    output/sources/<name>/      the runs on the sources
    output/bank/                their prompts
    output/target/              everything of `ptengine.transfer.transfer`
    output/control/             the same from sources with shuffled labels, where asked for
    output/prompt/              the prompt that is kept
    output/report.*             what came out

Every stage goes on where it stopped when the flow is called again with equal settings. Knows the stages; nothing of
command lines.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_whole
from ptengine.data import LabelledTask, VerbalizedTask
from ptengine.data.cells import place
from ptengine.data.serialization import task_to_json
from ptengine.errors import InputError, TrainingDiverged
from ptengine.files import make_directory, write_json_atomic, write_together
from ptengine.garbage import settled_objects
from ptengine.prompts.base import Prompt
from ptengine.prompts.registry import create
from ptengine.training import Trainer, TrainingConfig
from ptengine.training.evaluation import evaluation_options
from ptengine.training.folders import clean_leftovers, exclusive, write_folder
from ptengine.training.preparation import DataSource, encode, for_task, row_limits
from ptengine.transfer.adaptivity import Adaptivity, prompt_adaptivity
from ptengine.transfer.augmentation import Augmentation, augment
from ptengine.transfer.bank import BankEntry, PromptBank, check_name, weights_sha256
from ptengine.transfer.cleaning import Cleaning, CleaningReport, text_key
from ptengine.transfer.domains import domain_texts, texts_of
from ptengine.transfer.evaluation import Judged, baselines, judge
from ptengine.transfer.flow_data import FlowData, Rows, prepared
from ptengine.transfer.guard import SCRATCH, folds
from ptengine.transfer.identity import identify
from ptengine.transfer.procedure import Procedure, require_comparable, stage
from ptengine.transfer.run import TransferResult, require_same_plan, transfer
from ptengine.transfer.self_training import unlabelled_rows
from ptengine.transfer.similarity import require_finite
from ptengine.transfer.strategies import Guard, Strategy

__all__ = ["CONTROL", "CURVE_ROWS", "FlowResult", "FlowSettings", "described", "run_flow"]

CONTROL = "shuffled source"
FROZEN = "frozen model"
POOLED = "pooled"
CURVE_ROWS = 100
"""Test rows, drawn by the seed, of the learning curves, which decide nothing."""

BACKGROUND_TEXTS = 2000
"""Texts of all sources, drawn by the seed, that the target's domain terms stand out from."""

_HELD_SHARE, _MOST_HELD = 0.2, 200


@dataclass(frozen=True)
class FlowSettings:
    """Attributes:
    method, num_virtual_tokens, init: of every prompt; `init` one that needs no further arguments.
    shots: rows per label of the target to train on; None for all.
    test_rows: at most this many test rows, drawn by the seed; None for all.
    source_steps: optimiser steps on each source; its best evaluation on a fifth of its rows counts.
    source_learning_rate: None for the method's own.
    pool_sources: tune one prompt, called "pooled", on the rows of all sources together instead of one on each.
    control: also transfer from sources that were trained on shuffled labels.
    cleaning: of all files; its `per_label` is for the sources.
    augmentation: changed copies of the rows to train on, of sources and target; None for none.
    strategy, guard: of the transfer.
    """

    method: str = "soft_prompt"
    num_virtual_tokens: int = 20
    init: str = "random"
    shots: int | None = 16
    test_rows: int | None = None
    source_steps: int = 200
    source_learning_rate: float | None = None
    pool_sources: bool = False
    control: bool = True
    cleaning: Cleaning = field(default_factory=Cleaning)
    augmentation: Augmentation | None = None
    strategy: Strategy = field(default_factory=Strategy)
    guard: Guard = field(default_factory=Guard)

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "shots", "test_rows", "source_steps"):
            value = getattr(self, name)
            if value is not None or name not in ("shots", "test_rows"):
                check_whole(name, value)


@dataclass(frozen=True)
class FlowResult:
    """Attributes:
    transfer: what `ptengine.transfer.transfer` found.
    test: name to judgement on the test rows: the frozen model (but with a head, which an untrained one would be),
        scratch, source, transferred, and the control if any.
    sources: source to judgement of its untouched prompt on the test rows.
    baselines: name to accuracy of what needs no language model, trained on the shots.
    cleaning: file by file.
    curves: name to (optimiser step, accuracy on test rows, `CURVE_ROWS` at most).
    adaptivity: name to how the prompt suits the shots' texts in content and form; none of a task with a head.
    left_out: banked prompts that were no sources, with the reason.
    uncontrolled: why there is no control although it was asked for; None otherwise.
    unseen: labels of the task that no shot has.
    """

    transfer: TransferResult
    test: Mapping[str, Judged]
    sources: Mapping[str, Judged]
    baselines: Mapping[str, float]
    cleaning: Sequence[CleaningReport]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    adaptivity: Mapping[str, Adaptivity]
    left_out: Mapping[str, str] = field(default_factory=dict)
    uncontrolled: str | None = None
    unseen: Sequence[str] = ()


def run_flow(
    model: Any,
    tokenizer: Any,
    *,
    sources: Mapping[str, DataSource],
    target: DataSource,
    test: DataSource | None,
    task: LabelledTask,
    source_task: LabelledTask | None = None,
    unlabelled: DataSource | None = None,
    bank: PromptBank | None = None,
    settings: FlowSettings,
    training: TrainingConfig,
    say: Callable[[str], None] = lambda _: None,
) -> FlowResult:
    """Run every stage, going on with those that `training.output_dir` already holds.

    Args:
        model, tokenizer: the frozen backbone: causal, a masked language model, an encoder-decoder, or an encoder with a
            head for classes, of which every prompt has its own.
        sources: name to rows; every source gets a prompt of its own, or all one (`FlowSettings.pool_sources`). May be
            empty with a `bank`.
        target: the target's rows.
        test: rows to judge on; None takes those of `target` that are not among the shots.
        task: the target's; also the sources' without `source_task`.
        unlabelled: texts of the target for a strategy with `SelfTrain`; those of shots and test are dropped.
        bank: tuned prompts that are sources, too: those of this backbone that have the method and length of `settings`;
            it is not changed. Their data is not at hand, so a start made of one has no control.
        settings: of the stages.
        training: of the runs on the target and, but for steps and rate, on the sources. Evaluation is set here.
        say: told of each stage.

    Raises:
        InputError: as the stages; no rows are left to test on; a stage was run with other settings; another process
            runs in this `output_dir`.
    """
    source_task = source_task or task
    output = Path(training.output_dir)
    work = _Work(model, tokenizer, task, source_task, settings, training)
    banked, left_out = work.banked(bank, [POOLED] if settings.pool_sources else [*sources])
    say("cleaning")
    data = prepared(
        sources, target, test, unlabelled, task, source_task, settings.cleaning, settings.shots, settings.test_rows,
        training.seed, settings.pool_sources or settings.strategy.joint is not None,
    )  # fmt: skip
    files = data.files()
    if settings.pool_sources:
        if len(sources) < 2:
            raise InputError(f"expected at least two sources to pool, got {len(sources)}")
        data = data.pooled(POOLED)
        files |= data.files()
    work.check(data, banked)
    _check_clean(output / "clean", files)
    with exclusive(make_directory(output)), settled_objects():  # once for all runs
        _hold_prompts(output / "flow.json", [*sources], banked, settings)
        work.check_target(data, output / "target")
        clean_leftovers(make_directory(output / "clean"))
        write_together(output / "clean", files)
        return _stages(work, data, banked, left_out, output, say)


def _stages(
    work: _Work,
    data: FlowData,
    banked: Sequence[BankEntry],
    left_out: Mapping[str, str],
    output: Path,
    say: Callable[[str], None],
) -> FlowResult:
    """Every stage after cleaning, in the folder `output`, which is held."""
    model, tokenizer, task, settings = work.model, work.tokenizer, work.task, work.settings
    own = PromptBank(output / "bank")
    for entry in banked:
        own.take(entry, replace=True)
    for name, rows in data.sources.items():
        say(f"source {name}: tuning a {settings.method} on {len(rows)} rows")
        work.bank(own, name, rows, output / "sources" / name)
    say(f"target: transfer and scratch on {len(data.shots)} shots, checked on {settings.guard.folds} held-back parts")
    moved = transfer(
        model, tokenizer, task=task, shots=data.shots, bank=own, strategy=settings.strategy, guard=settings.guard,
        training=work.of_target(output / "target"), eval_data=work.curve_rows(data.test), source_task=work.source_task,
        source_data=data.together or None, unlabelled=data.unlabelled, augmentation=settings.augmentation, resume=True,
    )  # fmt: skip
    words = isinstance(task, VerbalizedTask)
    prompts: dict[str, Prompt | None] = {**({FROZEN: None} if words else {}), **moved.candidates}
    without = [name for name in moved.selected if name not in data.sources]
    uncontrolled = f"the data of {', '.join(without)} is not at hand" if settings.control and without else None
    if settings.control and not without:
        say("control: the same from sources with shuffled labels")
        try:
            prompts[CONTROL] = work.control(data, moved, output / "control")
        except (InputError, TrainingDiverged) as error:  # it describes and decides nothing
            uncontrolled = str(error)
    say(f"judging on {len(data.test)} test rows")
    options = evaluation_options(work.training)
    judged = {name: judge(model, tokenizer, task, data.test, prompt, **options) for name, prompt in prompts.items()}
    zero_shot = {
        entry.name: judge(model, tokenizer, task, data.test, entry.load(model, tokenizer), **options)
        for entry in own.list()
        if entry.name in {*data.sources, *(entry.name for entry in banked)}
    }
    write_folder(output / "prompt", moved.prompt.save)
    labels = {row[task.label_column] for row in data.shots}
    return FlowResult(
        transfer=moved,
        test=judged,
        sources=zero_shot,
        baselines=baselines(data.shots, data.test, task),
        cleaning=data.reports,
        curves={
            name: [(int(entry["step"]), entry["accuracy"]) for entry in run.evaluations]
            for name, run in moved.runs.items()
        },
        adaptivity={}
        if not isinstance(task, VerbalizedTask)
        else prompt_adaptivity(
            model, tokenizer, task.template, domain_texts(data.shots, task), prompts,
            background=work.background(data.together),
        ),
        left_out=left_out,
        uncontrolled=uncontrolled,
        unseen=[label for label in task.labels if label not in labels],
    )  # fmt: skip


def _check_clean(folder: Path, files: Mapping[str, bytes]) -> None:
    """A run to go on with must be of the rows that it was of, and its files must stay theirs."""
    for name, content in files.items():
        path = folder / name
        if path.suffix == ".jsonl" and path.is_file() and path.read_bytes() != content:
            raise InputError(
                f"expected the data, cleaning, shots and seed of the run to go on with, got others: {str(path)!r} "
                "would change; start a new run in another output_dir"
            )


def _hold_prompts(path: Path, sources: Sequence[str], banked: Sequence[BankEntry], settings: FlowSettings) -> None:
    """Note which prompts a new run starts from, and whether it has a control, or require those of the run to go on
    with, before its bank changes."""
    told = ("pool_sources", "control", "method", "num_virtual_tokens", "init", "source_steps", "source_learning_rate")
    now: dict[str, Any] = {"sources": [*sources], **{name: getattr(settings, name) for name in told}}
    now["bank"] = {entry.name: weights_sha256(entry.read()[0]) for entry in banked}
    if path.is_file():
        require_same_plan(path, now)
        clean_leftovers(path.parent)
        return
    write_json_atomic(path, now)


@dataclass(frozen=True)
class _Work:
    model: Any
    tokenizer: Any
    task: LabelledTask
    source_task: LabelledTask
    settings: FlowSettings
    training: TrainingConfig

    def banked(self, bank: PromptBank | None, sources: Sequence[str]) -> tuple[list[BankEntry], dict[str, str]]:
        """The prompts of `bank` that can be sources, and why the others cannot.

        Raises:
            InputError: neither sources nor a banked prompt that can be one; a prompt with the name of a source.
        """
        if bank is None:
            if not sources:
                raise InputError("expected at least one source to transfer from, got none")
            return [], {}
        present = identify(self.model, self.tokenizer)
        form = (self.settings.method, self.settings.num_virtual_tokens)
        good, left_out = [], {}
        for entry in bank.list():
            reason = entry.card.refusal(present, self.task)
            its = (entry.card.method, entry.card.num_virtual_tokens)
            if reason is None and its != form:
                reason = f"it is a {its[0]} of {its[1]} tokens, not a {form[0]} of {form[1]}"
            if reason is None:
                try:
                    require_finite(entry.read()[0])
                except InputError as error:
                    reason = str(error)
            if reason is None:
                good.append(entry)
            else:
                left_out[entry.name] = reason
        if not good and not sources:
            raise InputError(
                f"expected a bank with a prompt to transfer from, got {str(bank.path)!r} with {left_out or 'none'}"
            )
        both = sorted({entry.name for entry in good}.intersection(sources))
        if both:
            raise InputError(f"expected sources with other names than the bank's prompts, got {both[0]!r} in both")
        return good, left_out

    def check(self, data: FlowData, banked: Sequence[BankEntry]) -> None:
        """Meet what later stages would refuse before the first: a rate, labels, lengths, folds, names and rows of
        sources, what they are compared by and combined to."""
        replace(self.training, learning_rate=self.settings.source_learning_rate)
        wanted, count = self.settings.strategy.initialize.top_k, len(data.sources) + len(banked)
        if wanted > count:
            raise InputError(f"expected at least top_k={wanted} sources to combine, got {count}")
        if self.settings.strategy.joint is not None and not data.sources:
            raise InputError("expected sources with their rows to train on source and target, got banked prompts alone")
        if (self.settings.strategy.self_train is None) != (data.unlabelled is None):
            raise InputError("expected unlabelled texts with a strategy that has self_train, and not without, got one")
        labels = [str(row[self.task.label_column]) for row in data.shots]
        parts = folds(labels, len(labels), self.settings.guard.folds, self.training.seed)
        fresh = self.fresh()
        first = weights_sha256(fresh.fold())
        spec = backbone_spec(self.model)
        texts = {entry.name: entry.card.domain_texts for entry in banked}
        starts = {entry.name: entry.card.initial_sha256 for entry in banked}
        for name, rows in data.sources.items():
            check_name(name)
            texts[name] = 0 if spec.kind == "seq2seq" else len(rows) - _held_rows(name, rows)
            starts[name] = first
        require_comparable(self.settings.strategy, texts, starts, min(len(kept) for kept, _ in parts))
        for name, rows in data.named.items():
            task = self.source_task if name.startswith("source-") else self.task
            asked = unlabelled_rows(task, rows) if name == "unlabelled" else rows
            self.check_rows(task, asked, name, data.places[name], fresh)

    def check_rows(self, task: LabelledTask, rows: Rows, name: str, places: Sequence[str], prompt: Prompt) -> None:
        """Refuse rows that `task` cannot encode beside `prompt`, by their places in the files of before cleaning."""
        try:
            spec, limits = backbone_spec(self.model), row_limits(self.training)
            encode(task, rows, self.tokenizer, prompt, spec, name=name, **limits)
        except InputError as error:
            for index, where in enumerate(places):
                after = str(error).removeprefix(place(name, index))
                if after != str(error):
                    raise InputError(where + after) from None
            raise

    def of_target(self, folder: Path) -> TrainingConfig:
        """The runs on the target, with curves."""
        every = max(self.training.max_steps // 8, 1)
        return replace(self.training, output_dir=str(folder), eval_strategy="steps", eval_steps=every)

    def curve_rows(self, test: Rows) -> Rows:
        """Drawn, since files are often sorted by label."""
        return test if len(test) <= CURVE_ROWS else random.Random(self.training.seed).sample(test, CURVE_ROWS)

    def background(self, rows: Rows) -> list[str]:
        """What the target's domain terms stand out from, whatever the order of the sources that `rows` come from."""
        texts = sorted(texts_of(rows, self.source_task)) if rows else []
        if len(texts) <= BACKGROUND_TEXTS:
            return texts
        return random.Random(self.training.seed).sample(texts, BACKGROUND_TEXTS)

    def check_target(self, data: FlowData, folder: Path) -> None:
        """Refuse to take the sources up again for a transfer that was asked for differently."""
        path = folder / "plan.json"
        if not path.is_file():
            return
        settings = self.settings
        unlabelled = None if data.unlabelled is None else unlabelled_rows(self.task, data.unlabelled)
        procedure = Procedure(
            self.model, self.tokenizer, self.task, PromptBank(folder.parent / "bank"), self.of_target(folder),
            settings.strategy, settings.guard, self.source_task, data.together or None, (), unlabelled,
            settings.augmentation,
        )  # fmt: skip
        require_same_plan(path, procedure.asked(data.shots))

    def bank(self, bank: PromptBank, name: str, rows: Rows, folder: Path) -> None:
        """Tune a prompt on one source and bank it with its first numbers."""
        held_count = _held_rows(name, rows)
        order = random.Random(self.training.seed).sample(rows, len(rows))
        held, train = order[:held_count], order[held_count:]
        if self.settings.augmentation is not None:
            train = [*train, *augment(train, self.source_task.text_columns, self.settings.augmentation, held).rows]
        first, prompt = self.fresh(), self.fresh()
        config = replace(
            self.training, output_dir=str(folder), max_steps=self.settings.source_steps,
            learning_rate=self.settings.source_learning_rate, eval_strategy="steps",
            eval_steps=max(self.settings.source_steps // 5, 1), load_best_model_at_end=True,
        )  # fmt: skip
        make_directory(folder)
        result = stage(
            Trainer(self.model, prompt, train, held, config, task=self.source_task, tokenizer=self.tokenizer)
        )
        bank.add(
            name, prompt, model=self.model, tokenizer=self.tokenizer, task=self.source_task, data=train,
            metrics=result.metrics, initial=first, replace=True,
        )  # fmt: skip

    def fresh(self) -> Prompt:
        settings = self.settings
        options: dict[str, Any] = {"tokenizer": self.tokenizer} if settings.init == "sampled_vocab" else {}
        prompt = create(
            settings.method, self.model, num_virtual_tokens=settings.num_virtual_tokens, init=settings.init,
            seed=self.training.seed, **options,
        )  # fmt: skip
        return for_task(self.model, prompt, self.task, self.training.seed)

    def control(self, data: FlowData, moved: TransferResult, folder: Path) -> Prompt:
        """The transferred prompt from the selected sources, trained on shuffled labels: gains it shares are no
        knowledge of the source's labels."""
        bank = PromptBank(folder / "bank")
        shuffled = {
            name: _shuffled(data.sources[name], self.source_task, self.training.seed) for name in moved.selected
        }
        for name, rows in shuffled.items():
            self.bank(bank, name, rows, folder / "sources" / name)
        return transfer(
            self.model, self.tokenizer, task=self.task, shots=data.shots, bank=bank, strategy=self.settings.strategy,
            training=replace(self.training, output_dir=str(folder / "target")), source_task=self.source_task,
            source_data=_like(data.together, shuffled, self.source_task) or None, unlabelled=data.unlabelled,
            augmentation=self.settings.augmentation, resume=True,
        ).prompt  # fmt: skip


def _held_rows(name: str, rows: Rows) -> int:
    """How many rows of a source choose its prompt's best step."""
    count = min(int(len(rows) * _HELD_SHARE), _MOST_HELD)
    if count < 1:
        raise InputError(f"expected at least {round(1 / _HELD_SHARE)} rows of source {name!r}, got {len(rows)}")
    return count


def _shuffled(rows: Rows, task: LabelledTask, seed: int) -> Rows:
    labels = [row[task.label_column] for row in rows]
    random.Random(seed).shuffle(labels)
    return [row | {task.label_column: label} for row, label in zip(rows, labels, strict=True)]


def _like(together: Rows, sources: Mapping[str, Rows], task: LabelledTask) -> Rows:
    """Of the texts of `together` the rows that `sources` have, as often."""
    columns = task.text_columns
    left = Counter(text_key(row, columns) for row in together)
    rows = [row for its in sources.values() for row in its]
    kept = []
    for row in rows:
        key = text_key(row, columns)
        if left[key]:
            left[key] -= 1
            kept.append(row)
    return kept


def described(result: FlowResult, task: LabelledTask) -> dict[str, Any]:
    """Json values of everything the flow found."""
    return {
        "task": task_to_json(task),
        "transfer": result.transfer.to_json(),
        "test": {name: judged.to_json() for name, judged in result.test.items()},
        "sources": {name: judged.to_json() for name, judged in result.sources.items()},
        "baselines": dict(result.baselines),
        "cleaning": [report.to_json() for report in result.cleaning],
        "curves": {name: [list(point) for point in points] for name, points in result.curves.items()},
        "adaptivity": {name: scores.to_json() for name, scores in result.adaptivity.items()},
        "left_out": dict(result.left_out),
        "uncontrolled": result.uncontrolled,
        "unseen": list(result.unseen),
        "kept": result.transfer.chosen,
        "scratch_loss": list(result.transfer.runs[SCRATCH].losses) if SCRATCH in result.transfer.runs else None,
    }

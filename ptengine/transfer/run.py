"""`transfer`: select, start, train, check, keep; every stage in a folder of its own, so that a killed run goes on.

    output_dir/plan.json                   what the run is; going on with another one is refused
    output_dir/fold-<i>/...                the guard's runs, on the shots but those of part i
    output_dir/start/                      the source prompt, or the combination of several, untouched
    output_dir/transferred/, scratch.../   the runs on all shots
    output_dir/transfer.json, prompt/      what was found, and the prompt that is kept

Knows banks, strategies and the trainer; nothing of files of users and of reports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptengine.data import GenerationTask, LabelledTask, Task, load_rows, named_rows
from ptengine.data.sources import name_of
from ptengine.data.tasks import row_labels
from ptengine.errors import InputError
from ptengine.files import make_directory, write_json_atomic
from ptengine.garbage import settled_objects
from ptengine.prompts.base import Prompt
from ptengine.training import TrainingConfig, TrainingResult
from ptengine.training.folders import exclusive, write_folder
from ptengine.training.preparation import DataSource
from ptengine.transfer.augmentation import Augmentation, AugmentationReport
from ptengine.transfer.bank import PromptBank, Search
from ptengine.transfer.guard import SCRATCH, TRANSFERRED, Decision, Guess, decide, folds, pooled
from ptengine.transfer.procedure import Procedure, Rows, scratch_rate
from ptengine.transfer.self_training import Taught, unlabelled_rows
from ptengine.transfer.strategies import Guard, Strategy

__all__ = ["TransferResult", "hold_plan", "require_same_plan", "transfer"]


@dataclass(frozen=True)
class TransferResult:
    """Attributes:
    prompt: what is kept.
    decision: how that was decided; None without a guard, where the transferred prompt is kept.
    candidates: ``"transferred"``, ``"source"`` (the start untouched) and, with a guard, ``"scratch"``, the best of its
        learning rates; trained on all shots.
    runs: the training results of those that were trained.
    search: how the bank's entries ranked on all shots.
    selected: names of the entries the start was made of, with their weights.
    likeness: on all shots, what `Distill.similarity` multiplied its weight by; None without one.
    taught: what `SelfTrain`'s teacher made of the unlabelled texts; None without any.
    augmented: what augmentation made of all shots; None without one.
    untaught: fold of the guard to why its teacher had no unlabelled text to teach; it was trained on its shots alone.
    """

    prompt: Prompt
    decision: Decision | None
    candidates: Mapping[str, Prompt]
    runs: Mapping[str, TrainingResult]
    search: Search
    selected: Mapping[str, float]
    likeness: float | None = None
    taught: Taught | None = None
    augmented: AugmentationReport | None = None
    untaught: Mapping[str, str] = field(default_factory=dict)

    @property
    def chosen(self) -> str:
        return TRANSFERRED if self.decision is None else self.decision.chosen

    def to_json(self) -> dict[str, Any]:
        """Json values: the decision, the search and the selection."""
        return {
            "chosen": self.chosen,
            "decision": None if self.decision is None else self.decision.to_json(),
            "measure": self.search.measure,
            "search": {match.entry.name: match.score for match in self.search.matches},
            "refused": dict(self.search.refused),
            "selected": dict(self.selected),
            "likeness": self.likeness,
            "taught": None if self.taught is None else self.taught.to_json(),
            "augmented": None if self.augmented is None else self.augmented.to_json(),
            "untaught": dict(self.untaught),
        }


def transfer(
    model: Any,
    tokenizer: Any,
    *,
    task: Task,
    shots: DataSource,
    bank: PromptBank,
    training: TrainingConfig,
    strategy: Strategy | None = None,
    guard: Guard | None = None,
    source_task: Task | None = None,
    source_data: DataSource | None = None,
    unlabelled: DataSource | None = None,
    augmentation: Augmentation | None = None,
    eval_data: DataSource | None = None,
    exclude: Sequence[str] = (),
    resume: bool = False,
) -> TransferResult:
    """Tune a prompt for a target with few rows, starting from what prompts of a bank learned.

    Args:
        model, tokenizer: the frozen backbone: causal, a masked language model, an encoder-decoder, or an encoder with a
            head for classes.
        task: the target's: classification by words (a masked language model's with a ``{mask}``) or by a head, or
            generation. Self-training wants labels, and an encoder-decoder embeds no text for distances of domains. With
            a head every prompt is a `HeadedPrompt`, and sources are those whose head has the target's
            labels; the head is transferred with its prompt, and `Anchor` leaves it free.
        shots: the target's rows.
        bank: prompts of this backbone; those of others are passed over and named in the result's `search`.
        training: of every run on the target. Its learning rate is that of the transferred prompt (None: the method's
            own for a trained start); scratch takes the method's own for a fresh one, times the guard's rates.
            `output_dir` is the folder of everything.
        strategy: how to transfer; None means from the best match, with no further losses.
        guard: how to check; None checks nothing and keeps the transferred prompt.
        source_task, source_data: for a strategy with `Joint`.
        unlabelled: texts of the target, for a strategy with `SelfTrain`; labels among them are not read.
        augmentation: changed copies of the shots to train on beside them, scratch included; made after a fold's rows
            are held back.
        eval_data: rows that the runs on all shots are evaluated on as `training` says, for their curves; they decide
            nothing.
        exclude: bank entries to leave out.
        resume: go on in an `output_dir` that holds a run of equal settings.

    Raises:
        InputError: whatever does not fit, before any training, but for what a cosine with a prompt that is tuned on the
            shots shows, which is too few entries that it can rank, or a teacher that is sure of no unlabelled text; an
            `output_dir` with a run, unless `resume`; settings, rows or bank entries that differ from those of the run
            to go on with.
    """
    strategy = Strategy() if strategy is None else strategy
    given = {"bank": (bank, PromptBank), "training": (training, TrainingConfig), "strategy": (strategy, Strategy)}
    for name, (value, kind) in (given | ({} if guard is None else {"guard": (guard, Guard)})).items():
        if not isinstance(value, kind):
            raise InputError(f"expected {name}, a {kind.__name__}, got {type(value).__name__}")
    if not isinstance(task, LabelledTask | GenerationTask):
        raise InputError(
            f"expected a task with a template, or one of labels, whose prompt can be moved, got {type(task).__name__}"
        )
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(training, name):
            raise InputError(f"expected {name} off in a transfer, where no rows choose the step, got it on")
    if eval_data is None and training.eval_strategy not in (None, "no"):
        raise InputError(f"expected eval_data with eval_strategy={training.eval_strategy!r}, got None")
    dataset = load_rows(shots, name="shots")
    labels = row_labels(task, dataset, name_of(shots, "shots")) if isinstance(task, LabelledTask) else None
    rows: Rows = named_rows(dataset)
    parts = [] if guard is None else folds(labels, len(rows), guard.folds, training.seed)
    procedure = Procedure(
        model, tokenizer, task, bank, training, strategy, guard, source_task, source_data, tuple(exclude),
        None if unlabelled is None else unlabelled_rows(task, unlabelled), augmentation,
    )  # fmt: skip
    procedure.check(rows, eval_data, min([len(rows), *(len(kept) for kept, _ in parts)]))
    output = make_directory(training.output_dir)
    with exclusive(output), settled_objects():  # once for all runs
        hold_plan(output / "plan.json", procedure.plan(rows), resume)
        decision = None
        untaught: dict[str, str] = {}
        if guard is not None:
            held: dict[str, list[Any]] = {}
            for index, (kept, away) in enumerate(parts):
                fold = f"fold-{index}"
                tried = procedure.run([rows[i] for i in kept], output / fold, scratch=guard.scratch_rates, is_fold=True)
                if tried.untaught is not None:
                    untaught[fold] = tried.untaught
                for name, prompt in tried.prompts.items():
                    scored = procedure.score(prompt, [rows[i] for i in away])
                    gold = None if labels is None else [labels[i] for i in away]
                    held.setdefault(name, []).append((scored, away, gold))
            guess = None if labels is None else Guess.of(labels)
            tokens = procedure.label_tokens
            decision = decide(guard, {name: pooled(results, tokens) for name, results in held.items()}, guess)
        rates = () if guard is None or decision is None else (scratch_rate(decision.scratch, guard),)
        final = procedure.run(rows, output, scratch=rates, eval_data=eval_data)
        chosen = TRANSFERRED if decision is None else decision.chosen
        names = {SCRATCH if name.startswith(SCRATCH) else name: name for name in final.prompts}
        result = TransferResult(
            prompt=final.prompts[names[chosen]],
            decision=decision,
            candidates={name: final.prompts[old] for name, old in names.items()},
            runs={name: final.runs[old] for name, old in names.items() if old in final.runs},
            search=final.search,
            selected=final.selected,
            likeness=final.likeness,
            taught=final.taught,
            augmented=final.augmented,
            untaught=untaught,
        )
        write_folder(output / "prompt", result.prompt.save)
        write_json_atomic(output / "transfer.json", result.to_json())
    return result


def hold_plan(path: Path, plan: dict[str, Any], resume: bool) -> None:
    """Write the plan of a new run, or require that of the run to go on with to be equal."""
    found = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    if not path.is_file():
        if found and not resume:
            raise InputError(f"expected an empty output_dir, got {str(path.parent)!r} with {', '.join(found[:5])}")
        write_json_atomic(path, plan)
        return
    if not resume:
        raise InputError(
            f"expected an output_dir without a transfer, got {str(path.parent)!r}; pass resume=True to go on with it"
        )
    require_same_plan(path, plan)


def require_same_plan(path: Path, plan: dict[str, Any]) -> None:
    """Raise `InputError` where the plan in the file `path` differs from that of the run that is to go on."""
    before, now = json.loads(path.read_bytes()), json.loads(json.dumps(plan))
    for name in now:
        found = _difference(name, before.get(name), now[name])
        if found is not None:
            where, old, new = found
            raise InputError(f"expected {where}={old!r} as in the transfer in {str(path.parent)!r}, got {new!r}")


def _difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any] | None:
    """The first value that differs between two json values called `name`, by its own name, and what it is in both."""
    if isinstance(before, dict) and isinstance(now, dict):
        parts = (_difference(f"{name}.{key}", before.get(key), now.get(key)) for key in {**before, **now})
        return next((found for found in parts if found is not None), None)
    return None if before == now else (name, before, now)

"""Where a run starts: from nothing, from its newest checkpoint or from a given one; and what must be equal for that."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptengine.errors import InputError
from ptengine.training.checkpoints import Checkpoint, checkpoint_steps, newest_checkpoint, read_checkpoint
from ptengine.training.identity import require_same_run
from ptengine.training.run import Plan

__all__ = ["PROMPT_NAME", "Resume", "keep_finished_prompt", "refuse_finished_work", "require_exact", "starting_point"]

Resume = bool | str | os.PathLike[str]

PROMPT_NAME = "prompt"
"""Folder of a finished run's prompt in its output_dir."""


def starting_point(output_dir: Path, resume: Resume, traces: Sequence[str]) -> Checkpoint | None:
    """The checkpoint to go on from; None starts anew.

    Reads only: `output_dir` need not exist.

    Args:
        output_dir: the run's folder.
        resume: as in `ptengine.Trainer.fit`.
        traces: names in `output_dir` that tell of a run.

    Raises:
        InputError: as `ptengine.Trainer.fit`.
    """
    steps = checkpoint_steps(output_dir)
    if resume is False:
        refuse_finished_work(output_dir, traces)
        return None
    if resume is True:
        checkpoint, torn = newest_checkpoint(output_dir)
        for line in torn:
            used = f"going on from {checkpoint.path.name}" if checkpoint else "starting from the beginning"
            warnings.warn(f"{line}; {used}", stacklevel=4)
        if checkpoint is None:
            keep_finished_prompt(output_dir)
        return checkpoint
    if not isinstance(resume, str | os.PathLike):
        raise InputError(f"expected resume as True, False or a checkpoint folder, got {resume!r}")
    path = Path(resume)
    checkpoint = read_checkpoint(path)
    inside = path.resolve().parent == output_dir.resolve()
    newer = [step for step in steps if not inside or step > checkpoint.step]
    if newer:
        raise InputError(
            f"expected an output_dir without checkpoints beyond {str(path)!r}, got {str(output_dir)!r} with "
            f"checkpoint-{newer[-1]}; pass resume=True to go on from that one, or another output_dir"
        )
    return checkpoint


def refuse_finished_work(output_dir: Path, traces: Sequence[str]) -> None:
    """Raise `InputError` where `output_dir` holds a run already."""
    found = [name for name in traces if (output_dir / name).exists()]
    found += [f"checkpoint-{step}" for step in checkpoint_steps(output_dir)]
    if found:
        raise InputError(
            f"expected an output_dir without a run, got {str(output_dir)!r}, which holds {', '.join(found)}; "
            "pass resume=True to go on with it, or another output_dir"
        )


def keep_finished_prompt(output_dir: Path) -> None:
    """Raise `InputError` where a run without a checkpoint to go on from would replace the prompt of a finished one."""
    if (output_dir / PROMPT_NAME).exists():
        raise InputError(
            f"expected a checkpoint to go on from in {str(output_dir)!r}, got the prompt of a finished run and none: "
            "another output_dir starts a new run"
        )


def require_exact(saved: Mapping[str, Any], plan: Plan, where: str) -> None:
    """Refuse to go on where losses would not be those of the uninterrupted run, and warn where they may not be.

    Args:
        saved: the state of a run in the checkpoint `where`.
        plan: what is to go on from it.

    Raises:
        InputError: something differs that must not; the message has both values.
    """
    require_same_run(saved["identity"], plan.identity, where)
    if saved["step"] > plan.total_steps:
        raise InputError(
            f"expected max_steps of at least the {saved['step']} steps of {where}, got {plan.total_steps} steps"
        )
    for name, now in plan.environment.items():
        before = saved["environment"].get(name)
        if before != now:
            warnings.warn(
                f"{where} was written with {name} {before!r}, this is {now!r}: "
                "losses may differ from the uninterrupted run's in their last digits",
                stacklevel=4,
            )

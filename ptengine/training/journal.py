"""What a run tells people and machines while it goes: progress bar, JSONL log, TensorBoard events, and a curve.

Knows numbers and names only; when to report what is the trainer's business.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from ptengine.files import write_atomic

__all__ = ["LOG_NAME", "Journal", "draw_curve", "progress_bar"]

LOG_NAME = "log.jsonl"


def progress_bar(start: int, total_steps: int, show: bool) -> tqdm[Any]:
    """A bar of optimiser steps, to be used as a context; silent where nothing can be drawn anew."""
    silent = not (show and _redraws())
    return tqdm(total=total_steps, initial=start, unit="step", desc="tuning", disable=silent)


def _redraws() -> bool:
    """Whether people watch: on a terminal, or the widget of a notebook. In a file every redraw would stay."""
    return sys.stderr.isatty() or any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)


class Journal:
    """The log, the bar and the events of one run, from step `start` on.

    ``log.jsonl`` holds one object per line, each with ``event``, ``step`` and ``epoch``, and is flushed line by line:
    a killed run loses no line. A run that goes on from a checkpoint first drops the lines of later steps (they are
    written again) and a last line that was cut off.

    Args:
        output_dir: folder of the run.
        start: optimiser steps already done.
        total_steps: optimiser steps of the whole run.
        redo_evaluation: the evaluation at `start` will be done again, so its line is dropped too.
        show_bar: draw a progress bar, where standard error is a terminal.
        tensorboard: write events into ``output_dir/tensorboard``.
    """

    def __init__(
        self,
        output_dir: Path,
        start: int,
        total_steps: int,
        *,
        redo_evaluation: bool,
        show_bar: bool,
        tensorboard: bool,
    ) -> None:
        self.path = output_dir / LOG_NAME
        _drop_later_lines(self.path, start, redo_evaluation)
        self._file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self._bar = progress_bar(start, total_steps, show_bar)
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def advance(self, loss: float, tokens_per_second: float) -> None:
        """Move the bar by one optimiser step; the remaining time is its own estimate."""
        self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:.0f} tokens/s", refresh=False)
        self._bar.update(1)

    def record(self, event: str, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        """Write one line, and its numbers as TensorBoard events named ``<event>/<name>``."""
        line = {"event": event, "step": step, "epoch": round(epoch, 6), **values}
        self._file.write(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{event}/{name}", value, step)


def _drop_later_lines(path: Path, step: int, redo_evaluation: bool) -> None:
    """Keep the whole lines of what the run to come will not do again; without such a file do nothing."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        again = record["step"] > step or record["event"] == "end"
        again |= redo_evaluation and record["event"] == "eval" and record["step"] == step
        if line.endswith(b"\n") and not again:
            kept.append(line)
    write_atomic(path, b"".join(kept))


def draw_curve(path: Path, losses: Sequence[float], evaluations: Sequence[tuple[int, float]], metric: str) -> Path:
    """Write a PNG of the training loss per optimiser step and, on its own axis, of `metric` at each evaluation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120)
    FigureCanvasAgg(figure)
    left = figure.add_axes((0.1, 0.13, 0.79, 0.83))
    steps = range(1, len(losses) + 1)
    left.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1)
    left.plot(steps, _smooth(losses), color="tab:blue", linewidth=1.5, label="training loss (smoothed)")
    left.set_xlabel("optimiser step")
    left.set_ylabel("training loss")
    lines, names = left.get_legend_handles_labels()
    if evaluations:
        right = left.twinx()
        right.plot(*zip(*evaluations, strict=True), color="tab:orange", marker="o", markersize=3, label=metric)
        right.set_ylabel(metric)
        more = right.get_legend_handles_labels()
        lines, names = lines + more[0], names + more[1]
    left.legend(lines, names, loc="best")
    left.grid(alpha=0.3)
    return write_atomic(path, lambda file: figure.savefig(file, format="png"))


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the run, without the pull of the start value."""
    decay = math.exp(-1 / max(len(values) / 20, 1))
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(mean / weight)
    return out

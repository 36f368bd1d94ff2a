"""The rows of one flow: every file cleaned, shots drawn, and no text of the test or the shots in what is trained on.

Knows files and tasks; no prompt and no model.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ptengine.data import LabelledTask
from ptengine.errors import InputError
from ptengine.files import json_bytes
from ptengine.training.preparation import DataSource
from ptengine.transfer.cleaning import Cleaned, Cleaning, CleaningReport, clean

__all__ = ["FlowData", "Rows", "prepared"]

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class FlowData:
    """Attributes: clean rows of every source, and of all `together`; the target's shots, the test, unlabelled texts if
    any; the reports."""

    sources: dict[str, Rows]
    together: Rows
    shots: Rows
    test: Rows
    unlabelled: Rows | None
    reports: list[CleaningReport]

    def files(self) -> dict[str, bytes]:
        """What lies in `clean/`."""
        named = {
            "shots": self.shots,
            "test": self.test,
            **{f"source-{name}": rows for name, rows in self.sources.items()},
        }
        if self.unlabelled is not None:
            named["unlabelled"] = self.unlabelled
        files = {
            f"{name}.jsonl": b"".join(json_bytes(row, indent=None) for row in rows) for name, rows in named.items()
        }
        return files | {"cleaning.json": json_bytes([report.to_json() for report in self.reports])}


def prepared(
    sources: Mapping[str, DataSource],
    target: DataSource,
    test: DataSource | None,
    unlabelled: DataSource | None,
    task: LabelledTask,
    source_task: LabelledTask,
    cleaning: Cleaning,
    draw_shots: int | None,
    test_rows: int | None,
    seed: int,
    at_once: bool,
) -> FlowData:
    """Clean rows of every file, the test's texts in no other; labels that the task does not know are an error.

    Where the rows of several sources are trained on `at_once`, they are also cleaned together, since what occurs once
    in a file may occur in another, even with another label.
    """
    plain = replace(cleaning, per_label=None, balance="none")

    def cleaned(data: DataSource, of: LabelledTask, how: Cleaning, apart: Rows, name: str) -> Cleaned:
        return clean(
            data,
            text_columns=of.text_columns,
            label_column=of.label_column,
            settings=how,
            apart_from=apart,
            apart_columns=task.text_columns,
            name=name,
        )

    reports: list[CleaningReport] = []
    drawn = replace(plain, per_label=draw_shots, seed=seed)
    if test is not None:
        held = cleaned(test, task, plain, [], "test")
        shots = cleaned(target, task, drawn, held.rows, "target")
        reports += [shots.report, held.report]
        judged = held.rows
    else:
        whole = cleaned(target, task, plain, [], "target")
        # Only drawn: text that is cut and cleaned once more may change, and would not be told from that of the test.
        drawn = replace(drawn, normalization="none", max_characters=None, too_long="drop")
        shots = cleaned(whole.rows, task, drawn, [], "target shots")
        taken = {tuple(row.items()) for row in shots.rows}
        judged = [row for row in whole.rows if tuple(row.items()) not in taken]
        reports += [whole.report, shots.report]
        if not judged:
            raise InputError("expected a test file, or more target rows than shots to test on, got neither")
    if test_rows is not None and len(judged) > test_rows:
        judged = random.Random(seed).sample(judged, test_rows)
    apart = [*judged, *shots.rows]
    ready: dict[str, Rows] = {}
    for name, data in sources.items():
        found = cleaned(data, source_task, cleaning, apart, name)
        reports.append(found.report)
        ready[name] = found.rows
    together = [row for rows in ready.values() for row in rows]
    if at_once and len(ready) > 1:
        found = cleaned(together, source_task, replace(cleaning, per_label=None), [], "all sources together")
        reports.append(found.report)
        together = found.rows
    texts = None
    if unlabelled is not None:
        found = clean(
            unlabelled, text_columns=task.text_columns, settings=plain, apart_from=apart, name="unlabelled",
        )  # fmt: skip
        reports.append(found.report)
        texts = found.rows
    return FlowData(ready, together, shots.rows, judged, texts, reports)

"""The rows of one flow: every file cleaned, shots drawn, and no text of the test or the shots in what is trained on.

Knows files and tasks; no prompt and no model.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
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
    any; the reports; and, for each of `named` and for ``"together"``, how errors call its rows: by file and row there.
    """

    sources: dict[str, Rows]
    together: Rows
    shots: Rows
    test: Rows
    unlabelled: Rows | None
    reports: list[CleaningReport]
    places: Mapping[str, Sequence[str]]

    def pooled(self, name: str) -> FlowData:
        """The same with one source of that name instead, of all sources' rows."""
        places = {**self.places, f"source-{name}": self.places["together"]}
        return replace(self, sources={name: self.together}, places=places)

    @property
    def named(self) -> dict[str, Rows]:
        """All rows, by the name of their file in `clean/`."""
        sources = {f"source-{name}": rows for name, rows in self.sources.items()}
        unlabelled = {} if self.unlabelled is None else {"unlabelled": self.unlabelled}
        return {"shots": self.shots, "test": self.test, **sources, **unlabelled}

    def files(self) -> dict[str, bytes]:
        """What lies in `clean/`."""
        files = {
            f"{name}.jsonl": b"".join(json_bytes(row, indent=None) for row in rows) for name, rows in self.named.items()
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
        shot_places, judged = shots.places, [*zip(held.rows, held.places, strict=True)]
    else:
        whole = cleaned(target, task, plain, [], "target")
        # Only drawn: text that is cut and cleaned once more may change, and would not be told from that of the test.
        drawn = replace(drawn, normalization="none", max_characters=None, too_long="drop")
        shots = cleaned(whole.rows, task, drawn, [], "target shots")
        placed, taken = [*zip(whole.rows, whole.places, strict=True)], {*shots.numbers}
        shot_places = [placed[number][1] for number in shots.numbers]
        judged = [row for number, row in enumerate(placed) if number not in taken]
        reports += [whole.report, shots.report]
        if not judged:
            raise InputError("expected a test file, or more target rows than shots to test on, got neither")
    if test_rows is not None and len(judged) > test_rows:
        judged = random.Random(seed).sample(judged, test_rows)
    test_data = [row for row, _ in judged]
    places = {"shots": shot_places, "test": [where for _, where in judged]}
    apart = [*test_data, *shots.rows]
    ready: dict[str, Rows] = {}
    for name, data in sources.items():
        found = cleaned(data, source_task, cleaning, apart, name)
        reports.append(found.report)
        ready[name], places[f"source-{name}"] = found.rows, found.places
    together = [row for rows in ready.values() for row in rows]
    places["together"] = [where for name in ready for where in places[f"source-{name}"]]
    if at_once and len(ready) > 1:
        found = cleaned(together, source_task, replace(cleaning, per_label=None), [], "all sources together")
        reports.append(found.report)
        together, places["together"] = found.rows, [places["together"][number] for number in found.numbers]
    texts = None
    if unlabelled is not None:
        found = clean(
            unlabelled, text_columns=task.text_columns, settings=plain, apart_from=apart, name="unlabelled",
        )  # fmt: skip
        reports.append(found.report)
        texts, places["unlabelled"] = found.rows, found.places
    return FlowData(ready, together, shots.rows, test_data, texts, reports, places)

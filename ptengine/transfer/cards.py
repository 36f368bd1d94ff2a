"""The card of a banked prompt: what it was trained for, on what, with which result, and for which backbone.

Knows json values and tasks; no prompt, no model, no bank.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ptengine.data import Task, load_rows
from ptengine.data.serialization import task_from_json, task_to_json
from ptengine.data.tasks import head_labels
from ptengine.errors import InputError
from ptengine.prompts.facts import BackboneFacts
from ptengine.training.preparation import DataSource
from ptengine.transfer.identity import BackboneIdentity

__all__ = ["CARD_VERSION", "DataFacts", "PromptCard", "checked_metrics", "data_facts"]

CARD_VERSION = 1

_CARRIED = ("soft_prompt",)  # methods of folded prompts that `across_models` carries


@dataclass(frozen=True)
class DataFacts:
    """Training data by name and content.

    Attributes:
        name: the file's name without its folder, or what the caller called the rows.
        sha256: of the file's bytes; of rows that came from no file, of their json lines.
        rows: how many.
    """

    name: str
    sha256: str
    rows: int


def data_facts(data: DataSource, name: str = "rows") -> DataFacts:
    """The facts of a file, a list of dicts or a `datasets.Dataset`; raises as `ptengine.data.load_rows`."""
    rows = load_rows(data, name=name)
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        with path.open("rb") as file:
            return DataFacts(path.name, hashlib.file_digest(file, "sha256").hexdigest(), rows.num_rows)
    digest = hashlib.sha256()
    for row in rows.with_format(None):
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return DataFacts(name, digest.hexdigest(), rows.num_rows)


@dataclass(frozen=True)
class PromptCard:
    """Attributes:
    name: of the entry in its bank.
    created: UTC, ISO 8601, to the second.
    method, num_virtual_tokens: of the prompt, without its head if it has one.
    task: with template and verbaliser, or the labels of a head.
    data: what the prompt was trained on; None where it was not told.
    metrics: name to value, as the caller measured them.
    backbone: model and tokenizer the prompt belongs to.
    initial_sha256: of the prompt's first numbers P0, which are banked beside it; None where they are not. Two prompts
        have task vectors that can be compared or added where these are equal.
    derived_from: names of the prompts it was transferred from.
    note: free text.
    domain_texts: of how many texts of `data` the embeddings are banked beside the prompt; 0 for none.
    """

    name: str
    created: str
    method: str
    num_virtual_tokens: int
    task: Task
    data: DataFacts | None
    metrics: Mapping[str, float]
    backbone: BackboneIdentity
    initial_sha256: str | None = None
    derived_from: tuple[str, ...] = field(default=())
    note: str = ""
    domain_texts: int = 0

    def refusal(self, present: BackboneIdentity, task: Task | None = None) -> str | None:
        """Why this is no prompt of `present`, in words, and the bridge that may carry it there; None where it is.

        With `task` also why it cannot answer that one: its head is of other labels, or only one of the two has a head.
        """
        if task is not None and self.task.trains_head != task.trains_head:
            return f"it was tuned for a {type(self.task).__name__}, this is a {type(task).__name__}"
        if task is not None and task.trains_head and head_labels(self.task) != head_labels(task):
            return f"its head has the labels {list(head_labels(self.task))}, this task {list(head_labels(task))}"
        reason = self.backbone.difference(present)
        if reason is None or self.method not in _CARRIED or not self.backbone.is_other_model(present):
            return reason
        bridge = (
            "ptengine.transfer.carry_prompt can carry it there from the model it was made for (ptengine bank carry)"
        )
        return f"{reason}; {bridge}"

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": CARD_VERSION,
            "name": self.name,
            "created": self.created,
            "method": self.method,
            "num_virtual_tokens": self.num_virtual_tokens,
            "task": task_to_json(self.task),
            "data": None if self.data is None else asdict(self.data),
            "metrics": dict(self.metrics),
            "backbone": {
                "facts": self.backbone.facts.to_json(),
                "fingerprint": self.backbone.fingerprint,
                "dtype": self.backbone.dtype,
                "tokenizer": self.backbone.tokenizer,
            },
            "initial_sha256": self.initial_sha256,
            "derived_from": list(self.derived_from),
            "note": self.note,
            "domain_texts": self.domain_texts,
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> PromptCard:
        """The card that `to_json` wrote; `where` names the file in errors.

        Raises:
            InputError: not a card of this version, or a field is missing or of another type.
        """
        if not isinstance(value, dict) or value.get("format_version") != CARD_VERSION:
            raise InputError(f"{where}: expected a prompt's card of format version {CARD_VERSION}, got another value")
        value = {"domain_texts": 0, **value}  # cards of before have none
        for name, kind in _FIELDS.items():
            if name not in value or not isinstance(value[name], kind):
                raise InputError(f"{where}: expected {name!r} on the card, got {value.get(name, 'no such key')!r}")
        backbone, data = value["backbone"], value["data"]
        for name in ("fingerprint", "dtype", "tokenizer"):
            if not isinstance(backbone.get(name), str):
                raise InputError(f"{where}: expected the backbone's {name!r} on the card, got {backbone.get(name)!r}")
        if data is not None and set(data) != {"name", "sha256", "rows"}:
            raise InputError(f"{where}: expected data with name, sha256 and rows on the card, got {list(data)}")
        try:
            task, facts = task_from_json(value["task"]), BackboneFacts.from_json(backbone.get("facts"))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        return cls(
            name=value["name"],
            created=value["created"],
            method=value["method"],
            num_virtual_tokens=value["num_virtual_tokens"],
            task=task,
            data=None if data is None else DataFacts(**data),
            metrics=checked_metrics(value["metrics"], where),
            backbone=BackboneIdentity(facts, backbone["fingerprint"], backbone["dtype"], backbone["tokenizer"]),
            initial_sha256=value["initial_sha256"],
            derived_from=tuple(value["derived_from"]),
            note=value["note"],
            domain_texts=value["domain_texts"],
        )


_FIELDS: dict[str, Any] = {
    "name": str,
    "created": str,
    "method": str,
    "num_virtual_tokens": int,
    "task": dict,
    "data": (dict, type(None)),
    "metrics": dict,
    "backbone": dict,
    "initial_sha256": (str, type(None)),
    "derived_from": list,
    "note": str,
    "domain_texts": int,
}


def checked_metrics(metrics: Mapping[str, Any], where: str) -> dict[str, float]:
    """Metrics as finite floats by name."""
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{where}: expected metrics as finite numbers, got {name}={value!r}")
    return {str(name): float(value) for name, value in metrics.items()}

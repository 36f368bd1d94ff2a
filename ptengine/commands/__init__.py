"""The commands of `ptengine`: one file each, listed here by name and imported when called.

A command's module has `EXAMPLE` (a command line), `add_arguments(parser)` and `run(args) -> Outcome`. What a command
prints goes through its outcome; while it runs, standard output is turned to standard error. Importing this package
imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["COMMANDS", "Outcome"]

COMMANDS = {
    "demo": "tune a prompt on embedded data with the embedded model, in minutes and without a network",
    "tune": "tune a prompt on your data against a frozen model",
    "eval": "score a tuned prompt, or the frozen model alone, on a file",
    "generate": "label or continue texts with a tuned prompt",
    "export": "write a tuned prompt for PEFT, for vLLM, or into a stock checkpoint",
    "transfer": "move what prompts learned on other data to a target with few rows, and say whether it helped",
    "bank": "keep tuned prompts with cards, and find those that may help another task",
    "doctor": "report versions, devices, and which path each operation will take and why",
}


@dataclass(frozen=True)
class Outcome:
    """What a command has to say.

    Attributes:
        data: for machines: json values, printed as one object with ``--json``.
        shown: for people: text or rich tables, printed one after another without ``--json``.
        status: exit status; 1 where the command found something broken.
    """

    data: dict[str, Any]
    shown: tuple[Any, ...]
    status: int = 0

"""Which families there are, read from transformers' own tables and sources, and what a run over them comes to.

A family is a folder of transformers' models that has a modeling file. A text family has a type in one of the tables of
causal, masked, sequence-to-sequence and sequence-classification models; a routed one names transformers' table of
attention functions in a modeling file. Multimodal types are those of the tables of models that read images, sounds or
videos beside text.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto as tables
from transformers.models.auto.configuration_auto import model_type_to_module_name

CAUSAL = tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
SEQ2SEQ = tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
MASKED = tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES
SEQUENCE = tables.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
IMAGE_TEXT = tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
MULTIMODAL = tables.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
KINDS = ("causal", "encoder", "multimodal", "seq2seq")
SERVED = ("pass", "in-row")
_BEST_FIRST = ("pass", "in-row", "failed", "refused", "not built")


def families(kind: str) -> list[str]:
    """The model types of a kind."""
    if kind == "causal":
        return sorted(CAUSAL)
    if kind == "seq2seq":
        return sorted(SEQ2SEQ)
    if kind == "multimodal":
        return sorted({*IMAGE_TEXT, *MULTIMODAL})
    return sorted(set(MASKED) - set(SEQ2SEQ) | set(SEQUENCE) - set(CAUSAL) - set(SEQ2SEQ))


def auto_class(kind: str, model_type: str) -> Any:
    """The class that makes a model of this type with its language-modelling head."""
    choices = [
        ("multimodal", IMAGE_TEXT, transformers.AutoModelForImageTextToText),
        ("multimodal", MULTIMODAL, transformers.AutoModelForMultimodalLM),
        ("seq2seq", SEQ2SEQ, transformers.AutoModelForSeq2SeqLM),
        ("causal", CAUSAL, transformers.AutoModelForCausalLM),
    ]
    return next(auto for one, table, auto in choices if one == kind and model_type in table)


@functools.cache
def _modeling_files(folder: str) -> tuple[Path, ...]:
    return tuple((Path(transformers.__file__).parent / "models" / folder).glob("modeling_*.py"))


@functools.cache
def is_routed(folder: str) -> bool:
    return any("ALL_ATTENTION_FUNCTIONS" in file.read_text() for file in _modeling_files(folder))


def folders(model_types: Iterable[str]) -> set[str]:
    """The families of some types."""
    names = {model_type_to_module_name(model_type) for model_type in model_types}
    return {name for name in names if _modeling_files(name)}


def summary(rows: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """What tables of rows by kind and type come to, family by family: a family is what the best of its rows is.

    Every row of a family that failed is named, whatever the best one is.
    """
    text = folders([*CAUSAL, *SEQ2SEQ, *MASKED, *SEQUENCE])
    best: dict[str, str] = {}
    failed = []
    for kind in KINDS:
        for model_type, row in rows.get(kind, {}).items():
            found = [row["status"], *(part["status"] for part in row.values() if isinstance(part, dict))]
            if "failed" in found:
                failed.append(f"{model_type} ({kind})")
            folder = model_type_to_module_name(model_type)
            best[folder] = min([*found, best.get(folder, "not built")], key=_BEST_FIRST.index)
    multimodal = rows.get("multimodal", {})
    alone = [row["text part alone"] for row in multimodal.values() if "text part alone" in row]
    return {
        "text families": _counts(text, best),
        "routed text families": _counts({one for one in text if is_routed(one)}, best),
        "multimodal types": {
            "tried": len(multimodal),
            **Counter(row["status"] for row in multimodal.values()),
            "served by their text part alone": sum(one.endswith(SERVED) for one in alone),
        },
        "failed rows": failed,
    }


def _counts(chosen: set[str], best: dict[str, str]) -> dict[str, Any]:
    statuses = {name: best.get(name, "not tried") for name in chosen}
    counts = Counter(statuses.values())
    others = {name: status for name, status in sorted(statuses.items()) if status not in SERVED}
    return {"families": len(chosen), "served": sum(counts[one] for one in SERVED)} | dict(counts) | {"others": others}

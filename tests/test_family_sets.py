"""The family matrix' sets and summary: from transformers' own tables, and what the tables in the repository come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from family_sets import KINDS, families, folders, is_routed, summary

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def test_families_are_folders_with_a_modeling_file() -> None:
    assert folders(["llama", "gemma3", "gemma3_text"]) == {"llama", "gemma3"}
    assert folders(["gpt-sw3"]) == set()  # a tokenizer for GPT-2
    assert is_routed("llama")
    assert not is_routed("bloom")


def test_every_kind_has_types_of_its_own() -> None:
    assert all(families(kind) for kind in KINDS)
    assert not set(families("encoder")) & set(families("seq2seq"))
    assert "qwen2_vl" in families("multimodal")


def test_a_family_is_what_the_best_of_its_rows_is() -> None:
    rows: dict[str, dict[str, dict[str, Any]]] = {
        "causal": {
            "gemma3": {"status": "refused"}, "gemma3_text": {"status": "pass"}, "bloom": {"status": "in-row"},
            "llama": {"status": "failed"}, "bert": {"status": "not built"},
        },
        "encoder": {"bert": {"status": "refused", "masked": {"status": "pass"}, "sequence": {"status": "refused"}}},
        "multimodal": {"blip-2": {"status": "refused", "text part alone": "opt: pass"}},
    }  # fmt: skip
    found = summary(rows)
    text, routed = found["text families"], found["routed text families"]
    assert (text["pass"], text["in-row"], text["failed"], text["served"]) == (2, 1, 1, 3)
    assert (routed["pass"], routed.get("in-row", 0), routed["served"]) == (2, 0, 2)
    assert text["others"]["llama"] == "failed"
    assert text["not tried"] == text["families"] - 4
    assert found["failed rows"] == ["llama (causal)"]
    assert found["multimodal types"] == {"tried": 1, "refused": 1, "served by their text part alone": 1}


def test_the_committed_tables() -> None:
    """None failed, all 240 families were tried, and the numbers beside the bound say so."""
    found = json.loads((RESULTS / "families.json").read_text())
    assert found["failed rows"] == []
    text, routed = found["text families"], found["routed text families"]
    assert (text["families"], routed["families"]) == (240, 182)
    assert "not tried" not in text
    assert text["served"] >= 200
    assert routed["served"] >= 165


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_the_committed_tables(kind: str) -> None:
    table = json.loads((RESULTS / f"families_{kind}.json").read_text())
    parts = [part for row in table["families"].values() for part in (row, *row.values()) if isinstance(part, dict)]
    numbers = [value for part in parts for value in part.values() if isinstance(value, float)]
    assert numbers
    assert max(numbers) <= table["bound"] == 1e-4
    assert all(part.get("reason") for part in parts if part["status"] in ("refused", "not built", "in-row"))

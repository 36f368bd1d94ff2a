"""Many rows in batches: each row's text is what it is alone, in the rows' order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ptengine.backbone import generate, patch
from ptengine.backbone.generation import generate_in_batches

from .stock import make, virtual


def decode(written: Any, skip_special_tokens: bool) -> list[str]:
    assert skip_special_tokens
    return [" ".join(str(token) for token in row) for row in written.tolist()]


def test_rows_of_any_length_keep_their_order() -> None:
    """Evaluation and the command line each had their own loop; they differed in the order of rows in a batch."""
    model = patch(make("llama"))
    tokenizer: Any = SimpleNamespace(batch_decode=decode, pad_token_id=0)
    rows = [[5, 6, 7, 8], [9], [4, 3, 2], [8, 8], [11, 12, 13, 14, 15]]
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    alone = [generate(model, virtual(3), [row], tokenizer, **options)[:, len(row) :] for row in rows]  # type: ignore
    expected = [decode(written, True)[0] for written in alone]
    assert len(set(expected)) > 1
    for size in (1, 2, 5):
        assert generate_in_batches(model, virtual(3), rows, tokenizer, size, **options) == expected


def test_an_ending_stands_beside_the_models_own() -> None:
    """Whichever comes first ends a row; neither replaces the other."""
    model, row = patch(make("llama")), [5, 6, 7, 8]
    tokenizer: Any = SimpleNamespace(batch_decode=decode, pad_token_id=0)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    (free,) = generate_in_batches(model, virtual(3), [row], tokenizer, 1, eos_token_id=None, **options)
    words = free.split()
    first, later = int(words[1]), int(words[4])
    assert first not in (later, int(words[0]))
    for own, ending in ((first, [later]), (later, [first]), (None, [first]), (-1, [first]), ([first, later], [])):
        model.generation_config.eos_token_id = own
        found = generate_in_batches(model, virtual(3), [row], tokenizer, 1, ending, **options)
        assert found == [" ".join(words[:2])]

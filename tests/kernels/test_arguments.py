"""Arguments of another kind than the operations take: they ended in Python's errors, or a text counted as True."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ptengine.kernels.gated_activation import gated_activation
from ptengine.kernels.linear_cross_entropy import linear_cross_entropy
from ptengine.kernels.prefix_attention import prefix_attention
from ptengine.kernels.prefix_concat import prefix_concat, prefix_concat_paged, prefix_concat_varlen
from ptengine.kernels.rotary import rotary_embedding

HEAD = {"hidden": torch.randn(3, 4), "weight": torch.randn(7, 4), "labels": torch.tensor([0, 6, -100])}
ROWS = {"prefix": torch.randn(2, 2, 4), "rows": torch.randn(3, 2, 5, 4)}
PACKED = {
    "prefix": torch.randn(2, 2, 4), "rows": torch.randn(5, 2, 4), "cu_seqlens": torch.tensor([0, 5]), "max_seqlen": 5
}  # fmt: skip
PAGED = ROWS | {"cache": torch.zeros(6, 4, 2, 4), "block_table": torch.arange(6).view(3, 2)}
ANGLES = {"q": torch.randn(3, 2, 4), "k": torch.randn(3, 1, 4), "cos": torch.ones(3, 4), "sin": torch.zeros(3, 4)}
GATED = {"gate": torch.randn(3, 4), "up": torch.randn(3, 4)}
BAD: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
    (linear_cross_entropy, HEAD, {"hidden": [[1.0]]}, "expected hidden, a tensor, got list"),
    (linear_cross_entropy, HEAD, {"labels": None}, "expected labels, a tensor, got NoneType"),
    (linear_cross_entropy, HEAD, {"bias": [0.0] * 7}, "expected bias, a tensor or None, got list"),
    (linear_cross_entropy, HEAD, {"softcap": "30"}, "expected softcap, a number, got '30'"),
    (linear_cross_entropy, HEAD, {"label_smoothing": None}, "expected label_smoothing, a number, got None"),
    (linear_cross_entropy, HEAD, {"z_loss": True}, "expected z_loss, a number, got True"),
    (linear_cross_entropy, HEAD, {"ignore_index": -0.5}, "expected ignore_index, a whole number, got -0.5"),
    (prefix_concat, ROWS, {"prefix": None}, "expected prefix, a tensor, got NoneType"),
    (prefix_concat, ROWS, {"prompt_ids": [0, 0, 0]}, "expected prompt_ids, a tensor or None, got list"),
    (prefix_concat, ROWS, {"cos": 1.0, "sin": 0.0}, "expected cos, a tensor or None, got float"),
    (prefix_concat_varlen, PACKED, {"cu_seqlens": [0, 5]}, "expected cu_seqlens, a tensor, got list"),
    (prefix_concat_varlen, PACKED, {"max_seqlen": 5.0}, "expected max_seqlen, a whole number, got 5.0"),
    (prefix_concat_paged, PAGED, {"block_table": [[0, 1]] * 3}, "expected block_table, a tensor, got list"),
    (rotary_embedding, ANGLES, {"cos": None}, "expected cos, a tensor, got NoneType"),
    (gated_activation, GATED, {"up": 1.0}, "expected up, a tensor, got float"),
]


@pytest.mark.parametrize(
    ("operation", "good", "spoilt", "message"), BAD, ids=lambda part: getattr(part, "__name__", None)
)
def test_an_argument_of_another_kind(operation: Any, good: Any, spoilt: Any, message: str) -> None:
    operation(**good)
    with pytest.raises(TypeError, match=message):
        operation(**(good | spoilt))


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = linear_cross_entropy(**HEAD, softcap=np.float32(3), z_loss=np.float64(0.5), ignore_index=np.int64(-100))
    assert torch.equal(numpy, linear_cross_entropy(**HEAD, softcap=3.0, z_loss=0.5))
    q, prefix = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 4)
    out = prefix_attention(q, q, q, prefix, prefix, window=np.int64(2), scale=np.float32(0.5))
    assert torch.equal(out, prefix_attention(q, q, q, prefix, prefix, window=2, scale=0.5))

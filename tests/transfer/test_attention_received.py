"""Attention received, against stock eager attention in fp64 and a matrix one can see."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import ptengine
from ptengine.errors import InputError
from ptengine.transfer import attention_received as module
from ptengine.transfer.attention_received import attention_colsum, attention_received


@pytest.mark.parametrize(("heads", "kv_heads", "block"), [(4, 2, 256), (4, 4, 3), (2, 1, 5)])
def test_colsum_equals_the_sum_of_the_whole_matrix(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, block: int
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    torch.manual_seed(0)
    q, k = torch.randn(heads, 11, 8, dtype=torch.float64), torch.randn(kv_heads, 11, 8, dtype=torch.float64)
    scores = q @ k.repeat_interleave(heads // kv_heads, 0).transpose(1, 2) * 0.3
    whole = scores.masked_fill(~torch.ones(11, 11).tril().bool(), -torch.inf).softmax(-1)
    found = attention_colsum(q, k, 0.3)
    assert found.dtype == torch.float64
    assert torch.allclose(found, whole.sum(1), rtol=1e-12, atol=1e-12)
    assert torch.allclose(found.sum(-1), torch.full((heads,), 11.0, dtype=torch.float64))
    blind = torch.ones(11, 11, dtype=torch.bool)
    blind[4] = False  # a query that sees nothing gives nothing
    assert torch.allclose(attention_colsum(q, k, 0.3, blind).sum(-1), torch.full((heads,), 10.0, dtype=torch.float64))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("layers", [None, [1]])
def test_a_model_gives_what_its_eager_attention_sums_to(
    tiny: ModuleType, family: str, layers: list[int] | None
) -> None:
    model = getattr(tiny, family)().double()
    model.train()  # the call itself must leave dropout out and put the mode back
    ids = [7, 9, 11, 6, 8, 5, 9]
    before = model.config._attn_implementation
    found = attention_received(model, ids, layers)
    assert (model.config._attn_implementation, model.training) == (before, True)
    model.eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(torch.tensor([ids]), output_attentions=True).attentions
    picked = torch.stack([maps[layer][0] for layer in (layers or range(2))])  # [L, H, T, T]
    viewers = torch.full((7,), 7.0) if family == "bert" else torch.arange(7, 0, -1.0)
    wanted = picked.mean((0, 1)).sum(0) / viewers
    # Told in fp32.
    assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=1e-7)


def test_bad_input_is_refused_and_nothing_stays_changed(tiny: ModuleType) -> None:
    model = tiny.llama()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input_ids": []}, "1 to 48 tokens"),
        ({"input_ids": [1] * 49}, "1 to 48 tokens"),
        ({"input_ids": [1], "layers": [2]}, "layers from 0 to 1"),
        ({"input_ids": [1], "layers": []}, "layers from 0 to 1"),
    ]
    for arguments, words in cases:
        with pytest.raises(InputError, match=words):
            attention_received(model, **arguments)
    with ptengine.patched(model), pytest.raises(InputError, match="not patched"):
        attention_received(model, [1, 2])

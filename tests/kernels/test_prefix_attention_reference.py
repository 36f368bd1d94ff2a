"""The specification of prefix_attention against other people's code: PyTorch's SDPA and transformers' own attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import MistralConfig, T5Config
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention
from transformers.models.t5.modeling_t5 import T5Attention

from ptengine.kernels.prefix_attention import prefix_attention_varlen

from .prefix_attention_cases import cumulative, index, packed, prefixes

P, T = 7, 23  # one row of 23 tokens behind a prefix of 7


def one_row(heads: tuple[int, int] = (4, 2)) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Arguments of the operation, and the same as the stock q [1, H, T, D], keys and values [1, H_kv, P + T, D]."""
    q, k, v = packed((T,), heads)
    pk, pv = prefixes(P, heads=heads)
    stock = [x.transpose(0, 1)[None] for x in (q, torch.cat([pk, k]), torch.cat([pv, v]))]
    return [q, k, v, pk, pv], (stock[0], stock[1], stock[2])


def specification(tensors: list[Tensor], **options: Any) -> Tensor:
    out = prefix_attention_varlen(*tensors, cumulative((T,)), T, backend="reference", **options)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return out


def loop_mask(sees: Any) -> Tensor:
    """bool [T, P + T] of a rule over (query position, key position), entry by entry."""
    return torch.tensor([[bool(sees(P + t, key)) for key in range(P + T)] for t in range(T)])


MASKS = {
    "causal": ({}, lambda q, k: k <= q),
    "bidirectional": ({"causal": False}, lambda q, k: True),
    "window": ({"window": 5}, lambda q, k: k <= q and q - k < 5),
    "bidirectional window": ({"causal": False, "window": 5}, lambda q, k: abs(q - k) < 5),
    "window, prefix in view": (
        {"window": 5, "window_includes_prefix": False},
        lambda q, k: k < P or (k <= q and q - k < 5),
    ),
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_equal_scaled_dot_product_attention(mask: str, heads: tuple[int, int]) -> None:
    options, sees = MASKS[mask]
    tensors, (q, keys, values) = one_row(heads)
    exact = scaled_dot_product_attention(q, keys, values, attn_mask=loop_mask(sees), enable_gqa=True)
    torch.testing.assert_close(specification(tensors, **options), exact[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_rows_and_prompts_equal_scaled_dot_product_attention() -> None:
    """Three rows of one batch, each expanded on its own: prompt 1, no prompt, the first two tokens of prompt 0."""
    lengths = (5, 9, 4)
    q, k, v = packed(lengths)
    pk, pv = prefixes(2, P)
    out = prefix_attention_varlen(
        q, k, v, pk, pv, cumulative(lengths), 9, prompt_ids=index(1, -1, 0), prefix_lengths=index(2, P),
        backend="reference",
    )  # fmt: skip
    assert isinstance(out, Tensor)
    start = 0
    for length, own_k, own_v in zip(lengths, (pk[1], pk[0, :0], pk[0, :2]), (pv[1], pv[0, :0], pv[0, :2]), strict=True):
        row = slice(start, start + length)
        keys, values = torch.cat([own_k, k[row]]), torch.cat([own_v, v[row]])
        mask = torch.ones(length, len(keys), dtype=torch.bool).tril(len(own_k))
        exact = scaled_dot_product_attention(
            q[row].transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), attn_mask=mask, enable_gqa=True
        )
        torch.testing.assert_close(out[row], exact.transpose(0, 1), rtol=1e-12, atol=1e-12)
        start += length


def test_sliding_window_equals_transformers() -> None:
    """The mask that transformers builds for Mistral over prefix and row together."""
    config = MistralConfig(sliding_window=6, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    embeds = torch.zeros(1, P + T, config.hidden_size)
    mask = create_sliding_window_causal_mask(config, embeds, attention_mask=None, past_key_values=None)
    assert mask is not None
    tensors, (q, keys, values) = one_row()
    exact = scaled_dot_product_attention(q, keys, values, attn_mask=mask[0, :, P:], enable_gqa=True)
    torch.testing.assert_close(specification(tensors, window=6), exact[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


def causal_bias() -> Tensor:
    """fp64 [1, 1, T, P + T]: 0 or -inf."""
    return torch.zeros(1, 1, T, P + T, dtype=torch.float64).masked_fill(~loop_mask(MASKS["causal"][1]), float("-inf"))


def test_softcap_equals_gemma2() -> None:
    tensors, (q, keys, values) = one_row()
    module = SimpleNamespace(num_key_value_groups=2, training=False, head_dim=16)
    exact, _ = gemma2_attention(module, q, keys, values, causal_bias(), scaling=0.3, softcap=1.5)
    # Gemma-2's own code rounds the weights to fp32.
    torch.testing.assert_close(specification(tensors, scale=0.3, softcap=1.5), exact[0], rtol=1e-6, atol=1e-6)


def test_sinks_equal_gpt_oss() -> None:
    tensors, (q, keys, values) = one_row()
    sinks = torch.tensor([-2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    module = SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks)
    exact, _ = gpt_oss_attention(module, q, keys, values, causal_bias(), scaling=0.25)
    torch.testing.assert_close(specification(tensors, scale=0.25, sinks=sinks), exact[0], rtol=1e-12, atol=1e-12)


def test_alibi_equals_bloom() -> None:
    """Bloom adds slope * key position, which differs by a constant per query and so gives the same weights."""
    tensors, (q, keys, values) = one_row((4, 4))
    bias = build_alibi_tensor(torch.ones(1, P + T), 4, torch.float64).view(1, 4, 1, P + T)
    exact = scaled_dot_product_attention(q, keys, values, attn_mask=bias + causal_bias())
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])  # the recipe of the ALiBi paper for four heads
    # Bloom computes its slopes in fp32.
    torch.testing.assert_close(
        specification(tensors, alibi_slopes=slopes), exact[0].transpose(0, 1), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_bias_equals_t5(bidirectional: bool) -> None:
    """A table over clamped distances represents T5's buckets exactly once it reaches T5's maximal distance."""
    torch.manual_seed(0)
    reach = 20
    config = T5Config(
        num_heads=4, d_model=64, d_kv=16, relative_attention_num_buckets=8, relative_attention_max_distance=reach,
        is_decoder=not bidirectional,
    )  # fmt: skip
    attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double()
    torch.nn.init.normal_(attention.relative_attention_bias.weight)
    with torch.no_grad():
        bias = attention.compute_bias(P + T, P + T)[:, :, P:]  # [1, H, T, P + T]
        buckets = attention._relative_position_bucket(
            torch.arange(-reach, reach + 1), bidirectional, num_buckets=8, max_distance=reach
        )
        table = attention.relative_attention_bias(buckets).transpose(0, 1)  # [H, 2 R + 1]
    tensors, (q, keys, values) = one_row((4, 4))
    mask = bias if bidirectional else bias + causal_bias()
    exact = scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=1.0)
    got = specification(tensors, scale=1.0, causal=not bidirectional, relative_bias=table)
    torch.testing.assert_close(got, exact[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_half_types_are_computed_in_single_precision() -> None:
    """The specification's only error in a half type is the rounding of its inputs and of its result."""
    for dtype in (torch.bfloat16, torch.float16):
        tensors = [x.to(dtype) for x in one_row()[0]]
        exact = specification([x.double() for x in tensors])
        assert ((specification(tensors).double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()

"""prefix_attention refuses what it cannot mean: one error that says what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ptengine.kernels.prefix_attention import prefix_attention, prefix_attention_varlen

from .prefix_attention_cases import cumulative, index, noise, packed, prefixes

F64 = torch.float64


def good() -> dict[str, Any]:
    """A packed call of rows of 3, 0 and 5 tokens that is accepted; each case below spoils one thing."""
    q, k, v = packed((3, 0, 5))
    pk, pv = prefixes(2, 4)
    cu = cumulative((3, 0, 5))
    return {"q": q, "k": k, "v": v, "prefix_k": pk, "prefix_v": pv, "cu_seqlens": cu, "max_seqlen": 5,
            "prompt_ids": index(0, -1, 1)}  # fmt: skip


def call(given: dict[str, Any]) -> Any:
    given = dict(given)
    first = [given.pop(name) for name in ("q", "k", "v", "prefix_k", "prefix_v", "cu_seqlens", "max_seqlen")]
    return prefix_attention_varlen(*first, **given)


NO_PREFIX = {"prefix_k": None, "prefix_v": None, "prompt_ids": None}
PACKED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q of two axes": ({"q": noise(8, 16)}, ValueError, r"q of shape \[total, H, D\], got \[8, 16\]"),
    "k of four axes": ({"k": noise(1, 8, 2, 16)}, ValueError, r"k of shape \[total, H, D\]"),
    "v of four axes": ({"v": noise(1, 8, 2, 16)}, ValueError, r"v of shape \[total, H, D\]"),
    "integers": ({"q": torch.ones(8, 4, 16, dtype=torch.int64)}, TypeError, "floating dtype"),
    "other dtype of k": ({"k": noise(8, 2, 16).float()}, TypeError, "one floating dtype.*float64.*float32"),
    "other dtype of v": ({"v": noise(8, 2, 16).half()}, TypeError, "one floating dtype.*float64.*float16"),
    "other device": ({"k": torch.empty(8, 2, 16, dtype=F64, device="meta")}, ValueError, "k on cpu, got meta"),
    "fewer keys": ({"k": noise(7, 2, 16)}, ValueError, r"as many keys and values as queries \(8\), got 7 and 8"),
    "fewer values": ({"v": noise(7, 2, 16)}, ValueError, r"as many keys and values as queries \(8\), got 8 and 7"),
    "heads not a multiple": ({"q": noise(8, 3, 16)}, ValueError, "H = 3 with 2 key heads"),
    "heads of k and v differ": ({"v": noise(8, 4, 16)}, ValueError, "2 key heads and 4 value heads"),
    "no key heads": (
        {"k": noise(8, 0, 16), "v": noise(8, 0, 16)}, ValueError, "0 key heads"
    ),
    "width of k": ({"k": noise(8, 2, 15)}, ValueError, "one head dimension, got 16 and 15"),
    "cu_seqlens empty": ({"cu_seqlens": index()}, ValueError, "cu_seqlens of at least one entry"),
    "cu_seqlens of floats": ({"cu_seqlens": torch.tensor([0.0, 8.0])}, ValueError, "cu_seqlens of shape .* int32"),
    "cu_seqlens of two axes": ({"cu_seqlens": index(0, 3, 3, 8)[None]}, ValueError, "cu_seqlens of shape"),
    "cu_seqlens not from 0": ({"cu_seqlens": index(1, 3, 3, 8)}, ValueError, "from 0 to 8"),
    "cu_seqlens short": ({"cu_seqlens": index(0, 3, 3, 7)}, ValueError, r"from 0 to 8, got \[0, 3, 3, 7\]"),
    "cu_seqlens beyond": ({"cu_seqlens": index(0, 3, 3, 9)}, ValueError, "from 0 to 8"),
    "cu_seqlens falling": ({"cu_seqlens": index(0, 5, 3, 8)}, ValueError, "ascending"),
    "max_seqlen": ({"max_seqlen": 4}, ValueError, r"at least the longest row \(5\), got 4"),
    "prefix_k alone": ({"prefix_v": None}, ValueError, "both prefix_k and prefix_v"),
    "prefix_v alone": ({"prefix_k": None}, ValueError, "both prefix_k and prefix_v"),
    "prefix of two axes": ({"prefix_k": noise(2, 16)}, ValueError, r"prefix_k of shape \[P, 2, 16\]"),
    "heads of prefix_k": ({"prefix_k": noise(2, 4, 4, 16)}, ValueError, r"prefix_k of shape .* got \[2, 4, 4, 16\]"),
    "width of prefix_k": ({"prefix_k": noise(2, 4, 2, 8)}, ValueError, "prefix_k of shape"),
    "width of prefix_v": ({"prefix_v": noise(2, 4, 2, 8)}, ValueError, "prefix_v of shape"),
    "lengths of the prefixes": ({"prefix_v": noise(2, 5, 2, 16)}, ValueError, "prefixes of one length"),
    "axes of the prefixes": ({"prefix_v": noise(4, 2, 16)}, ValueError, "prefixes of one length"),
    "dtype of prefix_k": ({"prefix_k": noise(2, 4, 2, 16).float()}, TypeError, "prefix_k as q, torch.float64"),
    "dtype of prefix_v": ({"prefix_v": noise(2, 4, 2, 16).bfloat16()}, TypeError, "prefix_v as q, torch.float64"),
    "prompts without prompt_ids": ({"prompt_ids": None}, ValueError, "prompt_ids to choose among 2 prompts"),
    "prompt_ids without prompts": (NO_PREFIX | {"prompt_ids": index(0, 0, 0)}, ValueError, "prompt_ids or"),
    "prefix_lengths without prompts": (
        NO_PREFIX | {"prefix_lengths": index(1)}, ValueError, "prompt_ids or prefix_lengths"
    ),
    "prompt_ids too few": ({"prompt_ids": index(0, 1)}, ValueError, r"prompt_ids of shape \[3\], int32, got \[2\]"),
    "prompt_ids of floats": ({"prompt_ids": torch.zeros(3)}, ValueError, "prompt_ids of shape .* torch.float32"),
    "prompt_ids beyond": ({"prompt_ids": index(0, 2, 1)}, ValueError, r"prompt_ids from -1 to 1, got \[0, 2, 1\]"),
    "prompt_ids below": ({"prompt_ids": index(0, -2, 1)}, ValueError, "prompt_ids from -1 to 1"),
    "prefix_lengths too many": ({"prefix_lengths": index(1, 1, 1)}, ValueError, r"prefix_lengths of shape \[2\]"),
    "prefix_lengths beyond": ({"prefix_lengths": index(4, 5)}, ValueError, r"prefix_lengths from 0 to 4, got \[4, 5\]"),
    "prefix_lengths negative": ({"prefix_lengths": index(-1, 4)}, ValueError, "prefix_lengths from 0 to 4"),
    "prefix_rows beside prefixes": ({"prefix_rows": index(-1, 0, 0)}, ValueError, "prefix_rows alone"),
    "prefix_rows beside prompt_ids": (
        NO_PREFIX | {"prefix_rows": index(-1, 0, 0), "prompt_ids": index(0, 0, 0)}, ValueError, "prefix_rows alone"
    ),
    "prefix_rows too few": (NO_PREFIX | {"prefix_rows": index(-1, 0)}, ValueError, r"prefix_rows of shape \[3\]"),
    "prefix_rows beyond": (NO_PREFIX | {"prefix_rows": index(-1, 0, 3)}, ValueError, "prefix_rows from -1 to 2"),
    "prefix_rows below": (NO_PREFIX | {"prefix_rows": index(-2, 0, 0)}, ValueError, "prefix_rows from -1 to 2"),
    "prefix_rows of a reader": (NO_PREFIX | {"prefix_rows": index(-1, 0, 1)}, ValueError, "got row 1 doing both"),
    "prefix_rows of itself": (NO_PREFIX | {"prefix_rows": index(0, -1, -1)}, ValueError, "got row 0 doing both"),
    "max_seqlen of a fraction": ({"max_seqlen": 5.0}, TypeError, "max_seqlen, a whole number, got 5.0"),
    "no max_seqlen": ({"max_seqlen": None}, TypeError, "max_seqlen, a whole number, got None"),
    "window of a fraction": ({"window": 2.5}, TypeError, "window, a whole number, got 2.5"),
    "q as a list": ({"q": [[1.0]]}, TypeError, "expected q, a tensor, got list"),
    "no cu_seqlens": ({"cu_seqlens": None}, TypeError, "expected cu_seqlens, a tensor, got NoneType"),
    "prompt_ids as a list": ({"prompt_ids": [0, 1, 0]}, TypeError, "expected prompt_ids, a tensor or None, got list"),
    "sinks as a list": ({"sinks": [0.1] * 4}, TypeError, "expected sinks, a tensor or None, got list"),
    "softcap as text": ({"softcap": "a"}, TypeError, "expected softcap, a number, got 'a'"),
    "scale as text": ({"scale": "1"}, TypeError, "expected scale, a number, got '1'"),
    "a flag for scale": ({"scale": True}, TypeError, "expected scale, a number, got True"),
    "causal as text": ({"causal": "no"}, TypeError, "expected causal, True or False, got 'no'"),
    "no window_includes_prefix": (
        {"window_includes_prefix": None}, TypeError, "window_includes_prefix, True or False, got None"
    ),
    "a flag for max_seqlen": ({"max_seqlen": True}, TypeError, "max_seqlen, a whole number, got True"),
    "scale without end": ({"scale": float("inf")}, ValueError, "finite scale, got inf"),
    "softcap without end": ({"softcap": float("inf")}, ValueError, "positive softcap, got inf"),
    "window of 0": ({"window": 0}, ValueError, "window of at least 1, got 0"),
    "softcap of 0": ({"softcap": 0.0}, ValueError, "positive softcap, got 0.0"),
    "softcap negative": ({"softcap": -1.0}, ValueError, "positive softcap"),
    "softcap not a number": ({"softcap": float("nan")}, ValueError, "positive softcap, got nan"),
    "sinks per key head": ({"sinks": noise(2)}, ValueError, r"sinks of shape \[4\], got \[2\]"),
    "sinks of two axes": ({"sinks": noise(4, 1)}, ValueError, r"sinks of shape \[4\]"),
    "alibi_slopes": ({"alibi_slopes": noise(3)}, ValueError, r"alibi_slopes of shape \[4\]"),
    "relative_bias of one axis": ({"relative_bias": noise(4)}, ValueError, r"relative_bias of shape \[4, 2 R \+ 1\]"),
    "relative_bias of even width": ({"relative_bias": noise(4, 6)}, ValueError, r"relative_bias of shape .* \[4, 6\]"),
    "relative_bias on another device": (
        {"relative_bias": torch.empty(4, 5, device="meta")}, ValueError, "relative_bias on cpu, got meta"
    ),
    "backend unknown": ({"backend": "cuda"}, ValueError, "'reference', 'torch', 'triton', got 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("case", PACKED)
def test_packed(case: str) -> None:
    spoilt, error, message = PACKED[case]
    call(good())
    with pytest.raises(error, match=message) as raised:
        call(good() | spoilt)
    assert "\n" not in str(raised.value)


def dense_good() -> dict[str, Any]:
    pk, pv = prefixes(4)
    return {"q": noise(2, 4, 3, 16), "k": noise(2, 2, 5, 16), "v": noise(2, 2, 5, 16), "prefix_k": pk, "prefix_v": pv}


DENSE: dict[str, tuple[dict[str, Any], str]] = {
    "q of three axes": ({"q": noise(2, 4, 16)}, r"q of shape \[B, H, T, D\], got \[2, 4, 16\]"),
    "batch of k": ({"k": noise(1, 2, 5, 16)}, r"\[B = 2, H_kv, Tk >= 3, D\], got \[1, 2, 5, 16\]"),
    "batch of v": ({"v": noise(3, 2, 5, 16)}, r"\[B = 2, H_kv, Tk >= 3, D\]"),
    "fewer keys than queries": ({"k": noise(2, 2, 2, 16), "v": noise(2, 2, 2, 16)}, "Tk >= 3"),
    "keys and values differ": ({"v": noise(2, 2, 4, 16)}, "Tk >= 3"),
    "heads": ({"q": noise(2, 3, 3, 16)}, "H = 3 with 2 key heads"),
    "width": ({"q": noise(2, 4, 3, 8)}, "one head dimension, got 8 and 16"),
    "key_lengths too many": ({"key_lengths": index(5, 5, 5)}, r"key_lengths of shape \[2\]"),
    "key_lengths beyond": ({"key_lengths": index(5, 6)}, r"key_lengths from 0 to 5, got \[5, 6\]"),
    "key_lengths negative": ({"key_lengths": index(5, -1)}, "key_lengths from 0 to 5"),
    "key_starts beyond": ({"key_starts": index(6, 0)}, r"key_starts from 0 to 5, got \[6, 0\]"),
    "key_starts of floats": ({"key_starts": torch.zeros(2)}, r"key_starts of shape \[2\]"),
    "prompt_ids per token": ({"prompt_ids": index(0, 0, 0)}, r"prompt_ids of shape \[2\]"),
    "heads of the prefix": ({"prefix_k": noise(4, 4, 16)}, r"prefix_k of shape \[P, 2, 16\]"),
    "window": ({"window": -3}, "window of at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", DENSE)
def test_dense(case: str) -> None:
    spoilt, message = DENSE[case]
    prefix_attention(**dense_good())
    with pytest.raises(ValueError, match=message) as raised:
        prefix_attention(**(dense_good() | spoilt))
    assert "\n" not in str(raised.value)


def test_long_lists_are_cut() -> None:
    lengths = tuple([1] * 50)
    with pytest.raises(ValueError, match=r"got \[0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\]"):
        prefix_attention_varlen(*packed(tuple([1] * 51)), None, None, cumulative(lengths), 1)


def test_a_compiler_dropped_the_checks_of_values() -> None:
    """Tokens outside cu_seqlens were then what memory held, and ids out of range raw errors of PyTorch."""
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    compiled(good())
    for case in ("cu_seqlens short", "prompt_ids beyond", "prefix_lengths beyond", "prefix_rows of a reader"):
        spoilt, error, message = PACKED[case]
        with pytest.raises(error, match=message):
            compiled(good() | spoilt)
    spoilt, message = DENSE["key_lengths beyond"]
    with pytest.raises(ValueError, match=message):
        torch.compile(lambda given: prefix_attention(**given), backend="eager", fullgraph=True)(dense_good() | spoilt)

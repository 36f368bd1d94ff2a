"""Proves on a few tokens that a family without tests of its own computes through the shared path what it did stock.

A prompt of four virtual tokens with two short texts runs three ways against the stock rows: as a row of the packed
batch, as kept keys and values, and in a left-padded batch with a cache, as generation does. Sliding windows are
narrowed for the duration, or no short row would reach beyond one. The cost is nine forwards of at most a dozen tokens,
once per model. Random numbers, gradients, training modes and configurations are left as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ptengine.backbone.attention import KEYWORD, Observed, PrefixContext
from ptengine.backbone.lowering import KeyValuePrefix, LoweredPrompt, VirtualTokens
from ptengine.backbone.packing import IGNORE_INDEX, pack_rows
from ptengine.backbone.spec import BackboneSpec
from ptengine.errors import InputError, UnsupportedModelError

__all__ = ["Facts", "StockRows", "compare", "known", "measure", "narrowed", "refuse", "remember", "stock_rows"]

_VIRTUAL, _LENGTHS = 4, (6, 3)
_NARROW = 4  # window during the comparison: text sees a part of the prompt, then none of it


@dataclass(frozen=True)
class Facts:
    """What was measured and proven of one model; no modules, so that it does not keep the model alive.

    Attributes:
        num_heads, num_kv_heads, head_dim, value_dim, windowed, no_generation: as in `BackboneSpec`.
        skips_mlp: the last MLP may be narrowed to the rows that are wanted.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    windowed: tuple[int, ...]
    no_generation: str | None = None
    skips_mlp: bool = True

    def into(self, spec: BackboneSpec) -> BackboneSpec:
        return replace(
            spec, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim,
            value_dim=self.value_dim, windowed=self.windowed, no_generation=self.no_generation,
        )  # fmt: skip


@dataclass(frozen=True)
class StockRows:
    """The texts, the prompt, and what the stock model makes of each row behind it.

    Attributes:
        ids: of the texts.
        embeds: [P, d].
        results: per row [P + T, V], logits, or [P + T, d], last hidden states of a model without an LM head.
    """

    ids: list[list[int]]
    embeds: Tensor
    results: list[Tensor]


_proven: WeakKeyDictionary[Any, Facts] = WeakKeyDictionary()


def known(model: Any) -> Facts | None:
    return _proven.get(model)


def remember(model: Any, facts: Facts) -> None:
    _proven[model] = facts


def refuse(spec: BackboneSpec, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"model type {spec.model_type!r} is not supported: {reason}")


def first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextmanager
def narrowed(model: nn.Module) -> Iterator[None]:
    """Every sliding window in the configurations and modules of `model` is `_NARROW` inside the block.

    Written past the configurations' own checks, which compare a window with other fields.
    """
    holders = {id(module): module for module in model.modules()}
    holders |= {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    windows = [
        (holder, value)
        for holder in holders.values()
        if isinstance(value := vars(holder).get("sliding_window"), int) and value > 0 and not isinstance(value, bool)
    ]
    for holder, _ in windows:
        object.__setattr__(holder, "sliding_window", _NARROW)
    try:
        yield
    finally:
        for holder, value in windows:
            object.__setattr__(holder, "sliding_window", value)


@torch.no_grad()
def stock_rows(model: Any, spec: BackboneSpec) -> StockRows:
    """Run the stock model, in eval mode and with its windows narrowed, on each text behind the prompt.

    Raises:
        UnsupportedModelError: it fails on input embeddings.
    """
    weight = spec.word_embeddings.weight
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(spec.vocab_size, (length,), generator=generator).tolist() for length in _LENGTHS]
    noise = torch.randn(_VIRTUAL, spec.hidden_size, generator=generator).to(weight)  # [P, d]
    try:
        words = [spec.word_embeddings(torch.tensor(row, device=weight.device)) for row in ids]  # [T, d] each
        embeds = noise * torch.cat(words).float().std().to(weight)
        rows = [torch.cat([embeds, text])[None] for text in words]  # [1, P + T, d] each
        results = [spec.base_model(inputs_embeds=row, use_cache=False).last_hidden_state[0] for row in rows]
        if spec.lm_head is not None:
            hidden, results = results, [model(inputs_embeds=row, use_cache=False).logits[0] for row in rows]
    except Exception as error:
        raise refuse(spec, f"it does not run on input embeddings alone ({first_line(error)})") from error
    if spec.lm_head is not None:
        from ptengine.backbone.step import vocabulary_logits

        try:
            distance = _distance(torch.cat([vocabulary_logits(spec, one) for one in hidden]), torch.cat(results))
        except RuntimeError:
            distance = math.inf
        if not distance <= tolerance(spec, results[0].dtype):
            raise refuse(
                spec,
                "its logits are not those of its LM head's matrix over the last hidden states, which differ by "
                f"{distance:.1e}: it has a head of several layers or a scale ptengine does not know",
            )
    return StockRows(ids, embeds, results)


def measure(spec: BackboneSpec, observed: Sequence[Observed]) -> Facts:
    """The facts in what every layer handed to attention.

    Raises:
        UnsupportedModelError: layers differ, or tokens see each other both ways.
    """
    layers = [one.layer for one in observed]
    if layers != list(range(spec.num_layers)):
        raise refuse(spec, f"its layers reach attention in the order {layers}, not each once")
    if not all(one.causal for one in observed):
        raise refuse(spec, "its tokens see each other both ways, so virtual tokens depend on the text")
    shapes = {(one.num_heads, one.key, one.value) for one in observed}
    if len(shapes) > 1:
        raise refuse(
            spec, f"its layers differ in heads or widths (heads, keys, values: {', '.join(map(str, sorted(shapes)))})"
        )
    [(num_heads, (num_kv_heads, head_dim), (_, value_dim))] = shapes
    windowed = tuple(index for index, one in enumerate(observed) if one.window is not None)
    return Facts(num_heads, num_kv_heads, head_dim, value_dim, windowed)


@torch.no_grad()
def compare(model: Any, spec: BackboneSpec, stock: StockRows) -> str | None:
    """Hold the patched model, with its windows narrowed, to `stock`; returns why it does not generate, or None.

    Raises:
        UnsupportedModelError: the packed step gives other numbers; the message has the figure.
    """
    from ptengine.backbone.step import capture_prefix  # which reads patching, which reads this module

    soft = VirtualTokens(stock.embeds)
    try:
        _require_equal(spec, soft, stock, "virtual tokens")
        kept = capture_prefix(model, soft)
        _require_equal(spec, kept, stock, "a prefix of keys and values")
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise refuse(spec, f"a trial step over packed rows failed ({first_line(error)})") from error
    if spec.lm_head is None:
        return None
    try:
        got = _with_cache(model, kept, stock.ids)  # [B, V]
    except Exception as error:
        return f"a trial step with a cache failed ({first_line(error)})"
    expected = torch.stack([result[-1] for result in stock.results])  # [B, V]
    distance, bound = _distance(got, expected), tolerance(spec, expected.dtype)
    if distance <= bound:
        return None
    return f"a trial step with a cache differed from the stock computation by {distance:.1e} (bound {bound:.1e})"


def tolerance(spec: BackboneSpec, dtype: torch.dtype) -> float:
    """Relative distance of two orders of the same sums.

    Each layer rounds its results, which differ by a few ulps, and errors of layers add up like a random walk; the
    constant is for single precision, where the sums inside products, not the results, have the larger error. Leaving
    out a rule of attention costs 0.05 and more.
    """
    return math.sqrt(spec.num_layers) * (4 * torch.finfo(dtype).eps + 1e-4)


def _distance(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    distance = ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    return math.inf if math.isnan(distance) else distance


def _require_equal(spec: BackboneSpec, prompt: LoweredPrompt, stock: StockRows, what: str) -> None:
    from ptengine.backbone.step import predicting_hidden, vocabulary_logits

    labels = [[IGNORE_INDEX] * len(row) for row in stock.ids]  # the first text is labelled, and the last token
    labels[0], labels[-1][-1] = list(stock.ids[0]), stock.ids[-1][-1]
    found = predicting_hidden(spec, prompt, pack_rows(stock.ids, labels))
    got = found.hidden if spec.lm_head is None else vocabulary_logits(spec, found.hidden)  # [n, V] or [n, d]
    first = stock.results[0][_VIRTUAL - 1 : -1]  # what predicts each token of the first text
    if isinstance(prompt, KeyValuePrefix):
        first = first[1:]  # nothing predicts its first token
    expected = torch.cat([first, stock.results[-1][-2:-1]])  # [n, V] or [n, d]
    distance, bound = _distance(got, expected), tolerance(spec, expected.dtype)
    if not distance <= bound:
        raise refuse(
            spec,
            f"{what} through the shared path gave results that differ from the stock computation by {distance:.1e} "
            f"(relative; bound {bound:.1e}){_diagnosis(spec)}",
        )


def _diagnosis(spec: BackboneSpec) -> str:
    """The commonest cause, where that is it: positions that are counted instead of taken from the call."""
    from ptengine.backbone.step import packed_call

    device = spec.word_embeddings.weight.device
    size = 3
    context = PrefixContext(cu_seqlens=torch.tensor([0, size], dtype=torch.int32, device=device), max_seqlen=size)
    embeds = spec.word_embeddings(torch.arange(size, device=device) % spec.vocab_size)  # [3, d]
    positions = torch.arange(size, device=device)
    try:
        results = [packed_call(spec, embeds, places, context) for places in (positions, positions * 2)]
    except (InputError, RuntimeError, IndexError):
        return ""
    return ": it ignores position_ids" if torch.equal(*results) else ""


def _with_cache(model: Any, kept: KeyValuePrefix, ids: list[list[int]]) -> Tensor:
    """Logits [B, V] of each row's last token, read alone behind a cache of the others: left-padded, as generated."""
    device = kept.keys.device
    longest = max(map(len, ids))
    starts = torch.tensor([longest - len(row) for row in ids], device=device)  # [B]
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=device)  # [B, T]
    mask = (torch.arange(longest, device=device) >= starts[:, None]).long()  # [B, T]
    positions = (_VIRTUAL + mask.cumsum(1) - 1).masked_fill(mask == 0, 0)  # [B, T]
    context = PrefixContext(
        keys=tuple(x[None] for x in kept.keys),
        values=tuple(x[None] for x in kept.values),
        key_starts=starts.to(torch.int32),
    )
    cache: Any = DynamicCache()
    for span, seen in ((slice(0, longest - 1), longest - 1), (slice(longest - 1, longest), longest)):
        out = model(
            input_ids=tokens[:, span], attention_mask=mask[:, :seen], position_ids=positions[:, span],
            past_key_values=cache, use_cache=True, **{KEYWORD: context},
        )  # fmt: skip
        cache = out.past_key_values
    logits: Tensor = out.logits[:, -1]
    return logits

"""Proves on a few tokens that a family without tests of its own computes through ptengine what it did stock.

A prompt of four virtual tokens with two short texts runs against the stock rows of `trial`. In a causal family three
ways: as a row of the packed batch, as kept keys and values, and in a left-padded batch with a cache, as generation
does. In a bidirectional one in packed rows, and its head from hidden states at hand. Where the shared path does not
serve, rows of a stock batch with the prompt in place. Sliding windows are narrowed for the duration, or no short row
would reach beyond one. The cost is a dozen forwards of at most a dozen tokens, once per model. Random numbers,
gradients, training modes and configurations are left as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ptengine.backbone.attention import KEYWORD, Observed, PrefixContext
from ptengine.backbone.families import UNLIMITED
from ptengine.backbone.heads import Pooling, head_output, logits_of, pooling_of
from ptengine.backbone.lowering import KeyValuePrefix, LoweredPrompt, VirtualTokens
from ptengine.backbone.packing import IGNORE_INDEX, pack_rows
from ptengine.backbone.spec import BackboneSpec
from ptengine.backbone.trial import VIRTUAL, StockRows, distance_of, first_line, refuse, tolerance
from ptengine.errors import InputError, UnsupportedModelError

__all__ = ["Facts", "compare", "compare_in_row", "known", "measure", "narrowed", "read_head", "remember"]

_NARROW = 4  # window during the comparison: text sees a part of the prompt, then none of it


@dataclass(frozen=True)
class Facts:
    """What was measured and proven of one model, without what would keep the model alive.

    Attributes:
        skips_mlp: the last MLP may be narrowed to the rows that are wanted.
        logit_scale: None where it is as configured.
        others: as in `BackboneSpec`.
    """

    kind: Literal["causal", "encoder", "seq2seq"]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    windowed: tuple[int, ...] = ()
    no_generation: str | None = None
    path: Literal["shared", "in_row"] = "shared"
    why_in_row: str | None = None
    no_prefix: str | None = None
    pads: bool = True
    first_position: int = 0
    pooling: Pooling | None = None
    no_head: str | None = None
    before_head: nn.Module | None = None
    logit_scale: float | None = None
    pads_left: bool = False
    skips_mlp: bool = True

    def into(self, spec: BackboneSpec) -> BackboneSpec:
        facts = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "skips_mlp"}
        if self.logit_scale is None:
            del facts["logit_scale"]
        limit = spec.max_positions
        if self.first_position and limit < UNLIMITED:
            limit -= self.first_position
        return replace(spec, **facts, max_positions=limit)


_proven: WeakKeyDictionary[Any, Facts] = WeakKeyDictionary()


def known(model: Any) -> Facts | None:
    return _proven.get(model)


def remember(model: Any, facts: Facts) -> None:
    _proven[model] = facts


@contextmanager
def narrowed(model: nn.Module) -> Iterator[None]:
    """Every sliding window in the configurations and modules of `model` is `_NARROW` inside the block.

    Written past the configurations' own checks, which compare a window with other fields. A module's window that is
    one off its configuration's, which includes or leaves out the token itself, stays so.
    """
    holders = {id(module): module for module in model.modules()}
    holders |= {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    windows = {
        key: (holder, value)
        for key, holder in holders.items()
        if isinstance(value := _declared_window(holder), int) and value > 0 and not isinstance(value, bool)
    }
    for holder, value in windows.values():
        _, declared = windows.get(id(getattr(holder, "config", None)), (None, value))
        off = value - declared
        object.__setattr__(holder, "sliding_window", _NARROW + (off if abs(off) <= 1 else 0))
    try:
        yield
    finally:
        for holder, value in windows.values():
            object.__setattr__(holder, "sliding_window", value)


def _declared_window(holder: Any) -> Any:
    try:
        return getattr(holder, "sliding_window", None)
    except Exception:  # of configurations whose value differs by layer
        return None


def measure(spec: BackboneSpec, observed: Sequence[Observed]) -> Facts:
    """The facts in what every layer handed to attention.

    Raises:
        UnsupportedModelError: layers differ, or are not causal where the model is, or the reverse.
    """
    layers = [one.layer for one in observed]
    if layers != list(range(spec.num_layers)):
        raise refuse(spec, f"its layers reach attention in the order {layers}, not each once")
    causal = spec.kind == "causal"
    if any(one.causal != causal for one in observed):
        raise refuse(spec, "its attention says of some layers that tokens see each other both ways, of others not")
    shapes = {(one.num_heads, one.key, one.value) for one in observed}
    if len(shapes) > 1:
        raise refuse(
            spec, f"its layers differ in heads or widths (heads, keys, values: {', '.join(map(str, sorted(shapes)))})"
        )
    [(num_heads, (num_kv_heads, head_dim), (_, value_dim))] = shapes
    windowed = tuple(index for index, one in enumerate(observed) if one.window is not None)
    return Facts(
        spec.kind, num_heads, num_kv_heads, head_dim, value_dim, windowed, first_position=spec.first_position,
        before_head=spec.before_head, logit_scale=spec.logit_scale,
    )  # fmt: skip


@torch.no_grad()
def compare(model: Any, spec: BackboneSpec, facts: Facts, stock: StockRows) -> Facts:
    """Hold the patched model, with its windows narrowed, to `stock`; returns `facts` with what was found.

    Raises:
        UnsupportedModelError: the packed step gives other numbers; the message has the figure.
    """
    from ptengine.backbone.step import capture_prefix  # which reads patching, which reads this module

    soft = VirtualTokens(stock.embeds)
    try:
        if spec.kind == "encoder":
            _require_equal_text(spec, stock, "virtual tokens in packed rows")
            ignored = _diagnosis(spec)
            reason = "it ignores position_ids, so a text cannot be told that a prefix stands before it"
            return replace(facts, no_prefix=reason if ignored else None)
        _require_equal(spec, soft, stock, "virtual tokens through the shared path")
        kept = capture_prefix(model, soft)
        _require_equal(spec, kept, stock, "a prefix of keys and values through the shared path")
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise refuse(spec, f"a trial step over packed rows failed ({first_line(error)})") from error
    return replace(facts, no_generation=_no_generation(model, spec, kept, stock))


@torch.no_grad()
def compare_in_row(model: Any, spec: BackboneSpec, stock: StockRows, why: str) -> Facts:
    """Hold the stock model, with the prompt in every row of a batch, to rows that run alone.

    Args:
        model: stock.
        spec: of the model, with `path` in-row.
        stock: the rows alone.
        why: why the shared path does not serve the model.

    Raises:
        UnsupportedModelError: the numbers depend on the other rows of the batch; the message has `why`, too.
    """
    facts = Facts(
        spec.kind, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.value_dim, path="in_row", why_in_row=why,
        no_prefix=why, first_position=spec.first_position, before_head=spec.before_head, logit_scale=spec.logit_scale,
    )  # fmt: skip
    for pads in (True, False):
        facts = replace(facts, pads=pads)
        try:
            if spec.kind == "causal":
                _require_equal(facts.into(spec), VirtualTokens(stock.embeds), stock, "virtual tokens in the row")
            else:
                _require_equal_text(facts.into(spec), stock, "virtual tokens in the row")
        except Exception as error:
            reason = error
        else:
            return _with_steps(model, spec, facts, stock) if spec.kind == "causal" else facts
    raise refuse(spec, f"{why}; and {first_line(reason)}") from reason


def _with_steps(model: Any, spec: BackboneSpec, facts: Facts, stock: StockRows) -> Facts:
    """What stock calls of a causal model with the prompt in their rows bear: padding on the left, and a cache."""
    from ptengine.backbone.in_row_generation import row_hooks  # which reads what reads this module
    from ptengine.backbone.in_row_proof import bears_left_padding, why_no_steps

    handles = row_hooks(model, spec.base_model)
    try:
        facts = replace(facts, pads_left=bears_left_padding(model, facts.into(spec), stock))
        if stock.logits is None:
            return facts
        return replace(facts, no_generation=why_no_steps(model, facts.into(spec), stock))
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def read_head(model: Any, spec: BackboneSpec, facts: Facts, stock: StockRows) -> Facts:
    """How the head of an encoder is read from hidden states at hand, or why it cannot be."""
    ids = torch.tensor(stock.ids[:1], device=spec.word_embeddings.weight.device)  # [1, T]
    mask = torch.ones_like(ids)  # [1, T]
    bound = tolerance(spec, spec.word_embeddings.weight.dtype)
    try:
        out = spec.base_model(input_ids=ids, attention_mask=mask)
        hidden, pooler_output = out.last_hidden_state, out.get("pooler_output")  # [1, T, d], [1, d] or None
        if pooler_output is not None:
            facts = replace(facts, pooling=pooling_of(spec.base_model, hidden, pooler_output, bound))
        if model is spec.base_model:
            return facts
        expected = logits_of(model, model(input_ids=ids, attention_mask=mask))
        got = head_output(model, spec.base_model, facts.pooling, hidden, mask)
        distance = distance_of(got, expected)
        if got.dim() == 3 and distance <= bound:  # a head that reads tokens reads each alone
            part = head_output(model, spec.base_model, facts.pooling, hidden[:, 1::2], mask[:, 1::2])
            distance = distance_of(part, expected[:, 1::2])
        if got.dim() == 2 and distance <= bound:  # one that reads a row reads its text, wherever that ends
            behind = torch.nn.functional.pad(mask, (0, 1))  # [1, T + 1]
            padded = head_output(model, spec.base_model, facts.pooling, hidden[:, [*range(mask.shape[1]), 0]], behind)
            if not distance_of(padded, expected) <= bound:
                return replace(facts, no_head="its head reads the end of a row, which may be padding")
    except Exception as error:
        return replace(facts, no_head=f"a trial of its head failed ({first_line(error)})")
    if distance <= bound:
        return facts
    reason = f"its head computes from more than the last hidden states of its {type(spec.base_model).__name__}"
    return replace(facts, no_head=reason)


def _no_generation(model: Any, spec: BackboneSpec, kept: KeyValuePrefix, stock: StockRows) -> str | None:
    if stock.logits is None:
        return None
    try:
        got = _with_cache(model, spec, kept, stock.ids)  # [B, V]
    except Exception as error:
        return f"a trial step with a cache failed ({first_line(error)})"
    expected = torch.stack([result[-1] for result in stock.logits])  # [B, V]
    distance, bound = distance_of(got, expected), tolerance(spec, expected.dtype)
    if distance <= bound:
        return None
    return f"a trial step with a cache differed from the stock computation by {distance:.1e} (bound {bound:.1e})"


def _require_equal_text(spec: BackboneSpec, stock: StockRows, what: str) -> None:
    """Hold the hidden states of the texts of a bidirectional model to the stock rows."""
    from ptengine.backbone.step import text_hidden

    got = text_hidden(spec, VirtualTokens(stock.embeds), pack_rows(stock.ids))  # [N, d]
    expected = torch.cat([hidden[VIRTUAL:] for hidden in stock.hidden])  # [N, d]
    _require_close(spec, got, expected, what)


def _require_equal(spec: BackboneSpec, prompt: LoweredPrompt, stock: StockRows, what: str) -> None:
    from ptengine.backbone.step import predicting_hidden
    from ptengine.backbone.vocabulary import vocabulary_logits

    labels = [[IGNORE_INDEX] * len(row) for row in stock.ids]  # the first text is labelled, and the last token
    labels[0], labels[-1][-1] = list(stock.ids[0]), stock.ids[-1][-1]
    found = predicting_hidden(spec, prompt, pack_rows(stock.ids, labels))
    results = stock.hidden if stock.logits is None else stock.logits
    got = found.hidden if stock.logits is None else vocabulary_logits(spec, found.hidden)  # [n, V] or [n, d]
    first = results[0][VIRTUAL - 1 : -1]  # what predicts each token of the first text
    if isinstance(prompt, KeyValuePrefix):
        first = first[1:]  # nothing predicts its first token
    _require_close(spec, got, torch.cat([first, results[-1][-2:-1]]), what)


def _require_close(spec: BackboneSpec, got: Tensor, expected: Tensor, what: str) -> None:
    distance, bound = distance_of(got, expected), tolerance(spec, expected.dtype)
    if not distance <= bound:
        raise refuse(
            spec,
            f"{what} gave results that differ from the stock computation by {distance:.1e} "
            f"(relative; bound {bound:.1e}){_diagnosis(spec) if spec.path == 'shared' else ''}",
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


def _with_cache(model: Any, spec: BackboneSpec, kept: KeyValuePrefix, ids: list[list[int]]) -> Tensor:
    """Logits [B, V] of each row's last token, read alone behind a cache of the others: left-padded, as generated."""
    device = kept.keys.device
    longest = max(map(len, ids))
    starts = torch.tensor([longest - len(row) for row in ids], device=device)  # [B]
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=device)  # [B, T]
    mask = (torch.arange(longest, device=device) >= starts[:, None]).long()  # [B, T]
    positions = spec.first_position + (VIRTUAL + mask.cumsum(1) - 1).masked_fill(mask == 0, 0)  # [B, T]
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

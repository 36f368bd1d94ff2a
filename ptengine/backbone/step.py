"""One step of a frozen backbone over a packed batch with its prompts.

In a causal backbone virtual tokens are rows of the batch, one per prompt, which the texts' rows read in every layer:
P + sum(T_i) positions instead of B * (P + max T). In a bidirectional one, where the shared path does not serve, and
where a batch places them inside its rows, they stand in every row. Prefixes are read by every layer's attention from
where they lie. Positions of a text start behind its prompt. Only hidden states that predict a label leave this room.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, chain
from typing import Any, cast

import torch
from torch import Tensor

from ptengine.backbone.attention import KEYWORD, PrefixContext
from ptengine.backbone.gated import GatedPart, check_gated, gated_parts
from ptengine.backbone.heads import before_head
from ptengine.backbone.in_row import run_in_row
from ptengine.backbone.input_offsets import add_offsets, check_reach, stack_offsets
from ptengine.backbone.lowering import FixedPrompt, GatedTokens, KeyValuePrefix, LoweredPrompt, VirtualTokens
from ptengine.backbone.packing import IGNORE_INDEX, PackedBatch, check_vocabulary, cut_rows, read_back
from ptengine.backbone.patching import cache_off, no_mask, require_patched
from ptengine.backbone.placement import places_in_rows, row_order
from ptengine.backbone.spec import BackboneSpec
from ptengine.backbone.step_recording import active_graphs
from ptengine.backbone.text_dependent import own_prompts
from ptengine.backbone.vocabulary import LabelHidden, label_cross_entropy
from ptengine.errors import InputError, UnsupportedModelError

__all__ = [
    "Layout",
    "PackedLoss",
    "Prompts",
    "capture_prefix",
    "capture_prefixes",
    "check_fit",
    "checked_prompts",
    "label_hidden",
    "label_log_probs",
    "label_losses",
    "lay_out",
    "packed_call",
    "packed_loss",
    "predicting_hidden",
    "stack_prefixes",
    "text_hidden",
]

Prompts = LoweredPrompt | Sequence[LoweredPrompt] | None


@dataclass(frozen=True)
class PackedLoss:
    """Attributes:
    loss: mean cross-entropy over the labels, a scalar, in nats.
    num_labels: how many labels there were.
    """

    loss: Tensor
    num_labels: int


@dataclass(frozen=True)
class Layout:
    """A packed batch with its virtual tokens in place."""

    embeds: Tensor  # [N, d]
    positions: Tensor  # int64 [N]
    text: Tensor  # int64 [tokens]: where each token of the batch stands among the N
    row_of_token: Tensor  # int64 [tokens]: the row of the batch each token stands in
    before_text: Tensor  # int64 [rows]: the position that predicts a row's first token, -1 for none
    prompt_of_row: Tensor  # int64 [rows]: the prompt of each row of the batch, -1 for none
    cu_seqlens: Tensor  # int32
    max_seqlen: int
    prefix_rows: Tensor | None  # int32


def packed_loss(
    model: Any,
    lowered: Prompts,
    batch: PackedBatch,
    *,
    prompt_ids: Sequence[int] | None = None,
    label_smoothing: float = 0.0,
) -> PackedLoss:
    """Mean cross-entropy of the labelled tokens of a batch, for training: gradients reach the prompts alone.

    A label at a row's first token is predicted from the last virtual token; where there is none (a prefix, or no
    prompt) nothing predicts it and it does not count, as in the stock computation.

    Args:
        model: a patched causal model whose LM head is frozen.
        lowered: one prompt for all rows, several chosen by `prompt_ids`, or None for no prompt.
        batch: with labels.
        prompt_ids: [B], the prompt of each row; required exactly with several prompts.
        label_smoothing: in [0, 1).

    Raises:
        InputError: the model is not patched or has no LM head, the prompt does not fit the model, the batch has no
            label that can be predicted or a token outside the vocabulary, or a row with its prompt is longer than the
            model's positions.
    """
    found = label_hidden(model, lowered, batch, prompt_ids=prompt_ids)
    return PackedLoss(label_cross_entropy(require_patched(model), found, label_smoothing, "mean"), found.labels.numel())


def label_log_probs(
    model: Any, lowered: Prompts, batch: PackedBatch, *, prompt_ids: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """log p of every labelled token: fp32 [n], and the row it stands in: int64 [n]. Arguments as in `packed_loss`."""
    losses, rows = label_losses(model, lowered, batch, prompt_ids=prompt_ids)
    return -losses, rows


def label_losses(
    model: Any,
    lowered: Prompts,
    batch: PackedBatch,
    *,
    prompt_ids: Sequence[int] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of every labelled token, of which `packed_loss` is the mean: fp32 [n], in nats, differentiable.

    The second tensor is the row each stands in, int64 [n]. Arguments and errors as in `packed_loss`.
    """
    found = label_hidden(model, lowered, batch, prompt_ids=prompt_ids)
    return label_cross_entropy(require_patched(model), found, label_smoothing, "none"), found.rows


def label_hidden(
    model: Any, lowered: Prompts, batch: PackedBatch, *, prompt_ids: Sequence[int] | None = None
) -> LabelHidden:
    """The hidden states that predict the labels, in the order of the labels. Arguments as in `packed_loss`."""
    spec = require_patched(model)
    if spec.kind != "causal" or spec.lm_head is None:
        raise InputError(f"expected a causal model with an LM head, got {type(model).__name__}")
    return predicting_hidden(spec, lowered, batch, prompt_ids=prompt_ids)


def predicting_hidden(
    spec: BackboneSpec, lowered: Prompts, batch: PackedBatch, *, prompt_ids: Sequence[int] | None = None
) -> LabelHidden:
    """`label_hidden` of a patched causal model that need not have a head.

    What stands at a row's last label and behind it predicts nothing that counts, so the model does not run on it.
    """
    batch = batch.to(spec.word_embeddings.weight.device)
    if batch.labels is None:
        raise InputError("expected a batch with labels, got none")
    prompts, ids = checked_prompts(spec, lowered, batch, prompt_ids)
    labelled = (batch.labels != IGNORE_INDEX).nonzero()[:, 0]  # [l]
    rows = torch.searchsorted(batch.cu_seqlens[1:].long(), labelled, right=True)  # [l], the row each stands in
    within = labelled - batch.cu_seqlens[:-1].long()[rows]  # [l]
    # Virtual tokens inside rows may have their places behind the last label, too.
    whole = batch.virtual_at is not None and len(prompts) > 0
    read = batch.cu_seqlens.diff().long()  # [rows], tokens that are read: those before the last label
    if not whole:
        read = torch.zeros_like(read).scatter_reduce(0, rows, within, "amax")
    sizes = check_rows(spec, prompts, ids, batch, read)
    text = batch if whole else cut_rows(batch, read, sizes)
    layout = lay_out(spec, prompts, ids, text, sizes)
    if whole:
        before = layout.text[labelled] - 1  # [l], maybe a virtual token
    else:
        own = text.cu_seqlens[:-1].long()[rows] + within - 1  # [l], the token before, where the row has one
        before = torch.nn.functional.pad(layout.text, (0, 1), value=-1)[own]  # [l]
    before = layout.before_text[rows].where(within == 0, before)  # [l]
    counts = (before >= 0).nonzero()[:, 0]  # [n]
    predictors = before[counts]  # [n]
    if predictors.numel() == 0:
        raise InputError("expected a batch with at least one label behind a token or a virtual token, got none")
    hidden = _run(spec, layout, prompts, ids, hidden_rows=torch.unique(predictors))
    found = before_head(spec.before_head, hidden[predictors])  # [n, d]
    return LabelHidden(found, batch.labels[labelled[counts]], rows[counts])


def text_hidden(
    spec: BackboneSpec, lowered: Prompts, batch: PackedBatch, *, prompt_ids: Sequence[int] | None = None
) -> Tensor:
    """Last hidden states [tokens, d] of the texts of a patched encoder, in the order of the batch's tokens."""
    batch = batch.to(spec.word_embeddings.weight.device)
    prompts, ids = checked_prompts(spec, lowered, batch, prompt_ids)
    layout = lay_out(spec, prompts, ids, batch)
    return _run(spec, layout, prompts, ids, token_type_ids=batch.token_type_ids)[layout.text]


def capture_prefix(model: Any, virtual: VirtualTokens) -> KeyValuePrefix:
    """Run virtual tokens once through a patched causal model and keep their keys and values of every layer."""
    return capture_prefixes(model, [virtual])[0]


def capture_prefixes(model: Any, virtual: Sequence[VirtualTokens]) -> list[KeyValuePrefix]:
    """`capture_prefix` of several prompts in one forward, each a row of its own."""
    spec = require_patched(model)
    if spec.kind != "causal":
        raise InputError(f"expected a causal model, got {spec.model_type!r}: its virtual tokens depend on the text")
    if spec.path != "shared":
        raise UnsupportedModelError(f"model type {spec.model_type!r} keeps no prompt apart: {spec.no_prefix}")
    sizes = [prompt.num_virtual_tokens for prompt in virtual]
    device = spec.word_embeddings.weight.device
    for prompt in virtual:
        check_fit(spec, prompt)
    captured: dict[int, tuple[Tensor, Tensor]] = {}
    context = PrefixContext(
        cu_seqlens=torch.tensor([0, *sizes], device=device).cumsum(0).to(torch.int32),
        max_seqlen=max(sizes),
        hidden_rows=torch.zeros(1, dtype=torch.int64, device=device),
        captured=captured,
    )
    positions = torch.cat([torch.arange(size, device=device) for size in sizes])  # [sum P]
    packed_call(spec, torch.cat([prompt.embeds for prompt in virtual]), positions, context)
    keys, values = zip(*(captured[layer] for layer in range(spec.num_layers)), strict=True)
    parts = (torch.stack(x).split(sizes, dim=1) for x in (keys, values))  # of [L, P, H_kv, D]
    return [
        KeyValuePrefix(own_keys, own_values, prompt.input_offsets)
        for own_keys, own_values, prompt in zip(*parts, virtual, strict=True)
    ]


def stack_prefixes(
    prefixes: Sequence[KeyValuePrefix], device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Per layer the keys and values [N, P, H_kv, D] of N prefixes padded to the longest, and their lengths int32 [N].

    Unbound here, once, as by `KeyValuePrefix.by_layer`.
    """
    sizes = [prefix.num_virtual_tokens for prefix in prefixes]
    lengths = torch.tensor(sizes, dtype=torch.int32, device=device)
    if len(prefixes) == 1:
        return *prefixes[0].by_layer(device), lengths

    def stack(parts: list[Tensor]) -> tuple[Tensor, ...]:
        padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, max(sizes) - x.shape[1])) for x in parts]
        return torch.stack(padded, dim=1).to(device).unbind(0)  # L of [N, P, H_kv, D]

    keys = stack([prefix.keys for prefix in prefixes])
    values = stack([prefix.values for prefix in prefixes])
    return keys, values, lengths


def checked_prompts(
    spec: BackboneSpec, lowered: Prompts, batch: PackedBatch, prompt_ids: Sequence[int] | None
) -> tuple[list[FixedPrompt], list[int]]:
    """The prompts as a list and the prompt of every row, checked against each other and the model.

    A prompt that depends on the text comes back as one prompt for every row that reads it. `batch` lies on the model's
    device.
    """
    if lowered is None:
        if prompt_ids is not None:
            raise InputError("expected prompts to go with prompt_ids, got None")
        return [], [-1] * batch.num_rows
    single = isinstance(lowered, LoweredPrompt)
    given: list[LoweredPrompt] = [lowered] if single else list(lowered)  # type: ignore[list-item, arg-type]
    if single and prompt_ids is None:
        prompt_ids = [0] * batch.num_rows
    if prompt_ids is None:
        raise InputError(f"expected prompt_ids to choose among {len(given)} prompts, got None")
    ids = [int(prompt) for prompt in prompt_ids]
    if len(ids) != batch.num_rows or any(not -1 <= prompt < len(given) for prompt in ids):
        raise InputError(f"expected {batch.num_rows} prompt_ids from -1 to {len(given) - 1}, got {len(ids)}: {ids[:8]}")
    prompts, ids = own_prompts(spec, given, ids, batch)
    if len({type(prompt) for prompt in prompts}) > 1:
        raise InputError(
            "expected prompts of one kind in a batch, virtual tokens, prefixes or gated tokens, got several"
        )
    for prompt in prompts:
        check_fit(spec, prompt)
    return prompts, ids


def check_fit(spec: BackboneSpec, prompt: FixedPrompt) -> None:
    """Refuse a prompt that is longer than the model's positions or whose width, layers or heads are not the model's."""
    if prompt.num_positions > spec.max_positions:
        raise InputError(
            f"expected at most {spec.max_positions} positions, got a prompt of {prompt.num_virtual_tokens} tokens"
        )
    if prompt.input_offsets is not None and prompt.input_offsets.shape[1] != spec.hidden_size:
        raise InputError(
            f"expected input offsets of the model's width {spec.hidden_size}, got {prompt.input_offsets.shape[1]}"
        )
    if isinstance(prompt, VirtualTokens):
        if prompt.embeds.shape[1] != spec.hidden_size:
            raise InputError(
                f"expected virtual tokens of the model's width {spec.hidden_size}, got {prompt.embeds.shape[1]}"
            )
        return
    if isinstance(prompt, GatedTokens):
        check_gated(spec, prompt)
        return
    if spec.no_prefix is not None:
        raise UnsupportedModelError(
            f"model type {spec.model_type!r} is not supported with a prefix of keys and values: {spec.no_prefix}"
        )
    for name, x, dim in (("keys", prompt.keys, spec.head_dim), ("values", prompt.values, spec.value_dim)):
        expected = (spec.num_layers, spec.num_kv_heads, dim)
        layers, _, heads, width = x.shape
        if (layers, heads, width) != expected:
            raise InputError(
                f"expected prefix {name} of {expected[0]} layers with {expected[1]} key-value heads of {expected[2]}, "
                f"got {layers} with {heads} of {width}"
            )


def check_rows(
    spec: BackboneSpec, prompts: list[FixedPrompt], ids: list[int], batch: PackedBatch, read: Tensor | None = None
) -> list[int]:
    """`read` [rows], by default the rows' lengths, as a list, once no row is too long and no token beyond the words."""
    lengths, wanted, least, most = read_back(batch, read)
    virtual = _virtual_of_rows(prompts, ids)
    too_long = [row for row, length in enumerate(lengths) if length + virtual[row] > spec.max_positions]
    if too_long:
        row = too_long[0]
        raise InputError(
            f"row {row}: expected at most {spec.max_positions} positions, got {virtual[row]} virtual tokens and "
            f"{lengths[row]} tokens of text"
        )
    check_vocabulary(batch, spec.word_embeddings.weight.shape[0], least, most)
    for row, (prompt, length) in enumerate(zip(ids, lengths, strict=True)):
        check_reach(prompts[prompt] if prompt >= 0 else None, length, f"row {row}")
    return wanted


def _virtual_of_rows(prompts: list[FixedPrompt], ids: list[int]) -> list[int]:
    """How many virtual tokens stand before each row."""
    return [prompts[prompt].num_positions if prompt >= 0 else 0 for prompt in ids]


def lay_out(
    spec: BackboneSpec,
    prompts: list[FixedPrompt],
    ids: list[int],
    batch: PackedBatch,
    lengths: list[int] | None = None,
) -> Layout:
    """Place virtual tokens, as rows of their own or in every row, and give every token its position.

    `lengths` are those of the rows where `check_rows` has passed; with None it is called.
    """
    device = spec.word_embeddings.weight.device
    batch = batch.to(device)
    if lengths is None:
        lengths = check_rows(spec, prompts, ids, batch)
    sizes = [prompt.num_positions for prompt in prompts]
    virtual = _virtual_of_rows(prompts, ids)
    text_embeds = spec.word_embeddings(batch.input_ids)  # [tokens, d]
    row_of_token = batch.row_of_token()  # [tokens]
    # What the host knows goes to the device at once, since a GPU is waited for each time.
    own = [position for one in prompts if isinstance(one, VirtualTokens) for position in range(one.num_positions)]
    known = (virtual, [0, *accumulate(sizes)], ids, own)
    moved = torch.tensor([*chain(*known)], dtype=torch.int64).to(device).split([len(part) for part in known])
    virtual_of_row, starts, prompt_of_row, own_positions = moved  # [rows], [N + 1], [rows], [sum P_n] or none
    within = torch.arange(batch.num_tokens, device=device) - batch.cu_seqlens[:-1].long()[row_of_token]  # [tokens]
    text_positions = virtual_of_row[row_of_token] + within  # [tokens]
    offsets = stack_offsets(prompts, text_embeds)  # [N + 1, S, d]
    if offsets is not None:
        text_embeds = add_offsets(text_embeds, offsets, prompt_of_row[row_of_token], within)
    nothing = torch.full((len(lengths),), -1, dtype=torch.int64, device=device)  # [rows]
    if batch.virtual_at is not None and prompts and not isinstance(prompts[0], VirtualTokens):
        raise InputError(
            "expected virtual tokens for rows that have places for them, got a prompt that stands before all text or "
            "beside it"
        )
    if not prompts or not isinstance(prompts[0], VirtualTokens):
        return Layout(
            embeds=text_embeds,
            positions=text_positions,
            text=torch.arange(batch.num_tokens, device=device),
            row_of_token=row_of_token,
            before_text=nothing,
            prompt_of_row=prompt_of_row,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            prefix_rows=None,
        )
    embeds = [
        prompt.embeds.to(device=device, dtype=text_embeds.dtype)
        for prompt in prompts
        if isinstance(prompt, VirtualTokens)
    ]
    if spec.kind == "causal" and spec.path == "shared" and batch.virtual_at is None:
        total = int(sum(sizes))
        last = torch.where(virtual_of_row > 0, starts[prompt_of_row + 1] - 1, nothing)  # [rows]
        return Layout(
            embeds=torch.cat([*embeds, text_embeds]),
            positions=torch.cat([own_positions, text_positions]),
            text=total + torch.arange(batch.num_tokens, device=device),
            row_of_token=row_of_token,
            before_text=last,
            prompt_of_row=prompt_of_row,
            cu_seqlens=torch.cat([starts[:-1].to(torch.int32), batch.cu_seqlens + total]),
            max_seqlen=max([batch.max_seqlen, *sizes]),
            prefix_rows=torch.cat([torch.full_like(starts[:-1], -1), prompt_of_row]).to(torch.int32),
        )
    # Virtual tokens and text of every row, gathered from prompts and texts laid end to end.
    source = torch.cat([*embeds, text_embeds])  # [sum P_n + tokens, d]
    copies = sum(virtual)  # V, virtual tokens of all rows
    shift = starts[prompt_of_row] - (virtual_of_row.cumsum(0) - virtual_of_row)  # [rows], from a row's to its prompt's
    virtual_entries = torch.arange(copies, device=device) + torch.repeat_interleave(
        shift, virtual_of_row, output_size=copies
    )  # [V]
    entries = torch.cat([virtual_entries, sum(sizes) + torch.arange(batch.num_tokens, device=device)])  # [N]
    order = row_order(batch, virtual_of_row, places_in_rows(batch, virtual, lengths))  # [N]
    cu_seqlens = torch.nn.functional.pad((batch.cu_seqlens.diff() + virtual_of_row).cumsum(0), (1, 0)).to(torch.int32)
    row_starts = cu_seqlens[:-1].long()  # [rows]
    numbers = torch.arange(order.numel(), device=device)  # [N]
    place = torch.empty_like(order).scatter_(0, order, numbers)  # [N], of each entry
    row_of_position = torch.searchsorted(cu_seqlens[1:].long(), numbers, right=True)  # [N]
    leading = virtual_of_row  # [rows], virtual tokens before the text
    if batch.virtual_at is not None:
        leading = (batch.virtual_at == 0).sum(dim=1) * (virtual_of_row > 0)
    return Layout(
        embeds=source[entries[order]],
        positions=numbers - row_starts[row_of_position],
        text=place[copies:],
        row_of_token=row_of_token,
        before_text=torch.where(leading > 0, row_starts + leading - 1, nothing),
        prompt_of_row=prompt_of_row,
        cu_seqlens=cu_seqlens,
        max_seqlen=max(own + length for own, length in zip(virtual, lengths, strict=True)),
        prefix_rows=None,
    )


def _run(
    spec: BackboneSpec,
    layout: Layout,
    prompts: list[FixedPrompt],
    ids: list[int],
    *,
    hidden_rows: Tensor | None = None,
    token_type_ids: Tensor | None = None,
) -> Tensor:
    """Last hidden states [N, d] of the whole layout; those outside `hidden_rows` are meaningless."""
    types, kind = None, cast(Any, type(spec.base_model))
    if token_type_ids is not None and _has_segments(kind):
        types = torch.zeros(layout.embeds.shape[0], dtype=torch.int64, device=layout.embeds.device)
        types[layout.text] = token_type_ids.to(types.device)
    if spec.path == "in_row":
        embeds = layout.embeds.to(device=spec.word_embeddings.weight.device, dtype=spec.word_embeddings.weight.dtype)
        return run_in_row(spec, embeds, layout.cu_seqlens, types)
    keys = values = lengths = prompt_ids = None
    if prompts and isinstance(prompts[0], KeyValuePrefix):
        device = layout.embeds.device
        given = [prompt for prompt in prompts if isinstance(prompt, KeyValuePrefix)]
        keys, values, lengths = stack_prefixes(given, device)
        prompt_ids = layout.prompt_of_row.to(torch.int32)
    gated: tuple[GatedPart, ...] = ()
    if prompts and isinstance(prompts[0], GatedTokens):
        gated = gated_parts(spec, prompts, layout.prompt_of_row[layout.row_of_token])
    context = PrefixContext(
        keys=keys,
        values=values,
        prompt_ids=prompt_ids,
        prefix_lengths=lengths,
        prefix_rows=layout.prefix_rows,
        cu_seqlens=layout.cu_seqlens,
        max_seqlen=layout.max_seqlen,
        hidden_rows=hidden_rows,
        gated=gated,
    )
    extra = {} if types is None else {"token_type_ids": types[None]}
    return packed_call(spec, layout.embeds, layout.positions, context, **extra)


@cache
def _has_segments(kind: type) -> bool:
    """Whether a stock model of this class reads segment ids: some take them among keywords that they leave unread."""
    return "token_type_ids" in inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]


def packed_call(spec: BackboneSpec, embeds: Tensor, positions: Tensor, context: PrefixContext, **extra: Any) -> Tensor:
    """The stock model without its head over one packed row; [N, d] -> [N, d]."""
    embeds = embeds.to(device=spec.word_embeddings.weight.device, dtype=spec.word_embeddings.weight.dtype)
    call = partial(_call_base, spec)
    graphs = active_graphs(spec)
    return (call if graphs is None else partial(graphs.run, call))(embeds, positions, context, extra)


def _call_base(
    spec: BackboneSpec, embeds: Tensor, positions: Tensor, context: PrefixContext, extra: dict[str, Any]
) -> Tensor:
    out = spec.base_model(
        inputs_embeds=embeds[None],
        position_ids=positions[None] + spec.first_position if spec.first_position else positions[None],
        attention_mask=no_mask(embeds.device),
        **cache_off(spec),
        **{KEYWORD: context},
        **extra,
    )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden

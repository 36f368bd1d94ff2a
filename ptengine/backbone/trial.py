"""What the stock model makes of a few tokens behind a prompt: one side of the comparisons that serve a family.

Also says what only running can tell: whether tokens see each other both ways, and where positions begin. Knows nothing
of how ptengine runs the same rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ptengine.backbone import families
from ptengine.backbone.heads import before_head, tapping, ways_to_head
from ptengine.backbone.in_row import stock_hidden
from ptengine.backbone.spec import BackboneSpec
from ptengine.errors import UnsupportedModelError

__all__ = [
    "LENGTHS",
    "VIRTUAL",
    "StockRows",
    "distance_of",
    "first_line",
    "random_ids",
    "refuse",
    "stock_rows",
    "tolerance",
]

VIRTUAL, LENGTHS = 4, (6, 3)


@dataclass(frozen=True)
class StockRows:
    """The texts, the prompt, and what the stock model makes of each row behind it.

    Attributes:
        ids: of the texts.
        embeds: [P, d].
        hidden: per row [P + T, d], last hidden states.
        logits: per row [P + T, V] of a causal model with an LM head, else None.
        kind: whether tokens see each other both ways.
        first_position: the position id of a row's first token; None where the model is given none, or none in use.
        before_head, logit_scale: as in `BackboneSpec`, measured where there are logits.
    """

    ids: list[list[int]]
    embeds: Tensor
    hidden: list[Tensor]
    logits: list[Tensor] | None
    kind: Literal["causal", "encoder"]
    first_position: int | None
    before_head: nn.Module | None = None
    logit_scale: float | None = None


def random_ids(spec: BackboneSpec, generator: torch.Generator) -> list[list[int]]:
    """Rows of tokens without padding, which some families count their positions by."""
    padding = getattr(getattr(spec.base_model, "config", None), "pad_token_id", None)
    paddings = (padding, spec.word_embeddings.padding_idx)
    ids = [token for token in range(spec.vocab_size) if token not in paddings]
    picks = [torch.randint(len(ids), (length,), generator=generator).tolist() for length in LENGTHS]
    return [[ids[pick] for pick in row] for row in picks]


def refuse(spec: BackboneSpec, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"model type {spec.model_type!r} is not supported: {reason}")


def first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def tolerance(spec: BackboneSpec, dtype: torch.dtype) -> float:
    """Relative distance of two orders of the same sums.

    Each layer rounds its results, which differ by a few ulps, and errors of layers add up like a random walk; the
    constant is for single precision, where the sums inside products, not the results, have the larger error. Leaving
    out a rule of attention costs 0.05 and more.
    """
    return math.sqrt(spec.num_layers) * (4 * torch.finfo(dtype).eps + 1e-4)


def distance_of(got: Tensor, expected: Tensor) -> float:
    """Of two tensors, relative to the second; infinite where they are not of one shape or not of numbers."""
    if got.shape != expected.shape:
        return math.inf
    got, expected = got.double(), expected.double()
    distance = ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    return math.inf if math.isnan(distance) else distance


@torch.no_grad()
def stock_rows(model: Any, spec: BackboneSpec) -> StockRows:
    """Run the stock model, in eval mode and with its windows narrowed, on each text behind the prompt.

    Raises:
        UnsupportedModelError: it fails on input embeddings, or its logits are not those of its LM head.
    """
    weight = spec.word_embeddings.weight
    generator = torch.Generator().manual_seed(0)
    ids = random_ids(spec, generator)
    noise = torch.randn(VIRTUAL, spec.hidden_size, generator=generator).to(weight)  # [P, d]
    try:
        words = [spec.word_embeddings(torch.tensor(row, device=weight.device)) for row in ids]  # [T, d] each
        embeds = noise * torch.cat(words).float().std().to(weight)
        rows = [torch.cat([embeds, text])[None] for text in words]  # [1, P + T, d] each
        hidden = [stock_hidden(spec.base_model, row)[0] for row in rows]
        by_ids = stock_hidden(spec.base_model, input_ids=torch.tensor(ids[:1], device=weight.device))
        by_embeds = stock_hidden(spec.base_model, words[0][None])
        kind = _kind(spec, rows[0], hidden[0])
        logits = None
        if spec.lm_head is not None and kind == "causal":
            logits = [model(inputs_embeds=row.clone(), use_cache=False).logits[0] for row in rows]
            # Of the whole model: a part of it may add to embeddings what token ids alone tell.
            by_ids = model(input_ids=torch.tensor(ids[:1], device=weight.device), use_cache=False).logits
            by_embeds = model(inputs_embeds=words[0][None].clone(), use_cache=False).logits
        elif families.is_multimodal(model.config):
            model(input_ids=torch.tensor(ids[:1], device=weight.device))  # which some cannot without an image
    except Exception as error:
        raise refuse(spec, f"it does not run on input embeddings alone ({first_line(error)})") from error
    if not distance_of(by_embeds, by_ids) <= tolerance(spec, weight.dtype):
        raise refuse(spec, "it does not compute from word embeddings what it computes from their tokens")
    _require_gradient(spec, rows[-1])
    found = StockRows(ids, embeds, hidden, logits, kind, _first_position(spec, rows[0], hidden[0]))
    if logits is None:
        return found
    read = _read_head(model, spec, torch.cat(hidden), torch.cat(logits))
    return replace(found, before_head=read.before_head, logit_scale=read.logit_scale)


def _require_gradient(spec: BackboneSpec, row: Tensor) -> None:
    """Some families compute what they cannot be asked the gradient of, or that of training mode alone."""
    with torch.inference_mode(False), torch.enable_grad():
        read = row.clone().requires_grad_()  # [1, P + T, d]
        try:
            torch.autograd.grad(stock_hidden(spec.base_model, read).float().sum(), [read])
        except Exception as error:
            raise refuse(spec, f"no gradient reaches its input embeddings ({first_line(error)})") from error


def _kind(spec: BackboneSpec, row: Tensor, hidden: Tensor) -> Literal["causal", "encoder"]:
    """Whether another last token leaves what stands before it as it was. Sums in another order move it by less."""
    other = row.clone()
    other[:, -1] = 20 * row[:, 0]
    changed = stock_hidden(spec.base_model, other)[0]
    eps = torch.finfo(hidden.dtype).eps
    half = hidden.dtype in (torch.float16, torch.bfloat16)
    if distance_of(changed[:-1], hidden[:-1]) > (eps if half else 16 * eps):
        return "encoder"
    return "encoder" if half and _reaches_back(spec, row) else "causal"


def _reaches_back(spec: BackboneSpec, row: Tensor) -> bool:
    """Whether the last token has any part in what stands before it: of a small encoder's less than half precision
    rounds away, while what causal attention hides has a weight, and so a gradient, of exactly 0."""
    with torch.inference_mode(False), torch.enable_grad():
        read = row.clone().requires_grad_()  # [1, P + T, d]
        try:
            hidden = stock_hidden(spec.base_model, read)[0]
            (gradient,) = torch.autograd.grad(hidden[:-1].float().square().sum(), [read])
        except Exception:
            return False  # `_require_gradient` says so
    return bool(gradient[0, -1].any())


def _first_position(spec: BackboneSpec, row: Tensor, hidden: Tensor) -> int | None:
    """RoBERTa and its like count from behind the padding token's id; relative positions begin anywhere."""
    base = spec.base_model
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        return None
    padding = getattr(getattr(base, "config", None), "pad_token_id", None)
    behind = [padding + 1] if isinstance(padding, int) and padding >= 0 else []
    positions = torch.arange(row.shape[1], device=row.device)[None]  # [1, P + T]
    for first in dict.fromkeys([0, *behind, 1, 2]):
        try:
            got = stock_hidden(base, row, position_ids=positions + first)[0]
        except (IndexError, RuntimeError, TypeError, ValueError):
            continue
        if distance_of(got, hidden) <= tolerance(spec, hidden.dtype):
            return first
    return None


def _read_head(model: Any, spec: BackboneSpec, hidden: Tensor, logits: Tensor) -> BackboneSpec:
    """How logits [n, V] come of last hidden states [n, d]: `spec` with what stands before its LM head and its scale.

    Raises:
        UnsupportedModelError: in no way that is known.
    """
    distances = []
    bound = tolerance(spec, logits.dtype)
    with tapping(spec.lm_head):
        for way in _ways(model, spec, hidden):
            distances.append(_distance_of_head(way, hidden, logits))
            if distances[-1] <= bound:
                return way
    raise refuse(
        spec,
        f"its logits are not those of its LM head over the last hidden states, which differ by {distances[0]:.1e}: "
        "what stands between them, or a scale, is not known to ptengine",
    )


def _ways(model: Any, spec: BackboneSpec, hidden: Tensor) -> Iterator[BackboneSpec]:
    assert spec.lm_head is not None
    yield spec
    yield replace(spec, logit_scale=1.0)  # of models around one whose own head is scaled
    for module in ways_to_head(model, spec.base_model, spec.lm_head, hidden):
        yield replace(spec, before_head=module)


def _distance_of_head(spec: BackboneSpec, hidden: Tensor, logits: Tensor) -> float:
    from ptengine.backbone.vocabulary import vocabulary_logits

    try:
        return distance_of(vocabulary_logits(spec, before_head(spec.before_head, hidden)), logits)
    except RuntimeError:  # of widths that do not fit
        return math.inf

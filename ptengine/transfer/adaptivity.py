"""How a prompt suits a target, without its labels: in content, what texts are about, and in form, how it is written.

Numbers that describe and decide nothing. Knows a prompt, texts and the frozen model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ptengine.backbone import backbone_spec, masked_lm_loss, pack_rows, packed_loss
from ptengine.backbone.lowering import LoweredPrompt, VirtualTokens
from ptengine.backbone.modes import lowered_as_used
from ptengine.backbone.packing import IGNORE_INDEX
from ptengine.backbone.spec import BackboneSpec
from ptengine.data import Template
from ptengine.data.encoding import special_tokens, token_lists
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import embedding_scale
from ptengine.training.freezing import frozen
from ptengine.training.objective_base import perplexity
from ptengine.training.preparation import check_prompt
from ptengine.transfer.words import domain_terms, in_text

__all__ = ["Adaptivity", "prompt_adaptivity"]

TERMS = 20
"""Domain terms that are looked for."""

NEAREST = 20
"""Tokens of the vocabulary around every virtual token in which they are looked for."""

PASSES = 7
"""In which a masked language model reads a text, every seventh token hidden from it: about the share it was trained
with."""

BATCH = 32
MAX_TOKENS = 128


@dataclass(frozen=True)
class Adaptivity:
    """Attributes:
    text_loss: content: what a token of the target's texts costs behind the prompt, in nats; lower fits better. Of a
        masked language model: what it costs where it and every seventh token around it are masked, each token once (a
        pseudo-log-likelihood, Salazar et al. 2020, arXiv 1910.14659, in seven passes rather than one a token). None for
        an encoder-decoder, which reads a text and gives it no likelihood.
    term_coverage: content: the share of the target's domain terms (`domain_terms` against the background) whose first
        token is among the twenty nearest to a virtual token; None for a prefix, without background or without terms.
    num_virtual_tokens: form: P.
    template_perplexity: form: of the template's own words behind the prompt; None where it has fewer than two tokens,
        and for an encoder-decoder.
    token_distance: form: the mean over virtual tokens of 1 - cosine to the nearest word embedding: 0 is readable as
        text; None for a prefix.
    norm_ratio: form: mean length of a virtual token over that of a word embedding; None for a prefix.
    """

    text_loss: float | None
    term_coverage: float | None
    num_virtual_tokens: int
    template_perplexity: float | None
    token_distance: float | None
    norm_ratio: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def prompt_adaptivity(
    model: Any,
    tokenizer: Any,
    template: Template,
    texts: Sequence[str],
    prompts: Mapping[str, Prompt | None],
    *,
    background: Sequence[str] = (),
) -> dict[str, Adaptivity]:
    """The scores of each of `prompts` by name; None is the frozen model alone.

    Args:
        model, tokenizer: the frozen backbone: causal, a masked language model or an encoder-decoder.
        template: of the target's task.
        texts: of the target, without template; cut to 128 tokens or what fits.
        prompts: name to prompt.
        background: texts of other domains, that domain terms stand out from.

    Raises:
        InputError: no texts, no text of two tokens, a prompt of another backbone, a model without a language-modelling
            head, or a masked language model whose tokenizer has no mask.
    """
    spec = backbone_spec(model)
    if spec.lm_head is None:
        raise InputError(
            f"expected a model with a language-modelling head to score a prompt's fit, got {type(model).__name__}"
        )
    if spec.kind == "encoder" and tokenizer.mask_token_id is None:
        raise InputError(f"expected a tokenizer with a mask token, got {type(tokenizer).__name__} without one")
    for prompt in prompts.values():
        check_prompt(prompt, model)
    most = max((prompt.num_virtual_tokens for prompt in prompts.values() if prompt is not None), default=0)
    lead, tail = special_tokens(tokenizer)
    frame = _Frame(lead, tail, tokenizer.mask_token_id) if spec.kind == "encoder" else _Frame(lead, [], None)
    room = min(MAX_TOKENS, spec.max_positions - most) - len(frame.tail)
    rows = [row for row in ((lead + ids)[:room] for ids in token_lists(tokenizer, texts)) if len(row) > 1]
    if not rows:
        raise InputError(f"expected texts of at least two tokens to score a prompt's fit, got {len(texts)} without one")
    words = "".join(part.text for part in template.parts if part.kind == "text")
    [own] = token_lists(tokenizer, [words])
    fixed = (own if own[: len(lead)] == lead else lead + own)[:room]  # as `encode_texts`: one BOS
    terms = _terms(tokenizer, texts, background)
    scores = {}
    with frozen(model), torch.no_grad():
        for name, prompt in prompts.items():
            lowered = None if prompt is None else lowered_as_used(prompt.fold())
            of_template = of_texts = None
            if spec.kind != "seq2seq":
                of_texts = _loss(model, spec, lowered, rows, frame)
                if len(fixed) > 1:
                    of_template = perplexity(_loss(model, spec, lowered, [fixed], frame))
            near = _near(spec, lowered) if isinstance(lowered, VirtualTokens) else None
            scores[name] = Adaptivity(
                text_loss=of_texts,
                term_coverage=None
                if near is None or not terms
                else sum(token in near.tokens for token in terms) / len(terms),
                num_virtual_tokens=0 if lowered is None else lowered.num_virtual_tokens,
                template_perplexity=of_template,
                token_distance=None if near is None else near.distance,
                norm_ratio=None if near is None else near.norm_ratio,
            )
    return scores


@dataclass(frozen=True)
class _Frame:
    """What stands around a text, and the mask of a masked language model, or None."""

    lead: list[int]
    tail: list[int]
    mask: int | None

    def readings(self, row: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Input ids of `row` (lead and text) and the labels of one or of every pass."""
        if self.mask is None:
            yield row, [IGNORE_INDEX, *row[1:]]  # not every prompt predicts the first token
            return
        whole, text = [*row, *self.tail], range(len(self.lead), len(row))
        for number in range(min(PASSES, len(text))):
            hidden = set(text[number::PASSES])
            yield (
                [self.mask if at in hidden else token for at, token in enumerate(whole)],
                [token if at in hidden else IGNORE_INDEX for at, token in enumerate(whole)],
            )


def _loss(
    model: Any, spec: BackboneSpec, lowered: LoweredPrompt | None, rows: Sequence[list[int]], frame: _Frame
) -> float:
    """Mean over the rows' tokens."""
    loss_of = packed_loss if frame.mask is None else masked_lm_loss
    readings = [reading for row in rows for reading in frame.readings(row)]
    total, count = 0.0, 0
    for start in range(0, len(readings), BATCH):
        ids, labels = zip(*readings[start : start + BATCH], strict=True)
        found = loss_of(model, lowered, pack_rows(ids, labels=labels).to(spec.word_embeddings.weight.device))
        total += found.loss.item() * found.num_labels
        count += found.num_labels
    return total / count


@dataclass(frozen=True)
class _Near:
    tokens: frozenset[int]
    distance: float
    norm_ratio: float


def _near(spec: BackboneSpec, virtual: VirtualTokens) -> _Near:
    table: Tensor = embedding_scale(spec) * spec.word_embeddings.weight.detach().float()  # [V, d]
    embeds = virtual.embeds.to(table.device).float()  # [P, d]
    cosines = F.normalize(embeds, dim=1) @ F.normalize(table, dim=1).T  # [P, V]
    nearest = cosines.topk(min(NEAREST, cosines.shape[1]), dim=1)
    return _Near(
        tokens=frozenset(nearest.indices.flatten().tolist()),
        distance=float(1 - nearest.values[:, 0].mean()),
        norm_ratio=float(embeds.norm(dim=1).mean() / table.norm(dim=1).mean()),
    )


def _terms(tokenizer: Any, texts: Sequence[str], background: Sequence[str]) -> list[int]:
    """First tokens of the target's domain terms, as they stand inside a text."""
    if not background:
        return []
    try:
        found = domain_terms(texts, background, top_k=TERMS)
    except InputError:  # no word stands in the texts twice: there is nothing to cover
        return []
    ids = token_lists(tokenizer, [in_text(term.text) for term in found])
    return [row[0] for row in ids if row]

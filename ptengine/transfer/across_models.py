"""Across models: a soft prompt tuned on one frozen backbone, carried to another by the tokens both know.

The word embeddings of shared tokens are the same words told in two spaces; what leads from one to the other leads the
prompt, which lives among them. Needs no data and runs neither model. A prefix cannot be carried this way: its keys and
values live in attention, which vocabularies do not tie. Knows prompts, tokenizers and embedding tables; no bank, no
task, no training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ptengine.backbone.spec import BackboneSpec, backbone_spec
from ptengine.checks import check_whole
from ptengine.errors import InputError
from ptengine.prompts import Prompt, SoftPrompt, backbone_facts
from ptengine.prompts.facts import embedding_scale
from ptengine.prompts.initialization import check_count, generator_from

__all__ = ["CARRY_METHODS", "carry_prompt", "shared_tokens", "vocabulary_map"]

CARRY_METHODS = ("v2v_lin", "relative_anchors")

_NUM_TOKENS = 4000
_SKIP_FREQUENT = 1000
_SEARCH_STEPS = 2000
_SEARCH_RATE = 0.2  # of Adam, in standard deviations of the prompt's elements


@dataclass(frozen=True)
class _Vocabulary:
    """A tokenizer's ordinary tokens, text to id, and the table they index."""

    ids: dict[str, int]
    spec: BackboneSpec
    scale: float

    def rows(self, ids: list[int]) -> Tensor:
        """What these tokens enter the model as: fp64 [n, d] on the CPU."""
        table = self.spec.word_embeddings.weight.detach()
        return self.scale * table[torch.tensor(ids, device=table.device)].to("cpu", torch.float64)


def carry_prompt(
    prompt: Prompt,
    source_model: Any,
    source_tokenizer: Any,
    target_model: Any,
    target_tokenizer: Any,
    method: str = "v2v_lin",
    *,
    num_tokens: int | None = None,
    skip_frequent: int = _SKIP_FREQUENT,
    min_shared_tokens: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
) -> SoftPrompt:
    """A soft prompt for the target model that says there what `prompt` says to the source model.

    Let S [n, d_s] and T [n, d_t] be the embeddings of n shared tokens in the two models, as they enter the model, and
    P [P, d_s] the prompt.

    ``"v2v_lin"`` (Lester, Yurtsever, Shakeri and Constant 2022, arXiv 2208.05577, vocabulary to vocabulary, linear):
    W = argmin ||S W - T||_F, of least norm where several do, and the carried prompt is P W. Between equal embeddings of
    full rank it is the identity.

    ``"relative_anchors"`` (Wu, Wu and Mou 2024, arXiv 2310.01691, section 2): a vector is told by its cosines to n
    anchors, r_S(p) = normalized(S) p / ||p||. The target's rows are searched by Adam from seeded noise so that the
    cosine of r_T(p_t) and r_S(p) is greatest; within the search the prompt, over all its elements, has the mean and
    the standard deviation of the target's word embeddings. Cosines do not tell lengths: how long the source's rows are
    against each other is lost. Unlike there, the last step counts, since no labels are at hand to choose one by.

    What comes out is a start: `transfer` with a guard, or an evaluation, says whether it helps.

    Args:
        prompt: of the source model; is or folds to a `SoftPrompt`. Not changed.
        source_model, source_tokenizer: what it was tuned with.
        target_model, target_tokenizer: what it is wanted for.
        method: one of `CARRY_METHODS`.
        num_tokens: at most as many shared tokens are used. None means 4000, as Lester et al., or twice the width of the
            wider model where that is more.
        skip_frequent: leave out as many of the shared tokens with the lowest ids, the most frequent of BPE and
            SentencePiece, as far as `num_tokens` remain without them.
        min_shared_tokens: fewer are refused. None means d_s for ``"v2v_lin"`` and d_t for ``"relative_anchors"``: with
            fewer, directions of the prompt are lost or left to the noise.
        steps: of the search, None means 2000, which leaves little of the noise; with ``"relative_anchors"`` only.
        seed: of the search, None means 0; the same seed gives the same prompt. With ``"relative_anchors"`` only.

    Returns:
        A `SoftPrompt` of the target model, fp32 [P, d_t], that trains at the learning rate of a transferred one.

    Raises:
        InputError: a prompt of another method or backbone, of numbers that are not finite, or too long for the target;
            an unknown method; an argument that is not as described or that the method does not use; a tokenizer that
            is not its model's; too few shared tokens.
        UnsupportedModelError: a model is of no supported type.
    """
    if method not in CARRY_METHODS:
        raise InputError(f"expected method, one of {', '.join(CARRY_METHODS)}, got {method!r}")
    for name, value in {"steps": steps, "seed": seed}.items():
        if value is not None and method != "relative_anchors":
            raise InputError(f"method={method!r} does not use {name}, but it was given")
    check_whole("skip_frequent", skip_frequent, 0)
    for name, value in {"num_tokens": num_tokens, "min_shared_tokens": min_shared_tokens, "steps": steps}.items():
        if value is not None:
            check_whole(name, value, 1)
    generator = generator_from(0 if seed is None else seed)
    carried = _checked_rows(prompt, source_model)  # [P, d_s]
    source = _vocabulary(source_model, source_tokenizer, "source_tokenizer")
    target = _vocabulary(target_model, target_tokenizer, "target_tokenizer")
    check_count(len(carried), target.spec)
    width = (source if method == "v2v_lin" else target).spec.hidden_size
    least = width if min_shared_tokens is None else min_shared_tokens
    ours, theirs = _shared_rows(source, target, num_tokens, skip_frequent, least)  # [n, d_s], [n, d_t]
    if method == "v2v_lin":
        rows = carried @ _mapping(ours, theirs)  # [P, d_t]
    else:
        table = target.spec.word_embeddings.weight.detach()
        mean, std = target.scale * float(table.double().mean()), backbone_facts(target_model).embedding_std
        rows = _searched(carried, ours, theirs, mean, std, _SEARCH_STEPS if steps is None else steps, generator)
    return SoftPrompt(target_model, init="array", array=rows)


def vocabulary_map(
    source_model: Any,
    source_tokenizer: Any,
    target_model: Any,
    target_tokenizer: Any,
    *,
    num_tokens: int | None = None,
    skip_frequent: int = _SKIP_FREQUENT,
    min_shared_tokens: int | None = None,
) -> Tensor:
    """W of ``"v2v_lin"`` in `carry_prompt`, fp64 [d_s, d_t] on the CPU: a start for a `ProjectedPrompt`.

    Arguments and errors as in `carry_prompt`.
    """
    check_whole("skip_frequent", skip_frequent, 0)
    for name, value in {"num_tokens": num_tokens, "min_shared_tokens": min_shared_tokens}.items():
        if value is not None:
            check_whole(name, value, 1)
    source = _vocabulary(source_model, source_tokenizer, "source_tokenizer")
    target = _vocabulary(target_model, target_tokenizer, "target_tokenizer")
    least = source.spec.hidden_size if min_shared_tokens is None else min_shared_tokens
    return _mapping(*_shared_rows(source, target, num_tokens, skip_frequent, least))


def shared_tokens(source_tokenizer: Any, target_tokenizer: Any) -> list[tuple[int, int]]:
    """Ids (source, target) of the ordinary tokens both vocabularies have, by ascending source id.

    Tokens are compared as the vocabularies write them, but for the mark of a blank before a word, ``Ġ`` or ``▁``, which
    counts as one; special tokens are left out. WordPiece marks continuations instead, and byte-level BPE writes bytes:
    between such kinds fewer tokens are shared.

    Raises:
        InputError: a tokenizer is none.
    """
    return _shared(
        _ordinary_tokens(source_tokenizer, "source_tokenizer"), _ordinary_tokens(target_tokenizer, "target_tokenizer")
    )


def _mapping(source: Tensor, target: Tensor) -> Tensor:
    """argmin ||source W - target||_F of least norm: [n, d_s], [n, d_t] -> [d_s, d_t]."""
    return torch.linalg.lstsq(source, target, driver="gelsd").solution


def _searched(
    prompt: Tensor, source: Tensor, target: Tensor, mean: float, std: float, steps: int, generator: torch.Generator
) -> Tensor:
    """Rows fp64 [P, d_t] whose cosines to `target` are those of `prompt` to `source`.

    With unit anchors A, c = A v and the wanted cosines r, cos(c, r) = v.(A^T r) / (||r|| sqrt(v.(A^T A) v)): the sums
    over anchors are taken once, and a step costs nothing per anchor.
    """
    if not bool(prompt.norm(dim=1).gt(0).all()):
        raise InputError("expected a prompt without rows of zeros, which have no direction to search for")
    wanted = F.normalize(F.normalize(prompt, dim=1) @ F.normalize(source, dim=1).T, dim=1)  # [P, n]
    anchors = F.normalize(target, dim=1)  # [n, d_t]
    pull, gram = wanted @ anchors, anchors.T @ anchors  # [P, d_t], [d_t, d_t]
    noise = torch.randn(len(prompt), target.shape[1], generator=generator, dtype=torch.float64)  # [P, d_t]

    def matched(free: Tensor) -> Tensor:
        spread, centre = torch.std_mean(free, correction=0)
        return mean + std * (free - centre) / spread

    with torch.enable_grad():
        free = noise.requires_grad_()
        optimizer = torch.optim.Adam([free], lr=_SEARCH_RATE)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = matched(free)
            cosines = (rows * pull).sum(dim=1) / ((rows @ gram) * rows).sum(dim=1).clamp(min=1e-60).sqrt()  # [P]
            optimizer.zero_grad()
            (-cosines.sum()).backward()
            optimizer.step()
            falling.step()
    return matched(free.detach())


def _checked_rows(prompt: Prompt, model: Any) -> Tensor:
    """The prompt's rows, fp64 [P, d_s] on the CPU."""
    if not isinstance(prompt, Prompt):
        raise InputError(f"expected prompt, a ptengine prompt, got {type(prompt).__name__}")
    folded = prompt.fold()
    if not isinstance(folded, SoftPrompt):
        raise InputError(
            f"expected a prompt that is or folds to a SoftPrompt, rows among the word embeddings, which vocabularies "
            f"carry across models; got {prompt.method!r}, which folds to {folded.method!r}"
        )
    folded.facts.require_same(backbone_facts(model), "the prompt to carry")
    rows = folded.embeds.detach().to("cpu", torch.float64)  # [P, d_s]
    if not bool(torch.isfinite(rows).all()):
        raise InputError("expected a prompt of finite numbers to carry, got NaN or infinity")
    return rows


def _vocabulary(model: Any, tokenizer: Any, name: str) -> _Vocabulary:
    spec, ids = backbone_spec(model), _ordinary_tokens(tokenizer, name)
    if ids and max(ids.values()) >= spec.vocab_size:
        raise InputError(
            f"expected {name}, its model's own with ids below {spec.vocab_size}, got one with id {max(ids.values())}"
        )
    return _Vocabulary(ids, spec, embedding_scale(spec))


def _ordinary_tokens(tokenizer: Any, name: str) -> dict[str, int]:
    if not hasattr(tokenizer, "get_vocab"):
        raise InputError(f"expected {name}, a transformers tokenizer, got {type(tokenizer).__name__}")
    special = set(tokenizer.all_special_ids)
    return {token.replace("▁", "Ġ"): i for token, i in tokenizer.get_vocab().items() if i not in special}


def _shared(source: dict[str, int], target: dict[str, int]) -> list[tuple[int, int]]:
    return sorted((i, target[token]) for token, i in source.items() if token in target)


def _shared_rows(
    source: _Vocabulary, target: _Vocabulary, num_tokens: int | None, skip_frequent: int, least: int
) -> tuple[Tensor, Tensor]:
    """The embeddings of the shared tokens that are used, in both models: fp64 [n, d_s] and [n, d_t]."""
    most = num_tokens
    if most is None:
        most = max(_NUM_TOKENS, 2 * max(source.spec.hidden_size, target.spec.hidden_size))
    pairs = _used(_shared(source.ids, target.ids), most, skip_frequent, least)
    return source.rows([s for s, _ in pairs]), target.rows([t for _, t in pairs])


def _used(shared: list[tuple[int, int]], most: int, skip: int, least: int) -> list[tuple[int, int]]:
    """At most `most` of the shared tokens, without the first `skip` as far as so many remain."""
    skipped = min(skip, max(0, len(shared) - most))
    used = shared[skipped : skipped + most]
    if len(used) < least:
        raise InputError(
            f"expected at least {least} shared tokens to carry a prompt by (min_shared_tokens), got {len(used)}: the "
            f"two vocabularies have {len(shared)} ordinary tokens in common, of which at most {most} are used"
        )
    return used

"""CPT, context-aware prompt tuning (Blau et al. 2024, arXiv 2410.17222): examples in context, nudged within a ball."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptengine.backbone.spec import BackboneSpec, backbone_spec
from ptengine.checks import check_number
from ptengine.errors import InputError
from ptengine.prompts.facts import BackboneFacts, backbone_facts, embedding_scale
from ptengine.prompts.initialization import RATE, check_count
from ptengine.prompts.registry import register
from ptengine.prompts.reparametrized import Reparametrized

__all__ = ["ContextPrompt"]

KINDS = ("input", "format", "label")
_REFERENCE_WIDTH = 2048  # the width at which the epsilons are meant


@register("context_prompt")
class ContextPrompt(Reparametrized):
    """E = C + D: the word embeddings C of examples in context, and a trained D whose every row stays in a ball.

    ||D_i|| <= epsilon_i, where epsilon_i is `input_epsilon` or `format_epsilon` times sqrt(d / 2048), by what token i
    belongs to, and 0 for tokens of labels, which stay as they are. Projected gradient descent: D starts at zero, and in
    training mode `lower` first scales rows that the last step took out of their ball back onto it. (The paper also adds
    the loss of the labels in the context; a trainer of this package takes its loss from the rows alone.) `fold` (and so
    `save`) keeps E alone.

    Args:
        model: the frozen transformers model; read once, not kept.
        context: the examples as pieces ``(kind, text)`` in order, kind ``"input"``, ``"format"`` (the template around
            an example) or ``"label"``. Pieces are tokenised one by one, without special tokens: write those you want.
        tokenizer: the model's tokenizer.
        input_epsilon, format_epsilon: radii at a width of 2048; 0.1 as in the authors' code. They are lengths, not
            fractions: compare them with the norm of the model's embeddings.

    Attributes:
        delta: D, fp32 [P, d].
        context: C, fp32 [P, d], not trained.
        limits: epsilon_i, fp32 [P], not trained.

    Raises:
        InputError: an argument has the wrong type or range; the context is empty, longer than the model's positions, or
            of labels alone.
        UnsupportedModelError: the model is of no supported type.
    """

    delta: nn.Parameter
    context: Tensor
    limits: Tensor

    def __init__(
        self,
        model: Any,
        context: Iterable[tuple[str, str]],
        *,
        tokenizer: Any,
        input_epsilon: float = 0.1,
        format_epsilon: float = 0.1,
    ) -> None:
        spec = backbone_spec(model)
        radius = math.sqrt(spec.hidden_size / _REFERENCE_WIDTH)
        limit_of = {
            "input": check_number("input_epsilon", input_epsilon) * radius,
            "format": check_number("format_epsilon", format_epsilon) * radius,
            "label": 0.0,
        }
        ids, limits = _pieces(context, tokenizer, limit_of, spec)
        facts = backbone_facts(model)
        super().__init__(facts, check_count(len(ids), spec), {})
        table = spec.word_embeddings.weight.detach()  # [V, d]
        with torch.no_grad():
            self.context.copy_(table[torch.tensor(ids, device=table.device)] * embedding_scale(spec))
            self.limits.copy_(torch.tensor(limits))
        # Ten steps from the middle of the smaller ball to its edge, and never faster than a SoftPrompt.
        smallest = min(limit for limit in limits if limit > 0)
        self._finish(spec, rate=min(RATE * facts.embedding_std, 0.1 * smallest / math.sqrt(facts.hidden_size)))

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        pass  # there are none

    def _build(self) -> None:
        count, width = self.num_virtual_tokens, self.facts.hidden_size
        self.delta = nn.Parameter(torch.empty(count, width))  # [P, d]
        self.register_buffer("context", torch.empty(count, width))  # [P, d]
        self.register_buffer("limits", torch.empty(count))  # [P]

    def default_learning_rate(self) -> float:
        """A tenth of the smaller ball per step, but at most 0.3 of the embeddings' standard deviation."""
        return super().default_learning_rate()

    def compute(self) -> Tensor:
        free = (self.limits > 0)[:, None].to(self.delta)  # [P, 1]
        inside = self._projected()  # [P, d]
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.delta.copy_(inside)
            return self.context + self.delta * free
        if not torch.is_grad_enabled():
            return self.context + inside * free
        # Elsewhere nothing changes the parameter; the gradient is that of the projected point.
        return self.context + (self.delta + (inside - self.delta.detach())) * free

    @torch.no_grad()
    def _projected(self) -> Tensor:
        norms = self.delta.norm(dim=1, keepdim=True)  # [P, 1]
        limits = self.limits[:, None]  # [P, 1]
        return torch.where(norms > limits, self.delta * (limits / norms.clamp(min=1e-30)), self.delta)


def _pieces(
    context: Any, tokenizer: Any, limit_of: Mapping[str, float], spec: BackboneSpec
) -> tuple[list[int], list[float]]:
    """Token ids of the context and the radius of each."""
    if isinstance(context, str) or not isinstance(context, Iterable):
        raise InputError(f"expected context, pieces (kind, text), got {context!r}")
    if not callable(tokenizer):
        raise InputError(f"expected tokenizer, a transformers tokenizer, got {type(tokenizer).__name__}")
    ids: list[int] = []
    limits: list[float] = []
    for index, piece in enumerate(context):
        if not isinstance(piece, list | tuple) or len(piece) != 2 or not all(isinstance(part, str) for part in piece):
            raise InputError(f"expected context of pieces (kind, text), two strings, got {piece!r} at index {index}")
        kind, text = piece
        if kind not in KINDS:
            raise InputError(f"expected context of kinds {', '.join(KINDS)}, got {kind!r} at index {index}")
        tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokens and max(tokens) >= spec.vocab_size:
            raise InputError(
                f"expected the model's own tokenizer, with ids below {spec.vocab_size}, got one that maps {text!r} to "
                f"{max(tokens)}"
            )
        ids += tokens
        limits += [limit_of[kind]] * len(tokens)
    if not any(limits):
        raise InputError("expected context with at least one token of an input or of the format, got none")
    return ids, limits

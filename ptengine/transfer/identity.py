"""Which backbone and which tokenizer a banked prompt belongs to, as values that fit on its card.

A prompt is numbers in one model's space: behind another model of the same shape, or another tokenizer, it runs and
answers nonsense, so both are identified by content. Knows models and tokenizers; no bank and no files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ptengine.backbone.heads import task_head
from ptengine.backbone.spec import backbone_spec
from ptengine.prompts.facts import COMPARED, BackboneFacts, backbone_facts
from ptengine.training.identity import fingerprint_model

__all__ = ["BackboneIdentity", "identify", "tokenizer_sha256"]


@dataclass(frozen=True)
class BackboneIdentity:
    """Attributes:
    facts: the backbone in numbers.
    fingerprint: of its weights (`ptengine.training.identity.fingerprint_model`), which depends on the dtype.
    dtype: of its word embeddings, as torch names it without the module.
    tokenizer: sha256 of the tokenizer (`tokenizer_sha256`).
    """

    facts: BackboneFacts
    fingerprint: str
    dtype: str
    tokenizer: str

    def difference(self, other: BackboneIdentity) -> str | None:
        """Why a prompt of this backbone is not one of `other`, in words; None where it is."""
        for name in COMPARED:
            mine, its = getattr(self.facts, name), getattr(other.facts, name)
            if mine != its:
                return f"it was made for a backbone with {name} {mine!r}, this one has {its!r}"
        if self.dtype != other.dtype:
            return f"it was made for the backbone in {self.dtype}, this one is loaded in {other.dtype}"
        if self.fingerprint != other.fingerprint:
            return "it was made for a backbone of the same shape with other weights"
        if self.tokenizer != other.tokenizer:
            return "it was made for the same backbone behind another tokenizer"
        return None

    def is_other_model(self, other: BackboneIdentity) -> bool:
        """Whether `other` is another model, rather than the same in another dtype or behind another tokenizer."""
        if any(getattr(self.facts, name) != getattr(other.facts, name) for name in COMPARED):
            return True
        return self.dtype == other.dtype and self.fingerprint != other.fingerprint


def identify(model: Any, tokenizer: Any) -> BackboneIdentity:
    """The identity of `model` behind `tokenizer`; a head for classes, which every prompt has of its own, is not part
    of it.

    Raises:
        UnsupportedModelError: the model is of no supported type.
    """
    spec = backbone_spec(model)
    dtype = str(spec.word_embeddings.weight.dtype).removeprefix("torch.")
    head = task_head(model) if spec.kind == "encoder" and spec.lm_head is None else {}
    frozen = fingerprint_model(model, skip=set(head))
    return BackboneIdentity(backbone_facts(model), frozen, dtype, tokenizer_sha256(tokenizer))


def tokenizer_sha256(tokenizer: Any) -> str:
    """A sha256 over how a tokenizer turns text into ids: its model, rules, vocabulary and special tokens.

    Truncation and padding, which are settings of a call that a fast tokenizer remembers, are left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    told = json.dumps({"rules": rules, "special": special}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(told.encode()).hexdigest()

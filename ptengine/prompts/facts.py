"""What a prompt remembers of the backbone it was made for: enough to refuse another one, save, and export.

Holds plain numbers, never a model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptengine.backbone.spec import BackboneSpec, backbone_spec
from ptengine.errors import InputError, UnsupportedModelError

__all__ = ["COMPARED", "BackboneFacts", "backbone_facts", "embedding_scale"]

COMPARED = ("model_type", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
"""The fields of `BackboneFacts` that decide whether a prompt fits a model."""


@dataclass(frozen=True)
class BackboneFacts:
    """A frozen backbone in numbers.

    Attributes:
        model_type: transformers' name of the architecture.
        hidden_size: d, width of the word embeddings.
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: H_kv.
        head_dim: D.
        vocab_size: rows of the word embeddings.
        embedding_std: standard deviation over all elements of the word embeddings, the unit of a soft prompt's
            learning rate. Told, not compared: it depends on the dtype the model was loaded in.
        base_model: the name the model was loaded under, None where it is a path of this machine or unknown. Told, not
            compared: the same model may be known under several names.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    embedding_std: float
    base_model: str | None

    def require_same(self, model: BackboneFacts, what: str) -> None:
        """Refuse `model` unless a prompt made for this backbone fits it.

        Args:
            model: facts of the model at hand.
            what: the prompt in words, which begins the message.

        Raises:
            InputError: naming the first field that differs, what the prompt expects and what the model has.
        """
        for name in COMPARED:
            expected, got = getattr(self, name), getattr(model, name)
            if expected != got:
                raise InputError(f"{what} was made for another backbone: expected {name} {expected!r}, got {got!r}")

    def require_fits(self, spec: BackboneSpec, what: str) -> None:
        """As `require_same`, for a model at hand of which nothing needs to be told."""
        self.require_same(replace(self, **{name: getattr(spec, name) for name in COMPARED}), what)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> BackboneFacts:
        """The facts written by `to_json`.

        Raises:
            InputError: a field is missing or has another type.
        """
        if not isinstance(value, dict):
            raise InputError(f"expected the backbone's facts as a json object, got {type(value).__name__}")
        kept: dict[str, Any] = {}
        for field in fields(cls):
            kind = _TYPES[str(field.type)]
            got = value.get(field.name)
            if field.name not in value or not isinstance(got, kind) or isinstance(got, bool):
                raise InputError(f"expected backbone fact {field.name!r} of type {field.type}, got {got!r}")
            kept[field.name] = got
        return cls(**kept)


@torch.no_grad()
def embedding_scale(spec: BackboneSpec) -> float:
    """What the word embeddings' module multiplies its table by before the text enters the model: Gemma 3 by sqrt(d).

    Raises:
        UnsupportedModelError: it does something else to the table.
    """
    table = spec.word_embeddings
    if type(table) is nn.Embedding:
        return 1.0
    ids = torch.arange(min(8, spec.vocab_size), device=table.weight.device)
    rows, got = table.weight[ids].double(), table(ids).double()  # [n, d] both
    scale = ((rows * got).sum() / (rows * rows).sum().clamp(min=1e-30)).item()
    if not torch.allclose(got, scale * rows, rtol=0.02, atol=1e-6):  # 16-bit tables round the product
        raise UnsupportedModelError(
            f"model type {spec.model_type!r} is not supported: its {type(table).__name__} does more than "
            "to scale a table"
        )
    return scale


_TYPES: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "str | None": (str, type(None))}


def backbone_facts(model: Any) -> BackboneFacts:
    """Read the facts of `model`, a supported transformers model.

    Raises:
        UnsupportedModelError: as `ptengine.backbone.spec.backbone_spec`.
    """
    spec = backbone_spec(model)
    name = str(getattr(model, "name_or_path", "") or "")
    is_path = not name or Path(name).is_absolute() or name.startswith((".", "~")) or Path(name).exists()
    return BackboneFacts(
        model_type=spec.model_type,
        hidden_size=spec.hidden_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        embedding_std=embedding_scale(spec) * float(spec.word_embeddings.weight.detach().float().std(correction=0)),
        base_model=None if is_path else name,
    )

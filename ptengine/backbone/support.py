"""What runs in each layer of a model, and why: the report behind `ptengine.supports`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ptengine.backbone import families
from ptengine.backbone.patching import patched, require_patched
from ptengine.errors import UnsupportedModelError
from ptengine.kernels.dispatch import explain

__all__ = ["LayerSupport", "SupportReport", "supports"]


@dataclass(frozen=True)
class LayerSupport:
    """Attributes:
    index: the layer.
    path: ``"shared"`` (attention reads the prefix from where it lies) or ``"refused"``.
    reason: one sentence.
    """

    index: int
    path: Literal["shared", "refused"]
    reason: str


@dataclass(frozen=True)
class SupportReport:
    """Attributes:
    model_type: transformers' name of the architecture.
    supported: whether `ptengine.patch` accepts the model.
    reason: why it does not, or how prompts run in it.
    layers: one entry per layer; empty where the model is refused as a whole and its layers are of one kind.
    """

    model_type: str
    supported: bool
    reason: str
    layers: tuple[LayerSupport, ...]

    def __str__(self) -> str:
        head = f"{self.model_type}: {'supported' if self.supported else 'not supported'}: {self.reason}"
        return "\n".join([head, *(f"  layer {layer.index}: {layer.path}: {layer.reason}" for layer in self.layers)])


def supports(model: Any) -> SupportReport:
    """Report, per layer, which path a prompt takes through `model` and why. Leaves the model as it was; never raises
    for a model that is not supported."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    try:
        with patched(model):
            spec = require_patched(model)
    except UnsupportedModelError as error:
        return SupportReport(model_type, False, str(error), _refused_layers(model))
    device = spec.word_embeddings.weight.device
    if spec.kind == "causal":
        reason = "soft prompts run as one row of the packed batch, prefixes are read by every layer"
    else:
        reason = "bidirectional: soft prompts stand in every row, prefixes are read by every layer"
    route = explain("prefix_attention_varlen", device)
    if spec.no_generation is not None:
        reason += f"; no generation: {spec.no_generation}"
    layers = tuple(
        LayerSupport(
            index, "shared", f"sliding window over prompt and text; {route}" if index in spec.windowed else route
        )
        for index in range(spec.num_layers)
    )
    return SupportReport(model_type, True, reason, layers)


def _refused_layers(model: Any) -> tuple[LayerSupport, ...]:
    """Which layers stand in the way, where the configuration names the kinds of layers."""
    kinds = families.layer_kinds(getattr(model, "config", None)) or []
    if all(kind in families.LAYER_KINDS for kind in kinds):
        return ()
    return tuple(
        LayerSupport(index, "refused", "attention, but other layers of the model are refused")
        if kind in families.LAYER_KINDS
        else LayerSupport(index, "refused", f"{kind} reads no shared prefix")
        for index, kind in enumerate(kinds)
    )

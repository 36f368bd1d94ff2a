"""What runs in each layer of a model, and why: the report behind `ptengine.supports`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ptengine.backbone import families
from ptengine.backbone.patching import patched, require_patched
from ptengine.backbone.spec import BackboneSpec
from ptengine.errors import UnsupportedModelError
from ptengine.kernels.dispatch import explain

__all__ = ["LayerSupport", "SupportReport", "supports"]


@dataclass(frozen=True)
class LayerSupport:
    """Attributes:
    index: the layer.
    path: ``"shared"`` (attention reads the prefix from where it lies), ``"in_row"`` (the layer runs as it came, with
        virtual tokens in every row) or ``"refused"``.
    reason: one sentence.
    """

    index: int
    path: Literal["shared", "in_row", "refused"]
    reason: str


@dataclass(frozen=True)
class SupportReport:
    """What `supports` found; true where the model is supported.

    Attributes:
        model_type: transformers' name of the architecture.
        supported: whether `ptengine.patch` accepts the model.
        reason: why it does not, or how prompts run in it.
        layers: one entry per layer; empty where the model is refused as a whole and its layers are of one kind.
    """

    model_type: str
    supported: bool
    reason: str
    layers: tuple[LayerSupport, ...]

    def __bool__(self) -> bool:
        return self.supported

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
    if spec.path == "in_row":
        return SupportReport(model_type, True, _in_row_reason(spec), _in_row_layers(model, spec))
    device = spec.word_embeddings.weight.device
    if spec.kind == "causal":
        reason = "soft prompts run as one row of the packed batch, prefixes are read by every layer"
    elif spec.kind == "seq2seq":
        reason = "soft prompts stand in the encoder's rows, prefixes are read by every layer of the decoder"
    else:
        reason = "bidirectional: soft prompts stand in every row"
        reason += "" if spec.no_prefix else ", prefixes are read by every layer"
    route = explain("prefix_attention_varlen", device)
    if spec.no_generation is not None:
        behind = " behind a prefix" if spec.kind == "seq2seq" else ""
        reason += f"; no generation{behind}: {spec.no_generation}"
    if spec.no_prefix is not None:
        reason += f"; soft prompts alone: {spec.no_prefix}"
    if spec.no_head is not None:
        reason += f"; hidden states alone: {spec.no_head}"
    layers = tuple(
        LayerSupport(
            index, "shared", f"sliding window over prompt and text; {route}" if index in spec.windowed else route
        )
        for index in range(spec.num_layers)
    )
    return SupportReport(model_type, True, reason, layers)


def _in_row_reason(spec: BackboneSpec) -> str:
    where = "every row of a stock batch" if spec.kind != "seq2seq" else "the encoder's rows"
    reason = f"soft prompts stand in {where}, with the model's own attention: {spec.why_in_row}"
    if not spec.pads:
        reason += "; rows of equal length run together, as the model's numbers depend on padding"
    if spec.no_head is not None:
        reason += f"; hidden states alone: {spec.no_head}"
    if spec.kind == "causal" and not spec.pads_left:
        reason += "; padding before a text would change its numbers, so rows of equal length generate together"
    if spec.kind == "causal" and spec.no_generation is not None:
        reason += f"; no generation: {spec.no_generation}"
    return f"{reason}; no prefixes"


def _in_row_layers(model: Any, spec: BackboneSpec) -> tuple[LayerSupport, ...]:
    kinds = _layer_kinds(model)
    if len(kinds) == spec.num_layers and any(kind not in families.LAYER_KINDS for kind in kinds):
        return tuple(
            LayerSupport(index, "in_row", "attention, but other layers of the model read no shared prefix")
            if kind in families.LAYER_KINDS
            else LayerSupport(index, "in_row", f"{kind} reads no shared prefix")
            for index, kind in enumerate(kinds)
        )
    return tuple(LayerSupport(index, "in_row", str(spec.why_in_row)) for index in range(spec.num_layers))


def _layer_kinds(model: Any) -> list[str]:
    config = getattr(model, "config", None)
    return [] if config is None else families.layer_kinds(families.text_config(config)) or []


def _refused_layers(model: Any) -> tuple[LayerSupport, ...]:
    """Which layers stand in the way, where the configuration names the kinds of layers."""
    kinds = _layer_kinds(model)
    if all(kind in families.LAYER_KINDS for kind in kinds):
        return ()
    return tuple(
        LayerSupport(index, "refused", "attention, but other layers of the model are refused")
        if kind in families.LAYER_KINDS
        else LayerSupport(index, "refused", f"{kind} reads no shared prefix")
        for index, kind in enumerate(kinds)
    )

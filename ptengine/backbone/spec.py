"""The facts of a backbone that prompts, packing and lowering need, read once from the model itself.

Families that tests hold to the stock computation are read from their configuration. Every other family is measured:
whether its tokens see each other both ways, where its positions begin, and, since the same names mean different things
(the `head_dim` of latent attention is that of the rotary part alone), its heads and widths from the keys and values
that reach attention in a trial forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ptengine.backbone import families
from ptengine.errors import UnsupportedModelError

__all__ = ["STATE", "BackboneSpec", "backbone_spec", "config_spec", "is_proven", "kind_of"]

STATE = "_ptengine_state"  # attribute of a patched model, which has its facts

# Families proven by tests: patching them compares nothing. Others are compared with the stock computation once.
_PROVEN: dict[str, Literal["causal", "encoder"]] = {
    "gpt2": "causal",
    "llama": "causal",
    "qwen3": "causal",
    "bert": "encoder",
}


@dataclass(frozen=True)
class BackboneSpec:
    """What is fixed about a frozen model.

    Attributes:
        model_type: transformers' name of the architecture, for example ``"llama"``.
        kind: ``"causal"`` (a token sees what stands before it), ``"encoder"`` (bidirectional: virtual tokens stand in
            every row) or ``"seq2seq"`` (an encoder-decoder: virtual tokens stand in the encoder's rows, prefixes before
            the decoder's). Layers, heads and widths of the last are its decoder's.
        hidden_size: d, width of the word embeddings.
        num_layers: L.
        num_kv_heads: H_kv, key and value heads (fewer than the query heads under grouped-query attention).
        num_heads: H, query heads.
        head_dim: D, width of a query and a key.
        value_dim: D_v, width of a value; differs from D under latent attention.
        max_positions: tokens the position embeddings reach, virtual tokens included.
        vocab_size: rows of the word embeddings.
        word_embeddings: the input embedding module.
        base_model: the model without its head; of a multimodal one the part that reads text.
        lm_head: the module from hidden states to vocabulary logits before `logit_scale` and `logit_softcap`, or None.
        before_head: what stands between the last hidden states and `lm_head`, or None; see `ptengine.backbone.heads`.
        logit_scale: factor of the vocabulary logits.
        logit_softcap: c in ``c * tanh(logits / c)`` after it, or None.
        windowed: layers whose attention sees a sliding window.
        path: ``"shared"`` (rows are packed and attention is ptengine's) or ``"in_row"`` (virtual tokens stand in every
            row of a stock batch and attention is the model's own; no prefixes).
        why_in_row: why the shared path does not serve the model, None where it does.
        no_prefix: why the model takes no prefix of keys and values, or None where it does.
        pads: in-row only: whether the model's numbers bear padding; otherwise rows of equal length run together.
        pads_left: in-row causal models: whether their numbers bear padding before a row's prompt, too.
        first_position: the position id of a row's first token, of encoders.
        pooling: how an encoder pools its last hidden states, see `ptengine.backbone.heads.pooled`; None for not at all.
        no_head: why the head of an encoder cannot be read behind a prompt, or None where it can.
        no_generation: why this model does not generate behind a kept prompt (an encoder-decoder: behind a prefix; a
            causal model in the row: with a cache), or None where it does.
    """

    model_type: str
    kind: Literal["causal", "encoder", "seq2seq"]
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    vocab_size: int
    word_embeddings: nn.Embedding
    base_model: nn.Module
    lm_head: nn.Module | None
    value_dim: int = 0
    before_head: nn.Module | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    windowed: tuple[int, ...] = ()
    no_generation: str | None = None
    path: Literal["shared", "in_row"] = "shared"
    why_in_row: str | None = None
    no_prefix: str | None = None
    pads: bool = True
    pads_left: bool = False
    first_position: int = 0
    pooling: Literal["module", "first_token"] | None = None
    no_head: str | None = None

    def __post_init__(self) -> None:
        if not self.value_dim:
            object.__setattr__(self, "value_dim", self.head_dim)


def kind_of(model_type: str) -> Literal["causal", "encoder", "seq2seq"]:
    """What a model type is for by transformers' own tables; what a model at hand is, `backbone_spec` measures."""
    if model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:  # causal models that read sounds are among them
        return "seq2seq" if CONFIG_MAPPING[model_type].is_encoder_decoder else "causal"
    return "encoder" if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "causal"


def is_proven(config: Any) -> bool:
    """Whether tests hold this family, as configured, to the stock computation."""
    return _is_known(config) and families.window_of(config) is None


def _is_known(config: Any) -> bool:
    kind = _PROVEN.get(config.model_type)
    return kind is not None and not (kind == "encoder" and getattr(config, "is_decoder", False))


def backbone_spec(model: Any) -> BackboneSpec:
    """Read the facts of `model`, a transformers PreTrainedModel.

    A family that is not proven by tests is patched for a moment the first time, which compares a few tokens with the
    stock computation; what was found is remembered as long as the model lives.

    Raises:
        UnsupportedModelError: the model cannot be served exactly; the message names its type and what is missing.
    """
    from ptengine.backbone.patching import PATCHING, patched, require_patched  # patching reads this module

    with PATCHING:  # or another thread would take the moment's patch for one to stay
        state = getattr(model, "__dict__", {}).get(STATE)
        if state is not None:
            spec: BackboneSpec = state.spec
            return spec
        spec = config_spec(model)
        if is_proven(model.config):
            return spec
        with patched(model):
            return require_patched(model)


def _inside(model: Any) -> str | None:
    """How to reach the model in a wrapper that hands on its attributes, but is not what runs."""
    kind = type(model)
    if kind.__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):  # its import would bring the compiler in
        return "its _orig_mod, and compile in place (model.compile()) or after patching"
    return "its get_base_model(), with the adapters inside" if kind.__module__.startswith("peft.") else None


def config_spec(model: Any) -> BackboneSpec:
    """The facts of `model` as its configuration has them; raises as `backbone_spec`."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if config is None or model_type is None:
        raise UnsupportedModelError(f"expected a transformers model, got {type(model).__name__}")
    if inner := _inside(model):
        raise UnsupportedModelError(f"expected the model itself, got {type(model).__name__} around it: pass {inner}")
    proven = _is_known(config)
    reason = families.refusal(config)
    if proven and getattr(config, "is_encoder_decoder", False):
        reason = "its configuration says that it is an encoder-decoder"
    embeddings = output = None
    if reason is None:
        try:
            embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            reason = "it does not name its word embeddings"
    if reason is None and not isinstance(embeddings, nn.Embedding):
        reason = f"its word embeddings are a {type(embeddings).__name__}, not a table of vectors"
    if reason is None and embeddings.weight.is_meta:  # type: ignore[union-attr]
        reason = "its word embeddings have no values (meta device), as before loading or where they are offloaded"
    if reason is None and output is not None and getattr(getattr(output, "weight", None), "ndim", 0) != 2:
        output = None
    if reason is not None:
        raise UnsupportedModelError(f"model type {model_type!r} is not supported: {reason}")
    assert embeddings is not None
    base = model.base_model
    if base is model and output is not None:  # where a class names its part without the head wrongly
        parts = (part for part in model.children() if any(module is embeddings for module in part.children()))
        base = next(parts, model)
    if families.is_multimodal(config):  # the innermost model around the word embeddings reads the text
        models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        around = [part for part in models if any(module is embeddings for module in part.modules())]
        base, heads = around[-1], (part.get_output_embeddings() for part in around)
        output = next((head for head in heads if isinstance(head, nn.Module)), None)
    # Decoders taken out of an encoder-decoder keep its configuration, whose num_hidden_layers are the encoder's.
    seq2seq = getattr(config, "is_encoder_decoder", False)
    sizes = families.decoder_config(config) if seq2seq else families.text_config(config)
    num_layers = _first(
        sizes, "num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer", "num_layers", "n_layers"
    )
    num_heads = _first(sizes, "num_attention_heads", "n_head", "num_heads", "n_heads")
    if not num_layers:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported: its configuration does not say how many layers it has"
        )
    num_heads = num_heads or 1  # of models without attention, which run in the row
    return BackboneSpec(
        model_type=model_type,
        kind="seq2seq" if seq2seq else _PROVEN[model_type] if proven else "causal",
        hidden_size=config.hidden_size if proven else embeddings.embedding_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_first(sizes, "num_key_value_heads") or num_heads,
        head_dim=_first(sizes, "head_dim") or embeddings.embedding_dim // num_heads,
        max_positions=families.max_positions(families.text_config(config)),
        vocab_size=embeddings.num_embeddings,
        word_embeddings=embeddings,
        base_model=base,
        lm_head=output,
        logit_scale=families.logit_scale(sizes),
        logit_softcap=families.logit_softcap(sizes),
        pooling="module" if proven and getattr(base, "pooler", None) is not None else None,
    )


def _first(config: Any, *names: str) -> int | None:
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # of configurations whose value differs by layer, which trial forwards find out
            continue
        if isinstance(value, int):
            return value
    return None

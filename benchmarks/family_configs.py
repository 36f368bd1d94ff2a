"""Shrunken configurations of every family of transformers, and the texts that the family matrix runs over them."""

from __future__ import annotations

import re
from typing import Any

import torch
from family_fields import BESIDES, FIRST, VOCABULARY, WIDTH, WINDOW
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VIRTUAL, LENGTHS = 6, (9, 5)
MOST_PARAMETERS = 20_000_000

# Shrunken values of the first pattern that a configuration's field matches; fields that match none keep their default.
SMALL: tuple[tuple[str, Any], ...] = (
    (r"vocab_size|n_vocab|padded_vocab_size", VOCABULARY),
    (r"vocab_size_per_layer_input", VOCABULARY),
    (r"hidden_size_per_layer_input", 8),
    (r"hidden_size|n_embd|d_model|dim|embed_dim|word_embed_proj_dim|embedding_size|model_dim|emb_dim", WIDTH),
    (r"num_kv_shared_layers|num_nextn_predict_layers|first_k_dense_replace|moe_layer_start_index", 0),
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers|num_encoder_layers", 2),
    (r"encoder_layers", 1),
    (r"num_attention_heads|n_heads?|num_heads|decoder_attention_heads|encoder_attention_heads", 4),
    (r"num_key_value_heads|num_kv_heads|num_global_key_value_heads|kv_n_heads", 2),
    (r"rotary_dim", 8),
    (r"head_dim|kv_channels|global_head_dim|attention_head_dim|swa_head_dim|v_head_dim|swa_v_head_dim", 16),
    (r"qk_nope_head_dim", 16),
    (r"qk_rope_head_dim", 8),
    (r"qk_head_dim", 24),
    (r"(q|kv|o)_lora_rank|lora_rank.*", 16),
    (r"(moe_|shared_|expert_)?(intermediate_size|ffn_hidden_size)(_mlp)?|shared_expert_intermediate_size|n_inner", 96),
    (r"moe_shared_expert_intermediate_size|shared_intermediate_size|.*ffn_dim|ffn_dim|d_ff|inner_dim", 96),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_moe_experts", 4),
    (r"num_experts_per_tok|experts_per_token|num_experts_per_token|moe_topk|moe_k|top_k_experts|moe_top_k", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length", 128),
    (r"sliding_window|attention_window_size", WINDOW),
    # Scores of an indexer with few heads are exactly zero for many tokens, and which of equals are picked depends on
    # the length of the batch.
    (r"index_n_heads", 16),
    (r"index_topk", 6),
    (r"index_head_dim", 16),
    (r"initializer_range|init_std", 0.1),
)
# Of the parts that see or hear, besides: their depth, and the width of what they hand to the text.
SENSES: tuple[tuple[str, Any], ...] = (
    (r"depth|adapter_num_layers|num_block|num_blocks", 2),
    (r"codebook_size|num_embeddings|base_channels|latent_channels|num_filters|upsample_groups", 32),
    (r"out_hidden_size|adapter_out_dim|projection_dim|output_dim|projector_dim|text_hidden_size|adapter_in_dim", WIDTH),
    (r"image_size", 56),
)
TEXT = ("text_config", "encoder", "decoder")  # names of parts that read text


def small_config(model_type: str) -> Any:
    """A configuration of `model_type` for a model of some ten thousand weights."""
    kind = CONFIG_MAPPING[model_type]
    changes = overrides(kind(**FIRST.get(model_type, {})))
    try:
        config = kind(**merged(changes, BESIDES.get(model_type, {})))
    except Exception:
        # Some fields constrain each other: without those of expert groups and heads' widths more configurations hold.
        changes = {name: value for name, value in changes.items() if "head_dim" not in name and "rope" not in name}
        config = kind(**merged(changes, BESIDES.get(model_type, {})))
    config.use_cache = True
    return config


def merged(changes: dict[str, Any], besides: dict[str, Any]) -> dict[str, Any]:
    """`changes` and `besides`, whose values count where both have one, those of parts field by field."""
    parts = {
        name: merged(changes[name], value)
        for name, value in besides.items()
        if isinstance(value, dict) and isinstance(changes.get(name), dict)
    }
    return changes | besides | parts


def overrides(default: Any, fields: tuple[tuple[str, Any], ...] = SMALL) -> dict[str, Any]:
    values = default.to_dict()
    aliases = dict(getattr(default, "attribute_map", {}))
    changes: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name, value in values.items():
        if aliases.get(name, name) != name:
            continue
        found = next((small for pattern, small in fields if re.fullmatch(pattern, name)), None)
        if found is not None and isinstance(value, int | float) and not isinstance(value, bool):
            changes[name] = found if isinstance(found, float) else int(found)
    heads, shared = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if heads is not None and heads == shared:
        changes["num_key_value_heads"] = changes.get("num_attention_heads", heads)
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and kinds and all(isinstance(one, str) for one in kinds):
        distinct = list(dict.fromkeys(kinds))
        changes["layer_types"] = distinct * 2 if len(distinct) == 1 else distinct
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in changes:
                changes[name] = len(changes["layer_types"])
        changes["use_sliding_window"] = True if "use_sliding_window" in values else None
        changes = {name: value for name, value in changes.items() if value is not None}
    if "qk_rope_head_dim" in values:
        changes.pop("head_dim", None)  # which is then that of the rotary part
    elif "head_dim" in values and values["head_dim"] is None:
        changes["head_dim"] = 16
    if "num_key_value_heads" in values and values["num_key_value_heads"] is None:
        changes["num_key_value_heads"] = 2
    for name in ("mlp_layer_types",):
        if isinstance(values.get(name), list) and values[name]:
            changes[name] = [values[name][-1]] * len(changes.get("layer_types", [0, 0]))
    if "use_sliding_window" in values:
        changes["use_sliding_window"] = True
        changes["sliding_window"] = WINDOW
        if "max_window_layers" in values:
            changes["max_window_layers"] = 1
        changes.pop("layer_types", None)  # made of the two
    for name, part in vars(default).items():
        if isinstance(part, PreTrainedConfig):
            changes[name] = overrides(part, SMALL if name in TEXT else SMALL + SENSES)
            if part.model_type in CONFIG_MAPPING:
                changes[name]["model_type"] = part.model_type
    return changes


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]

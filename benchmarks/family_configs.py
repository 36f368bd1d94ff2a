"""Shrunken configurations of every family of transformers, and the texts that the family matrix runs over them."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VIRTUAL, LENGTHS, VOCABULARY, WINDOW, WIDTH = 6, (9, 5), 96, 5, 64
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
    (r"index_n_heads", 2),
    (r"index_head_dim", 16),
    (r"initializer_range|init_std", 0.1),
)
# Of the parts that see or hear, besides: their depth, and the width of what they hand to the text.
SENSES: tuple[tuple[str, Any], ...] = (
    (r"depth|adapter_num_layers|num_block|num_blocks", 2),
    (r"out_hidden_size|adapter_out_dim|projection_dim|output_dim|projector_dim", WIDTH),
    (r"image_size", 56),
)
TEXT = ("text_config", "encoder", "decoder")  # names of parts that read text
# What the configurations of some families need to be made at all.
FIRST: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
}
_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
_LOCAL = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [3, 3, 2]}
_INDEXED = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}  # fmt: skip
_LATENT = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}
_SLIDING_LATENT = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 24,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
_DOTS3 = {
    "num_key_value_heads": 4, "layer_types": ["indexed_attention", "sliding_attention"], "num_hidden_layers": 2,
    "mlp_layer_types": ["dense", "sparse"], "shared_experts_intermediate_size": 96, "index_topk": 4, "head_dim": 24,
    "per_layer_config": {1: _SLIDING_LATENT}, "rope_parameters": None, "sliding_window": WINDOW,
}  # fmt: skip
_GRANITE_SPEECH = {
    "encoder_config": {"hidden_dim": WIDTH, "dim_head": 16}, "projector_config": {"encoder_hidden_size": WIDTH},
}  # fmt: skip
_TOKENIZER = {"num_filters": 4, "downsampling_ratios": [2], "depths": [1, 1]}
# What some families need besides: fields without a default, in units of their own, or that others constrain.
BESIDES: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": VOCABULARY, "local_attention_window_len": WINDOW,
        "encoder_config": {"hidden_size_global": WIDTH}, "decoder_config": {"hidden_size_global": WIDTH},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _LOCAL, "full_attention": _LOCAL},
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": WIDTH}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": _LATENT,
    "dots3_note_text": _DOTS3,
    "dots3_note": {
        "text_config": _DOTS3, "vision_config": {"adapter_out_dim": WIDTH},
        "audio_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
    },
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "granite_speech": _GRANITE_SPEECH,
    "granite_speech_plus": _GRANITE_SPEECH,
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16, "visual_embed": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"max_2d_position_embeddings": 64, "hidden_size": 96, "num_attention_heads": 4},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "longformer": {"attention_window": [4, 4], "max_position_embeddings": 130},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "perceiver": {
        "d_latents": WIDTH, "num_latents": 8, "num_self_attends_per_block": 1, "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "qwen4_exp_text": _INDEXED,
    "qwen4_exp": {"text_config": _INDEXED},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"]},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": _TOKENIZER, "semantic_tokenizer_encoder_config": _TOKENIZER,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip


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

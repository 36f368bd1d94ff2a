"""Fields of configurations that no rule for all families shrinks: what some need to be made, and to be small.

Found by trying, family by family. Units are those of each family's configuration.
"""

from __future__ import annotations

from typing import Any

VOCABULARY, WINDOW, WIDTH = 96, 5, 64

# What the configurations of some families need to be made at all.
FIRST: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
}
_ROTARY: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
_LOCAL: dict[str, Any] = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [3, 3, 2]}
_COMPASS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"sliding_attention": _LOCAL, "full_attention": _LOCAL},
}  # fmt: skip
_THREE_AXES: dict[str, Any] = {"text_config": {"rope_parameters": _ROTARY | {"mrope_section": [2, 3, 3]}}}
_HALF_THREE_AXES: dict[str, Any] = {
    "text_config": {"rope_parameters": _ROTARY | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}
}  # fmt: skip
_INDEXED: dict[str, Any] = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}  # fmt: skip
_LATENT: dict[str, Any] = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}
_SLIDING_LATENT: dict[str, Any] = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 24,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
_DOTS3: dict[str, Any] = {
    "num_key_value_heads": 4, "layer_types": ["indexed_attention", "sliding_attention"], "num_hidden_layers": 2,
    "mlp_layer_types": ["dense", "sparse"], "shared_experts_intermediate_size": 96, "head_dim": 24,
    "per_layer_config": {1: _SLIDING_LATENT}, "rope_parameters": None, "sliding_window": WINDOW,
}  # fmt: skip
_GRANITE_SPEECH: dict[str, Any] = {
    "encoder_config": {"hidden_dim": WIDTH, "dim_head": 16}, "projector_config": {"encoder_hidden_size": WIDTH},
}  # fmt: skip
_TOKENIZER: dict[str, Any] = {"num_filters": 4, "downsampling_ratios": [2], "depths": [1, 1]}
_SENSES: dict[str, Any] = {"image_token_id": 93, "video_token_id": 94, "audio_token_id": 95}
_MAMBA: dict[str, Any] = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2}
_SILENT: dict[str, Any] = {"enable_audio_output": False}
# What some families need besides: fields without a default, in units of their own, or that others constrain.
BESIDES: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": VOCABULARY, "local_attention_window_len": WINDOW,
        "encoder_config": {"hidden_size_global": WIDTH}, "decoder_config": {"hidden_size_global": WIDTH},
    },
    "chameleon": {"vocabulary_map": {"<image>": 95}},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "cosmos3_edge": _THREE_AXES,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": WIDTH}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": _LATENT,
    "dots3_note_text": _DOTS3,
    "dots3_note": {
        "text_config": _DOTS3, "vision_config": {"adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "emu3": {"vocabulary_map": {"<image>": 95}},
    "ernie4_5_vl_moe": {"text_config": {
        "rope_parameters": _ROTARY | {"mrope_section": [2, 2, 4]}, "moe_intermediate_size": [96, 96],
    }},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 3},
    # The larger checkpoints have none of the embeddings per layer that token ids alone give.
    "gemma4": _SENSES | {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2}
    },
    "gemma4_unified": _SENSES,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96}},
    "florence2": {"vision_config": {
        "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 2], "num_groups": [2, 2],
    }},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "glm46v": _THREE_AXES,
    "glm4v": _THREE_AXES,
    "glm4v_moe": _HALF_THREE_AXES,
    "glm_ocr": _THREE_AXES,
    "glmga": _THREE_AXES,
    "glm5_next": {"text_config": {
        "index_topk": 6, "index_kpool": 2, "qk_rope_head_dim": 0, "head_dim": 0, "num_key_value_heads": 4,
    }},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "qformer_config": {"num_attention_heads": 4},
        "downsample_rate": "1/2",
    },
    "granite_speech": _GRANITE_SPEECH,
    "granite_speech_plus": _GRANITE_SPEECH,
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16, "visual_embed": False},
    "hunyuan_vl": {"text_config": {"rope_parameters": _ROTARY | {"mrope_section": [2, 3, 3]}}},
    "janus": {"vq_config": {"num_hidden_layers": 1, "channel_multiplier": [1, 1], "image_token_embed_dim": 16}},
    "kyutai_speech_to_text": {"audio_pad_token_id": 3, "num_codebooks": 2, "codebook_vocab_size": 33},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"max_2d_position_embeddings": 64, "hidden_size": 96, "num_attention_heads": 4},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "longformer": {"attention_window": [4, 4], "max_position_embeddings": 130},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}, "text_config": {"rope_scaling_layers": []}},
    "muse_glimmer": {"projector_hidden_size": WIDTH, "out_hidden_size": WIDTH},
    "muse_spark": {
        "projector_hidden_size": WIDTH, "text_config": {"moe_hidden_size": WIDTH},
        "audio_config": {"patch_sizes": [16, 6], "hidden_sizes": [16, 32], "depths": [1, 1]},
    },
    "nemo_speechlm": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": WIDTH}}}, "text_config": _MAMBA,
        "word_timestamp_config": {"blank_token_id": 95},
    },
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2, "max_img_size": 64}, "text_config": _MAMBA,
        "projector_hidden_size": WIDTH,
    },
    "paddleocr_vl": _THREE_AXES,
    "perceiver": {
        "d_latents": WIDTH, "num_latents": 8, "num_self_attends_per_block": 1, "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "qwen2_5_omni": _SILENT | {"thinker_config": _THREE_AXES},
    "qwen2_5_omni_thinker": _THREE_AXES,
    "qwen2_5_vl": _THREE_AXES,
    "qwen2_vl": _THREE_AXES,
    "qwen3_omni_moe": _SILENT,
    "qwen4_exp_text": _INDEXED,
    "qwen4_exp": {"text_config": _INDEXED},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"]},
    "step3p7": {"text_config": {"sliding_window": WINDOW}},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": _TOKENIZER, "semantic_tokenizer_encoder_config": _TOKENIZER,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip

"""What the fields of configurations are called, and how small they get: plain data, read by `shrinking`.

Families name one and the same size in many ways. A rule is a pattern that must match the whole name of a field; the
first that matches decides, `SET` before `AT_MOST`. A field that no rule knows keeps its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

VOCABULARY = 97
POSITIONS = 96
LAYERS = 3
MOST_LAYERS = 4
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 8
ROTARY_DIM = 4
HIDDEN = HEADS * HEAD_DIM
WINDOW = 6

# The new value, whatever the default is (0 and None included).
SET: tuple[tuple[str, object], ...] = (
    (r".*vocab_size.*", VOCABULARY),
    (r"hidden_size|d_model|n_embd|emb_dim|(\w+_)?embedding_(dim|size)|word_embed_proj_dim|lru_width", HIDDEN),
    (r"(num_)?((en|de)coder_)?(swa_)?(num_)?attention_heads|n_heads?|num_heads", HEADS),
    (r"(swa_)?(num_key_value|num_kv|kv_n)_heads", KV_HEADS),
    # A None is no help where the class does not work it out, and these are what it would be.
    (r"(swa_)?head_dim", HEAD_DIM),
    # Read from left to right, one token id a position.
    (r"is_decoder|causal", True),
    (r"num_codebooks", 1),
    # The scale of scores and of logits, where the default is for large sizes.
    (r"attention_multiplier", HEAD_DIM**-0.5),
    (r"query_pre_attn_scalar", HEAD_DIM),
    (r"logits_mup_width_multiplier", 1.0),
    (r"dim_model_base", HIDDEN),
    # Kernels that may not be there.
    (r"use_mamba_kernels", False),
)

# At most this; what is smaller, or no integer, stays.
AT_MOST: tuple[tuple[str, int], ...] = (
    (r"(attention_)?head_dim|d_head|dim_head|kv_channels|d_kv|attention_head_size|.*_head_dim|\w+_d_head", HEAD_DIM),
    (r"rotary_dim", ROTARY_DIM),
    (r".*_rank|hc_lowrank|d_rel|hidden_size_per_layer_input", 16),
    (r"index_n_heads|linear_num(_\w+)?_heads", HEADS),
    # Twice the hidden size in all, as `expand` has it by default.
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_headdim", 8),
    (r"mamba_d_ssm", 64),
    (r"(\w+_)?(num|n)_?(\w+_)?experts|\w*expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|(moe_)?top_k(_experts)?", 2),
    (r"n_groups?|num_expert_groups?|o_groups", 2),
    (r"topk_group|first_k_dense_replace|num_dense_layers", 1),
    (r".*(intermediate_size|ffn|feed_forward|inner_dim|mlp_dim).*|n_inner|dim_ff|dff|d_inner|d_ff", 48),
    (r"(\w+_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions", POSITIONS),
    (r"context_length|model_max_length|rel_extent|relative_max_distance|position_bias_max_distance", POSITIONS),
    (r".*sliding_window(_size)?|(\w+_)?window_size(_len)?|local_attention(_window_len)?|attention_chunk_size", WINDOW),
    (r"index_topk", WINDOW),
    (r"index_block_size", 4),
    (r"index_topk_blocks", 2),
    (r"(bos|eos|eod|sep|cls|mask|unk|decoder_start|forced_eos|forced_bos)_(token_id|index)", 0),
    (r"pad_(token_id|index)", 1),
    (r".*(token_id|token_index)", VOCABULARY - 1),
    (r".*(state_size|d_state)", 8),
    (r"patch_size", 8),
    (r"encoder_hash_byte_group_vocab", VOCABULARY),
    # For names that nobody has thought of yet.
    (r".*(_size|_dim|_width|_channels?)", HIDDEN),
)

LAYER_COUNT = r"num_hidden_layers|(num_)?((en|de)coder_)?layers|n_layers?|num_blocks"
"""Numbers of layers, made as many as are kept of the default's."""

DROPOUT = r".*(dropout|pdrop|layerdrop|drop_rate)(_p|_prob|_rate)?"
"""Probabilities of dropping something, made 0."""

# Inside a mapping of rotary parameters.
ROTARY: Mapping[str, int] = MappingProxyType(
    {"original_max_position_embeddings": POSITIONS // 4, "max_position_embeddings": POSITIONS}
)

_ROPE = MappingProxyType({"rope_type": "default", "rope_theta": 10000.0})

# What no rule on names could know: fields by model type, laid over what the rules made.
EXCEPTIONS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        # The default lists no layer that has attention.
        "bamba": {"attn_layer_indices": [1]},
        "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
        "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
        "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
        # The default has one kind of layer, though there are two.
        "laguna": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "mellum": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "ministral": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]},
        # Sparse attention takes blocks at random, and short prompts fall back to the full one with a warning.
        "big_bird": {"attention_type": "original_full"},
        "bigbird_pegasus": {"attention_type": "original_full"},
        # Defaults with which the class cannot be built.
        "cohere_compass_text": {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": {**_ROPE, "mrope_section": [2, 1, 1]}, "full_attention": None},
        },
        "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 2.0}, "ffn_config": {"moe_top_k": 2}},
        "deepseek_v2": {"num_experts_per_tok": 2},
        "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
        "qwen4_exp_text": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        },
        "mllama_text_model": {"rope_scaling": {"rope_type": "default"}},
        "phi4_multimodal": {
            "vision_config": {
                "hidden_size": HIDDEN,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": HEADS,
            },
            "audio_config": {
                "hidden_size": HIDDEN,
                "intermediate_size": 48,
                "num_blocks": 1,
                "num_attention_heads": HEADS,
                "nemo_conv_channels": HIDDEN,
                "ext_pw_out_channel": HIDDEN,
                "depthwise_separable_out_channel": HIDDEN,
            },
        },
        "transfo-xl": {"cutoffs": [20, 40, 60]},
        "xmod": {"default_language": "en_XX"},
        # Sizes that must agree with each other in a way of their own.
        "deepseek_v4": {"num_key_value_heads": 1},
        "dots3_note_text": {
            "head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 12,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
        },
        "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
        # Layers in two stacks, which each pass runs several times: a slot of the cache for each run of a layer.
        "hrm_text": {
            "num_layers_per_stack": 2,
            "H_cycles": 2,
            "L_cycles": 2,
            "L_bp_cycles": [1, 2],
            "num_hidden_layers": 12,
        },
        # Two attention modules a layer.
        "longcat_flash": {"num_layers": 2},
        "mamba2": {"head_dim": 16},
        "reformer": {"axial_pos_shape": [8, 12], "axial_pos_embds_dim": [16, 16]},
        "xlstm": {"hidden_size": 128, "embedding_dim": 128},
        "zamba": {
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
        },
        # Layers of two head sizes, and layers that take their keys and values from an earlier one.
        "gemma4_text": {"global_head_dim": 16},
        "gemma4_unified_text": {"global_head_dim": 16},
        "gemma3n_text": {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "intermediate_size": 48,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        },
        # Past its window or its choice of tokens, a model of these types forgets what it has cached.
        "hy_v4": {"index_topk": POSITIONS},
        "moshi": {"sliding_window": POSITIONS},
        # What is put before the tokens of each prompt is no token of the batch that a test hands over.
        "cpmant": {"prompt_length": 0},
        # Off by default: without it, any position sees any other.
        "xlnet": {"attn_type": "uni"},
    }
)

# How sharp queries and keys are drawn where scores are not divided by the root of the head size, or norms double them.
SOFTER: Mapping[str, float] = MappingProxyType({"gpt_neo": 0.95, "nemotron": 0.8})

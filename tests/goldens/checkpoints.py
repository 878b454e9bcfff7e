"""The tiny checkpoints that make.py makes: their config classes, what they are given, how they are saved."""

from __future__ import annotations

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
COMMON = {
    "vocab_size": 83, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 36,
    "intermediate_size": 52, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

SMALL = COMMON | {"vocab_size": 61, "intermediate_size": 44}
BERT = {
    "vocab_size": 61, "hidden_size": 36, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 50,
    "max_position_embeddings": 720,
}  # fmt: skip
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
T5 = {
    "vocab_size": 61, "d_model": 28, "d_kv": 5, "d_ff": 40, "num_layers": 4, "num_decoder_layers": 5, "num_heads": 6,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "decoder_start_token_id": 0,
}  # fmt: skip
FALCON = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 1024,
}  # fmt: skip

MLA = {
    "kv_lora_rank": 14, "q_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
    "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 0.7,
    "mscale_all_dim": 0.9, "original_max_position_embeddings": 256,
}  # fmt: skip

LOCAL = {
    "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40,
    "max_position_embeddings": 1024, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}  # fmt: skip
BLT = {
    "encoder_hash_byte_group_size": [3, 5, 8], "encoder_hash_byte_group_vocab": 101,
    "encoder_hash_byte_group_nb_functions": 2, "local_attention_window_len": 6,
    "encoder_config": LOCAL | {"num_hidden_layers": 2},
    "decoder_config": LOCAL | {"num_hidden_layers": 3, "hidden_size_global": 36},
    "global_config": LOCAL | {"hidden_size": 36, "num_attention_heads": 6, "num_hidden_layers": 3},
    "patcher_config": LOCAL
    | {"hidden_size": 20, "num_attention_heads": 2, "num_hidden_layers": 2, "sliding_window": 5},
}  # fmt: skip

# folder -> (config class, its arguments, arguments of save_pretrained)
CHECKPOINTS = {
    "llama_tied": ("LlamaConfig", COMMON | {"tie_word_embeddings": True}, {}),
    "llama_untied_sharded": (
        "LlamaConfig",
        COMMON
        | {
            "rope_parameters": LLAMA3,
            "head_dim": 10,
            "attention_bias": True,
            "mlp_bias": True,
            "num_hidden_layers": 5,
        },
        {"max_shard_size": "60KB"},
    ),
    "llama_bfloat16": ("LlamaConfig", COMMON | {"head_dim": 8, "dtype": "bfloat16", "hidden_size": 30}, {}),
    "mistral": ("MistralConfig", COMMON | {"sliding_window": None, "head_dim": 8, "hidden_size": 40}, {}),
    "mistral_windowed": (
        "MistralConfig",
        COMMON | {"sliding_window": 4, "head_dim": 8, "hidden_size": 40, "vocab_size": 61},
        {},
    ),
    "qwen2_windowed": (
        "Qwen2Config",
        COMMON | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2, "vocab_size": 61},
        {},
    ),
    "qwen2": ("Qwen2Config", COMMON | {"tie_word_embeddings": True}, {}),
    "qwen3": ("Qwen3Config", COMMON | {"head_dim": 16, "rms_norm_eps": 1e-6}, {}),
    "gemma": ("GemmaConfig", SMALL | {"head_dim": 10, "hidden_size": 30}, {}),
    "gemma2": (
        "Gemma2Config",
        SMALL
        | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0}
        | {"final_logit_softcapping": 3.0},
        {},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        SMALL
        | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 12, "num_hidden_layers": 5}
        | {
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        {},
    ),
    "olmo2": ("Olmo2Config", SMALL, {}),
    "olmo3": (
        "Olmo3Config",
        SMALL
        | {"sliding_window": 4, "num_hidden_layers": 5}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0}
                | {"original_max_position_embeddings": 16},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
        {},
    ),
    "granite": (
        "GraniteConfig",
        SMALL
        | {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "residual_multiplier": 0.7}
        | {"attention_multiplier": 0.3, "attention_bias": True, "mlp_bias": True},
        {},
    ),
    "smollm3": (
        "SmolLM3Config",
        SMALL
        | {"num_hidden_layers": 5, "no_rope_layer_interval": 2, "sliding_window": 3}
        | {"use_sliding_window": True, "pad_token_id": 0},
        {},
    ),
    "phi3": (
        "Phi3Config",
        SMALL
        | {
            "pad_token_id": 0,
            "sliding_window": 5,
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1000.0,
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [1.5, 3.0, 8.0],
            },
        },
        {},
    ),
    "phi3_partial": (  # Phi-4-mini
        "Phi3Config",
        SMALL
        | {"pad_token_id": 0, "hidden_size": 48}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.75}},
        {},
    ),
    "cohere": ("CohereConfig", SMALL | {"use_qk_norm": True, "logit_scale": 0.3}, {}),
    "starcoder2": ("Starcoder2Config", SMALL | {"sliding_window": 4, "norm_epsilon": 1e-5}, {}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 61, "n_embd": 24, "n_layer": 4, "n_head": 4, "n_positions": 720}
        | {"bos_token_id": 1, "eos_token_id": 2},
        {},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        SMALL | {"hidden_size": 48, "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        {},
    ),
    "gpt_neox_serial": (
        "GPTNeoXConfig",
        SMALL | {"use_parallel_residual": False, "attention_bias": False, "hidden_size": 48},
        {},
    ),
    "bloom": (
        "BloomConfig",
        {
            "vocab_size": 61,
            "hidden_size": 36,
            "n_layer": 4,
            "n_head": 6,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {},
    ),
    "mpt": (
        "MptConfig",
        {"vocab_size": 61, "d_model": 36, "n_layers": 4, "n_heads": 6, "max_seq_len": 1024}
        | {"attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.3}},
        {},
    ),
    "falcon_7b": ("FalconConfig", FALCON, {}),
    "falcon_40b": (
        "FalconConfig",
        FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_attention_heads": 6, "hidden_size": 36},
        {},
    ),
    "falcon_11b": (
        "FalconConfig",
        FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
        | {"ffn_hidden_size": 50},
        {},
    ),
    "falcon_rw": (
        "FalconConfig",
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        {},
    ),
    "mixtral": (
        "MixtralConfig",
        SMALL | {"num_local_experts": 5, "intermediate_size": 20, "sliding_window": 6, "head_dim": 8},
        {},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        SMALL
        | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
        | {"shared_expert_intermediate_size": 28, "mlp_only_layers": [1]},
        {},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        SMALL
        | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 8}
        | {"norm_topk_prob": True, "decoder_sparse_step": 2},
        {},
    ),
    "olmoe": (
        "OlmoeConfig",
        SMALL | {"num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 20, "clip_qkv": 2.0},
        {},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        SMALL
        | MLA
        | {"q_lora_rank": None, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}
        | {"routed_scaling_factor": 1.5, "num_key_value_heads": 6},
        {},
    ),
    "deepseek_v2_yarn": (
        "DeepseekV2Config",
        SMALL | MLA | {"topk_method": "greedy", "num_key_value_heads": 6, "rope_parameters": YARN},
        {},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        SMALL
        | MLA
        | {
            "n_group": 2,
            "topk_group": 1,
            "num_key_value_heads": 6,
            "rope_parameters": YARN,
            "num_mtp_layers": 0,
        },
        {},
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        SMALL
        | {"n_routed_experts": 6, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "head_dim": 8}
        | {"moe_intermediate_size": 20, "use_qk_norm": True, "attention_bias": True, "num_mtp_layers": 0}
        | {"routed_scaling_factor": 1.5},
        {},
    ),
    "gpt_oss": (
        "GptOssConfig",
        SMALL
        | {
            "num_local_experts": 4,
            "intermediate_size": 20,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 4,
            "pad_token_id": 0,
        }
        | {"rope_parameters": YARN | {"truncate": False, "mscale": None, "mscale_all_dim": None}},
        {},
    ),
    "llama4_text": (
        "Llama4TextConfig",
        SMALL
        | {"num_local_experts": 3, "head_dim": 8, "attention_chunk_size": 5, "interleave_moe_layer_step": 2}
        | {"intermediate_size_mlp": 50, "floor_scale": 3, "attn_scale": 0.5, "pad_token_id": 0},
        {},
    ),
    "bert": ("BertConfig", BERT | {"hidden_act": "gelu_new", "type_vocab_size": 3}, {}),
    "bert_bare": ("BertConfig", BERT, {}),
    "bert_classes": (
        "BertConfig",
        BERT | {"num_hidden_layers": 3, "id2label": {0: "good", 1: "bad", 2: "neither"}},
        {},
    ),
    "modernbert": (
        "ModernBertConfig",
        BERT
        | TOKEN_IDS
        | {"num_hidden_layers": 5, "local_attention": 6, "norm_bias": True, "attention_bias": True}
        | {"mlp_bias": True, "classifier_bias": True, "intermediate_size": 38}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
        {},
    ),
    "modernbert_bare": ("ModernBertConfig", BERT | TOKEN_IDS | {"local_attention": 8}, {}),
    "t5": ("T5Config", T5, {}),
    "flan_t5": (
        "T5Config",
        T5
        | {
            "d_ff": 22,
            "num_decoder_layers": 4,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        {},
    ),
    "blt": ("BltConfig", BLT | {"patching_threshold": 4.3}, {}),
    # every patch is cut, every byte sees all before it, and three vectors of a patch are as wide as it is
    "blt_cut": (
        "BltConfig",
        BLT
        | {
            "patching_threshold": 4.49,
            "max_patch_length": 3,
            "local_attention_window_len": None,
            "cross_attn_k": 3,
            "encoder_config": LOCAL | {"num_hidden_layers": 1, "cross_attn_k": 3},
            "decoder_config": LOCAL | {"num_hidden_layers": 2, "cross_attn_k": 3, "hidden_size_global": 72},
            "global_config": LOCAL | {"hidden_size": 72, "num_hidden_layers": 2},
            "patcher_config": LOCAL
            | {"hidden_size": 20, "num_attention_heads": 2, "num_hidden_layers": 1, "sliding_window": None},
        },
        {},
    ),
    "mamba": (
        "MambaConfig",
        {"vocab_size": 61, "hidden_size": 30, "num_hidden_layers": 4, "state_size": 5, "time_step_rank": 3}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        {},
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "vocab_size": 61,
            "hidden_size": 30,
            "num_hidden_layers": 4,
            "state_size": 5,
            "num_heads": 6,
            "head_dim": 10,
        }
        | {"n_groups": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "chunk_size": 4},
        {},
    ),
    "jamba": (
        "JambaConfig",
        SMALL
        | {
            "num_hidden_layers": 5,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "num_experts": 5,
            "intermediate_size": 24,
            "pad_token_id": 0,
        }
        | {"num_experts_per_tok": 2, "mamba_d_state": 5, "mamba_dt_rank": 3, "use_mamba_kernels": False},
        {},
    ),
    "falcon_h1": (
        "FalconH1Config",
        SMALL
        | {
            "mamba_d_ssm": 24,
            "mamba_n_heads": 4,
            "mamba_d_state": 5,
            "mamba_n_groups": 2,
            "mamba_chunk_size": 4,
        }
        | {
            "lm_head_multiplier": 0.7,
            "embedding_multiplier": 2.0,
            "mlp_multipliers": [0.8, 0.6],
            "head_dim": 8,
        }
        | {"key_multiplier": 0.9, "attention_out_multiplier": 0.7, "attention_in_multiplier": 1.1}
        | {"ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9], "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.8}
        | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "pad_token_id": 0},
        {},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {
            "vocab_size": 61,
            "hidden_size": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "lru_width": 30,
        }
        | {"intermediate_size": 88, "attention_window_size": 4, "num_key_value_heads": 2, "conv1d_width": 3}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        {},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        SMALL
        | {"head_dim": 8, "linear_key_head_dim": 6, "linear_value_head_dim": 7, "linear_num_key_heads": 2}
        | {
            "linear_num_value_heads": 4,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
        }
        | {"shared_expert_intermediate_size": 14, "mlp_only_layers": [1], "partial_rotary_factor": 0.5}
        | {"pad_token_id": 0},
        {},
    ),
    "dbrx": (
        "DbrxConfig",
        {"vocab_size": 61, "d_model": 36, "n_heads": 6, "n_layers": 4, "max_seq_len": 1024, "pad_token_id": 0}
        | {
            "attn_config": {"clip_qkv": 2.0, "kv_n_heads": 2},
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        }
        | {"ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 5, "moe_top_k": 2}},
        {},
    ),
}

FEW = {
    "vocab_size": 29, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16,
    "intermediate_size": 20, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
}  # fmt: skip

GROUPS = {"n_routed_experts": 4, "n_shared_experts": 1, "topk_group": 1}

# of make_mtp.py: folder -> (config class, its arguments, how many of the layers are modules of multi-token prediction)
FUTURE_CHECKPOINTS = {
    "deepseek_v3_mtp": (
        "DeepseekV3Config",
        MLA
        | FEW
        | GROUPS
        | {"num_hidden_layers": 4, "num_key_value_heads": 4, "num_mtp_layers": 2, "n_group": 2},
        2,
    ),
    "glm4_moe_mtp": (
        "Glm4MoeConfig",
        FEW | GROUPS | {"first_k_dense_replace": 1, "n_group": 1, "head_dim": 8, "use_qk_norm": True},
        1,
    ),
    "qwen3_next_mtp": (
        "Qwen3NextConfig",
        FEW
        | {"head_dim": 8, "linear_key_head_dim": 6, "linear_value_head_dim": 7, "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 4, "num_experts": 4, "shared_expert_intermediate_size": 14}
        | {"layer_types": ["linear_attention", "full_attention", "full_attention"], "pad_token_id": 0},
        1,
    ),
}

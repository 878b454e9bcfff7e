"""Keys of a config.json that change what some family computes, with their neutral values.

A family without such a key must not ignore it: a `logit_scale` in a Llama would be lost. Sizes that the tensor shapes
repeat are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# key -> its neutral values beside null; an integer equals the same float
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # activations
    **dict.fromkeys(
        ("hidden_act", "hidden_activation", "activation", "activation_function", "dense_act_fn"), ()
    ),
    **dict.fromkeys(("feed_forward_proj", "mlp_hidden_act", "classifier_activation", "ffn_act_fn"), ()),
    "is_gated_act": (False,),
    **dict.fromkeys(("swiglu_limit", "swiglu_alpha"), ()),
    # multipliers of embedding, scores, residuals and logits
    **dict.fromkeys(("logit_scale", "logits_scaling", "lm_head_multiplier", "embedding_multiplier"), (1,)),
    **dict.fromkeys(("residual_multiplier", "key_multiplier", "attention_in_multiplier"), (1,)),
    **dict.fromkeys(("attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"), (1,)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "attn_scale", "softmax_scale"), ()),
    "mlp_multipliers": ([1, 1],),
    "ssm_multipliers": ([1] * 5,),
    **dict.fromkeys(("scale_emb", "scale_depth", "dim_model_base", "mup_width_scale"), (1,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap"), (0,)),
    **dict.fromkeys(("clip_qkv", "alibi_bias_max", "floor_scale", "attention_temperature"), (0,)),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "scale_decoder_outputs": (False,),
    "attn_temperature_tuning": (False, 0),
    # masks
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size"), ()),
    **dict.fromkeys(("local_attention", "local_attention_window_len", "window_size"), ()),
    **dict.fromkeys(("use_sliding_window", "use_bidirectional_attention", "bidirectional"), (False,)),
    "layer_types": (),
    **dict.fromkeys(("block_types", "attention_types", "attention_layers"), ()),
    **dict.fromkeys(("is_causal", "causal"), (True,)),
    "is_prefix_lm": (False,),
    # positions
    **dict.fromkeys(("rope_scaling", "rope_parameters"), ({}, {"rope_type": "default"})),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "rope_local_base_freq"), ()),
    **dict.fromkeys(("global_rope_theta", "local_rope_theta"), ()),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_pct", "rope_ratio"), (1,)),
    "rotary_dim": (),
    **dict.fromkeys(("rope_interleave", "rope_interleaved", "is_neox_style", "use_mrope"), (False,)),
    **dict.fromkeys(("alibi", "use_alibi", "learned_pos_emb", "abs_pos"), (False,)),
    "position_embedding_type": ("absolute", "rope", "rotary"),
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval"), ([], 0)),
    **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), ()),
    "mrope_section": ([],),
    # norms and residuals
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "use_post_norm", "sandwich_norm"), (False,)),
    **dict.fromkeys(("parallel_attn", "use_parallel_residual", "parallel_residual"), (False,)),
    **dict.fromkeys(("apply_residual_connection_post_layernorm", "mamba_rms_norm"), (False,)),
    "num_ln_in_parallel_attn": (),
    **dict.fromkeys(("norm_type", "norm_first", "mamba_norm_before_gate"), ()),
    # heads and sharing between layers
    **dict.fromkeys(("multi_query", "new_decoder_architecture"), (False,)),
    **dict.fromkeys(
        ("num_kv_heads", "n_head_kv", "multi_query_group_num", "num_heads", "n_heads", "n_head"), ()
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), (0,)),
    **dict.fromkeys(("attention_sinks", "attn_output_gate", "use_differential_attention"), (False,)),
    # biases
    **dict.fromkeys(
        ("attention_bias", "mlp_bias", "qkv_bias", "bias", "use_bias", "projectors_bias"), (False,)
    ),
    **dict.fromkeys(("lm_head_bias", "mamba_proj_bias", "mamba_conv_bias", "use_conv_bias"), (False,)),
    "no_bias": (True,),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), (0, 1)),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "experts_per_token", "moe_topk"), (0, 1)),
    **dict.fromkeys(("norm_topk_prob", "topk_method", "scoring_func", "use_routing_bias"), (False,)),
    "routed_scaling_factor": (1,),
    **dict.fromkeys(("n_group", "topk_group"), (0, 1)),
    **dict.fromkeys(("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq"), (0, 1)),
    **dict.fromkeys(("first_k_dense_replace", "expert_layer_offset", "expert_layer_period"), (0,)),
    **dict.fromkeys(("mlp_only_layers", "moe_layers"), ([],)),
    # recurrences
    **dict.fromkeys(("full_attention_interval", "attn_layer_offset", "attn_layer_period"), (0,)),
    "time_step_limit": (),
    # quantized or pruned weights, and other inputs
    **dict.fromkeys(("embedding_fraction", "expansion_ratio"), ()),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention"), (False,)),
}

WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size", "window_size")
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def changes_numbers(key: str, value: Any, config: Mapping[str, Any]) -> bool:
    """Whether a key that the config's family does not know changes the numbers in another family."""
    if key not in NEUTRAL or value is None or value in NEUTRAL[key]:
        return False
    if key == "layer_types":
        return not isinstance(value, list) or any(kind != "full_attention" for kind in value)
    if key in WINDOWS:  # a window as long as the longest context hides nothing
        longest = [config[name] for name in LENGTHS if type(config.get(name)) is int]
        return type(value) is not int or not longest or value < longest[0]
    return True

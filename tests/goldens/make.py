"""Makes the golden files of tests/model with transformers and the gguf package, which the product does not need.

    python3 -m venv .venvs/goldens
    .venvs/goldens/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0   (a CPU build of torch is enough)
    .venvs/goldens/bin/python tests/goldens/make.py [folder ...]   (all, or these alone)

Writes beside itself: a folder for each tiny random checkpoint as `save_pretrained` writes it, with `logits.npz`
(tokens, mask, positions, logits: what transformers computes in float32); two GGUF files of them; and
`dequantize.npz` (random blocks of each type and what the gguf package makes of them). Everything is seeded.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent
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
        {"vocab_size": 61, "n_embd": 36, "n_layer": 4, "n_head": 6, "n_positions": 720}
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
    "mixtral": ("MixtralConfig", SMALL | {"num_local_experts": 5, "sliding_window": 6, "head_dim": 8}, {}),
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
            "num_local_experts": 5,
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


def main(wanted: list[str]) -> None:
    for name, (config_class, arguments, options) in CHECKPOINTS.items():
        if wanted and name not in wanted:
            continue
        model = random_model(getattr(transformers, config_class)(**arguments))
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, **options)
        (folder / "generation_config.json").unlink(missing_ok=True)
        # read anew: `.to(bfloat16)` has rounded the rotary frequencies of this one
        np.savez_compressed(folder / "logits.npz", **logits(read_float32(folder, name)))
        if name in ("llama_tied", "llama_untied_sharded"):
            write_gguf(HERE / f"{name}.gguf", model)
    if not wanted:
        np.savez_compressed(HERE / "dequantize.npz", **dequantized())
        np.savez_compressed(HERE / "mxfp4.npz", **unpacked_mxfp4())
    (HERE / "frequencies.json").write_text(json.dumps(frequencies(), indent=1) + "\n")
    defaults = {name: default_config(config_class) for name, (config_class, _, _) in CHECKPOINTS.items()}
    (HERE / "defaults.json").write_text(json.dumps(defaults, indent=1, sort_keys=True) + "\n")


def read_float32(folder: Path, name: str) -> torch.nn.Module:
    # eager attention adds Falcon's ALiBi twice (transformers 5.23), the other does not
    attention = "sdpa" if name == "falcon_rw" else "eager"
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()


def check(folder: Path, names: list[str]) -> dict[str, float]:
    """By how much transformers' logits of the models in `folder` differ from the golden ones."""
    found = {}
    for name in names:
        golden = np.load(HERE / name / "logits.npz")
        again = logits(read_float32(folder / name, name))["logits"]
        real = golden["mask"] == 1
        found[name] = float(np.abs(again[real] - golden["logits"][real]).max())
    return found


def frequencies() -> dict[str, object]:
    """transformers' rotary frequencies and their magnitude for the ways to stretch a context."""
    kinds = {
        "linear": {"factor": 3.0},
        "dynamic": {"factor": 4.0},
        "llama3": {key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")},
        "yarn": {"factor": 8.0, "original_max_position_embeddings": 512},
        "yarn_wide": {"factor": 4.0, "beta_fast": 64.0, "beta_slow": 0.5, "truncate": False}
        | {"original_max_position_embeddings": 512, "attention_factor": 1.3},
        "longrope": {
            "short_factor": [1.0 + 0.1 * i for i in range(16)],
            "long_factor": [1.0 + i for i in range(16)],
        }
        | {"original_max_position_embeddings": 512},
    }
    found: dict[str, object] = {}
    for name, parameters in kinds.items():
        kind = name.split("_")[0]
        parameters = parameters | {"rope_type": kind, "rope_theta": 10000.0}
        config = transformers.LlamaConfig(
            hidden_size=128, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=parameters
        )
        init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind]
        lengths = {"dynamic": [4096], "longrope": [100, 4096]}.get(kind, [100])
        values = [init(config, device="cpu", seq_len=length) for length in lengths]
        found[name] = {
            "rope_parameters": parameters,
            "frequencies": [frequency.tolist() for frequency, _ in values],
            "magnitude": values[0][1],
        }
    return found


def default_config(config_class: str) -> dict[str, object]:
    """What transformers takes for each key that a config.json leaves out."""
    return getattr(transformers, config_class)().to_dict()


def random_model(config) -> torch.nn.Module:
    """Weights large enough that every part of the model shows in the logits."""
    torch.manual_seed(config.num_hidden_layers)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.3)
    return model.to(getattr(torch, str(config.dtype or "float32").removeprefix("torch.")))


def logits(model) -> dict[str, np.ndarray]:
    """Rows padded on the right and on the left; the second row starts late, so far positions are met too."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, (4, 14))
    mask = np.ones_like(tokens)
    mask[1, 9:], mask[2, :5], mask[3, 1:] = 0, 0, 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    positions[1] += 700
    if model.config.model_type in ("llama4_text", "recurrent_gemma"):  # these read a row from its beginning
        mask[2] = 1
        positions = np.broadcast_to(np.arange(14), (4, 14)).copy()
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    inputs = {
        key: value for key, value in inputs.items() if key in inspect.signature(model.forward).parameters
    }
    rows = []
    for row in range(
        len(tokens)
    ):  # alone, since LongRoPE chooses its frequencies by the longest row of a batch
        with torch.no_grad():
            out = model(
                **{key: torch.tensor(value[row : row + 1]) for key, value in inputs.items()}, use_cache=False
            )
        rows.append(out.logits.numpy())
    return {"tokens": tokens, "mask": mask, "positions": positions, "logits": np.concatenate(rows)}


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def write_gguf(path: Path, model) -> None:
    """As llama.cpp's convert_hf_to_gguf.py writes a Llama, in float32."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            shape = values.shape
            values = (
                values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
            )
        short = name.replace("model.layers.", "blk.")
        for theirs, ours in GGUF_NAMES.items():
            short = short.replace(theirs, ours)
        writer.add_tensor(short, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(config) -> np.ndarray:
    """Computed as in convert_hf_to_gguf.py, `LlamaModel.generate_extra_tensors`."""
    rope, dim = config.rope_parameters, config.head_dim
    freqs = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    old = rope["original_max_position_embeddings"]
    low_wavelen, high_wavelen = old / rope["low_freq_factor"], old / rope["high_freq_factor"]
    factors = []
    for freq in freqs:
        wavelen = 2 * np.pi / freq
        if wavelen < high_wavelen:
            factors.append(1.0)
        elif wavelen > low_wavelen:
            factors.append(rope["factor"])
        else:
            smooth = (old / wavelen - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(float(1 / ((1 - smooth) / rope["factor"] + smooth)))
    return np.array(factors, np.float32)


def unpacked_mxfp4() -> dict[str, np.ndarray]:
    """Experts of a tiny gpt-oss (width 64, 32 features, 2 experts) packed, and what transformers unpacks."""
    rng, found = np.random.default_rng(2), {}
    for name, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        blocks = rng.integers(0, 256, (2, rows, columns // 32, 16), dtype=np.uint8)
        scales = rng.integers(115, 125, (2, rows, columns // 32), dtype=np.uint8)
        unpack = transformers.integrations.mxfp4.convert_moe_packed_tensors
        values = unpack(torch.tensor(blocks), torch.tensor(scales)).float().numpy()
        found |= {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_values": values}
    return found


def dequantized() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    found = {}
    # where in a block its float16 scales are
    halves = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}
    for name, places in halves.items():
        kind = gguf.GGMLQuantizationType[name]
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        raw = rng.integers(0, 256, (12, block_bytes), dtype=np.uint8)
        for place in places:
            raw[:, place : place + 2] = rng.normal(size=(12, 1)).astype("<f2").view(np.uint8)
        found[f"{name}_raw"] = raw
        found[f"{name}_values"] = gguf.dequantize(raw, kind).astype(np.float32)
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        print(json.dumps(check(Path(sys.argv[2]), sys.argv[3:])))
    else:
        main(sys.argv[1:])

"""Large models, as a config.json of Hugging Face says them, and the slices and meshes that suit them."""

from __future__ import annotations

import dataclasses

from train.config import MeshSpec

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def llama(width: int, ffn: int, layers: int, heads: int) -> dict:
    sizes = {"hidden_size": width, "intermediate_size": ffn}
    return LLAMA | sizes | {"num_hidden_layers": layers, "num_attention_heads": heads}


MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}

# Of the size of Falcon-H1-1.5B: attention and Mamba-2 side by side in each layer.
FALCON_H1 = {
    "model_type": "falcon_h1",
    "vocab_size": 65536,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_d_ssm": 3072,
    "mamba_n_heads": 48,
    "mamba_d_head": 64,
    "mamba_d_state": 256,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_rms_norm": False,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e11,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


@dataclasses.dataclass(frozen=True)
class Case:
    config: dict  # as in a config.json of Hugging Face
    topology: str
    mesh: MeshSpec
    rows: int  # of a step, over all devices
    length: int = 8192

    @property
    def chip(self) -> str:
        return self.topology.split(":")[0]


CASES = {
    "llama-8b": Case(llama(4096, 14336, 32, 32), "v5p:4x4x4", MeshSpec(data=1, fsdp=64), 64),
    "llama-8b-4-chips": Case(llama(4096, 14336, 32, 32), "v5p:2x2x1", MeshSpec(data=1, fsdp=4), 4),
    "llama-8b-v6e": Case(llama(4096, 14336, 32, 32), "v6e:8x8", MeshSpec(data=1, fsdp=64), 64),
    "llama-8b-128k": Case(
        llama(4096, 14336, 32, 32), "v5p:4x4x4", MeshSpec(data=1, fsdp=8, context=8), 8, 131072
    ),
    "llama-70b": Case(llama(8192, 28672, 80, 64), "v5p:4x8x8", MeshSpec(data=1, fsdp=64, tensor=4), 128),
    "llama-405b": Case(
        llama(16384, 53248, 126, 128), "v5p:8x8x16", MeshSpec(data=1, fsdp=128, tensor=8), 256
    ),
    "llama-70b-v6e": Case(llama(8192, 28672, 80, 64), "v6e:16x16", MeshSpec(data=1, fsdp=64, tensor=4), 64),
    "mixtral-8x7b": Case(MIXTRAL, "v5p:4x4x4", MeshSpec(data=1, fsdp=64), 64),
    "deepseek-v3": Case(DEEPSEEK_V3, "v5p:8x8x8", MeshSpec(data=1, fsdp=64, tensor=8), 64),
    "falcon-h1-1.5b": Case(FALCON_H1, "v5p:2x2x2", MeshSpec(data=1, fsdp=8), 32),
    "falcon-h1-1.5b-v6e": Case(FALCON_H1, "v6e:4x4", MeshSpec(data=1, fsdp=16), 16),
}

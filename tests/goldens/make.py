"""Makes the golden files of tests/model with transformers and the gguf package, which the product does not need.

    python3 -m venv .venvs/goldens
    .venvs/goldens/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0   (a CPU build of torch is enough)
    .venvs/goldens/bin/python tests/goldens/make.py

Writes beside itself: a folder for each tiny random checkpoint as `save_pretrained` writes it, with `logits.npz`
(tokens, mask, positions, logits: what transformers computes in float32); two GGUF files of them; and
`dequantize.npz` (random blocks of each type and what the gguf package makes of them). Everything is seeded.
"""

from __future__ import annotations

import shutil
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
}


def main() -> None:
    for name, (config_class, arguments, options) in CHECKPOINTS.items():
        model = random_model(getattr(transformers, config_class)(**arguments))
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, **options)
        (folder / "generation_config.json").unlink(missing_ok=True)
        # read anew: `.to(bfloat16)` has rounded the rotary frequencies of this one
        in_float32 = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        np.savez_compressed(folder / "logits.npz", **logits(in_float32.eval()))
        if name in ("llama_tied", "llama_untied_sharded"):
            write_gguf(HERE / f"{name}.gguf", model)
    np.savez_compressed(HERE / "dequantize.npz", **dequantized())


def random_model(config) -> torch.nn.Module:
    """Weights large enough that every part of the model shows in the logits."""
    torch.manual_seed(config.num_hidden_layers)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.to(getattr(torch, str(config.dtype or "float32").removeprefix("torch.")))


def logits(model) -> dict[str, np.ndarray]:
    """Rows padded on the right and on the left; the second row starts late, so far positions are met too."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, (4, 14))
    mask = np.ones_like(tokens)
    mask[1, 9:], mask[2, :5], mask[3, 1:] = 0, 0, 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    positions[1] += 700
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
            use_cache=False,
        )
    return {"tokens": tokens, "mask": mask, "positions": positions, "logits": out.logits.numpy()}


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
    main()

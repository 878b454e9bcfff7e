"""Makes the golden files of tests/model with transformers and the gguf package, which the product does not need.

    python3 -m venv .venvs/goldens
    .venvs/goldens/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0   (a CPU build of torch is enough)
    .venvs/goldens/bin/python tests/goldens/make.py [folder ...]   (all, or these alone)

Writes beside itself: a folder for each tiny random checkpoint as `save_pretrained` writes it, with `logits.npz`
(tokens, mask, positions and what else goes in; logits or hidden states: what transformers computes in float32); two
GGUF files of them, and one in parts; and `dequantize.npz` (random blocks of each type and what the gguf package makes
of them). Everything is seeded.
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
from checkpoints import CHECKPOINTS, LLAMA3  # beside this file

HERE = Path(__file__).resolve().parent

# What transformers makes of a config; causal language models otherwise.
HEADS = {
    "bert": "AutoModelForMaskedLM",
    "bert_bare": "AutoModel",
    "bert_classes": "AutoModelForSequenceClassification",
    "modernbert": "AutoModelForMaskedLM",
    "modernbert_bare": "AutoModel",
    "t5": "AutoModelForSeq2SeqLM",
    "flan_t5": "AutoModelForSeq2SeqLM",
}
NAMES_OF_INPUTS = {
    "tokens": "input_ids", "mask": "attention_mask", "positions": "position_ids", "token_types": "token_type_ids",
}  # fmt: skip
NAMES_OF_DECODER_INPUTS = {
    "tokens": "decoder_input_ids", "mask": "decoder_attention_mask", "encoder_tokens": "input_ids",
    "encoder_mask": "attention_mask",
}  # fmt: skip
NAMES_OF_OUTPUTS = {
    "logits": "logits",
    "last_hidden_state": "hidden",
    "pooler_output": "pooled",
    "classes": "classes",
}


def main(wanted: list[str]) -> None:
    for name, (config_class, arguments, options) in CHECKPOINTS.items():
        if wanted and name not in wanted:
            continue
        model = random_model(name, getattr(transformers, config_class)(**arguments))
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, **options)
        (folder / "generation_config.json").unlink(missing_ok=True)
        # read anew: `.to(bfloat16)` has rounded the rotary frequencies of this one
        np.savez_compressed(folder / "logits.npz", **logits(read_float32(folder, name)))
        if name in ("llama_tied", "llama_untied_sharded"):
            write_gguf(HERE / f"{name}.gguf", model)
        if name == "llama_tied":
            (HERE / "split_gguf").mkdir(exist_ok=True)
            write_gguf(HERE / "split_gguf" / "model.gguf", model, split_max_tensors=17)
    if not wanted:
        np.savez_compressed(HERE / "dequantize.npz", **dequantized())
        np.savez_compressed(HERE / "mxfp4.npz", **unpacked_mxfp4())
    (HERE / "frequencies.json").write_text(json.dumps(frequencies(), indent=1) + "\n")
    defaults = {name: default_config(config_class) for name, (config_class, _, _) in CHECKPOINTS.items()}
    (HERE / "defaults.json").write_text(json.dumps(defaults, indent=1, sort_keys=True) + "\n")


def read_float32(folder: Path, name: str) -> torch.nn.Module:
    # eager attention adds Falcon's ALiBi twice (transformers 5.23), the other does not
    attention = "sdpa" if name == "falcon_rw" else "eager"
    return auto(name).from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def auto(name: str):
    return getattr(transformers, HEADS.get(name, "AutoModelForCausalLM"))


def check(folder: Path, names: list[str]) -> dict[str, float]:
    """By how much transformers' logits of the models in `folder` differ from the golden ones."""
    found = {}
    for name in names:
        golden = np.load(HERE / name / "logits.npz")
        again, real = logits(read_float32(folder / name, name)), golden["mask"] == 1
        of = {"logits": real, "hidden": real, "classes": slice(None)}
        found[name] = max(
            float(np.abs(again[key][of[key]] - golden[key][of[key]]).max()) for key in of if key in golden
        )
    return found


def frequencies() -> dict[str, object]:
    """transformers' rotary frequencies and their magnitude for the ways to stretch a context."""
    kinds = {
        "linear": {"factor": 3.0},
        "dynamic": {"factor": 4.0},
        "llama3": {key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")},
        "llama3_step": {  # Llama 4 Scout: the two bounds are one
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 256,
        },
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


def random_model(name: str, config) -> torch.nn.Module:
    """Weights large enough that every part of the model shows in the logits."""
    torch.manual_seed(getattr(config, "num_hidden_layers", 0))
    model = auto(name).from_config(config, attn_implementation="eager").eval()
    if model.config.model_type == "t5" and not config.scale_decoder_outputs:
        # transformers 5 ties the head of T5 1.1 too, unless a checkpoint has one of its own, as those of T5 1.1 do
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.config.tie_word_embeddings = False
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    if model.config.model_type == "t5":  # its scores are not scaled
        for name, parameter in model.named_parameters():
            parameter.data *= config.d_kv**-0.5 if name.endswith(".q.weight") else 1.0
    if getattr(config, "scale_decoder_outputs", False):  # the tied head shrinks by the root of the width
        torch.nn.init.normal_(model.shared.weight, std=1.5)
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
    if model.config.model_type == "blt":  # patches are counted from the row's beginning
        mask[2], positions = 1, np.broadcast_to(np.arange(14), (4, 14)).copy()
        if (
            model.config.max_patch_length
        ):  # then a row's very last byte reads another patch than in a longer row
            mask[:, -1] = 0
    inputs = {"tokens": tokens, "mask": mask, "positions": positions}
    if kinds := getattr(model.config, "type_vocab_size", 0):
        inputs["token_types"] = rng.integers(0, kinds, tokens.shape)
    names, taken = NAMES_OF_INPUTS, inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder:
        names = NAMES_OF_DECODER_INPUTS
        inputs["encoder_tokens"] = rng.integers(0, model.config.vocab_size, (4, 17))
        inputs["encoder_mask"] = (np.arange(17) < np.array([[17], [3], [12], [9]])).astype(np.int64)
    rows = []
    for row in range(
        len(tokens)
    ):  # alone, since LongRoPE chooses its frequencies by the longest row of a batch
        of_row = {
            names[key]: torch.tensor(value[row : row + 1]) for key, value in inputs.items() if key in names
        }
        of_row |= {"use_cache": False} if "use_cache" in taken else {}
        with torch.no_grad():
            out = model(**{key: value for key, value in of_row.items() if key in taken})
        if "logits" in out and out["logits"].ndim == 2:  # of a text as a whole
            out = {"classes": out["logits"]}
        rows.append({ours: out[key].numpy() for key, ours in NAMES_OF_OUTPUTS.items() if key in out})
    return inputs | {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def write_gguf(path: Path, model, **options) -> None:
    """As llama.cpp's convert_hf_to_gguf.py writes a Llama, in float32; `options` of the gguf package's writer."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama", **options)
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

"""Makes tests/goldens/wrapped: tiny models of text and images, and one in eight-bit floats, as transformers saves them.

    .venvs/goldens/bin/python tests/goldens/make_wrapped.py   (environment: see make.py)

Each folder has `logits.npz`: what transformers computes of text alone, in float32. The one in eight-bit floats is a
golden checkpoint of make.py whose matrices are quantized here; transformers reads what torch makes of them (its own way
back wants whole blocks). Everything is seeded.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from checkpoints import SMALL  # beside this file
from make import HERE
from safetensors.torch import load_file, save_file

FOLDER = HERE / "wrapped"
VISION = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = SMALL | {"num_hidden_layers": 3, "head_dim": 8, "pad_token_id": 0}
WHOLES = {
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": TEXT
            | {"sliding_window": 4, "query_pre_attn_scalar": 12, "tie_word_embeddings": True}
            | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            "vision_config": VISION | {"image_size": 8, "patch_size": 4},
            "mm_tokens_per_image": 4,
            "image_token_index": 60, "boi_token_index": 58, "eoi_token_index": 59,
        },
    ),
    "llama4": (
        "Llama4Config",
        {
            "text_config": TEXT
            | {"num_local_experts": 3, "attention_chunk_size": 5, "interleave_moe_layer_step": 2}
            | {"intermediate_size_mlp": 50, "floor_scale": 3, "attn_scale": 0.5, "tie_word_embeddings": False},
            "vision_config": VISION
            | {"image_size": 8, "patch_size": 4, "vision_output_dim": 8, "projector_input_dim": 8}
            | {"projector_output_dim": 8},
            "image_token_index": 60, "boi_token_index": 58, "eoi_token_index": 59,
        },
    ),
    "mistral3": (
        "Mistral3Config",
        {
            "text_config": TEXT | {"model_type": "mistral", "sliding_window": None},
            "vision_config": VISION | {"model_type": "pixtral", "image_size": 8, "patch_size": 4, "head_dim": 4},
            "image_token_index": 60,
        },
    ),
}  # fmt: skip
BLOCK = (16, 8)  # smaller than the matrices, and no divisor of them


def main() -> None:
    for name, (config_class, arguments) in WHOLES.items():
        torch.manual_seed(len(name))
        config = getattr(transformers, config_class)(**arguments)
        model = transformers.AutoModelForImageTextToText.from_config(
            config, attn_implementation="eager"
        ).eval()
        for parameter in model.parameters():
            spread = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim >= 2 else 0.3
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim < 2), std=spread)
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
        read = transformers.AutoModelForImageTextToText.from_pretrained(
            FOLDER / name, dtype=torch.float32, attn_implementation="eager"
        )
        write_logits(FOLDER / name, read.eval())
    quantize(HERE / "deepseek_v3", FOLDER / "deepseek_v3_fp8")


def write_logits(folder: Path, model) -> None:
    tokens = np.random.default_rng(0).integers(1, 50, (2, 14))
    with torch.no_grad():
        values = model(input_ids=torch.tensor(tokens), use_cache=False).logits.numpy()
    np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=values)


def quantize(source: Path, folder: Path) -> None:
    """Every matrix of the layers in eight-bit floats, with the scales that put each block's largest at 448."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stored, back = {}, {}
    for name, values in load_file(source / "model.safetensors").items():
        linear = name.endswith("proj.weight") or name.endswith("with_mqa.weight")
        if not linear or "layers" not in name:
            stored[name] = back[name] = values.to(torch.float32 if "bias" in name else torch.bfloat16)
            continue
        rows, columns = (-(-n // of) for n, of in zip(values.shape, BLOCK))
        scales, packed = torch.zeros(rows, columns), torch.zeros(values.shape, dtype=torch.float8_e4m3fn)
        for i in range(rows):
            for j in range(columns):
                where = tuple(slice(k * of, (k + 1) * of) for k, of in zip((i, j), BLOCK))
                scales[i, j] = values[where].abs().max() / 448
                packed[where] = (values[where] / scales[i, j]).to(torch.float8_e4m3fn)
        stored |= {name: packed, f"{name}_scale_inv": scales}
        each = torch.tensor(np.kron(scales.numpy(), np.ones(BLOCK, np.float32)))
        back[name] = (packed.float() * each[: values.shape[0], : values.shape[1]]).to(torch.bfloat16)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as plain:
        save_file(back, Path(plain) / "model.safetensors", metadata={"format": "pt"})
        (Path(plain) / "config.json").write_text(json.dumps(config))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            plain, attn_implementation="eager", dtype=torch.float32
        )
        write_logits(folder, model.eval())
    config["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Makes tests/goldens/rwkv7 with the package rwkv, BlinkDL's own reader of RWKV-7; transformers has no such class.

    .venvs/goldens/bin/pip install --no-deps rwkv==0.8.30     (beside what make.py wants)
    .venvs/goldens/bin/python tests/goldens/make_rwkv7.py

A tiny random checkpoint under the names of flash-linear-attention's RWKV7ForCausalLM (as on the Hub), and the logits
that the package computes in float32 from the same numbers under BlinkDL's names. Heads have 64 channels, since the
package's norm of a head's output has the eps of that width.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}

import numpy as np
import torch
from rwkv.model import RWKV
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent / "rwkv7"
WIDTH, HEADS, LAYERS, INNER, VOCAB = 128, 2, 4, 64, 61
RANKS = {"w": 5, "a": 6, "g": 7, "v": 4}


def main() -> None:
    torch.manual_seed(7)
    theirs = random_tensors()
    FOLDER.mkdir(exist_ok=True)
    save_file(theirs, FOLDER / "model.safetensors", metadata={"format": "pt"})
    (FOLDER / "config.json").write_text(json.dumps(config(), indent=2) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(blinkdl(theirs), f"{folder}/model.pth")
        model = RWKV(f"{folder}/model", "cpu fp32")
        np.savez_compressed(FOLDER / "logits.npz", **logits(model))


def config() -> dict[str, object]:
    return {
        "architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7", "vocab_size": VOCAB, "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS, "head_dim": WIDTH // HEADS, "num_heads": None, "hidden_ratio": 4.0,
        "intermediate_size": INNER, "decay_low_rank_dim": RANKS["w"], "a_low_rank_dim": RANKS["a"],
        "gate_low_rank_dim": RANKS["g"], "v_low_rank_dim": RANKS["v"], "hidden_act": "sqrelu", "norm_first": True,
        "norm_bias": True, "norm_eps": 1e-5, "attn": None, "attn_mode": "chunk", "fuse_norm": True,
        "fuse_cross_entropy": True, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True,
        "auto_map": {"AutoModelForCausalLM": "modeling_rwkv7.RWKV7ForCausalLM"},
    }  # fmt: skip


def random_tensors() -> dict[str, torch.Tensor]:
    """Large enough that every part shows in the logits."""
    found: dict[str, torch.Tensor] = {}

    def linear(name: str, outputs: int, inputs: int, scale: float = 1.0) -> None:
        found[name] = scale * inputs**-0.5 * torch.randn(outputs, inputs)

    def norm(name: str) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (
            1 + 0.3 * torch.randn(WIDTH),
            0.3 * torch.randn(WIDTH),
        )

    linear("model.embeddings.weight", VOCAB, WIDTH)
    linear("lm_head.weight", VOCAB, WIDTH, 1.5)
    norm("model.norm")
    norm("model.layers.0.pre_norm")
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        norm(f"{layer}.attn_norm")
        norm(f"{layer}.ffn_norm")
        norm(f"{layer}.attn.g_norm")
        for name in "rwkvag":
            found[f"{layer}.attn.x_{name}"] = torch.rand(1, 1, WIDTH)
        found[f"{layer}.attn.k_k"] = 0.7 + 0.2 * torch.randn(WIDTH)
        found[f"{layer}.attn.k_a"] = 1 + 0.2 * torch.randn(WIDTH)
        found[f"{layer}.attn.r_k"] = 0.3 * torch.randn(HEADS, WIDTH // HEADS)
        for name in "rkvo":
            linear(f"{layer}.attn.{name}_proj.weight", WIDTH, WIDTH)
        for name, rank in RANKS.items():
            if name == "v" and i == 0:
                continue
            linear(f"{layer}.attn.{name}_lora.lora.0.weight", rank, WIDTH)
            linear(f"{layer}.attn.{name}_lora.lora.2.weight", WIDTH, rank)
            if name != "g":
                found[f"{layer}.attn.{name}_lora.lora.2.bias"] = torch.randn(WIDTH)
        found[f"{layer}.ffn.x_k"] = torch.rand(WIDTH)
        linear(f"{layer}.ffn.key.weight", INNER, WIDTH)
        linear(f"{layer}.ffn.value.weight", WIDTH, INNER)
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in found.items()}


def blinkdl(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers under the names, and in the layout, of BlinkDL's .pth files."""
    renamed = {
        "model.embeddings": "emb", "lm_head": "head", "model.norm": "ln_out", "model.layers.": "blocks.",
        "pre_norm": "ln0", "attn_norm": "ln1", "ffn_norm": "ln2", "g_norm": "ln_x", ".attn.": ".att.",
        "r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output",
    }  # fmt: skip
    found = {}
    for name, tensor in theirs.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        if "_lora.lora." in name:
            start, rest = name.split("_lora.lora.")
            name = start + {"0.weight": "1", "2.weight": "2", "2.bias": "0"}[rest]
            tensor = tensor.T if tensor.ndim == 2 else tensor
        found[name] = tensor.float().contiguous()
    return found


def logits(model: RWKV) -> dict[str, np.ndarray]:
    """Rows padded on the right and on the left; padding has no logits."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (4, 14))
    mask = np.ones_like(tokens)
    mask[1, 9:], mask[2, :5], mask[3, 1:] = 0, 0, 0
    found = np.zeros((4, 14, VOCAB), np.float32)
    for row in range(4):
        state = None
        for t in np.flatnonzero(mask[row]):
            out, state = model.forward([int(tokens[row, t])], state)
            found[row, t] = out.numpy()
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    return {"tokens": tokens, "mask": mask, "positions": positions, "logits": found}


if __name__ == "__main__":
    main()

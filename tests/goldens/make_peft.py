"""Makes tests/goldens/adapters: LoRA adapters of golden checkpoints as PEFT writes them, and what PEFT computes.

    .venvs/goldens/bin/pip install --no-deps peft==0.21.2 accelerate psutil   (into the environment of make.py)
    .venvs/goldens/bin/python tests/goldens/make_peft.py

A folder for each adapter, with the logits of its base (a folder beside) for the tokens, masks and positions of the
base's own `logits.npz`, in float32. Beside them `keys.json`: what PEFT computes of `llama_lora` when its config has
one key changed, or "error". Everything is seeded.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from make import HERE, logits, read_float32  # beside this file
from peft import LoraConfig, PeftModel, get_peft_model

ADAPTERS = {
    "llama_lora": ("llama_tied", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "llama_ranks": (
        "llama_tied",
        {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["k_proj", "o_proj", "gate_proj"]}
        | {"rank_pattern": {"o_proj": 5}, "alpha_pattern": {"layers.1.self_attn.k_proj": 2}},
    ),
    "llama_dora": ("llama_tied", {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": "all-linear"}),
    "phi3_lora": ("phi3", {"r": 4, "lora_alpha": 4, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    "gpt2_dora": (
        "gpt2",
        {"r": 2, "lora_alpha": 4, "use_dora": True, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]},
    ),
    # these take something out of the base, which whoever reads the folder must take out again
    "llama_pissa": (
        "llama_tied",
        {"r": 3, "lora_alpha": 4, "init_lora_weights": "pissa", "target_modules": ["q_proj", "down_proj"]},
    ),
    "llama_olora": (
        "llama_tied",
        {"r": 3, "lora_alpha": 4, "init_lora_weights": "olora", "use_rslora": True}
        | {"target_modules": ["v_proj", "up_proj"]},
    ),
    "gpt2_pissa_dora": (
        "gpt2",
        {"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa", "use_dora": True, "fan_in_fan_out": True}
        | {"target_modules": ["c_attn"]},
    ),
}  # fmt: skip

INITS = (
    "gaussian",
    "pissa",
    "pissa_niter_4",
    "olora",
    "eva",
    "corda",
    "loftq",
    "orthogonal",
    "lora_ga",
    "mica",
    "x",
)
KEYS = [
    ("auto_mapping", {"base_model_class": "A", "parent_library": "b"}), ("base_model_name_or_path", "elsewhere"),
    ("revision", "main"), ("inference_mode", False), ("task_type", None), ("peft_version", "0.1.0"),
    ("lora_dropout", 0.5), ("fan_in_fan_out", True), ("runtime_config", {"ephemeral_gpu_offload": True}),
    ("megatron_config", {"a": 1}), ("megatron_core", "elsewhere"), ("eva_config", {"rho": 3.0}),
    ("corda_config", {"corda_method": "kpm"}), ("loftq_config", {"loftq_bits": 2}), ("lora_ga_config", {}),
    ("qalora_group_size", 4), ("ensure_weight_tying", True), *(("init_lora_weights", init) for init in INITS),
    ("init_lora_weights", False), ("init_lora_weights", None), ("target_modules", ["q_proj"]),
    ("target_modules", "all-linear"), ("target_modules", r".*\.(q_proj|v_proj)"), ("target_modules", ["proj"]),
    ("target_modules", ["model.layers.1.self_attn.q_proj", "down_proj"]), ("exclude_modules", ["q_proj"]),
    ("exclude_modules", ".*down_proj"), ("layers_to_transform", [1]), ("layers_to_transform", 2),
    ("layers_to_transform", [0, 1, 2, 3]), ("layers_to_transform", []), ("layers_pattern", "layers"),
    ("layers_pattern", "blocks"), ("rank_pattern", {"q_proj": 4}), ("rank_pattern", {"q_proj": 5}),
    ("alpha_pattern", {"q_proj": 3}), ("alpha_pattern", {"layers.[12]..*": 3}), ("use_qalora", True),
    ("lora_bias", True), ("layer_replication", [[0, 2], [0, 2]]), ("alora_invocation_tokens", [1, 2]),
    ("trainable_token_indices", [1]), ("target_parameters", ["q_proj.weight"]), ("modules_to_save", ["lm_head"]),
    ("use_dora", True), ("use_rslora", True), ("bias", "all"), ("kasa_config", {"beta": 0.1}),
    ("monteclora_config", {}), ("velora_config", {}), ("arrow_config", {}), ("use_bdlora", {}), ("unheard_of", 1),
]  # fmt: skip
PATTERNS = [  # of layers, beside the layers that they are of
    [("layers_to_transform", [1]), ("layers_pattern", pattern)]
    for pattern in ("layers", ["blocks", "layers"], "blocks")
]  # fmt: skip


def main(wanted: list[str]) -> None:
    for name, (base, options) in ADAPTERS.items():
        if wanted and name not in wanted:
            continue
        model = get_peft_model(
            read_float32(HERE / base, base), LoraConfig(task_type="CAUSAL_LM", **options)
        ).eval()
        torch.manual_seed(zlib.crc32(name.encode()))
        for key, parameter in model.named_parameters():
            if "lora_magnitude" in key:
                parameter.data *= torch.empty_like(parameter).uniform_(0.7, 1.3)
            elif "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.4 * parameter.shape[-1] ** -0.5)
        folder = HERE / "adapters" / name
        shutil.rmtree(folder, ignore_errors=True)
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        config = json.loads((folder / "adapter_config.json").read_text())
        if isinstance(config["target_modules"], list):  # a set, in another order each time
            config["target_modules"].sort()
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        np.savez_compressed(folder / "logits.npz", logits=logits(model.base_model.model)["logits"])

    lines = [
        json.dumps([edits, changed(edits)]) for edits in [[[key, value]] for key, value in KEYS] + PATTERNS
    ]
    (HERE / "adapters" / "keys.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


def changed(edits) -> list[float] | str:
    """A few logits of `llama_lora` with these keys changed."""
    source = HERE / "adapters" / "llama_lora"
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Exception):
        config = json.loads((source / "adapter_config.json").read_text()) | dict(edits)
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
        shutil.copy(source / "adapter_model.safetensors", folder)
        model = PeftModel.from_pretrained(read_float32(HERE / "llama_tied", "llama_tied"), folder).eval()
        values = logits(model.base_model.model)["logits"]
        return [float(f"{value:.7g}") for value in np.concatenate([values[0, 12, ::9], values[1, 8, ::9]])]
    return "error"


if __name__ == "__main__":
    main(sys.argv[1:])

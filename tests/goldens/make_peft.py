"""Makes tests/goldens/adapters: LoRA adapters of golden checkpoints as PEFT writes them, and what PEFT computes.

    .venvs/goldens/bin/pip install --no-deps peft==0.21.2 accelerate psutil   (into the environment of make.py)
    .venvs/goldens/bin/python tests/goldens/make_peft.py

A folder for each adapter, with the logits of its base (a folder beside) for the tokens, masks and positions of the
base's own `logits.npz`, in float32. Everything is seeded.
"""

from __future__ import annotations

import json
import shutil
import zlib

import numpy as np
import torch
from make import HERE, logits, read_float32  # beside this file
from peft import LoraConfig, get_peft_model

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
}  # fmt: skip


def main() -> None:
    for name, (base, options) in ADAPTERS.items():
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


if __name__ == "__main__":
    main()

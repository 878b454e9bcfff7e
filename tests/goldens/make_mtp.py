"""Makes the golden checkpoints of multi-token prediction with transformers, beside those of make.py.

    .venvs/goldens/bin/python tests/goldens/make_mtp.py

Each is a tiny random checkpoint in the form of the released ones, whose last layers are modules that transformers
leaves out of the model itself and reads as an `MtpModel`. `logits.npz` has, beside what make.py writes, `future_1`, ...
what that model computes in float32, zeros where a row's real tokens have no such successor.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from checkpoints import FUTURE_CHECKPOINTS  # beside this file
from make import HERE, logits, random_model, read_float32
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel


def main() -> None:
    for name, (config_class, arguments, modules) in FUTURE_CHECKPOINTS.items():
        config = getattr(transformers, config_class)(**arguments)
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        random_model(name, config).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        cut_modules(folder, config.num_hidden_layers - modules, modules)
        np.savez_compressed(folder / "logits.npz", **all_logits(folder, name, modules))


def cut_modules(folder: Path, layers: int, modules: int) -> None:
    """Make the last `modules` of the layers of a checkpoint those of multi-token prediction."""
    tensors = load_file(folder / "model.safetensors")
    saved = json.loads((folder / "config.json").read_text())
    saved["num_hidden_layers"] = layers
    qwen = saved["model_type"] == "qwen3_next"
    if qwen:  # the released config has no key for them
        saved["layer_types"] = saved["layer_types"][:layers]
        tensors = {name.replace(f"model.layers.{layers}.", "mtp.layers.0."): x for name, x in tensors.items()}
    else:
        saved["num_nextn_predict_layers"] = modules
    for i in range(layers, layers + modules):
        tensors |= qwen_extras(tensors) if qwen else extras(tensors, f"model.layers.{i}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(saved, indent=2) + "\n")


def extras(tensors: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    enorm, hnorm, last, join = random_extras(tensors)
    return {
        f"{layer}.enorm.weight": enorm,
        f"{layer}.hnorm.weight": hnorm,
        f"{layer}.eh_proj.weight": join,
        f"{layer}.shared_head.norm.weight": last,
        f"{layer}.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{layer}.shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }


def qwen_extras(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    enorm, hnorm, last, join = random_extras(tensors)
    return {
        "mtp.pre_fc_norm_embedding.weight": enorm,
        "mtp.pre_fc_norm_hidden.weight": hnorm,
        "mtp.fc.weight": join,
        "mtp.norm.weight": last,
    }


def random_extras(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Three norms and the map that joins two vectors, as large as in `random_model`."""
    width = tensors["model.norm.weight"].shape[0]
    norms = [1 + 0.3 * torch.randn(width) for _ in range(3)]
    return *norms, 1.5 * (2 * width) ** -0.5 * torch.randn(width, 2 * width)


def all_logits(folder: Path, name: str, modules: int) -> dict[str, np.ndarray]:
    model = read_float32(folder, name)
    layers = model.config.num_hidden_layers
    model.config.num_mtp_layers = modules
    if model.config.model_type == "qwen3_next":
        model.config.mtp_layer_types = ["full_attention"] * modules
    else:  # the class itself only knows the numbers of the released checkpoints' modules
        numbers = range(layers, layers + modules)
        model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{i}.*" for i in numbers]
    future = MtpModel.from_pretrained(model).eval()
    found = logits(model)
    shape = (modules, *found["logits"].shape)
    ahead = np.zeros(shape, np.float32)
    for row in range(shape[1]):
        real = np.flatnonzero(found["mask"][row])
        tokens, positions = (torch.tensor(found[key][row : row + 1, real]) for key in ("tokens", "positions"))
        for k, of_module in enumerate(row_logits(model, future, tokens, positions)):
            ahead[k, row, real[: of_module.shape[0]]] = of_module
    return found | {f"future_{k}": values for k, values in enumerate(ahead, 1)}


def row_logits(model, future: MtpModel, tokens: torch.Tensor, positions: torch.Tensor):
    """For each module its logits at every token that has a successor for it to read."""
    with torch.no_grad():
        hidden = model.get_decoder()(tokens, position_ids=positions, use_cache=False).last_hidden_state
        for k in range(len(future.layers)):
            tokens, positions, hidden = tokens[:, 1:], positions[:, 1:], hidden[:, :-1]
            if tokens.shape[1] == 0:
                return
            hidden = future.forward_layer(k, hidden, positions, None, input_ids=tokens)
            yield future._project_to_logits(hidden)[0].numpy()


def check(folder: Path) -> dict[str, float]:
    """The largest differences between logits of the models in `folder` and of the golden ones.

    Both are computed here: the stored logits come from another machine, where float32 rounds in another order.
    """
    found = {}
    for name, (_, _, modules) in FUTURE_CHECKPOINTS.items():
        golden, again = (all_logits(parent / name, name, modules) for parent in (HERE, folder))
        real = golden["mask"] == 1
        keys = ["logits", *(f"future_{k + 1}" for k in range(modules))]
        found[name] = max(float(np.abs(again[key][real] - golden[key][real]).max()) for key in keys)
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        print(json.dumps(check(Path(sys.argv[2]))))
    else:
        main()

"""Makes merges.npz with mergekit: tiny checkpoints, recipes, and the tensors that mergekit makes of them.

    .venvs/goldens/bin/python tests/goldens/make_merges.py     (torch==2.13.0 mergekit==0.1.5 immutables==0.21)

Keys:
    FAMILY/config             config.json
    FAMILY/shapes             JSON: the shape of each tensor by name
    FAMILY/models/MODEL       all tensors as one vector, sorted by name
    FAMILY/recipes            JSON: recipes of `model.merge` by name; folders are named by their model
    FAMILY/merged/RECIPE      as models, by mergekit
    dare/base, models, masks  DARE has random masks, so mergekit runs with given ones on single tensors
    dare/METHOD_RESCALE_NORMALIZE

mergekit joins the experts of a layer before it merges them. The product merges each expert alone, so mixtral's tensors
are given to mergekit's methods as they are stored.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.api import merge_state_dicts, merge_tensors
from mergekit.merge_methods.registry import get
from mergekit.options import MergeOptions
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as torch_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
MODELS = ("base", "b", "c", "d")

COMMON = {"vocab_size": 13, "hidden_size": 8, "num_attention_heads": 4, "torch_dtype": "float32"}
CONFIGS = {
    "llama": {
        **COMMON,
        **{"model_type": "llama", "num_hidden_layers": 4, "num_key_value_heads": 2, "intermediate_size": 12},
        "tie_word_embeddings": False,
    },
    "phi3": {
        **COMMON,
        "model_type": "phi3",
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 12,
        "pad_token_id": 0,
    },
    "gpt2": {
        "vocab_size": 13,
        "n_embd": 8,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 16,
        "model_type": "gpt2",
    },
    "mixtral": {
        **COMMON,
        **{
            "model_type": "mixtral",
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 12,
        },
        **{"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None},
    },
}


def models(*settings: dict) -> list[dict]:
    return [{"model": name, **own} for name, own in zip(MODELS[1:], settings)]


ATTENTION, NETWORK = [0, 0.5, 0.3, 0.7, 1], [1, 0.5, 0.7, 0.3, 0]
WEIGHTS = models({"weight": 0.3}, {"weight": 0.5}, {"weight": 0.9})
BOTH = models({}, {})
STOCK = models({}, {}, {})
SPARSE = models(
    {"weight": 0.3, "density": 0.3}, {"weight": 0.5, "density": 0.6}, {"weight": 0.9, "density": 1.0}
)
SIGNED = models({"weight": -0.3, "density": 0.2}, {"weight": 0.5, "density": 0.7})
LAYERS = models({"weight": {"ffn/*": [0, 1], "*": 0.5}}, {"weight": {"mixer/*": [1, 0.2, 0.4], "*": 0.7}})
SLICES = [
    {"models": [{"model": "b", "layers": [0, 3]}]},
    {"models": [{"model": "c", "layers": [1, 4]}]},
]
PAIRS = [
    {"models": [{"model": "b", "layers": [0, 3]}, {"model": "c", "layers": [1, 4]}]},
    {"models": [{"model": "b", "layers": [2, 3]}, {"model": "c", "layers": [3, 4]}]},
]

# mergekit's method, our method, and the models of both
PLAIN = {
    "linear": ("linear", {"kind": "Linear"}, WEIGHTS),
    "linear_sum": ("linear", {"kind": "Linear", "normalize": False}, WEIGHTS),
    "linear_layers": ("linear", {"kind": "Linear"}, LAYERS),
    "slerp": ("slerp", {"kind": "Slerp", "t": 0.3}, BOTH),
    "slerp_layers": (
        "slerp",
        {"kind": "Slerp", "t": {"mixer/*": ATTENTION, "ffn/*": NETWORK, "*": 0.4}},
        BOTH,
    ),
    "task_arithmetic": ("task_arithmetic", {"kind": "TaskArithmetic"}, WEIGHTS),
    "task_arithmetic_mean": (
        "task_arithmetic",
        {"kind": "TaskArithmetic", "scale": 0.7, "normalize": True},
        LAYERS,
    ),
    "ties": ("ties", {"kind": "Ties"}, SPARSE),
    "ties_sum": ("ties", {"kind": "Ties", "scale": 0.7, "normalize": False, "rescale": "l1"}, SIGNED),
    "dare_all": ("dare_linear", {"kind": "Dare"}, WEIGHTS),
    "dare_ties_all": ("dare_ties", {"kind": "Dare", "elect_signs": True, "scale": 0.7}, WEIGHTS),
    "model_stock": ("model_stock", {"kind": "ModelStock"}, STOCK),
    "model_stock_rows": ("model_stock", {"kind": "ModelStock", "filter_wise": True}, STOCK),
}
RECIPES = {
    "llama": {
        **PLAIN,
        "passthrough": ("passthrough", {"kind": "Passthrough"}, SLICES),
        "slerp_slices": ("slerp", {"kind": "Slerp", "t": [0.1, 0.9]}, PAIRS),
    },
    "phi3": {name: PLAIN[name] for name in ("linear", "slerp", "ties", "ties_sum", "model_stock_rows")},
    "gpt2": {name: PLAIN[name] for name in ("slerp", "ties", "model_stock_rows")},
    "mixtral": {name: PLAIN[name] for name in ("slerp", "ties", "model_stock")},
}
FILTERS = {"mixer/*": "self_attn", "ffn/*": "mlp", "*": "*"}


def main() -> None:
    found = {}
    for seed, (family, config) in enumerate(CONFIGS.items()):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            found |= make_models(root, family, config, seed)
            ours = {}
            for name, (method, own, parts) in RECIPES[family].items():
                ours[name] = recipe_of(own, parts)
                merge = merge_stored if family == "mixtral" else merge_folders
                found[f"{family}/merged/{name}"] = as_vector(merge(root, method, own, parts))
            found[f"{family}/recipes"] = np.array(json.dumps(ours))
    found |= make_dare()
    np.savez_compressed(HERE / "merges.npz", **found)
    count = sum(map(len, RECIPES.values()))
    print(f"{count} merges of mergekit {importlib.metadata.version('mergekit')}")


def merge_folders(root: Path, method: str, ours: dict, parts: list[dict]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as out:
        config = MergeConfiguration.model_validate(mergekit_config(root, method, ours, parts))
        run_merge(config, out, MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
        return load_file(Path(out) / "model.safetensors")


def merge_stored(root: Path, method: str, ours: dict, parts: list[dict]) -> dict[str, np.ndarray]:
    config = mergekit_config(root, method, ours, parts)
    base = config["base_model"]
    paths = dict.fromkeys([base, *(own["model"] for own in config["models"])])
    of_model = lambda name: {own["model"]: own["parameters"].get(name, 1.0) for own in config["models"]}
    wanted = {spec.name for spec in get(method).spec.parameters} & {"weight", "density"}
    merged = merge_state_dicts(
        {path: torch_file(Path(path) / "model.safetensors") for path in paths},
        method,
        parameters=config["parameters"] | {name: of_model(name) for name in wanted},
        base=base,
    )
    return {name: x.numpy() for name, x in merged.items()}


def make_models(root: Path, family: str, config: dict, seed: int) -> dict[str, np.ndarray]:
    """Folders of the models; they share most of their difference from the base, as tuned models do."""
    options = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    made.save_pretrained(root / "base")
    stored = load_file(root / "base" / "model.safetensors")
    text = (root / "base" / "config.json").read_text()
    rng = np.random.default_rng(seed)
    normal = lambda x: rng.normal(size=x.shape).astype(np.float32)
    base = {key: 0.3 * normal(x) + ("norm" in key) for key, x in stored.items()}
    common = {key: 0.1 * normal(x) for key, x in stored.items()}
    shapes = {key: x.shape for key, x in sorted(base.items())}
    found = {f"{family}/config": np.array(text), f"{family}/shapes": np.array(json.dumps(shapes))}
    for name in MODELS:
        tensors = base
        if name != "base":
            tensors = {key: x + common[key] + 0.1 * normal(x) for key, x in base.items()}
        (root / name).mkdir(exist_ok=True)
        save_file(tensors, root / name / "model.safetensors", {"format": "pt"})
        (root / name / "config.json").write_text(text)
        found[f"{family}/models/{name}"] = as_vector(tensors)
    return found


def as_vector(tensors: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def recipe_of(method: dict, parts: list[dict]) -> dict:
    recipe = {"method": method, "slices" if "models" in parts[0] else "models": parts}
    needs_base = method["kind"] in ("TaskArithmetic", "Ties", "Dare", "ModelStock")
    return recipe | ({"base": "base"} if needs_base else {})


def mergekit_config(root: Path, method: str, ours: dict, parts: list[dict]) -> dict:
    """The same recipe as mergekit writes it."""
    names = {"scale": "lambda", "rescale": "rescale"}
    values = {"rescale": ours.get("rescale") == "l1"} if "rescale" in ours else {}
    shared = {
        names.get(key, key): setting_of(x) for key, x in ours.items() if key not in ("kind", "elect_signs")
    }
    config = {"merge_method": method, "dtype": "float32", "parameters": shared | values}
    if method not in ("linear", "passthrough"):
        config["base_model"] = str(root / ("b" if method == "slerp" else "base"))
    if "models" in parts[0]:
        sources = lambda part: [
            {"model": str(root / source["model"]), "layer_range": source["layers"]}
            for source in part["models"]
        ]
        return config | {"slices": [{"sources": sources(part)} for part in parts]}
    of_model = lambda own: {key: setting_of(x) for key, x in own.items() if key != "model"}
    return config | {
        "models": [{"model": str(root / own["model"]), "parameters": of_model(own)} for own in parts]
    }


def setting_of(ours):
    if not isinstance(ours, dict):
        return ours
    return [{"filter": FILTERS[pattern], "value": value} for pattern, value in ours.items()]


def make_dare() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    base, tuned = rng.normal(size=(6, 5)), rng.normal(size=(3, 6, 5))
    masks = rng.random((3, 6, 5)) < np.array([0.3, 0.6, 0.8])[:, None, None]
    tensor = lambda x: torch.tensor(x, dtype=torch.float32)
    found = {"base": tensor(base).numpy(), "models": tensor(tuned).numpy(), "masks": masks}
    densities, weights = [0.3, 0.6, 0.8], [0.5, 0.9, -0.4]
    for method in ("dare_linear", "dare_ties"):
        for rescale in (False, True):
            for normalize in (False, True):
                merged = run_dare(method, base, tuned, masks, densities, weights, rescale, normalize)
                found[f"{method}_{'l1' if rescale else 'none'}_{normalize}"] = merged.numpy()
    return {f"dare/{key}": value for key, value in found.items()}


def run_dare(method, base, tuned, masks, densities, weights, rescale, normalize) -> torch.Tensor:
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (base, *tuned)]
    given = iter(torch.tensor(mask, dtype=torch.float32) for mask in masks)
    by_model = lambda values: dict(enumerate(values, 1))
    parameters = {"weight": by_model(weights), "density": by_model(densities), "lambda": 0.7}
    parameters |= {"normalize": normalize, "rescale": rescale}
    with patch("torch.bernoulli", lambda _: next(given)):
        return merge_tensors(tensors, method, base_index=0, parameters=parameters)


if __name__ == "__main__":
    main()

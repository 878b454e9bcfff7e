"""Merging of models: mergekit's tensors, the papers' formulas, and `python -m model merge`."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from configs.typed import build
from model import (
    load,
)
from model.merge import methods
from model.merge.merge import merge
from model.merge.recipe import Recipe

from .conftest import GOLDENS

MERGES = np.load(GOLDENS / "merges.npz")
FAMILIES = ("llama", "phi3", "gpt2", "mixtral")
NAMES = [(family, name) for family in FAMILIES for name in json.loads(str(MERGES[f"{family}/recipes"]))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """FAMILY/MODEL: the tiny checkpoints that mergekit merged."""
    root = tmp_path_factory.mktemp("merges")
    for family in FAMILIES:
        shapes = json.loads(str(MERGES[f"{family}/shapes"]))
        for name in ("base", "b", "c", "d"):
            folder, vector, start, tensors = root / family / name, MERGES[f"{family}/models/{name}"], 0, {}
            for key, shape in shapes.items():
                tensors[key] = vector[start : start + math.prod(shape)].reshape(shape)
                start += math.prod(shape)
            folder.mkdir(parents=True)
            safetensors.numpy.save_file(tensors, folder / "model.safetensors")
            (folder / "config.json").write_text(str(MERGES[f"{family}/config"]))
    return root


def recipe_in(folder: Path, recipe: dict) -> dict:
    """The recipe with paths in a folder instead of names."""
    found = json.loads(json.dumps(recipe))
    for source in [
        *found.get("models", ()),
        *(s for part in found.get("slices", ()) for s in part["models"]),
    ]:
        source["model"] = str(folder / source["model"])
    if "base" in found:
        found["base"] = str(folder / found["base"])
    return found


def as_vector(folder: Path) -> np.ndarray:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    return np.concatenate([tensors[key].ravel() for key in sorted(tensors)])


def params_of(path: Path) -> dict[str, np.ndarray]:
    return {"/".join(keys): np.asarray(leaf) for keys, leaf in flatten_dict(load(path)[1]).items()}


@pytest.mark.parametrize("family, name", NAMES)
def test_merged_tensors_equal_mergekits(family, name, folders, tmp_path):
    recipe = json.loads(str(MERGES[f"{family}/recipes"]))[name]
    merge(build(Recipe, recipe_in(folders / family, recipe)), tmp_path / "out")
    ours, theirs = as_vector(tmp_path / "out"), MERGES[f"{family}/merged/{name}"]
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-7)
    assert np.abs(theirs).max() > 0.1


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", ["none", "l1"])
@pytest.mark.parametrize("normalize", [False, True])
def test_dare_with_given_masks_equals_mergekits(method, rescale, normalize):
    base, tuned, masks = (MERGES[f"dare/{name}"] for name in ("base", "models", "masks"))
    tau = [methods.keep(m - base, mask, 0.5, rescale) for m, mask in zip(tuned, masks)]
    combine = methods.ties if method == "dare_ties" else methods.task_arithmetic
    merged = combine(base, tau, [0.5, 0.9, -0.4], 0.7, normalize)
    np.testing.assert_allclose(merged, MERGES[f"dare/{method}_{rescale}_{normalize}"], rtol=2e-6, atol=2e-7)

"""Merging of models: mergekit's tensors, the papers' formulas, and `python -m model merge`."""

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from benchmarks.loading import write_made_up
from configs.typed import ConfigError, build
from data import load_tokenizer, train_tokenizer
from model import (
    Attention,
    Block,
    ModelConfig,
    ScalarHead,
    SwiGLU,
    load,
    load_config,
    param_shapes,
    quantize,
    save,
)
from model.__main__ import _commands, main
from model.adapters import add_adapters
from model.blocks.lora import LoRA
from model.blocks.moe import MoE
from model.blocks.residual import HyperConnections
from model.formats.checkpoint import CHUNK_BYTES
from model.formats.lazy import Sliced
from model.layout import relayout
from model.merge import methods
from model.merge.merge import merge, merged_params
from model.merge.plan import plan
from model.merge.recipe import Method, Recipe, Slerp, Ties, read_recipe, value_of

from .conftest import GOLDENS, random_params, tiny

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


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_linear_merge_of_equal_models_is_the_model():
    theta = rows(5, 7)
    np.testing.assert_array_equal(methods.linear([theta, theta], [1.0, 1.0]), theta)
    np.testing.assert_allclose(methods.linear([theta] * 3, [0.2, 0.7, 0.4]), theta, rtol=1e-6)
    np.testing.assert_allclose(
        methods.linear([theta] * 3, [0.2, 0.7, 0.4], normalize=False), 1.3 * theta, rtol=1e-6
    )


@pytest.mark.parametrize("angle", [0.05, 1.0, 2.9])
def test_slerp_of_unit_vectors_goes_along_the_arc(angle):
    first, across = np.float32([[1, 0, 0]]), np.float32([[0, 0.6, 0.8]])
    point = lambda angle: np.cos(angle) * first + np.sin(angle) * across
    for t in (0.0, 0.25, 0.5, 1.0):
        found = methods.slerp(first, point(angle).astype(np.float32), t)
        np.testing.assert_allclose(found, point(t * angle), atol=2e-6)


@pytest.mark.parametrize("factor", [2.0, -1.0, 1.0])
def test_slerp_of_parallel_and_opposite_vectors_is_linear(factor):
    theta = rows(4, 3)
    found = methods.slerp(theta, np.float32(factor) * theta, 0.25)
    np.testing.assert_allclose(found, (0.75 + 0.25 * factor) * theta, rtol=1e-6)
    zero = np.zeros_like(theta)  # has no angle: taken as a right one
    np.testing.assert_allclose(methods.slerp(theta, zero, 0.5), np.sqrt(0.5) * theta, rtol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("normalize", [False, True])
def test_ties_equals_a_loop_over_numbers(density, normalize):
    theta_0, tau, weights = rows(30), rows(3, 30, seed=1), [0.5, 1.0, 0.7]
    trimmed = [methods.trim(tau_i, density) for tau_i in tau]
    found = methods.ties(theta_0, trimmed, weights, 0.8, normalize)
    wanted = []
    for n in range(30):
        values = []
        for tau_i, w in zip(tau, weights):
            larger = sum(abs(other) > abs(tau_i[n]) for other in tau_i)
            values.append(w * tau_i[n] if larger < int(density * 30) else 0.0)
        sign = 1 if sum(values) >= 0 else -1
        agree = [(v, w) for v, w in zip(values, weights) if v * sign > 0]
        mean = sum(v for v, _ in agree) / (sum(w for _, w in agree) if normalize and agree else 1)
        wanted.append(theta_0[n] + 0.8 * mean)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_trim_keeps_exactly_its_share_of_equal_magnitudes_and_at_least_one():
    tau = np.float32([[1, -1, 1, -1], [2, 1, -1, 0]])
    np.testing.assert_array_equal(methods.trim(tau, 0.5), [[1, -1, 1, 0], [2, 0, 0, 0]])
    np.testing.assert_array_equal(methods.trim(tau, 0.01), [[0, 0, 0, 0], [2, 0, 0, 0]])
    np.testing.assert_array_equal(methods.trim(tau, 0.01, "l1"), [[0, 0, 0, 0], [8, 0, 0, 0]])
    np.testing.assert_array_equal(methods.trim(tau, 1.0), tau)


def test_dare_has_the_difference_as_its_expectation():
    delta, density, seeds = rows(6, 5), 0.25, 4000
    runs = np.stack([methods.drop(delta, density, np.random.default_rng(seed)) for seed in range(seeds)])
    assert set(np.unique(np.round(runs / delta, 4))) == {0.0, 4.0}
    error = np.abs(delta) * np.sqrt((1 - density) / density / seeds)  # standard deviation of the mean
    assert np.all(np.abs(runs.mean(0) - delta) < 5 * error)
    np.testing.assert_array_equal(methods.drop(delta, 1.0, np.random.default_rng(0)), delta)
    share = (methods.drop(rows(300, 300), 0.7, np.random.default_rng(0), "none") != 0).mean()
    assert abs(share - 0.7) < 0.01


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_is_the_point_nearest_to_the_centre_of_the_models(filter_wise):
    # Models at right angles around a centre, as the paper finds them: w_i = mu + r e_i, and w_0 = mu + h e_0.
    count, r, h, width = 4, 0.5, 0.3, 12
    e = np.linalg.qr(rows(width, width).astype(np.float64))[0].astype(np.float32)
    mu = rows(width, seed=1)
    w_0, w = mu + h * e[0], [mu + r * e[i] for i in range(1, count + 1)]
    t = np.linspace(0, 1, 20_001)[:, None]
    points = t * np.mean(w, axis=0) + (1 - t) * w_0
    nearest = points[np.argmin(np.square(points - mu).sum(1))]
    as_rows = (lambda x: np.stack([x, x])) if filter_wise else (lambda x: x.reshape(3, 4))
    found = methods.model_stock(as_rows(w_0), [as_rows(x) for x in w], filter_wise)
    np.testing.assert_allclose(found, as_rows(nearest), atol=1e-4)


def test_model_stock_of_equal_models_is_that_model_and_of_opposite_ones_the_base():
    w_0, offset = rows(4, 3), rows(4, 3, seed=1)
    np.testing.assert_allclose(
        methods.model_stock(w_0, [w_0 + offset] * 3), w_0 + offset, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(methods.model_stock(w_0, [w_0 + offset, w_0 - offset]), w_0, atol=1e-6)


def test_numbers_follow_layers_and_names():
    names = "q", "mixer/q", "block_2/mixer/q"
    for depth in (0, 0.1, 0.5, 0.9, 1):
        wanted = np.interp(depth, [0, 0.5, 1], [1, 5, 2])
        assert value_of((1.0, 5.0, 2.0), names, depth, "t") == pytest.approx(wanted)
    first = {"block_2/*": 3.0, "mixer/*": (0.0, 1.0), "*": 7.0}
    assert value_of(first, names, 0.5, "t") == 3
    assert value_of(first, ("q", "mixer/q", "block_1/mixer/q"), 0.25, "t") == 0.25
    assert value_of(first, ("embedding",) * 3, 0.0, "t") == 7


def test_tensors_without_axes_are_merged_as_vectors_of_one_number():
    theta_0, theta = np.float32(rows(1)), [rows(1, seed=seed) for seed in (1, 2, 3)]
    tau = [theta_i - theta_0 for theta_i in theta]
    rng = lambda: np.random.default_rng(0)
    for merged in (
        lambda one, many, base: methods.linear(many, [1, 2, 3]),
        lambda one, many, base: methods.slerp(base, many[0], 0.3),
        lambda one, many, base: methods.ties(base, [methods.trim(tau_i, 0.5) for tau_i in one], [1, 2, 3]),
        lambda one, many, base: methods.task_arithmetic(
            base, [methods.drop(tau_i, 0.5, rng()) for tau_i in one], [1, 2, 3]
        ),
        lambda one, many, base: methods.model_stock(base, many, filter_wise=True),
    ):
        scalars = lambda arrays: [array.reshape(()) for array in arrays]
        found = merged(scalars(tau), scalars(theta), theta_0.reshape(()))
        assert np.shape(found) == ()
        np.testing.assert_array_equal(found, merged(tau, theta, theta_0)[0])


def recipe(method, models, **more):
    return build(Recipe, {"method": method, "models": [{"model": str(model)} for model in models], **more})


@pytest.fixture(scope="module")
def scattered(tmp_path_factory):
    """One architecture in three layouts: a folder, a native checkpoint, a scanned one in bfloat16; and the base."""
    root = tmp_path_factory.mktemp("scattered")
    for seed, name in enumerate(("folder", "native", "scanned", "base")):
        cfg = tiny(scan=name == "scanned", param_dtype="bfloat16" if name == "scanned" else "float32")
        save(
            root / name, cfg, random_params(cfg, seed), format="huggingface" if name == "folder" else "native"
        )
    return root


TRIMMED = {"kind": "Ties", "rescale": "l1"}


@pytest.mark.parametrize("format", ["huggingface", "native"])
@pytest.mark.parametrize("order", list(itertools.permutations(["folder", "native", "scanned"], 3))[::2])
def test_layouts_of_the_sources_and_the_result_do_not_change_it(order, format, scattered, tmp_path):
    models = [{"model": str(scattered / name), "density": 0.4} for name in order]
    given = build(Recipe, {"method": TRIMMED, "models": models, "base": str(scattered / "base")})
    merge(given, tmp_path / "out", format, "float32")
    cfg = load_config(tmp_path / "out")
    assert cfg.scan == (format == "native" and order[0] == "scanned")
    unrolled = {
        name: load(scattered / name, cfg=tiny())[1] for name in ("folder", "native", "scanned", "base")
    }
    flat = {name: flatten_dict(params) for name, params in unrolled.items()}
    _, merged = load(tmp_path / "out", cfg=cfg.replace(scan=False))
    for path, array in flatten_dict(merged).items():
        theta = lambda name: np.asarray(flat[name][path], np.float32)  # noqa: B023
        tau = [methods.trim(theta(name) - theta("base"), 0.4, "l1") for name in order]
        wanted = methods.ties(theta("base"), tau, [1, 1, 1])
        np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6, err_msg="/".join(path))


@pytest.mark.parametrize("format", ["huggingface", "native"])
@pytest.mark.parametrize(
    "name", ["bert_classes", "blt", "dbrx", "deepseek_v3_mtp", "falcon_h1", "gpt_oss", "llama4_text", "t5"]
)
def test_the_mean_of_a_model_and_itself_is_the_model_in_every_kind_of_family(name, format, tmp_path):
    cfg, params = load(GOLDENS / name)
    merge(recipe({"kind": "Linear"}, [GOLDENS / name] * 2), tmp_path / "out", format)
    merged_cfg, merged = load(tmp_path / "out")
    assert merged_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_the_result_has_the_dtype_of_the_first_source_or_the_given_one(scattered, tmp_path):
    for first, dtype, wanted in [
        ("scanned", None, "bfloat16"),
        ("native", None, "float32"),
        ("native", "float16", "float16"),
    ]:
        second = "native" if first == "scanned" else "scanned"
        for format in ("huggingface", "native"):
            out = tmp_path / f"{first}{dtype}{format}"
            merge(recipe({"kind": "Linear"}, [scattered / first, scattered / second]), out, format, dtype)
            assert {str(leaf.dtype) for leaf in jax.tree.leaves(load(out)[1])} == {wanted}
            assert load_config(out).dtype == (dtype or tiny().dtype if format == "native" else wanted)


def test_models_in_bfloat16_are_summed_in_float32(tmp_path):
    # The mean of 1, 1 + 2^-7 and 1 + 2^-7 is nearer to 1 + 2^-7; sums in bfloat16 would lose both, and give 1.
    cfg = tiny(layers=1, param_dtype="bfloat16")
    for name, value in zip("abc", (1, 1 + 2**-7, 1 + 2**-7)):
        save(tmp_path / name, cfg, jax.tree.map(lambda x: jax.numpy.full_like(x, value), random_params(cfg)))  # noqa: B023
    merge(recipe({"kind": "Linear"}, [tmp_path / name for name in "abc"]), tmp_path / "out")
    for leaf in jax.tree.leaves(load(tmp_path / "out")[1]):
        assert leaf.dtype == "bfloat16" and (leaf == 1 + 2**-7).all()


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Two models that no Hugging Face family can express, with experts, scanned and unrolled."""
    root = tmp_path_factory.mktemp("odd")
    block = Block(Attention(2, 1, 6), MoE(3, 1, SwiGLU(8)), residual=HyperConnections(2))
    cfg = ModelConfig(17, 12, (block,) * 2, heads=(ScalarHead("value"),))
    for seed, name in enumerate("ab"):
        params = random_params(cfg, seed)
        save(root / name, cfg, params)
        save(root / f"{name}_scanned", *relayout(cfg, params, scan=True))
    return root


def test_a_model_of_no_family_is_merged_by_parameter_and_expert(odd, tmp_path):
    given = {"kind": "Slerp", "t": 0.3}
    merge(recipe(given, [odd / "a", odd / "b"]), tmp_path / "out", "native")
    merge(recipe(given, [odd / "a_scanned", odd / "b_scanned"]), tmp_path / "scanned", "native")
    merged, a, b = (params_of(path) for path in (tmp_path / "out", odd / "a", odd / "b"))
    for name, array in merged.items():
        of_experts = "experts/" in name
        slerp = lambda x, y: methods.slerp(x, y, 0.3)
        wanted = np.stack(list(map(slerp, a[name], b[name]))) if of_experts else slerp(a[name], b[name])
        np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6, err_msg=name)
    assert any("experts/" in name for name in merged)
    _, scanned = load(tmp_path / "scanned", cfg=load_config(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out")[1], scanned)


def test_dares_random_numbers_follow_from_names_and_not_from_the_order(folders, tmp_path):
    folder = folders / "phi3"
    dare = lambda seed: plan(
        build(
            Recipe,
            {
                "method": {"kind": "Dare", "seed": seed, "rescale": "none"},
                "base": str(folder / "base"),
                "models": [{"model": str(folder / name), "density": 0.5} for name in "bc"],
            },
        )
    )
    flat = lambda params: flatten_dict(params)
    forward = {path: np.asarray(leaf) for path, leaf in flat(merged_params(dare(0))).items()}
    backward = {path: np.asarray(leaf) for path, leaf in reversed(flat(merged_params(dare(0))).items())}
    other = {path: np.asarray(leaf) for path, leaf in flat(merged_params(dare(1))).items()}
    for path, array in forward.items():
        np.testing.assert_array_equal(array, backward[path])
    assert sum(np.array_equal(array, other[path]) for path, array in forward.items()) <= 2
    base = load(folder / "base")[1]
    changed = lambda i: np.asarray(forward[f"block_{i}", "mixer", "q"] != base[f"block_{i}"]["mixer"]["q"])
    assert not np.array_equal(changed(0), changed(1))


def test_a_slice_may_have_its_own_method_and_layers_of_the_base(scattered, tmp_path):
    layers = lambda name, *pair: {"model": str(scattered / name), "layers": list(pair)}
    given = {
        "method": {"kind": "Passthrough", "scale": {"down": 0.5, "*": 1.0}},
        "base": str(scattered / "base"),
        "slices": [
            {"models": [layers("folder", 0, 2)]},
            {
                "method": {"kind": "TaskArithmetic"},
                "models": [layers("native", 1, 3)],
                "base_layers": [0, 2],
            },
        ],
    }
    merge(build(Recipe, given), tmp_path / "out")
    cfg, merged = load(tmp_path / "out")
    assert cfg.blocks == tiny(layers=4).blocks
    folder, native, base = (params_of(scattered / name) for name in ("folder", "native", "base"))
    np.testing.assert_array_equal(merged["block_1"]["ffn"]["down"], 0.5 * folder["block_1/ffn/down"])
    np.testing.assert_array_equal(merged["block_1"]["ffn"]["up"], folder["block_1/ffn/up"])
    wanted = base["block_1/ffn/up"] + (native["block_2/ffn/up"] - base["block_1/ffn/up"])
    np.testing.assert_array_equal(merged["block_3"]["ffn"]["up"], wanted)
    np.testing.assert_array_equal(merged["embedding"], folder["embedding"])
    # the parts after the blocks are those of the last slice
    base_norm = base["final_norm/scale"]
    np.testing.assert_array_equal(
        merged["final_norm"]["scale"], base_norm + (native["final_norm/scale"] - base_norm)
    )


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A base and two models with a tokenizer: a folder, and a run of three checkpoints; another folder."""
    root = tmp_path_factory.mktemp("chats")
    tokenizer = train_tokenizer("bpe", ["the cat sat on the mat"] * 20, 264, digits=3)
    tokenizer.save(root / "run" / "tokenizer")
    files = {item.name: item.read_bytes() for item in (root / "run" / "tokenizer").iterdir()}
    cfg = tiny(layers=2).replace(vocab_size=320)
    save(root / "base", cfg, random_params(cfg), format="huggingface", tokenizer=files)
    save(root / "other", cfg, random_params(cfg, 1), format="huggingface", tokenizer=files)
    for step in (5, 10, 20):
        save(root / "run" / "checkpoints" / str(step), cfg, random_params(cfg, step))
    return root


def command(*arguments, folder):
    """`python -m model` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(GOLDENS.parents[1]), "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "model", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.parametrize("format", ["huggingface", "native"])
def test_the_command_merges_as_its_recipe_says(format, chats, tmp_path):
    given = {
        "method": {"kind": "TaskArithmetic", "scale": 0.5},
        "base": "base",
        "models": [{"model": "run", "weight": {"ffn/*": 2, "*": 1}}, {"model": "other", "weight": -1}],
    }
    (tmp_path / "recipe.json").write_text(json.dumps(given))
    ran = command("merge", tmp_path / "recipe.json", tmp_path / "out", f"--format={format}", folder=chats)
    assert ran.returncode == 0, ran.stderr
    assert "3 models merged in 20 tensors" in ran.stdout and f"written as {format}" in ran.stdout
    assert "merging" in ran.stderr and "/s" in ran.stderr and "warning" not in ran.stderr
    merged, base, run, other = (
        params_of(p) for p in (tmp_path / "out", chats / "base", chats / "run", chats / "other")
    )
    for name, array in merged.items():
        weight = 2 if "ffn/" in name else 1
        wanted = base[name] + 0.5 * (weight * (run[name] - base[name]) - (other[name] - base[name]))
        np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6, err_msg=name)
    own = load_tokenizer(chats / "run")
    messages = [{"role": "user", "content": "the cat 123"}]
    assert load_tokenizer(tmp_path / "out").apply_chat_template(messages) == own.apply_chat_template(messages)


def test_the_last_checkpoints_of_a_run_are_averaged(chats, tmp_path):
    ran = command("average", "run", "--last=2", tmp_path / "last", "--format=native", folder=chats)
    assert ran.returncode == 0, ran.stderr
    steps = chats / "run" / "checkpoints"
    ran = command("average", steps / "10", steps / "20", tmp_path / "named", "--format=native", folder=chats)
    assert ran.returncode == 0, ran.stderr
    last, named, ten, twenty = (
        params_of(path) for path in (tmp_path / "last", tmp_path / "named", steps / "10", steps / "20")
    )
    for name, array in last.items():
        np.testing.assert_allclose(array, (ten[name] + twenty[name]) / 2, rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(array, named[name])
    assert load_tokenizer(tmp_path / "last").vocab_size == load_tokenizer(chats / "run").vocab_size


def test_tokens_that_mean_other_texts_are_a_warning(chats, tmp_path, capsys):
    cfg = load_config(chats / "base")
    train_tokenizer("bpe", ["a dog lay in the hay"] * 20, 264, digits=3).save(tmp_path / "tokenizer")
    files = {item.name: item.read_bytes() for item in (tmp_path / "tokenizer").iterdir()}
    save(tmp_path / "dog", cfg, random_params(cfg), format="huggingface", tokenizer=files)
    assert main(["average", str(chats / "base"), str(tmp_path / "dog"), str(tmp_path / "out")]) == 0
    one, other = load_tokenizer(chats / "base"), load_tokenizer(tmp_path / "dog")
    common = min(one.vocab_size, other.vocab_size)
    differ = sum(one.bytes_of(i) != other.bytes_of(i) for i in range(common))
    differ += abs(one.vocab_size - other.vocab_size)
    error = capsys.readouterr().err
    assert differ > 0 and f"warning: {differ} tokens of {tmp_path / 'dog'} differ from those of" in error
    assert load_tokenizer(tmp_path / "out").encode("the cat") == one.encode("the cat")
    named = recipe({"kind": "Linear"}, [chats / "base", tmp_path / "dog"], tokenizer=str(tmp_path / "dog"))
    merge(named, tmp_path / "named")
    assert load_tokenizer(tmp_path / "named").encode("a dog") == other.encode("a dog")


@pytest.fixture(scope="module")
def others(chats):
    """Models that do not fit `base` of `chats`, beside it."""
    cfg = load_config(chats / "base")
    longer = dataclasses.replace(
        cfg.blocks[0].mixer, rope=dataclasses.replace(cfg.blocks[0].mixer.rope, theta=5e5)
    )
    changed = {
        "wide": cfg.replace(blocks=(dataclasses.replace(cfg.blocks[0], ffn=SwiGLU(48)), cfg.blocks[1])),
        "deep": cfg.replace(blocks=cfg.blocks * 2),
        "far": cfg.replace(blocks=(dataclasses.replace(cfg.blocks[0], mixer=longer),) * 2),
        "large": cfg.replace(vocab_size=384),
    }
    for name, other in changed.items():
        save(chats / name, other, random_params(other), format="native")
    params = random_params(cfg)
    save(chats / "rounded", cfg, quantize(cfg, params, "int8", block="all"))
    adapted = add_adapters(cfg, params, LoRA(2, 4.0), jax.random.key(0))
    save(chats / "adapted", *adapted)
    return chats


TASK = {"kind": "TaskArithmetic"}
BAD = {
    "wide": ({"models": ["base", "wide"]}, r"base and wide differ: blocks\[0\].ffn.width is 40 and 48. Only models"),
    "deep": ({"models": ["base", "deep"]}, "differ: the number of blocks is 2 and 4"),
    "far": ({"models": ["base", "far"]}, r"rope.theta is 100.0 and 500000.0; .*name the model that gives the config"),
    "large": ({"models": ["base", "large"]}, "vocab_size is 320 and 384"),
    "quantized": ({"models": ["base", "rounded"]}, r"rounded: block_0/.* is quantized.*dequantize it first"),
    "adapters": ({"models": ["base", "adapted"]}, r"adapted: has adapters.*model convert adapted DST --slot=0"),
    "missing": ({"models": ["base", "othr"]}, r"othr: no such file or folder. Did you mean other"),
    "weights": (
        {"models": [("base", {"weight": 1}), ("other", {"weight": {"up": -1, "*": 1}})]},
        r"the weights of .*up_proj.weight sum to 0 \(1, -1\).*set normalize to false",
    ),
    "infinite": ({"models": [("base", {"weight": 1e999}), "other"]}, "weight of base is inf"),
    "density": (
        {"method": {"kind": "Ties"}, "models": [("other", {"density": 1.5})], "base": "base"},
        "density of other is 1.5 for .*; wanted more than 0, up to 1",
    ),
    "zero density": (
        {"method": {"kind": "Dare"}, "models": [("other", {"density": 0})], "base": "base"},
        "density of other is 0 ",
    ),
    "key": ({"models": [("base", {"wieght": 1})]}, r"models\[0\].wieght is not a key of Source. Did you mean weight"),
    "kind": ({"method": {"kind": "Tie"}, "models": ["base"]}, "recipe.method.kind='Tie' is unknown.*Did you mean Ties"),
    "pattern": ({"models": [("base", {"weight": {"ffn/upp": 1}})]}, "matches 'ffn/upp'. Did you mean ffn/up"),
    "no pattern": ({"models": [("base", {"weight": {"ffn/*": 1}}), "other"]}, r'has no pattern for .*. Add "\*"'),
    "empty": ({"models": [("base", {"weight": []}), "other"]}, "weight of base is an empty list"),
    "one of two": ({"method": {"kind": "Slerp"}, "models": ["base"]}, "models has 1 models; Slerp merges 2"),
    "stock": ({"method": {"kind": "ModelStock"}, "models": ["other"], "base": "base"}, "ModelStock merges at least 2"),
    "base": ({"method": TASK, "models": ["other"]}, "TaskArithmetic needs `base`"),
    "is base": ({"method": TASK, "models": ["base"], "base": "base"}, r"models\[0\] is the base"),
    "no base": ({"models": ["other"], "base": "base"}, "Linear has no base"),
    "unread": ({"models": [("base", {"density": 0.5})]}, r"models\[0\].density: Linear has no density"),
    "nothing": ({"models": []}, "either models, which are merged whole, or slices"),
    "layers": ({"slices": [[("base", {"layers": [1, 3]})]]}, r"slices\[0\] asks for layers \[1, 3\] of base, .*has 2"),
    "no layers": ({"slices": [[("base", {"layers": [2, 2]})]]}, r"layers=\[2, 2\]: wanted the first layer"),
    "unequal": (
        {"slices": [[("base", {"layers": [0, 1]}), ("other", {"layers": [0, 2]})]]},
        r"a slice has sources of equally many layers; given: \[0, 1\], \[0, 2\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_recipe_that_can_not_be_merged_says_what_to_mend(case, others, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(others)
    given, wanted = BAD[case]
    source = lambda own: {"model": own} if isinstance(own, str) else {"model": own[0], **own[1]}
    text = {"method": {"kind": "Linear"}, **given}
    if "models" in text:
        text["models"] = [source(own) for own in text["models"]]
    if "slices" in text:
        text["slices"] = [{"models": [source(own) for own in part]} for part in text["slices"]]
    (tmp_path / "recipe.json").write_text(json.dumps(text))
    assert main(["merge", str(tmp_path / "recipe.json"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(wanted, error), error
    assert sorted(item.name for item in tmp_path.iterdir()) == ["recipe.json"]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("{", "not JSON"),
        ("[]", "recipe=\\[\\] is of type list"),
        (None, "no such file. Give a recipe, a JSON file"),
    ],
)
def test_a_file_that_is_no_recipe_is_an_error(text, wanted, tmp_path):
    if text is not None:
        (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ConfigError, match=wanted):
        read_recipe(tmp_path / "recipe.json")


def test_the_documentations_recipe_is_read_and_its_commands_parse(tmp_path):
    page = (GOLDENS.parents[1] / "docs" / "model.md").read_text()
    section = page[page.index("## Merge") : page.index("## Families")]
    (tmp_path / "recipe.json").write_text(re.findall("```json\n(.*?)```", section, re.DOTALL)[0])
    found = read_recipe(tmp_path / "recipe.json")
    assert isinstance(found.method, Ties) and found.models[1].weight == {"ffn/*": (0.0, 1.0), "*": 0.5}
    lines = re.findall("^python -m model (.*)$", section, re.MULTILINE)
    parsed = [_commands()._parser.parse_args(line.split()) for line in lines]
    assert [own.destination for own in parsed] == ["runs/averaged", "runs/both", "runs/merged"]
    assert parsed[0].last == 5 and parsed[1].sources == ["runs/maths", "runs/code"]
    for name, cls in {member.__name__: member for member in get_args(Method)}.items():
        row = next(line for line in section.splitlines() if line.startswith(f"| `{name}` |"))
        settings = {field.name for field in dataclasses.fields(cls)}
        assert settings == set(re.findall("`(\\w+)`", row.split("|")[3])) | ({"elect_signs"} & settings)


def test_averages_that_can_not_be_say_what_to_mend(chats, tmp_path, capsys):
    run, out = str(chats / "run"), str(tmp_path / "out")
    for arguments, wanted in [
        ([run, out, "--last=4"], "has 3 complete checkpoints (5, 10, 20)"),
        ([run, out, "--last=0"], "--last=0"),
        ([str(chats / "base"), out, "--last=1"], "has no checkpoints/"),
        ([run, str(chats / "base"), out, "--last=1"], "2 paths are given"),
        ([run, out], "alone is"),
        ([run, str(chats / "base"), str(chats / "other")], "already exists"),
        ([run, str(chats / "base"), f"{out}.gguf"], "a merge writes a folder; give its name"),
    ]:
        assert main(["average", *arguments]) == 2
        assert wanted in capsys.readouterr().err
        assert not Path(out).exists()


def test_models_that_differ_in_more_than_shapes_are_merged_if_one_gives_the_config(others, tmp_path):
    models = [others / "base", others / "far"]
    merge(recipe({"kind": "Linear"}, models, config=str(others / "far")), tmp_path / "out")
    cfg, merged = load(tmp_path / "out")
    assert cfg.blocks == load_config(others / "far").blocks != load_config(others / "base").blocks
    base, far = (params_of(path) for path in models)
    np.testing.assert_allclose(merged["embedding"], (base["embedding"] + far["embedding"]) / 2, rtol=1e-6)
    with pytest.raises(ConfigError, match="block_0/ffn/.* is .*40.* and .*48"):
        plan(recipe({"kind": "Linear"}, [others / "base", others / "wide"], config=str(others / "base")))


def test_weights_may_sum_to_zero_where_signs_are_elected(folders, tmp_path):
    folder = folders / "llama"
    models = [{"model": str(folder / "b"), "weight": 1}, {"model": str(folder / "c"), "weight": -1}]
    for method in ({"kind": "Ties"}, {"kind": "Dare", "elect_signs": True, "normalize": True}):
        given = build(Recipe, {"method": method, "models": models, "base": str(folder / "base")})
        merge(given, tmp_path / method["kind"])
        merged = as_vector(tmp_path / method["kind"])
        base, b, c = (MERGES[f"llama/models/{name}"] for name in ("base", "b", "c"))
        np.testing.assert_allclose(
            merged, methods.ties(base, [b - base, c - base], [1, -1]), rtol=1e-5, atol=1e-6
        )


def test_parameters_in_one_tensor_have_one_number(folders):
    models = [{"model": str(folders / "phi3" / "b")}, {"model": str(folders / "phi3" / "c")}]
    given = lambda t: plan(build(Recipe, {"method": {"kind": "Slerp", "t": t}, "models": models}))
    wanted = "method.t: block_0/mixer/q: 0.1, block_0/mixer/k: 0.2, .*are one tensor, .*qkv_proj.weight. Give them one"
    with pytest.raises(ConfigError, match=wanted):
        given({"q": 0.1, "*": 0.2})
    by_name = {step.tensor.name: step for step in given({"q": 0.1, "k": 0.1, "v": 0.1, "*": 0.2}).steps}
    assert by_name["model.layers.1.self_attn.qkv_proj.weight"].method == Slerp(0.1)
    assert by_name["model.layers.1.self_attn.o_proj.weight"].method == Slerp(0.2)


@pytest.mark.parametrize("format", ["huggingface", "native"])
def test_a_merge_that_stops_leaves_nothing(format, chats, tmp_path, capsys, monkeypatch):
    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    given = recipe({"kind": "Linear"}, [chats / "base", chats / "other"])
    with pytest.raises(KeyboardInterrupt):
        merge(given, tmp_path / "out", format, report=stop)
    given = recipe({"kind": "Linear", "normalize": False}, [chats / "base", chats / "other"])
    heavy = dataclasses.replace(given, models=tuple(dataclasses.replace(s, weight=1e5) for s in given.models))
    with pytest.raises(ValueError, match="has the value .* float16 can't hold.*Use bfloat16"):
        merge(heavy, tmp_path / "out", format, "float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["huggingface", "native"])
def test_progress_counts_each_byte_of_the_result_once(format, folders, tmp_path):
    seen = []
    given = recipe({"kind": "Slerp"}, [folders / "phi3" / "b", folders / "phi3" / "c"])
    merge(given, tmp_path / "out", format, "bfloat16", report=lambda *numbers: seen.append(numbers))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(load(tmp_path / "out")[1]))
    done = [done for done, _ in seen]
    assert done == sorted(set(done)) and done[-1] == size and {total for _, total in seen} == {size}


@pytest.mark.parametrize("scan", [False, True])
def test_no_more_than_a_layer_of_a_parameter_is_read_at_once(scan, tmp_path, monkeypatch):
    cfg = tiny(layers=4, scan=scan)
    for seed, name in enumerate("ab"):
        save(tmp_path / name, cfg, random_params(cfg, seed))
    read, of = [], Sliced.__array__
    monkeypatch.setattr(
        Sliced, "__array__", lambda self, *a, **k: read.append(self.shape) or of(self, *a, **k)
    )
    merge(recipe({"kind": "Slerp"}, [tmp_path / "a", tmp_path / "b"]), tmp_path / "out", "native")
    # the embedding; four layers of a map would be more
    assert max(math.prod(shape) for shape in read) == 61 * 24
    assert sum(math.prod(shape) for shape in read) == 2 * sum(
        x.size for x in jax.tree.leaves(param_shapes(cfg))
    )


MEASURE = """
import json, sys, threading, time
from model.merge.merge import merge
from model.merge.recipe import read_recipe

def private():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, private())
        time.sleep(0.002)
recipe = read_recipe(sys.argv[1])
before = private()
thread = threading.Thread(target=watch); thread.start()
merge(recipe, sys.argv[2], sys.argv[3])
done = True; thread.join()
print(json.dumps((peak - before) * 1024))
"""


@pytest.mark.skipif(not os.path.isfile("/proc/self/status"), reason="memory is read from /proc")
@pytest.mark.parametrize(
    "method, format, few",
    [("Linear", "huggingface", 6), pytest.param("Ties", "native", 12, marks=pytest.mark.slow)],
)
def test_peak_memory_is_a_few_tensors_however_large_and_many_the_models(method, format, few, tmp_path):
    names = "abcdefgh" if method == "Linear" else "ab"
    for name in ("base", *names):
        total, largest = write_made_up(tmp_path / name, 96 if format == "huggingface" else 160)
    given = {"method": {"kind": method}, "models": [{"model": str(tmp_path / name)} for name in names]}
    if method == "Ties":
        given["base"] = str(tmp_path / "base")
        given["models"] = [own | {"density": 0.5} for own in given["models"]]
    (tmp_path / "recipe.json").write_text(json.dumps(given))
    line = [sys.executable, "-c", MEASURE, tmp_path / "recipe.json", tmp_path / "out", format]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    run = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=True, env=environment)
    peak, in_float32 = int(run.stdout.splitlines()[-1]), 2 * largest
    allowed = few * in_float32 + 20e6  # threads and buffers
    if format == "native":  # written in chunks, each beside its compressed form
        allowed += 2 * CHUNK_BYTES
    assert peak < allowed < total

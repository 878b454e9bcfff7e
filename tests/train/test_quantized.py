"""Adapters are trained over a quantized model: QLoRA, Dettmers et al. 2023, arXiv:2305.14314."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import decoder, init, quantize
from model.adapters import add_adapters, is_adapter
from model.blocks.lora import LoRA
from model.weights import is_quantized
from tests.policy import adamw, policy_state, policy_step
from train.schedules import Cosine

STEPS = 60


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_adapters_learn_a_text_and_the_quantized_weights_stay(kind):
    cfg = decoder(32, 32, 2, 4, 2, 8, 64, rope_theta=100.0)
    base = quantize(cfg, init(cfg, jax.random.key(0)), kind, 16)
    cfg, params = add_adapters(cfg, base, LoRA(8, 16.0), jax.random.key(1))
    tokens = np.resize(np.random.default_rng(0).permutation(32), (4, 25)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": np.ones((4, 24), np.float32)}
    batch |= {
        "segment_ids": np.ones((4, 24), np.int32),
        "positions": np.tile(np.arange(24, dtype=np.int32), (4, 1)),
    }
    optimizer = adamw(cfg, STEPS, Cosine(5), peak_lr=3e-2, weight_decay=0.0)
    step = jax.jit(policy_step(cfg, optimizer))
    state, losses = policy_state(params, optimizer), []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].mean()))
    assert losses[0] > 3 and losses[-1] < 0.2, losses
    flat = dict(jax.tree.leaves_with_path(state.params["policy"], is_leaf=is_quantized))
    for path, leaf in jax.tree.leaves_with_path(base, is_leaf=is_quantized):
        jax.tree.map(np.testing.assert_array_equal, flat[path], leaf)
    changed = [path for path in flat if is_adapter(tuple(key.key for key in path))]
    assert len(changed) == len(flat) - len(jax.tree.leaves(base, is_leaf=is_quantized))
    assert any(jnp.abs(flat[path]).max() > 0.05 for path in changed if path[-1].key.endswith("_lora_b"))

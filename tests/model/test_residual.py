"""Residual connections: plain, scaled, parallel and hyper-connections; blocks of a mixer or of a network alone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import Block, ModelConfig, Rope, apply, init, init_cache, load, param_shapes, save
from model.blocks.mixture_of_depths import MixtureOfDepths
from model.blocks.mixture_of_recursions import MixtureOfRecursions
from model.blocks.residual import HyperConnections, ParallelResidual, Residual
from model.inputs.encoder import Encoder
from model.layout import relayout
from model.readouts.mtp import ParallelMTP

from .conftest import GOLDENS, applied, check_decoding, compiled_fast, random_params, random_tokens, tiny

forward = compiled_fast(applied, static_argnums=0)


def with_residual(residual, layers=2, **changes):
    cfg = tiny(layers=layers, **changes)
    return cfg.replace(blocks=tuple(dataclasses.replace(block, residual=residual) for block in cfg.blocks))


def test_a_block_of_one_part_is_half_of_a_block():
    """A mixer alone and then a network alone are the block of both; so are their parameters."""
    cfg = tiny(layers=1)
    block = cfg.blocks[0]
    halves = cfg.replace(
        blocks=(
            dataclasses.replace(block, ffn=None),
            dataclasses.replace(block, mixer=None, residual=Residual()),
        )
    )
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 9))
    whole = params["block_0"]
    split = {key: value for key, value in params.items() if key != "block_0"}
    split["block_0"] = {key: whole[key] for key in ("mixer_norm", "mixer")}
    split["block_1"] = {key: whole[key] for key in ("ffn_norm", "ffn")}
    assert jax.tree.map(jnp.shape, split) == jax.tree.map(jnp.shape, param_shapes(halves))
    wanted = forward(cfg, params, tokens).logits
    np.testing.assert_allclose(forward(halves, split, tokens).logits, wanted, atol=1e-6)
    check_decoding(forward, halves, split, tokens, init_cache(halves, 2, 9), [4, 1, 4])
    scanned, stacked = relayout(halves, split, scan=True)
    check_decoding(forward, scanned, stacked, tokens, init_cache(scanned, 2, 9), [4, 1, 4])
    with pytest.raises(ValueError, match="a block needs a mixer or a network"):
        Block(None, None)


@pytest.mark.parametrize("norms", ["one norm", "two norms"])
def test_a_parallel_residual_adds_mixer_and_network_in_one_sum(norms):
    """Of blocks of one part: each part's result is what it adds to the stream alone."""
    cfg = with_residual(ParallelResidual(norms, scale=0.5, skip_scale=2.0), layers=1).replace(final_norm=None)
    block, params, tokens = cfg.blocks[0], random_params(cfg), random_tokens(cfg, (2, 7))
    own = params["block_0"]
    if norms == "one norm":
        assert "ffn_norm" not in own
    embedded = np.asarray(params["embedding"])[np.asarray(tokens)]
    added = np.zeros_like(embedded)
    for part, other in (("mixer", "ffn"), ("ffn", "mixer")):
        single = dataclasses.replace(block, **{other: None}, residual=Residual())
        norm = own["mixer_norm" if norms == "one norm" else f"{part}_norm"]
        of_part = params | {"block_0": {f"{part}_norm": norm, part: own[part]}}
        added += np.asarray(forward(cfg.replace(blocks=(single,)), of_part, tokens).hidden) - embedded
    np.testing.assert_allclose(forward(cfg, params, tokens).hidden, 2 * embedded + 0.5 * added, atol=2e-5)
    with pytest.raises(ValueError, match="needs a mixer and a network"):
        dataclasses.replace(block, ffn=None)


def test_a_scaled_residual_scales_what_is_added_and_what_it_is_added_to():
    plain, scaled = (
        with_residual(r, layers=1).replace(final_norm=None) for r in (Residual(), Residual(0.5, 3.0))
    )
    params, tokens = random_params(plain), random_tokens(plain, (1, 6))
    only = lambda cfg: cfg.replace(blocks=(dataclasses.replace(cfg.blocks[0], ffn=None),))
    of_mixer = params | {"block_0": {key: params["block_0"][key] for key in ("mixer", "mixer_norm")}}
    embedded = np.asarray(params["embedding"])[np.asarray(tokens)]
    added = np.asarray(forward(only(plain), of_mixer, tokens).hidden) - embedded
    found = forward(only(scaled), of_mixer, tokens).hidden
    np.testing.assert_allclose(found, 3 * embedded + 0.5 * added, atol=1e-5)


def test_hyper_connections_with_copies_alike_are_the_plain_residual():
    """Read the mean, write to all, mix nothing: every copy is the stream of the plain model."""
    plain, hyper = with_residual(Residual()), with_residual(HyperConnections(3))
    params, tokens = random_params(plain), random_tokens(plain, (2, 8))
    around = {"read": jnp.full(3, 1 / 3), "write": jnp.ones(3), "mix": jnp.eye(3)}
    put_in = lambda block: block | {f"{part}_residual": around for part in ("mixer", "ffn")}
    wide = {key: put_in(value) if key.startswith("block") else value for key, value in params.items()}
    assert jax.tree.map(jnp.shape, wide) == jax.tree.map(jnp.shape, param_shapes(hyper))
    wanted = forward(plain, params, tokens).logits
    np.testing.assert_allclose(forward(hyper, wide, tokens).logits, wanted, atol=3e-5)


def test_hyper_connections_equal_a_loop_over_copies():
    cfg = with_residual(HyperConnections(2), layers=2).replace(final_norm=None)
    params, tokens = random_params(cfg), random_tokens(cfg, (1, 5))
    embedded = np.asarray(params["embedding"])[np.asarray(tokens)]
    streams = [embedded, embedded]
    for i, block in enumerate(cfg.blocks):
        own = params[f"block_{i}"]
        for part, other in (("mixer", "ffn"), ("ffn", "mixer")):
            around = jax.tree.map(np.asarray, own[f"{part}_residual"])
            read = sum(weight * x for weight, x in zip(around["read"], streams))
            single = dataclasses.replace(block, **{other: None}, residual=Residual())
            # what the part adds to a stream that a table of one token a place begins with
            table = read.reshape(-1, read.shape[-1])
            of_part = {"embedding": table, "block_0": {f"{part}_norm": own[f"{part}_norm"], part: own[part]}}
            alone = cfg.replace(blocks=(single,), vocab_size=len(table))
            places = np.arange(len(table)).reshape(tokens.shape)
            y = np.asarray(forward(alone, of_part, places).hidden) - read
            mixed = [sum(streams[n] * around["mix"][n, m] for n in range(2)) for m in range(2)]
            streams = [x + y * around["write"][m] for m, x in enumerate(mixed)]
    np.testing.assert_allclose(forward(cfg, params, tokens).hidden, sum(streams) / 2, atol=5e-5)


def test_hyper_connections_decode_scan_learn_and_are_saved(tmp_path):
    cfg = with_residual(HyperConnections(2), layers=3)
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 9))
    check_decoding(forward, cfg, params, tokens, init_cache(cfg, 2, 9), [4, 1, 4])
    scanned, stacked = relayout(cfg, params, scan=True)
    wanted = forward(cfg, params, tokens).logits
    np.testing.assert_allclose(forward(scanned, stacked, tokens).logits, wanted, atol=3e-5)
    save(tmp_path / "model", cfg, params)
    again, loaded = load(tmp_path / "model")
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    loss = lambda params: jax.nn.log_softmax(apply(cfg, params, tokens).logits)[..., 3].mean()
    grads = compiled_fast(jax.grad(loss))(init(cfg, jax.random.key(0)))
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="copies=0"):
        HyperConnections(0)


def test_a_parallel_head_reads_every_copy_of_the_stream():
    """The head is the model with the head's block for its last block."""
    cfg = with_residual(HyperConnections(3))
    cfg = cfg.replace(mtp=ParallelMTP((dataclasses.replace(cfg.blocks[0], ffn=None),)))
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 7))
    other = cfg.replace(blocks=(cfg.blocks[0], *cfg.mtp.blocks), mtp=None)
    of_other = {key: params[key] for key in ("embedding", "final_norm", "block_0")}
    of_other["block_1"] = params["mtp_1"]["block_0"]
    wanted = forward(other, of_other, tokens).logits
    np.testing.assert_allclose(forward(cfg, params, tokens).mtp_logits[0], wanted, atol=3e-5)


@pytest.mark.parametrize(
    "residuals", [(HyperConnections(2), HyperConnections(3)), (Residual(), HyperConnections(2))]
)
def test_blocks_of_one_stack_have_one_stream(residuals):
    first, last = (dataclasses.replace(tiny().blocks[0], residual=residual) for residual in residuals)
    with pytest.raises(ValueError, match="share one residual stream.*HyperConnections"):
        tiny().replace(blocks=(first, last))
    with pytest.raises(ValueError, match="share one residual stream"):
        tiny().replace(blocks=(first,), mtp=ParallelMTP((last,)))
    with pytest.raises(ValueError, match="share one residual stream"):
        tiny().replace(encoder=Encoder((first, last)))
    for nested in (MixtureOfDepths, lambda block: MixtureOfRecursions((block,), 2)):
        with pytest.raises(ValueError, match="widens the stream of a whole stack"):
            nested(last)


def test_a_config_that_an_earlier_version_saved_has_todays_names():
    """Written before residuals were a part, and before keys and values were `kv_sharing`."""
    saved = json.loads((GOLDENS / "config_2026_11.json").read_text())
    cfg = ModelConfig.from_dict(saved)
    residuals = [block.residual for block in cfg.blocks[:3]]
    assert residuals == [ParallelResidual("two norms", 0.5), Residual(skip_scale=2.0), Residual(0.25, 3.0)]
    assert [block.mixer.kv_sharing for block in cfg.blocks[:3]] == ["provide", "reuse", "reuse"]
    assert cfg.blocks[0].mixer.rope == Rope(100.0, rotated_fraction=0.5)
    routers = [type(block.mixer.router).__name__ for block in cfg.blocks[3:]]
    assert routers == ["RecursionExpertChoice", "RecursionTokenChoice"] and cfg.mtp is not None
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg

"""Blocks that some tokens pass by, blocks that are used several times, and keys that several layers share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import (
    Attention,
    Block,
    ModelConfig,
    RMSNorm,
    Rope,
    SwiGLU,
    apply,
    init_cache,
    logical_axes,
    param_shapes,
)
from model.blocks.block import BlockModule
from model.blocks.common import Context, TokenInfo
from model.blocks.latent_attention import LatentAttention
from model.blocks.mamba import Mamba
from model.blocks.mamba2 import Mamba2
from model.blocks.mixture_of_depths import MixtureOfDepths, predict
from model.blocks.mixture_of_recursions import (
    MixtureOfRecursions,
    RecursionExpertChoice,
    RecursionTokenChoice,
)
from model.blocks.moe import MoE
from model.blocks.parallel import Parallel
from model.blocks.router import Router
from model.cache import Cache
from model.inspect.anatomy import anatomy
from model.inspect.flops import forward_flops_per_token
from tests.policy import adamw

from .conftest import applied, check_decoding, compiled_fast, paged_cache, random_params, random_tokens

D, NORM = 24, RMSNorm()
ATTENTION = Attention(4, 2, 6, Rope(100.0))
PLAIN = Block(ATTENTION, SwiGLU(20), NORM)
RECURRENT = Block(Mamba2(4, 6, 5), None, NORM)

forward = compiled_fast(applied, static_argnums=0)


def wrapped(mixer):
    return Block(mixer, None, None)


def model_of(*blocks, **changes):
    return ModelConfig(61, D, blocks, final_norm=NORM, max_length=64, **changes)


CTX = Context(D, 3, jnp.dtype("float32"), jnp.dtype("float32"), train=True)


@functools.partial(compiled_fast, static_argnums=0)
def run_block(block, params, x_TD, positions, real):
    info = TokenInfo(positions[None], real[None])
    return BlockModule(block, CTX).apply({"params": params}, x_TD[None], None, info)[0][0]


def alone(block, params, x_TD, positions):
    """A block on these tokens and no others (but padding, so that all have one length)."""
    count = len(positions)
    pad = lambda x: np.pad(x, [(0, 9 - count)] + [(0, 0)] * (x.ndim - 1))
    real = (np.arange(9) < count).astype(np.int32)
    return np.asarray(run_block(block, params, pad(x_TD), pad(np.asarray(positions)), real))[:count]


def mixed(mixer, params, x_BTD, segment_ids=None):
    """(result, report) of a mixer without a cache."""
    B, T = x_BTD.shape[:2]
    info = TokenInfo(jnp.broadcast_to(jnp.arange(T), (B, T)), segment_ids)
    run = compiled_fast(
        lambda params, x_BTD: mixer.module(CTX, None).apply({"params": params}, x_BTD, info, None)
    )
    y_BTD, _, more = run(params, x_BTD)
    return np.asarray(y_BTD), more.aux


def random_x(*shape, seed=3):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def params_of(mixer):
    return random_params(model_of(wrapped(mixer)))["block_0"]["mixer"]


@pytest.mark.parametrize("block", [PLAIN, RECURRENT], ids=["attention", "state"])
@pytest.mark.parametrize("capacity", [0.4, None])
def test_tokens_that_a_router_chooses_pass_through_the_block_and_others_by(block, capacity):
    mixer = MixtureOfDepths(block, capacity)
    params, x_BTD = params_of(mixer), random_x(2, 9, D)
    real_BT = np.arange(9) < np.array([[9], [6]])
    y_BTD, aux = mixed(mixer, params, x_BTD, jnp.asarray(real_BT, jnp.int32))
    passed = 0
    for x_TD, real_T, y_TD in zip(x_BTD, real_BT, y_BTD, strict=True):
        scores_T = x_TD @ np.asarray(params["router"])
        chosen = np.flatnonzero(real_T & (scores_T > 0))
        if capacity is not None:
            best = sorted(np.flatnonzero(real_T), key=lambda t: -scores_T[t])
            chosen = np.sort(best[: int(0.4 * real_T.sum())])
        wanted_TD = np.zeros_like(x_TD)
        made = alone(block, params["block"], x_TD[chosen], chosen)
        wanted_TD[chosen] = scores_T[chosen, None] * (made - x_TD[chosen])
        np.testing.assert_allclose(y_TD, wanted_TD, atol=3e-5)
        passed += len(chosen)
    assert 0 < passed < real_BT.sum()
    assert float(aux["depth_share"].mean()) == pytest.approx(passed / real_BT.sum())
    assert ("loss" in aux) == (capacity is not None)


def test_the_sign_of_a_score_is_trained_to_say_who_passes():
    scores_BT, passed_BT, real_BT = random_x(2, 5), random_x(2, 5, seed=4) > 0, random_x(2, 5, seed=5) > -1
    weights_BT = jnp.asarray(real_BT, jnp.float32)
    passed = jnp.asarray(passed_BT, jnp.float32)
    aux = predict(jnp.asarray(scores_BT), passed, jnp.asarray(real_BT), weights_BT, 0.1)
    chance = 1 / (1 + np.exp(-scores_BT.astype(np.float64)))
    entropy = -np.where(passed_BT, np.log(chance), np.log(1 - chance))
    assert float(aux["loss"].mean()) == pytest.approx(0.1 * entropy[real_BT].mean(), rel=1e-5)
    assert float(aux["depth_predicted"].mean()) == pytest.approx(
        ((scores_BT > 0) == passed_BT)[real_BT].mean()
    )


@pytest.mark.parametrize("capacities", [None, (0.8, 0.5, 0.3)])
def test_each_recursion_narrows_the_tokens_of_the_one_before(capacities):
    mixer = MixtureOfRecursions((PLAIN, RECURRENT), 3, RecursionExpertChoice(capacities))
    params, x_BTD = params_of(mixer), random_x(2, 9, D)
    y_BTD, aux = mixed(mixer, params, x_BTD)
    counts = np.zeros(3)
    for x_TD, y_TD in zip(x_BTD, y_BTD, strict=True):
        left, start_TD = np.arange(9), x_TD
        for r in range(3):
            scores_T = x_TD @ np.asarray(params[f"router_{r}"])
            if capacities is None:
                left = left[scores_T[left] > 0]
            else:
                best = sorted(left, key=lambda t, scores_T=scores_T: -scores_T[t])
                left = np.sort(best[: int(capacities[r] * 9)])
            if len(left):
                once = alone(PLAIN, params["block_0"], x_TD[left], left)
                made = alone(RECURRENT, params["block_1"], once, left)
                x_TD = x_TD.copy()
                x_TD[left] += scores_T[left, None] * (made - x_TD[left])
            counts[r] += len(left)
        np.testing.assert_allclose(y_TD, x_TD - start_TD, atol=1e-4)
    assert counts[0] < 18 and counts[0] > counts[1] > 0
    assert [float(aux[f"recursion_{r}_share"].mean()) for r in range(3)] == pytest.approx(counts / 18)


def test_a_router_may_assign_the_number_of_recursions_at_the_start():
    mixer = MixtureOfRecursions((PLAIN,), 3, RecursionTokenChoice(0.1))
    params, x_BTD = params_of(mixer), random_x(2, 9, D)
    y_BTD, aux = mixed(mixer, params, x_BTD)
    depths, probabilities = [], []
    for x_TD, y_TD in zip(x_BTD, y_BTD, strict=True):
        logits_TR = x_TD @ np.asarray(params["router"])
        chance_TR = np.exp(logits_TR) / np.exp(logits_TR).sum(1, keepdims=True)
        last_T, now_TD = logits_TR.argmax(1), x_TD.copy()
        for r in range(3):
            going = np.flatnonzero(last_T >= r)
            if len(going):
                change = alone(PLAIN, params["block_0"], now_TD[going], going) - now_TD[going]
                weight = np.where(last_T[going] == r, chance_TR[going, r], 1.0)
                now_TD[going] += weight[:, None] * change
        np.testing.assert_allclose(y_TD, now_TD - x_TD, atol=1e-4)
        depths += list(last_T + 1)
        probabilities += list(chance_TR)
    assert len(set(depths)) == 3 and float(aux["recursions"].mean()) == pytest.approx(np.mean(depths))
    balance = []
    for row in (slice(0, 9), slice(9, 18)):
        share = np.bincount(np.array(depths[row]) - 1, minlength=3) / 9
        balance.append(3 * share @ np.mean(probabilities[row], 0))
    assert float(aux["loss"].mean()) == pytest.approx(0.1 * np.mean(balance), rel=1e-5)


def test_recursions_without_a_router_are_the_blocks_again_and_again():
    looped = model_of(wrapped(MixtureOfRecursions((PLAIN, RECURRENT), 2)))
    params, tokens = random_params(looped), random_tokens(looped, (2, 8))
    inside = params["block_0"]["mixer"]
    unrolled = model_of(PLAIN, RECURRENT, PLAIN, RECURRENT)
    copies = {f"block_{i}": inside[f"block_{i % 2}"] for i in range(4)}
    others = {key: value for key, value in params.items() if key != "block_0"}
    wanted = forward(unrolled, others | copies, tokens).logits
    np.testing.assert_allclose(forward(looped, params, tokens).logits, wanted, atol=5e-5)
    assert forward_flops_per_token(looped, 8) == forward_flops_per_token(unrolled, 8)


LATENT = Block(LatentAttention(2, 4, 4, 5, kv_rank=8, rope=Rope(100.0, interleaved=True)), None, NORM)
WINDOWED = Block(dataclasses.replace(ATTENTION, window=3), SwiGLU(20), NORM)
HYMBA = [
    Block(
        Parallel((dataclasses.replace(ATTENTION, kv_sharing=kv, window=4), Mamba(20, 4, 3)), out_norm=NORM),
        SwiGLU(20),
    )
    for kv in ("provide", "reuse", "none")
]
DECODED = {
    "depths": model_of(
        WINDOWED, wrapped(MixtureOfDepths(PLAIN, None)), wrapped(MixtureOfDepths(LATENT, None))
    ),
    "depths of a network": model_of(PLAIN, wrapped(MixtureOfDepths(Block(None, SwiGLU(20), NORM), None))),
    "depths of states": model_of(wrapped(MixtureOfDepths(RECURRENT, None)), PLAIN),
    "expert choice": model_of(
        PLAIN, wrapped(MixtureOfRecursions((PLAIN, RECURRENT), 2, RecursionExpertChoice()))
    ),
    "token choice": model_of(wrapped(MixtureOfRecursions((PLAIN,), 2, RecursionTokenChoice()))),
    "loops": model_of(wrapped(MixtureOfRecursions((PLAIN,), 2))),
    "shared keys": model_of(
        *(
            Block(dataclasses.replace(ATTENTION, kv_sharing=kv), SwiGLU(20), NORM)
            for kv in ("provide", "reuse", "reuse")
        )
    ),
    "Samba": model_of(
        Block(Mamba(20, 4, 3), SwiGLU(20)), WINDOWED, Block(Mamba(20, 4, 3), SwiGLU(20)), WINDOWED
    ),
    "Hymba": model_of(*HYMBA),
}


@pytest.mark.parametrize("name", DECODED)
def test_decoding_equals_the_whole_text_whatever_the_pages_held_before(name):
    cfg = DECODED[name]
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 11))
    cache = paged_cache(cfg, 2, 4, 3, num_rows=2)
    dirty = jax.tree.map(lambda x: jnp.ones_like(x) if x.dtype == bool else x, cache.layers)
    check_decoding(
        forward, cfg, params, tokens, Cache(dirty, cache.page_table, cache.length), (5, 1, 1, 4), 1e-4
    )


@pytest.mark.parametrize("name", DECODED)
def test_packed_documents_are_as_they_are_alone(name):
    cfg = DECODED[name]
    params, tokens = random_params(cfg), random_tokens(cfg, (1, 11))
    segment_ids = jnp.array([[1] * 6 + [2] * 5])
    positions = jnp.array([[*range(6), *range(5)]])
    packed = forward(cfg, params, tokens, positions, segment_ids).logits[0]
    for start, stop in ((0, 6), (6, 11)):
        of_one = forward(cfg, params, tokens[:, start:stop]).logits[0]
        np.testing.assert_allclose(packed[start:stop], of_one, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODED)
def test_scanned_blocks_compute_the_same(name):
    cfg = DECODED[name]
    cfg = cfg.replace(blocks=tuple(block for block in cfg.blocks for _ in range(2)))
    scanned = cfg.replace(scan=True)
    params, tokens = random_params(scanned), random_tokens(cfg, (2, 8))
    unrolled = {
        f"block_{number}": jax.tree.map(lambda x, i=i: x[i], params[run])
        for run, _, numbers in scanned.runs()
        for i, number in enumerate(numbers)
    }
    rest = {key: value for key, value in params.items() if not key.startswith("run_")}
    wanted = forward(cfg, rest | unrolled, tokens).logits
    np.testing.assert_allclose(forward(scanned, params, tokens).logits, wanted, atol=1e-4)


@pytest.mark.parametrize("name", DECODED)
def test_they_are_written_as_json_and_described(name):
    cfg = DECODED[name]
    assert ModelConfig.from_dict(cfg.to_dict()) == cfg
    described = anatomy(cfg, 1, 8)
    assert all(group.role for group in described.groups)
    assert described.parameters == sum(x.size for x in jax.tree.leaves(param_shapes(cfg)))
    sharded = [
        axes
        for axes in jax.tree.leaves(logical_axes(cfg), is_leaf=lambda x: isinstance(x, tuple))
        if len(axes) > 1
    ]
    assert all(any(axis not in (None, "norm") for axis in axes) for axes in sharded)


def test_keys_and_values_are_those_of_the_layer_that_gives_them():
    """By hand: softmax of the taker's queries with the giver's keys, in float64."""
    give, take = (dataclasses.replace(ATTENTION, kv_sharing=kv, rope=None) for kv in ("provide", "reuse"))
    cfg = model_of(Block(give, None, NORM), Block(take, None, NORM))
    params, tokens = random_params(cfg), random_tokens(cfg, (1, 6))
    double = jax.tree.map(np.float64, params)
    assert set(params["block_1"]["mixer"]) == {"q", "o"}

    def normed(x_TD, scale):
        return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + 1e-5) * scale

    x_TD = double["embedding"][tokens[0]]
    for name in ("block_0", "block_1"):
        block, read_TD = double[name], normed(x_TD, double[name]["mixer_norm"]["scale"])
        q_THC = np.einsum("TD,DHC->THC", read_TD, block["mixer"]["q"])
        if name == "block_0":
            k_TKC, v_TKC = (
                np.repeat(np.einsum("TD,DKC->TKC", read_TD, block["mixer"][n]), 2, 1) for n in "kv"
            )
        scores_HTS = np.einsum("THC,SHC->HTS", q_THC, k_TKC) / np.sqrt(6)
        weights_HTS = np.exp(np.where(np.tri(6, dtype=bool), scores_HTS, -np.inf))
        weights_HTS /= weights_HTS.sum(-1, keepdims=True)
        x_TD = x_TD + np.einsum("HTS,SHC,HCD->TD", weights_HTS, v_TKC, block["mixer"]["o"])
    wanted = normed(x_TD, double["final_norm"]["scale"])
    np.testing.assert_allclose(forward(cfg, params, tokens).hidden[0], wanted, atol=2e-5)


def test_layers_that_take_keys_have_no_cache_of_their_own():
    shared, own = (
        model_of(*(Block(dataclasses.replace(ATTENTION, kv_sharing=kv), None, NORM) for kv in kinds))
        for kinds in (("provide", "reuse"), ("none", "none"))
    )
    assert 2 * anatomy(shared, 1, 8).cache_bytes_per_token == anatomy(own, 1, 8).cache_bytes_per_token
    saved = 2 * 2 * D * 2 * 6  # two maps for the keys and values of two heads, two flops each
    assert forward_flops_per_token(own, 8) - forward_flops_per_token(shared, 8) == saved
    lonely = model_of(Block(dataclasses.replace(ATTENTION, kv_sharing="reuse"), None, NORM))
    with pytest.raises(ValueError, match="no attention before this one has kv_sharing"):
        apply(lonely, random_params(lonely), random_tokens(lonely, (1, 3)))


def test_nested_moe_layers_are_balanced_without_a_loss():
    experts = [MoE(4, 2, SwiGLU(8), Router(choice_bias=True), balance_rate=rate) for rate in (0.5, 0.25)]
    nested = wrapped(MixtureOfDepths(Block(ATTENTION, experts[0], NORM), None))
    cfg = model_of(nested)
    params = random_params(cfg)
    optimizer = adamw(cfg, peak_lr=1.0, weight_decay=0.0)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    biases = [u for path, u in jax.tree_util.tree_leaves_with_path(updates) if "choice_bias" in str(path)]
    assert len(biases) == 1 and (biases[0] == -0.5).all()
    both = MixtureOfRecursions(tuple(Block(ATTENTION, moe, NORM) for moe in experts), 2)
    with pytest.raises(ValueError, match="different balance_rate"):
        adamw(model_of(wrapped(both)))


def test_what_makes_no_sense_is_said():
    with pytest.raises(ValueError, match="capacity=1.5"):
        MixtureOfDepths(PLAIN, 1.5)
    for mixture in (
        lambda b: MixtureOfDepths(b),
        lambda b: MixtureOfRecursions((b,), 2, RecursionExpertChoice()),
    ):
        with pytest.raises(ValueError, match="window=3 counts tokens, and this block skips some"):
            mixture(WINDOWED)
    with pytest.raises(ValueError, match="for each of 3 times"):
        MixtureOfRecursions((PLAIN,), 3, RecursionExpertChoice((0.5, 0.5)))
    with pytest.raises(ValueError, match="at least one time"):
        MixtureOfRecursions((), 3)


def test_depths_decide_by_the_sign_when_they_decode():
    cfg = model_of(wrapped(MixtureOfDepths(PLAIN, 0.5)))
    by_sign = model_of(wrapped(MixtureOfDepths(PLAIN, None)))
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 8))
    out = forward(cfg, params, tokens, cache=init_cache(cfg, 2, 8)).logits
    np.testing.assert_allclose(out, forward(by_sign, params, tokens).logits, atol=5e-5)

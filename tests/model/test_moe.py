"""Mixture of experts against a loop over tokens and experts in numpy: every router, dispatch, loss and mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from model import MESH_AXES, Inputs, ModelConfig, ShardingRules, decoder, init_cache
from model.blocks.common import Context, TokenInfo
from model.blocks.experts import ClampedSwiGLU
from model.blocks.ffn import MLP, GatedMLP
from model.blocks.moe import MoE
from model.blocks.router import ExpertChoice, Router, SparseMixer
from model.function import Transformer
from model.layout import relayout
from model.sharding import named_sharding
from tests.meshes import assert_divided, compiled

from .conftest import applied, check_decoding, random_params, random_tokens
from .conftest import compiled_fast as jit

D, F, E, B, T = 10, 12, 8, 2, 9
PLAIN = MoE(E, 2, GatedMLP(F))
CTX = Context(D, 2, jnp.dtype("float32"), jnp.dtype("float32"), train=True)


def info(segments=None, rows=B, length=T):
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return TokenInfo(positions, None if segments is None else jnp.asarray(segments, jnp.int32))


def boxed(spec):
    """Shapes of the parameters with their logical axis names."""
    x = jnp.zeros((B, T, D))
    return jax.eval_shape(lambda: spec.module(CTX, "ffn").init(jax.random.key(0), x, info()))["params"]


def make(spec, seed=0):
    """Parameters from numpy, none at its initial value, and an input [B, T, D]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    shapes = jax.tree.map(lambda box: box.value, boxed(spec), is_leaf=lambda box: hasattr(box, "names"))
    params = jax.tree.map(
        lambda s: (rng.normal(size=s.shape) * s.shape[-1] ** -0.3).astype(np.float32), shapes
    )
    return params, x


def run(spec, params, x, segments=None):
    return spec.module(CTX, "ffn").apply({"params": params}, jnp.asarray(x), info(segments, *x.shape[:2]))


forward = jit(run, static_argnums=0)
model_forward = jit(applied, static_argnums=0)


# The reading in plain loops.


def silu(x):
    return x / (1 + np.exp(-x))


def brute_expert(spec, p, e, x):
    bias = lambda name: p.get(f"{name}_bias", np.zeros((E, 1)))[e]
    up = x @ p["up"][e] + bias("up")
    if isinstance(spec, MLP):
        h = np.maximum(up, 0)
    else:
        gate = x @ p["gate"][e] + bias("gate")
        if isinstance(spec, ClampedSwiGLU):
            gate, up = np.minimum(gate, spec.limit), np.clip(up, -spec.limit, spec.limit)
            h = (up + 1) * gate / (1 + np.exp(-spec.alpha * gate))
        else:
            h = silu(gate) * up
    return h @ p["down"][e] + bias("down")


def brute_mixer(router, logits, number):
    """The best, then the best of the others; the weight is a softmax among those that come close."""
    choices = []
    for _ in range(number):
        left = [e for e in range(E) if e not in [c for c, _ in choices]]
        best = max(left, key=lambda e: logits[e])
        top = logits[best]
        below = [
            top - logits[e] for e in left if top - logits[e] <= 2 * router.jitter * max(abs(logits[e]), top)
        ]
        choices.append((best, 1 / np.exp(-np.array(below)).sum()))
    return choices


def brute_choice(spec, p, x):
    """[(expert, weight)] of one token."""
    router = spec.router
    logits = x @ p["router"] + p.get("router_bias", 0)
    if isinstance(router, SparseMixer):
        return brute_mixer(router, logits, spec.experts_per_token)
    scores = (
        1 / (1 + np.exp(-logits)) if router.scores == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    )
    ranked = scores + p.get("choice_bias", 0)
    size = E // router.num_groups
    groups = [ranked[g * size : (g + 1) * size] for g in range(router.num_groups)]
    worth = [max(g) if router.group_score == "max" else sum(sorted(g)[-2:]) for g in groups]
    best = sorted(range(router.num_groups), key=lambda g: -worth[g])[: router.groups_per_token]
    allowed = [e for e in range(E) if e // size in best]
    chosen = sorted(allowed, key=lambda e: -ranked[e])[: spec.experts_per_token]
    weights = scores[chosen]
    if router.normalize:
        weights = weights / (weights**router.norm_order).sum() ** (1 / router.norm_order)
    return list(zip(chosen, weights * router.scale))


def brute_token(spec, p, x, choice):
    """The weighted sum of the experts in `choice`, and the shared expert."""
    y = np.zeros(D)
    for e, weight in choice:
        out = brute_expert(spec.expert, p["experts"], e, x * weight if spec.weigh_input else x)
        y += out if spec.weigh_input else weight * out
    if spec.shared:
        s = p["shared"]
        shared = (silu(x @ s["gate"]) * (x @ s["up"])) @ s["down"]
        y += shared / (1 + np.exp(-x @ p["shared_gate"])) if spec.shared_gate else shared
    return y


GROUPS = {"num_groups": 4, "groups_per_token": 2}
LIKE = {
    "mixtral, qwen3": PLAIN,
    "olmoe, jamba": MoE(E, 3, GatedMLP(F), Router(normalize=False)),
    "qwen2": MoE(E, 3, GatedMLP(F), Router(normalize=False), shared=GatedMLP(7), shared_gate=True),
    "gpt-oss": MoE(E, 2, ClampedSwiGLU(F, limit=0.7), Router(bias=True)),
    "llama4": MoE(
        E, 1, GatedMLP(F), Router("sigmoid", normalize=False), shared=GatedMLP(F), weigh_input=True
    ),
    "deepseek_v2": MoE(
        E,
        2,
        GatedMLP(F),
        Router(normalize=False, scale=16.0, group_score="max", **GROUPS),
        shared=GatedMLP(5),
    ),
    "deepseek_v3, glm4": MoE(
        E, 3, GatedMLP(F), Router("sigmoid", scale=2.5, choice_bias=True, **GROUPS), shared=GatedMLP(5)
    ),
    "dbrx": MoE(E, 4, GatedMLP(F), Router(norm_order=2.0)),
    "phimoe": MoE(E, 2, GatedMLP(F), SparseMixer(0.3)),
    "plain mlp": MoE(E, 2, MLP(F, "relu", bias=True)),
}


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize("spec", LIKE.values(), ids=LIKE)
def test_each_router_equals_a_loop_over_tokens_and_experts(spec, dispatch):
    spec = dataclasses.replace(spec, dispatch=dispatch, capacity_factor=E)  # room for everyone
    params, x = make(spec)
    y, _ = forward(spec, params, x)
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for b, t in np.ndindex(B, T):
        wanted = brute_token(spec, exact, x[b, t], brute_choice(spec, exact, x[b, t]))
        np.testing.assert_allclose(y[b, t], wanted, atol=3e-5, rtol=3e-5)


def test_dropless_keeps_every_token_when_all_choose_the_same_expert():
    spec = dataclasses.replace(PLAIN, router=Router(bias=True), experts_per_token=1)
    params, x = make(spec)
    params["router_bias"][5] = 1e4
    y, aux = forward(spec, params, x)
    for b, t in np.ndindex(B, T):
        np.testing.assert_allclose(
            y[b, t], brute_expert(spec.expert, params["experts"], 5, x[b, t]), atol=1e-5
        )
    assert float(aux["moe_max_load"].mean()) == E and float(aux["moe_dropped"].mean()) == 0


def brute_capacity(spec, p, x, real, slots):
    """Choices of each token of a row that find a place: first choices first, then second ones."""
    wanted = [brute_choice(spec, p, token) if real[t] else [] for t, token in enumerate(x)]
    load, kept = np.zeros(E, int), [[] for _ in x]
    for rank in range(spec.experts_per_token):
        for t, choices in enumerate(wanted):
            if choices and load[choices[rank][0]] < slots:
                load[choices[rank][0]] += 1
                kept[t].append(choices[rank])
    return kept


@pytest.mark.parametrize("factor, slots", [(0.4, 1), (0.5, 2), (1.25, 3)])
def test_capacity_drops_the_last_and_least_wanted_and_padding_takes_no_place(factor, slots):
    spec = dataclasses.replace(PLAIN, dispatch="capacity", capacity_factor=factor)
    assert spec.slots(T) == slots
    params, x = make(spec, seed=3)
    segments = np.array([[0, 0, 1, 1, 1, 2, 2, 2, 0], [1] * T])
    y, aux = forward(spec, params, x, segments)
    dropped = 0
    for b in range(B):
        kept = brute_capacity(spec, params, x[b], segments[b], slots)
        dropped += 2 * int((segments[b] > 0).sum()) - sum(map(len, kept))
        for t in range(T):
            np.testing.assert_allclose(y[b, t], brute_token(spec, params, x[b, t], kept[t]), atol=1e-5)
    assert (
        float(aux["moe_dropped"].mean()) == pytest.approx(dropped / (2 * (segments > 0).sum()))
        and dropped > 0
    )


def test_capacity_drops_nothing_outside_training():
    tight = dataclasses.replace(PLAIN, dispatch="capacity", capacity_factor=0.1)
    params, x = make(tight)
    free = dataclasses.replace(CTX, train=False)
    y, aux = jit(lambda p, x: tight.module(free, "ffn").apply({"params": p}, x, info()))(
        params, jnp.asarray(x)
    )
    np.testing.assert_allclose(y, forward(PLAIN, params, x)[0], atol=1e-6)
    assert float(aux["moe_dropped"].mean()) == 0


def test_experts_that_choose_take_their_best_tokens_of_each_row():
    spec = MoE(E, 2, GatedMLP(F), ExpertChoice(), shared=GatedMLP(5))
    params, x = make(spec)
    segments = np.array([[1] * 7 + [0, 0], [1] * T])
    y, aux = forward(spec, params, x, segments)
    assert spec.slots(T) == 3
    for b in range(B):
        logits = x[b] @ params["router"]
        scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) * (segments[b] > 0)[:, None]
        choices = [[] for _ in range(T)]
        for e in range(E):
            for t in sorted(range(T), key=lambda t: -scores[t, e])[:3]:
                choices[t].append((e, scores[t, e]))
        for t in range(T):
            np.testing.assert_allclose(y[b, t], brute_token(spec, params, x[b, t], choices[t]), atol=1e-5)
    assert float(aux["moe_max_load"].mean()) == pytest.approx(1.0)
    cached = dataclasses.replace(info(), rows=jnp.arange(B))
    with pytest.raises(ValueError, match="cannot decode with a cache"):
        spec.module(CTX, "ffn").apply({"params": params}, x, cached)


ROUTERS = {
    "dropless": dataclasses.replace(PLAIN, balance_loss=0.1, z_loss=0.01),
    "capacity": dataclasses.replace(PLAIN, dispatch="capacity", capacity_factor=1.0, balance_loss=0.1),
    "expert choice": MoE(E, 2, GatedMLP(F), ExpertChoice(), z_loss=0.01),
}


@pytest.mark.parametrize("spec", ROUTERS.values(), ids=ROUTERS)
def test_padding_changes_neither_real_tokens_nor_losses(spec):
    params, x = make(spec)
    segments = np.array([[1, 1, 1, 2, 2, 2, 0, 0, 0], [0, 1, 1, 1, 0, 0, 1, 1, 1]])
    other = np.where(segments[..., None] == 0, 100.0, x).astype(np.float32)
    (y, aux), (y_other, aux_other) = (
        forward(spec, params, x, segments),
        forward(spec, params, other, segments),
    )
    np.testing.assert_allclose(y[segments > 0], y_other[segments > 0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), aux, aux_other)
    assert all(float(value.weight) == (segments > 0).sum() for value in aux.values())


@pytest.mark.parametrize("over", ["document", "batch"])
def test_losses_and_metrics_are_their_formulas(over):
    spec = dataclasses.replace(PLAIN, balance_loss=0.3, z_loss=0.02, balance_over=over)
    params, x = make(spec)
    aux = {name: float(value.mean()) for name, value in forward(spec, params, x)[1].items()}
    tokens = x.reshape(-1, D)
    logits = tokens @ params["router"]
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    load = np.bincount([e for token in tokens for e, _ in brute_choice(spec, params, token)], minlength=E)
    balance = E * np.sum(load / len(tokens) * probs.mean(0))
    if over == "document":  # of each row, then their mean
        loads = [
            np.bincount([e for t in row for e, _ in brute_choice(spec, params, t)], minlength=E) for row in x
        ]
        means = probs.reshape(B, T, E).mean(1)
        balance = np.mean([E * np.sum(load / T * mean) for load, mean in zip(loads, means)])
    z = np.mean(np.log(np.exp(logits).sum(1)) ** 2)
    assert aux["moe_load_balance"] == pytest.approx(balance, rel=1e-5)
    assert aux["moe_z_loss"] == pytest.approx(z, rel=1e-5)
    assert aux["moe_entropy"] == pytest.approx(-np.mean(np.sum(probs * np.log(probs), 1)), rel=1e-5)
    assert aux["moe_max_load"] == pytest.approx(load.max() / load.mean(), rel=1e-5)
    assert aux["loss"] == pytest.approx(0.3 * balance + 0.02 * z, rel=1e-5)


def test_an_even_router_has_the_least_balance_loss():
    """E * sum_e (K / E) * (1 / E) = K, entropy log E, normaliser log E."""
    params, x = make(PLAIN)
    aux = forward(PLAIN, params | {"router": np.zeros((D, E), np.float32)}, x)[1]
    assert float(aux["moe_load_balance"].mean()) == pytest.approx(PLAIN.experts_per_token)
    assert float(aux["moe_entropy"].mean()) == pytest.approx(np.log(E), rel=1e-6)
    assert float(aux["moe_z_loss"].mean()) == pytest.approx(np.log(E) ** 2, rel=1e-6)


def test_a_bias_that_makes_all_scores_negative_chooses_no_expert_of_another_group():
    """A number that is added to all scores changes no choice."""
    router = Router("sigmoid", choice_bias=True, **GROUPS)
    logits = np.random.default_rng(0).normal(size=(B, T, E)).astype(np.float32)
    wanted = router.choose(logits, np.zeros(E, np.float32), 3)
    for bias in (-3.0, 12.0):
        found = router.choose(logits, np.full(E, bias, np.float32), 3)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("logits", [np.zeros(E), -np.arange(E) / 8], ids=["all 0", "the best is 0"])
def test_a_sparse_mixer_chooses_among_logits_of_zero(logits):
    router = SparseMixer(0.3)
    chosen, weights = router.choose(jnp.asarray(logits[None, None], jnp.float32), None, 3)
    wanted = brute_mixer(router, logits, 3)
    np.testing.assert_array_equal(chosen[0, 0], [e for e, _ in wanted])
    np.testing.assert_allclose(weights[0, 0], [weight for _, weight in wanted], rtol=1e-6)


def test_load_can_be_traced():
    params, x = make(PLAIN)
    trace = lambda p, x: PLAIN.module(CTX, "ffn").apply({"params": p}, x, info(), mutable=["intermediates"])
    _, traced = jit(trace)(params, x)
    load = traced["intermediates"]["expert_load"][0]
    wanted = [e for token in x.reshape(-1, D) for e, _ in brute_choice(PLAIN, params, token)]
    np.testing.assert_array_equal(load, np.bincount(wanted, minlength=E))


@pytest.mark.parametrize("spec", ROUTERS.values(), ids=ROUTERS)
def test_gradients_reach_the_router_and_the_experts_and_are_right(spec):
    params, x = make(spec)

    @jit
    def slope_of(params, direction, step):
        def loss(params):
            y, aux = run(spec, params, x)
            return jnp.sum(jnp.sin(y)) + aux["loss"].mean()

        move = lambda step: loss(jax.tree.map(lambda p, d: p + step * d, params, direction))
        return jax.grad(loss)(params), (move(step) - move(-step)) / (2 * step)

    ones = jax.tree.map(np.ones_like, params)
    grads, _ = slope_of(params, ones, 1e-3)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads))
    size = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    _, slope = slope_of(
        params, jax.tree.map(lambda g: g / size, grads), 3e-3
    )  # too little to change a choice
    assert float(slope) == pytest.approx(size, rel=1e-3)


def test_both_dispatches_have_the_same_gradient():
    params, x = make(LIKE["deepseek_v3, glm4"])

    def gradient(**change):
        spec = dataclasses.replace(LIKE["deepseek_v3, glm4"], balance_loss=0.1, **change)
        loss = lambda y, aux: jnp.sum(jnp.sin(y)) + aux["loss"].mean()
        return jit(jax.grad(lambda p: loss(*run(spec, p, x))))(params)

    slots = gradient(dispatch="capacity", capacity_factor=E)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), gradient(), slots)


def test_the_pull_of_balancing_without_a_loss_is_the_error_of_the_load():
    spec = dataclasses.replace(PLAIN, router=Router("sigmoid", choice_bias=True), balance_rate=1e-3)
    params, x = make(spec)

    def loss(params):
        return run(spec, params, x)[1]["loss"].mean()

    value, grads = jit(jax.value_and_grad(loss))(params)
    chosen = [e for token in x.reshape(-1, D) for e, _ in brute_choice(spec, params, token)]
    error = np.bincount(chosen, minlength=E) / len(chosen) - 1 / E
    assert float(value) == 0
    np.testing.assert_allclose(grads["choice_bias"], error, atol=1e-6)
    assert not np.any(grads["router"])


@pytest.mark.parametrize("spec", ROUTERS.values(), ids=ROUTERS)
def test_eight_devices_give_the_numbers_of_one(spec):
    spec = dataclasses.replace(spec, shared=GatedMLP(8))
    params, x = make(spec)
    segments = np.array([[1] * 5 + [2] * 3 + [0], [1] * T])
    rules, mesh = (
        ShardingRules(),
        jax.make_mesh((2, 1, 1, 1, 2, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 6),
    )
    loss = lambda ctx, p, x: (lambda y, aux: (jnp.sum(jnp.sin(y)) + aux["loss"].mean(), (y, aux)))(
        *spec.module(ctx, "ffn").apply({"params": p}, x, info(segments))
    )
    alone = compiled(jit(jax.grad(functools.partial(loss, CTX), has_aux=True)), params, x)
    wanted = alone(params, x)
    sharded = dataclasses.replace(CTX, rules=rules)
    shardings = jax.tree.map(
        lambda box: named_sharding(mesh, rules, box.names), boxed(spec), is_leaf=lambda b: hasattr(b, "names")
    )
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        x = jax.device_put(x, named_sharding(mesh, rules, ("batch", "length", "act_embed")))
        split = compiled(jit(jax.grad(functools.partial(loss, sharded), has_aux=True)), placed, x)
        found = split(placed, x)
    assert_divided(alone, split, 0.4, 0.5)
    assert placed["experts"]["gate"].addressable_shards[0].data.shape == (E // 2, D, F // 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), found, wanted)


# In a whole model.


def whole(spec, **options):
    """A dense block and two with an MoE."""
    cfg = decoder(61, 24, 3, 4, 2, 6, 40, max_length=64, **options)
    sparse = dataclasses.replace(cfg.blocks[0], ffn=spec)
    return cfg.replace(blocks=(cfg.blocks[0], sparse, sparse))


def test_scanned_blocks_give_the_logits_and_losses_of_unrolled_ones():
    cfg = whole(LIKE["deepseek_v3, glm4"])
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 9))
    scanned_cfg, scanned = relayout(cfg, params, scan=True)
    unrolled, rolled = model_forward(cfg, params, tokens), model_forward(scanned_cfg, scanned, tokens)
    np.testing.assert_allclose(unrolled.logits, rolled.logits, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), unrolled.aux, rolled.aux)
    assert float(rolled.aux["moe_entropy"].weight) == 2 * 18
    trace = lambda p: Transformer(scanned_cfg).apply({"params": p}, Inputs(tokens), mutable=["intermediates"])
    load_LE = jit(trace)(scanned)[1]["intermediates"]["run_1"]["ffn"]["expert_load"][0]
    assert load_LE.shape == (2, E) and np.all(load_LE.sum(1) == 18 * 3)


def test_decoding_equals_the_full_forward_pass():
    cfg = whole(LIKE["qwen2"])
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 9))
    cache = init_cache(cfg, 2, 9)
    check_decoding(model_forward, cfg, params, tokens, cache, (6, 1, 1, 1))


@pytest.mark.parametrize("spec", ROUTERS.values(), ids=ROUTERS)
def test_bfloat16_routes_in_float32_and_is_close(spec):
    cfg = whole(
        dataclasses.replace(spec, experts_per_token=E, capacity_factor=1.0)
    )  # all experts: no choice flips
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 9))
    exact, half = (model_forward(cfg.replace(dtype=t), params, tokens) for t in ("float32", "bfloat16"))
    assert half.hidden.dtype == jnp.bfloat16 and half.aux["moe_entropy"].total.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((exact.logits - half.logits) ** 2) / jnp.mean(exact.logits**2))
    assert 1e-4 < float(error) < 0.03


def test_an_moe_comes_back_from_json():
    for spec in [*LIKE.values(), ROUTERS["expert choice"]]:
        assert ModelConfig.from_dict(whole(spec).to_dict()) == whole(spec)


def test_an_moe_that_can_not_be_is_refused_with_the_mend():
    for change, message in [
        ({"experts_per_token": 9}, "is not in 1 to num_experts=8"),
        ({"dispatch": "drop"}, "is not one of dropless, capacity"),
        ({"balance_rate": 1e-3}, r"use Router\(choice_bias=True\)"),
        ({"shared_gate": True}, "there is none"),
        ({"router": Router(num_groups=3)}, "groups must be equal"),
        ({"router": Router(num_groups=8)}, "must have experts_per_token=2"),
        ({"router": Router(num_groups=8, groups_per_token=4)}, "needs two experts a group"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(PLAIN, **change)
    with pytest.raises(ValueError, match="scores='tanh' is not one of softmax, sigmoid"):
        Router("tanh")


def test_flops_count_the_experts_that_a_token_uses():
    spec = MoE(E, 2, GatedMLP(F), shared=GatedMLP(5), shared_gate=True)
    assert spec.flops_per_token(D) == 2 * (2 * 3 * D * F + 3 * D * 5 + D * E + D)
    assert spec.active_share("experts/up") == 0.25 and spec.active_share("shared/up") == 1

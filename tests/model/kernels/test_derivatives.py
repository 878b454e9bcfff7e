"""Derivatives by hand, in forward mode and of second order, against JAX's own of the same maths and differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.blocks.norms import by_rms
from model.kernels import backend, cpu, order
from model.kernels.attention import Mask, Scores
from model.kernels.attention.blocks import in_query_blocks
from model.kernels.attention.reference import attention
from model.kernels.cross_entropy import cross_entropy, from_all_logits
from model.kernels.delta_rule.reference import solve_unit_lower
from model.kernels.derivatives import differentiable, tangent_of
from model.kernels.grouped_matmul.blocks import in_blocks
from model.kernels.grouped_matmul.dispatch import from_rows, sorted_by, to_rows
from model.kernels.grouped_matmul.reference import every_product
from model.logprobs import ScoreOptions, token_logprobs
from tests.policy import language_modelling

from ..conftest import compiled_fast as jit
from ..conftest import random_params, tiny


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


T = 160
POSITIONS = jnp.concatenate([jnp.arange(70), jnp.arange(90)])[None].repeat(2, 0)
SEGMENTS = jnp.concatenate([jnp.full(70, 1), jnp.full(90, 2)])[None].repeat(2, 0)
MASKS = {
    "causal": (Mask(), {}),
    "window and soft-cap": (Mask(window=33), {"softcap": 2.0, "scale": 0.3}),
    "both sides": (Mask(causal=False, window=20), {}),
    "sinks": (Mask(), {"sinks_H": jnp.array([0.5, -1.0, 2.0, 0.0])}),
}


def attention_pair(kind):
    mask, options = MASKS[kind]
    whole = slice(0, T)
    dense_BTS = mask.within(whole, whole, POSITIONS, SEGMENTS)

    def ours(sinks_H, *qkv):
        return in_query_blocks(*qkv, POSITIONS, SEGMENTS, mask, Scores(**options | {"sinks_H": sinks_H}))

    def plain(sinks_H, *qkv):
        return attention(*qkv, dense_BTS, Scores(**options | {"sinks_H": sinks_H}))

    qkv = normal(2, T, 4, 8), normal(2, T, 2, 8), normal(2, T, 2, 6)
    return ours, plain, (options.get("sinks_H"), *qkv)


TOKENS = jnp.array([3, 0, 6, 6])
PLACES = sorted_by(jnp.array([2, 0, 1, 1, 0, 2, 2, 1]))
SIZES = jnp.array([30, 0, 25, 5])  # and ten rows of none
gather = lambda x: x[PLACES.pair_M // 2]


def spread(x, rows):
    return jnp.broadcast_to(x, (*rows, *x.shape))


def in_stripes(*arrays):
    options = {"score_options": ScoreOptions(0.7, entropy=True), "softcap": 3.0, "stripe_bytes": 1}
    with backend.prefer(backend.Kernels(cross_entropy="stripes")):
        return cross_entropy(*arrays[:2], jnp.arange(9) * 7, arrays[2], **options)[:3]


def at_once(*arrays):
    options = {"score_options": ScoreOptions(0.7, entropy=True), "softcap": 3.0}
    return from_all_logits(*arrays[:2], jnp.arange(9) * 7, arrays[2], **options)[:3]


def plain_logprobs(logits):
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return logits[jnp.arange(4), TOKENS] - log_z, log_z


def plain_solve(strict, y):
    return jax.scipy.linalg.solve_triangular(jnp.tril(strict, -1) + jnp.eye(8), y, lower=True)


activation = lambda x, w: jnp.tanh(x[0]) * x[1] @ w
PAIRS = {  # ours, the same in plain jnp, arguments
    **{f"attention, {kind}": attention_pair(kind) for kind in MASKS},
    "log-probabilities": (
        lambda logits: token_logprobs(logits, TOKENS),
        plain_logprobs,
        (normal(4, 7),),
    ),
    "cross-entropy in stripes": (in_stripes, at_once, (normal(9, 16), normal(300, 16), normal(300))),
    "norms": (
        lambda x: by_rms(x, 2, 1e-5),
        lambda x: x / jnp.sqrt(jnp.square(x).mean((-2, -1), keepdims=True) + 1e-5),
        (normal(3, 4, 64),),
    ),
    "rows": (lambda x: cpu.for_rows(x, (32, 3)), lambda x: spread(x, (32, 3)), (normal(5),)),
    "recomputed": (
        order.recompute(activation),
        activation,
        ((normal(2, 5, 8), normal(3, 5, 8)[:2]), normal(8, 3)),
    ),
    "triangular systems": (
        lambda strict, y: solve_unit_lower(jnp.tril(strict, -1), y),
        plain_solve,
        (normal(2, 8, 8), normal(2, 8, 3)),
    ),
    "products of experts": (
        lambda x, w: in_blocks(x, w, SIZES),
        lambda x, w: every_product(x, w, SIZES),
        (normal(70, 12), normal(4, 12, 10)),
    ),
    "tokens to rows": (lambda x: to_rows(x, PLACES), gather, (normal(4, 6),)),
    "rows to tokens": (
        lambda y, w: from_rows(y, w, PLACES),
        lambda y, w: (y[PLACES.row_M].reshape(4, 2, 6) * w[..., None]).sum(1),
        (normal(8, 6), normal(4, 2)),
    ),
}


def directions(arguments):
    return jax.tree.map(lambda x: normal(*x.shape, seed=1), arguments)


def squared(function):
    """A number whose second derivatives come from those of the function, too."""
    return lambda *args: sum(jnp.square(y).sum() for y in jax.tree.leaves(function(*args)))


ORDERS = {
    "forward": lambda f, args, along: jax.jvp(f, args, along),
    "forward over reverse": lambda f, args, along: jax.jvp(
        jax.grad(squared(f), tuple(range(len(args)))), args, along
    )[1],
    "reverse over forward": lambda f, args, along: jax.grad(
        lambda *args: jax.jvp(squared(f), args, along)[1], tuple(range(len(args)))
    )(*args),
    "forward over forward": lambda f, args, along: jax.jvp(
        lambda *args: jax.jvp(f, args, along)[1], args, along
    )[1],
}


@pytest.mark.parametrize("mode", ORDERS)
@pytest.mark.parametrize("name", PAIRS)
def test_derivatives_are_those_of_plain_maths(name, mode):
    ours, plain, arguments = PAIRS[name]
    run = lambda f: jit(functools.partial(ORDERS[mode], f))(arguments, directions(arguments))
    for got, want in zip(*(jax.tree.leaves(run(f)) for f in (ours, plain)), strict=True):
        assert np.isfinite(want).all()
        np.testing.assert_allclose(got, want, atol=2e-4 * max(1, np.abs(want).max()))


def made(x, n, y):
    return jnp.sin(x) * y**2 + n, n + 1


BY_HAND = differentiable(
    lambda *args: (made(*args), args),
    tangent_of(made),
    lambda saved, d: (
        d[0] * jnp.cos(saved[0]) * saved[2] ** 2,
        None,
        2 * d[0] * jnp.sin(saved[0]) * saved[2],
    ),
)


@pytest.mark.parametrize("transform", ["vmap of one", "vmap of both", "scan", "remat", "of one argument"])
def test_derivatives_by_hand_pass_through_transformations(transform):
    x, n, y = normal(3), jnp.arange(3), normal(3, seed=2)

    def run(f):
        loss = lambda x, y: jnp.square(f(x, n, y)[0]).sum()
        if transform == "vmap of one":
            return jax.vmap(jax.grad(loss, (0, 1)), (0, None))(jnp.stack([x, 2 * x]), y)
        if transform == "vmap of both":
            return jax.vmap(lambda x, y: jax.jvp(loss, (x, y), (y, x)))(
                jnp.stack([x, 2 * x]), jnp.stack([y, x])
            )
        if transform == "remat":
            return jax.grad(jax.checkpoint(loss), (0, 1))(x, y)
        if transform == "of one argument":
            return jax.grad(loss, 1)(x, y)
        step = lambda x, _: (x + 0.1 * f(x, n, y)[0], None)
        return jax.grad(lambda x: jax.lax.scan(step, x, None, length=3)[0].sum())(x)

    for got, want in zip(jax.tree.leaves(run(BY_HAND)), jax.tree.leaves(run(made)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def model_loss():
    cfg = tiny(layers=2)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 33))
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": np.ones((2, 32), np.float32),
        "segment_ids": np.repeat([[1] * 20 + [2] * 12], 2, axis=0),
        "positions": np.repeat([[*range(20), *range(12)]], 2, axis=0),
    }
    objective = language_modelling(cfg)
    return lambda params: objective(params, batch)[0].total / 64, random_params(cfg)


def test_a_models_directional_derivative_is_its_gradient_along_the_direction():
    loss, params = model_loss()
    along = directions(params)
    value, slope = jit(lambda p, d: jax.jvp(loss, (p,), (d,)))(params, along)
    wanted, gradient = jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    parts = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, along)
    np.testing.assert_allclose(slope, sum(jax.tree.leaves(parts)), rtol=1e-4)


def test_a_models_hessian_times_a_vector_is_the_difference_of_gradients():
    loss, params = model_loss()
    along, step = directions(params), 1e-3
    gradient = jit(jax.grad(loss))
    product = jit(lambda p, d: jax.jvp(jax.grad(loss), (p,), (d,))[1])(params, along)
    ahead, behind = (
        gradient(jax.tree.map(lambda p, d, s=s: p + s * d, params, along)) for s in (step, -step)
    )
    difference = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
    for got, want in zip(jax.tree.leaves(product), jax.tree.leaves(difference), strict=True):
        np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())

"""When things are computed: what programs for this CPU keep in memory between the forward and the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import backend, cpu, order

DEPTH, ROWS, WIDTH = 6, 256, 64
ARRAY = ROWS * WIDTH * 4  # bytes of one layer's features

on_cpu = pytest.mark.skipif(not backend.for_cpu(), reason="is about XLA for CPUs")


def activation(x):
    return jnp.tanh(x) * x


def temporary_bytes(function, *args, **options) -> int:
    return jax.jit(function, **options).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_what_is_computed_anew_has_the_same_gradient():
    def plain(x, w):
        return activation(x[0]) * x[1] @ w

    keys = jax.random.split(jax.random.key(0), 4)
    x = (jax.random.normal(keys[0], (2, 5, 8)), jax.random.normal(keys[1], (2, 5, 8)))
    w, d = jax.random.normal(keys[2], (8, 3)), jax.random.normal(keys[3], (2, 5, 3))
    results = [jax.vjp(f, x, w)[1](d) for f in (plain, order.recompute(plain))]
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@on_cpu
def test_products_with_what_is_computed_anew_keep_their_inputs_alone():
    w_LDD, x_ND = jnp.ones((DEPTH, WIDTH, WIDTH)) / WIDTH, jnp.ones((ROWS, WIDTH))

    def recompute(w_LDD, x_ND):
        for w_DD in w_LDD:
            x_ND = order.recompute(lambda x, w_DD: activation(x) @ w_DD)(x_ND, w_DD)
        return jnp.square(x_ND).sum()

    def kv_layout(w_LDD, x_ND):
        for w_DD in w_LDD:
            x_ND = activation(x_ND) @ w_DD
        return jnp.square(x_ND).sum()

    with_anew, with_all = (
        temporary_bytes(jax.value_and_grad(f), w_LDD, x_ND) for f in (recompute, kv_layout)
    )
    assert with_anew < with_all - (DEPTH - 2) * ARRAY


@on_cpu
def test_nothing_of_a_late_value_is_computed_ahead():
    """Long rows are made of short ones for the backward pass: all at once if nothing keeps them back."""

    def program(wait):
        def backward(x_LD, d):
            for x_D in x_LD:
                x_D = order.order_after(d.sum(), x_D) if wait else x_D
                d = jnp.sin(x_D[:, None] * jnp.arange(4096.0)) @ jnp.ones(4096) * d
            return d

        return temporary_bytes(backward, jnp.ones((8, 64)), jnp.ones(64))

    assert program(wait=True) < 2 * 64 * 4096 * 4 <= program(wait=False)


def test_only_rows_without_a_gradient_are_lost():
    gradient_ND = jnp.array([[1.0, 2.0], [np.nan, np.nan], [np.inf, 0.0]])
    late_NF = np.asarray(order.order_after(gradient_ND, jnp.ones((3, 4))))
    assert (late_NF[[0, 2]] == 1).all() and (np.isnan(late_NF[1]).all() or not backend.for_cpu())


@on_cpu
def test_a_state_updated_in_place_is_not_copied():
    def step(params, moment, wait):
        direction = lambda moment: params - moment / (jnp.sqrt(jnp.abs(moment)) + 1)
        new, (moment,) = cpu.compute_first(direction, moment) if wait else (direction(moment), (moment,))
        return new, moment * 0.9 + jnp.sqrt(jnp.abs(moment))

    arrays = [jnp.ones((512, 512)) for _ in range(2)]
    used = {
        wait: temporary_bytes(lambda p, m, wait=wait: step(p, m, wait), *arrays, donate_argnums=(0, 1))
        for wait in (False, True)
    }
    assert used[True] < arrays[0].nbytes <= used[False]

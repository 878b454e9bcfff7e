"""The chunked recurrences against plain float64 loops: ragged lengths, every chunk size, restarts, hostile values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels.delta_rule import delta_rule
from model.kernels.delta_rule.reference import solve_unit_lower
from model.kernels.linear_scan import linear_scan, selective_scan
from model.kernels.rwkv7 import rwkv7
from model.kernels.ssd import ssd

from ..conftest import compiled_fast as jit

LENGTHS = pytest.mark.parametrize("T, chunk", [(1, 64), (5, 1), (16, 8), (37, 16), (130, 64), (70, 128)])


def draws(T, seed=0):
    """normal(*shape), log decays from mild to deadly, and a few first tokens of documents."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)
    decays = lambda *shape: -np.exp(rng.uniform(-6, 4, size=shape))
    first = rng.random((2, T)) < 0.05
    return normal, decays, first


def check(kernel, loop, inputs, chunk):
    """Outputs and last state of both, in float32 and from a state that is not zero."""
    ours = jit(functools.partial(kernel, chunk=chunk))(
        *(jnp.asarray(x, jnp.result_type(x, np.float16)) for x in inputs)
    )
    for got, wanted in zip(ours, loop(*inputs), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, atol=3e-5 * max(1, np.abs(wanted).max()), rtol=1e-4)


def ssd_loop(v, log_decay, k, q, first, state):
    y, group = np.zeros_like(v), v.shape[2] // k.shape[2]
    k, q = np.repeat(k, group, 2), np.repeat(q, group, 2)
    for t in range(v.shape[1]):
        state = np.where(first[:, t, None, None, None], 0, state) * np.exp(log_decay[:, t, :, None, None])
        state = state + np.einsum("bhp,bhn->bhpn", v[:, t], k[:, t])
        y[:, t] = np.einsum("bhpn,bhn->bhp", state, q[:, t])
    return y, state


def delta_loop(q, k, v, log_decay, beta, first, state):
    o = np.zeros_like(v)
    for t in range(v.shape[1]):
        state = np.where(first[:, t, None, None, None], 0, state) * np.exp(log_decay[:, t, :, :, None])
        new = beta[:, t, :, None] * (v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + np.einsum("bhk,bhv->bhkv", k[:, t], new)
        o[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state)
    return o, state


def linear_loop(x, log_decay, first, state):
    states = np.zeros_like(x)
    for t in range(x.shape[1]):
        states[:, t] = state = np.where(first[:, t, None], 0, state) * np.exp(log_decay[:, t]) + x[:, t]
    return states, state


def selective_loop(x, dt, A, k, q, first, state):
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        state = np.where(first[:, t, None, None], 0, state) * np.exp(dt[:, t, :, None] * A)
        state = state + (dt * x)[:, t, :, None] * k[:, t, None]
        y[:, t] = np.einsum("bfn,bn->bf", state, q[:, t])
    return y, state


def rwkv7_loop(r, log_decay, k, v, a, b, first, state):
    o = np.zeros_like(v)
    for t in range(v.shape[1]):
        state = np.where(first[:, t, None, None, None], 0, state)
        read = np.einsum("bhk,bhkv->bhv", a[:, t], state)
        state = state * np.exp(log_decay[:, t, :, :, None]) + np.einsum("bhk,bhv->bhkv", b[:, t], read)
        state = state + np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        o[:, t] = np.einsum("bhk,bhkv->bhv", r[:, t], state)
    return o, state


@LENGTHS
def test_the_linear_scan_equals_its_loop(T, chunk):
    normal, decays, first = draws(T)
    check(linear_scan, linear_loop, (normal(2, T, 3), decays(2, T, 3), first, normal(2, 3)), chunk)


@LENGTHS
def test_the_selective_scan_equals_its_loop(T, chunk):
    normal, decays, first = draws(T)
    inputs = (normal(2, T, 3), -decays(2, T, 3), decays(3, 4), normal(2, T, 4), normal(2, T, 4), first)
    check(selective_scan, selective_loop, (*inputs, normal(2, 3, 4)), chunk)


@LENGTHS
def test_ssd_equals_its_loop(T, chunk):
    normal, decays, first = draws(T)
    inputs = (
        normal(2, T, 4, 3),
        decays(2, T, 4),
        normal(2, T, 2, 5),
        normal(2, T, 2, 5),
        first,
        normal(2, 4, 3, 5),
    )
    check(ssd, ssd_loop, inputs, chunk)


@LENGTHS
@pytest.mark.parametrize("channels", [1, 5])
def test_the_delta_rule_equals_its_loop(T, chunk, channels):
    normal, decays, first = draws(T)
    keys = normal(2, T, 3, 5)
    inputs = (
        normal(2, T, 3, 5),
        keys / np.linalg.norm(keys, axis=-1, keepdims=True),
        normal(2, T, 3, 4),
        decays(2, T, 3, channels),
        np.random.default_rng(1).uniform(0, 2, (2, T, 3)),
        first,
        normal(2, 3, 5, 4),
    )
    check(delta_rule, delta_loop, inputs, chunk)


@LENGTHS
def test_rwkv7_equals_its_loop(T, chunk):
    normal, _, first = draws(T)
    rng, keys = np.random.default_rng(1), normal(2, T, 3, 5)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    log_decay, rate = -np.exp(rng.uniform(-6, -0.5, keys.shape)), rng.uniform(0, 1, keys.shape)
    inputs = (normal(2, T, 3, 5), log_decay, normal(2, T, 3, 5), normal(2, T, 3, 4), -keys, keys * rate)
    check(rwkv7, rwkv7_loop, (*inputs, first, normal(2, 3, 5, 4)), chunk)


def test_one_key_written_again_and_again_keeps_the_last_value():
    """The worst case of the triangular system: all overlaps are 1, and powers of it would overflow."""
    v, key = np.random.default_rng(0).normal(size=(1, 200, 1, 4)), np.eye(5)[:1].repeat(200, 0)[None, :, None]
    zeros, ones = np.zeros((1, 200, 1, 1)), np.ones((1, 200, 1))
    never = np.zeros((1, 200), bool)
    o, state = jit(delta_rule)(key, key, v, zeros, ones, never, np.zeros((1, 1, 5, 4)))
    np.testing.assert_allclose(o, v, atol=2e-6)
    np.testing.assert_allclose(state[0, 0, 0], v[0, -1, 0], atol=2e-6)


@pytest.mark.parametrize("size", [1, 2, 64])
def test_the_triangular_system_is_solved(size):
    rng = np.random.default_rng(size)
    strict, y = np.tril(rng.normal(size=(3, size, size)), -1) * size**-0.5, rng.normal(size=(3, size, 2))
    wanted = np.linalg.solve(np.eye(size) + strict, y)
    ours = jit(solve_unit_lower)(strict.astype(np.float32), y.astype(np.float32))
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * np.abs(wanted).max())


def kernels():
    normal, decays, first = draws(20, seed=3)
    keys = normal(2, 20, 1, 3)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    q, v, state, beta = normal(2, 20, 1, 3), normal(2, 20, 1, 2), normal(2, 1, 3, 2), np.ones((2, 20, 1))
    decay = decays(2, 20, 1, 3)
    return {
        "linear scan": (linear_scan, (normal(2, 20, 3), decays(2, 20, 3), first, normal(2, 3))),
        "selective scan": (
            selective_scan,
            (normal(2, 20, 3), -decays(2, 20, 3), -np.ones((3, 4)), normal(2, 20, 4), normal(2, 20, 4), first)
            + (normal(2, 3, 4),),
        ),
        "ssd": (ssd, (v, decays(2, 20, 1), keys, q, first, state.swapaxes(2, 3))),
        "delta rule, by head": (delta_rule, (q, keys, v, decay[..., :1], beta, first, state)),
        "delta rule, by channel": (delta_rule, (q, keys, v, decay, beta, first, state)),
        "rwkv7": (
            rwkv7,
            (q, np.maximum(decay, -0.6), normal(2, 20, 1, 3), v, -keys, keys * 0.9, first, state),
        ),
    }


@pytest.mark.parametrize("name", kernels())
def test_gradients_under_hostile_decays_are_those_of_single_steps(name):
    """Chunks of 8 against chunks of one token, which have no products of decays to go wrong."""
    kernel, inputs = kernels()[name]
    inputs = tuple(jnp.asarray(x, jnp.result_type(x, np.float16)) for x in inputs)
    floats = [i for i, x in enumerate(inputs) if x.dtype != bool]

    def gradients(chunk):
        def loss(*inputs):
            return sum(jnp.sum(jnp.sin(out)) for out in kernel(*inputs, chunk=chunk))

        return jit(jax.grad(loss, argnums=floats))(*inputs)

    for ours, wanted in zip(gradients(8), gradients(1), strict=True):
        assert np.isfinite(wanted).all()
        np.testing.assert_allclose(ours, wanted, atol=3e-5 * max(1, np.abs(wanted).max()), rtol=1e-4)

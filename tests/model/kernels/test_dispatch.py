"""Rows of experts there and back, beside the plain gathers and scatters that autodiff makes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.blocks.common import Context, TokenInfo
from model.blocks.ffn import GatedMLP
from model.blocks.moe import MoE
from model.kernels import backend
from model.kernels.grouped_matmul.dispatch import from_rows, sorted_by, to_rows

from ..conftest import compiled_fast as jit
from ..tpu import compile_for, needs_libtpu

N, K, D = 12, 3, 5


def plain(x_ND, weights_NK, expert_M, matrix_M1):
    pair_M = jnp.argsort(expert_M)
    y_MD = jnp.tanh(x_ND[pair_M // K] * matrix_M1)
    y_NKD = y_MD[jnp.argsort(pair_M)].reshape(N, K, D)
    return jnp.einsum("NKD,NK->ND", y_NKD.astype(jnp.float32), weights_NK)


def ours(x_ND, weights_NK, expert_M, matrix_M1):
    places = sorted_by(expert_M)
    return from_rows(jnp.tanh(to_rows(x_ND, places) * matrix_M1), weights_NK, places)


@pytest.mark.parametrize("dtype, error", [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_autodiff(dtype, error):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x_ND, weights_NK, matrix_M1, d_ND = normal(N, D), normal(N, K), normal(N * K, 1), normal(N, D)
    expert_M = jnp.asarray(rng.integers(0, 4, N * K))

    def pulled(function, dtype):
        def run(x_ND, weights_NK, d_ND):
            of = lambda x, w: function(x.astype(dtype), w, expert_M, matrix_M1.astype(dtype))
            y_ND, pull = jax.vjp(of, x_ND, weights_NK)
            return y_ND, *pull(d_ND)

        return jit(run)(x_ND, weights_NK, d_ND)

    for found, wanted in zip(pulled(ours, dtype), pulled(plain, jnp.float32), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, rtol=error, atol=error * float(jnp.abs(wanted).max()))


def test_no_gradient_is_a_scatter_of_rows():
    expert_M = jnp.arange(N * K) % 4
    loss = lambda x, w: ours(x, w, expert_M, jnp.ones((N * K, 1))).sum()
    program = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones((N, D)), jnp.ones((N, K))).as_text()
    assert "stablehlo.gather" in program and "stablehlo.scatter" not in program


@needs_libtpu
def test_a_tpu_makes_no_float32_array_of_all_rows():
    bfloat16 = jnp.dtype("bfloat16")
    module = MoE(8, 2, GatedMLP(512)).module(Context(512, 2, bfloat16, bfloat16), "ffn")
    positions = jnp.zeros((1, 4096), jnp.int32)
    x = jax.ShapeDtypeStruct((1, 4096, 512), bfloat16)

    def step(params, x, d):
        forward = lambda params, x: module.apply({"params": params}, x, TokenInfo(positions, None))[0]
        y, pull = jax.vjp(forward, params, x)
        return y, pull(d)

    with backend.use("tpu", "v5p"):
        boxes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, TokenInfo(positions, None)), x)
        params = jax.tree.map(
            lambda box: box.value, boxes["params"], is_leaf=lambda leaf: hasattr(leaf, "names")
        )
        program = compile_for("v5p", step, params, x, x).as_text()
    assert "grouped_products" in program
    made = re.findall(r"%[\w.-]+ = (\w+)\[8192,512\]\S* (\w+)\(", program[program.index("ENTRY") :])
    assert {dtype for dtype, _ in made} == {"bf16"}

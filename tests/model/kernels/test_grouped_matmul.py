"""Grouped products against the plain form, at ragged, empty and lopsided groups, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels.grouped_matmul import grouped_matmul
from model.kernels.grouped_matmul.blocks import in_blocks
from model.kernels.grouped_matmul.reference import every_product

from ..conftest import compiled_fast as jit


def inputs(sizes, dtype=np.float32):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(sum(sizes), 5)), rng.normal(size=(len(sizes), 5, 3))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(sizes, jnp.int32)


def loop(x, w, sizes):
    starts = np.cumsum([0, *sizes])
    return np.concatenate([x[a:b] @ m for a, b, m in zip(starts, starts[1:], np.asarray(w))])


SIZES = [(3,), (0, 1), (40, 0, 0, 1), (8, 16, 9, 7, 0, 0, 24, 1), (1, 1, 1), (0, 0, 300), (100, 33, 67)]


@pytest.mark.parametrize("form", [every_product, in_blocks, grouped_matmul], ids=lambda f: f.__name__)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_group_is_multiplied_with_its_own_matrix(sizes, form):
    x, w, sizes_E = inputs(sizes)
    np.testing.assert_allclose(jit(form)(x, w, sizes_E), loop(x, w, sizes), atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES[2:4], ids=str)
def test_gradients_equal_those_of_the_plain_form(sizes):
    x, w, sizes_E = inputs(sizes)
    gradient = lambda form: jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(form(x, w, sizes_E))), argnums=(0, 1)))
    for ours, wanted in zip(gradient(grouped_matmul)(x, w), gradient(every_product)(x, w), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_bfloat16_stays_bfloat16_and_gradients_of_matrices_are_added_in_float32():
    x, w, sizes_E = inputs((500, 100), jnp.bfloat16)
    assert jit(in_blocks)(x, w, sizes_E).dtype == jnp.bfloat16
    ones = jnp.ones_like(x)
    dw = jit(jax.grad(lambda w: jnp.sum(in_blocks(ones, w, sizes_E).astype(jnp.float32))))(w)
    assert dw.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        dw[:, 0, 0].astype(np.float32), [500, 100], rtol=4e-3
    )  # 257 ones in bfloat16 are 256

"""Sums and maxima by parts against numpy's, at widths that parts divide and that they don't; no windows in programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.compilation import training_options
from model.kernels import cpu

WIDTHS = [1, 31, 64, 100, 384, 512, 4096]


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_reduced_as_numpy_does(width):
    x, y = np.random.default_rng(width).standard_normal((2, 3, 5, width)).astype(np.float32)
    close = lambda ours, wanted: np.testing.assert_allclose(ours, wanted, rtol=2e-6, atol=1e-5)
    close(cpu.row_sum(x), x.sum(-1, keepdims=True))
    close(cpu.row_dot(x, y), (x * y).sum(-1, keepdims=True))
    close(cpu.row_dot(x, y, axes=2), (x * y).sum((-2, -1), keepdims=True))
    one_row = y[:1, :1]  # broadcast along all but the last axis
    close(cpu.row_max(jnp.add, x, one_row), (x + one_row).max(-1, keepdims=True))


@pytest.mark.parametrize("shape", [(7,), (33, 5), (4096, 3), (64, 8, 16)])
def test_all_squares_are_summed(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.testing.assert_allclose(cpu.sum_of_squares(x), np.sum(x.astype(np.float64) ** 2), rtol=1e-5)


def test_a_program_of_row_sums_has_no_windows():
    x = jnp.ones((64, 512))
    compiled = lambda f: jax.jit(f, compiler_options=training_options("cpu")).lower(x).compile().as_text()
    assert "reduce-window" in compiled(lambda x: jnp.sum(x * x, axis=-1))  # what is avoided, where it is seen
    assert "reduce-window" not in compiled(lambda x: cpu.row_dot(x, x))
    assert "reduce-window" not in compiled(lambda x: cpu.row_max(jnp.multiply, x, x))

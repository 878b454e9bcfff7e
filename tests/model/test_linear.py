"""Maps of one input, together and each by itself."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.blocks.common import Context
from model.blocks.linear import linear, linears

CTX = Context(16, 2, jnp.dtype("float32"), jnp.dtype("float32"))
OUTS = {
    "q": ((4, 8), ("heads", "head_dim"), ""),
    "k": ((2, 8), ("kv_heads", "head_dim"), ""),
    "v": ((3,), ("mlp",), ""),
}


class Maps(nn.Module):
    together: bool
    ctx: Context = CTX

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, Any]:
        if self.together:
            return linears(self, x, OUTS, bias=True)
        return {name: linear(self, name, x, *out, bias=True) for name, out in OUTS.items()}


@pytest.mark.parametrize("tokens", [3, 40], ids=["fewer tokens than channels", "more"])
def test_maps_together_are_each_by_itself(tokens):
    x = jax.random.normal(jax.random.key(0), (2, tokens, 16))
    params = nn.meta.unbox(Maps(True).init(jax.random.key(1), x))
    params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(2), p.shape), params)
    apart, together = (
        jax.vjp(lambda params, x, as_one=as_one: Maps(as_one).apply(params, x), params, x)
        for as_one in (False, True)
    )
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(check, apart[0], together[0])
    jax.tree.map(check, apart[1](apart[0]), together[1](apart[0]))

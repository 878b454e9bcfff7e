"""Masks against a loop over tokens, in attention and paged attention, and the kernels that refuse parts of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import backend
from model.kernels.attention import Mask, Scores, self_attention
from model.kernels.attention.blocks import in_query_blocks
from model.kernels.attention.reference import attention, self_attention_weights
from model.kernels.backend import Kernels
from model.kernels.paged_attention import KVLayout, attend_in_rows, pages

B, T = 2, 150
SEGMENTS = np.repeat([[1] * 70 + [2] * 60 + [0] * 20], B, axis=0)
POSITIONS = np.repeat([[*range(70), *range(60), *range(20)]], B, axis=0)
SPANS = np.where(POSITIONS % 40 >= 25, 1 + POSITIONS // 40, 0) * np.array([[1], [0]])
TREE = np.random.default_rng(0).random((B, T, T)) < 0.3
TREE |= np.eye(T, dtype=bool)


def rule(mask, b, i, j, positions=POSITIONS, segments=SEGMENTS):
    """Whether token i sees token j, in so many words."""
    if segments[b, i] != segments[b, j]:
        return False
    if mask.tree_BTT is not None:
        return bool(mask.tree_BTT[b, i, j])
    p, q = positions[b, i], positions[b, j]
    seen = not (mask.causal and q > p)
    if mask.window is not None and abs(p - q) >= mask.window:
        seen = False
    if mask.chunk is not None and p // mask.chunk != q // mask.chunk:
        seen = False
    if mask.prefix is not None:
        prefix = mask.prefix[b] if np.ndim(mask.prefix) == 1 else mask.prefix[b, i]
        seen = seen or (p < prefix and q < prefix)
    if mask.spans_BT is not None:
        seen = seen or (mask.spans_BT[b, i] != 0 and mask.spans_BT[b, i] == mask.spans_BT[b, j])
    return bool(seen)


MASKS = {
    "causal": Mask(),
    "window": Mask(window=33),
    "window to both sides": Mask(causal=False, window=20),
    "chunks": Mask(chunk=32),
    "prefix of rows": Mask(prefix=np.array([5, 40])),
    "prefix of documents, beside a window": Mask(window=10, prefix=np.where(SEGMENTS == 1, 50, 12)),
    "spans": Mask(spans_BT=SPANS),
    "spans, prefix and chunks": Mask(chunk=16, prefix=np.array([9, 0]), spans_BT=SPANS),
    "tree": Mask(tree_BTT=TREE),
}


def brute_force(mask):
    return np.array([[[rule(mask, b, i, j) for j in range(T)] for i in range(T)] for b in range(B)])


def draws():
    rng = np.random.default_rng(1)
    return (jnp.asarray(rng.normal(size=(B, T, H, 8)), jnp.float32) for H in (4, 2, 2))


def arrays_of(mask):
    return jax.tree.map(jnp.asarray, mask)


@pytest.mark.parametrize("name", MASKS)
def test_a_token_sees_what_the_rule_says_and_attends_to_it_alone(name):
    q, k, v = draws()
    seen = brute_force(MASKS[name])
    ids = jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS)
    found = self_attention_weights(q, k, *ids, arrays_of(MASKS[name]))
    np.testing.assert_array_equal(np.asarray(found).min(1) > 0, seen)
    scores, d_out = Scores(softcap=3.0), jnp.cos(q)

    def ours(*qkv):
        return in_query_blocks(*qkv, *ids, arrays_of(MASKS[name]), scores)

    out, pull = jax.vjp(ours, q, k, v)
    wanted, pull_wanted = jax.vjp(lambda *qkv: attention(*qkv, jnp.asarray(seen), scores), q, k, v)
    for got, want in zip((out, *pull(d_out)), (wanted, *pull_wanted(d_out)), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("part", ["prefix of rows", "spans", "tree"])
@pytest.mark.parametrize("kernel", ["flash", "splash", "cudnn"])
def test_a_kernel_refuses_the_part_of_a_mask_that_it_has_not_and_plain_steps_in(kernel, part):
    q, k, v = draws()
    ids, mask = (jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS)), arrays_of(MASKS[part])
    platform = "gpu" if kernel == "cudnn" else "tpu"
    with backend.use(platform, interpret=True):
        with (
            backend.prefer(Kernels(attention=kernel)),
            pytest.raises(ValueError, match=f"its masks have no {part.split()[0]}. These can: plain"),
        ):
            self_attention(q, k, v, *ids, mask)
        out = self_attention(q, k, v, *ids, mask)
    np.testing.assert_allclose(out, in_query_blocks(q, k, v, *ids, mask), atol=1e-6)


START, COUNT = np.array([11, 0]), np.array([5, 3])
NEW = np.zeros((2, 5, 5), bool)
for row, parents in enumerate([[None, 0, 0, 1, 2], [None, 0, 1, None, None]]):
    for i, parent in enumerate(parents):
        NEW[row, i] |= np.arange(5) == i
        NEW[row, i] |= NEW[row, parent] if parent is not None else False
PAGED = {
    "causal": Mask(),
    "prefix": Mask(prefix=np.array([14, 2])),
    "tree": Mask(tree_BTT=NEW),
    "tree and window": Mask(window=7, tree_BTT=NEW),
}


@pytest.mark.parametrize("name", PAGED)
def test_pages_are_seen_as_the_rule_says(name):
    """Old tokens by position, new ones by the tree where there is one; none beyond the row's last."""
    rng, layout, mask = np.random.default_rng(2), KVLayout(2), PAGED[name]
    slots = {x: jnp.asarray(rng.normal(size=(2, 32, 2, 8)), jnp.float32) for x in "kv"}
    cache = pages.empty_pages("k", 9, 8, 2, 8, jnp.float32) | pages.empty_pages("v", 9, 8, 2, 8, jnp.float32)
    table = jnp.asarray(rng.permutation(8).reshape(2, 4) + 1)
    place = jnp.broadcast_to(jnp.arange(32), (2, 32))
    old = jax.tree.map(lambda x: jnp.where((place < START[:, None])[..., None, None], x, 1e3), slots)
    cache = pages.write(cache, old, jnp.take_along_axis(table, place // 8, 1), place % 8)
    at = jnp.minimum(START[:, None] + jnp.arange(5), 31)
    new = jax.tree.map(lambda x: jnp.take_along_axis(x, at[..., None, None], axis=1), slots)
    q = jnp.asarray(rng.normal(size=(2, 5, 4, 8)), jnp.float32)
    out, _ = attend_in_rows(
        q, new, cache, table, jnp.asarray(START), jnp.asarray(COUNT), layout, arrays_of(mask)
    )
    seen = np.zeros((2, 5, 32), bool)
    for b in range(2):
        positions = np.repeat([np.arange(32)], 2, axis=0)
        for i in range(COUNT[b]):
            for j in range(START[b] + COUNT[b]):
                by_position = dataclasses.replace(mask, tree_BTT=None)
                ones = np.ones_like(positions)
                seen[b, i, j] = rule(by_position, b, START[b] + i, j, positions, ones)
                if mask.tree_BTT is not None and j >= START[b]:
                    seen[b, i, j] = NEW[b, i, j - START[b]]
    wanted = attention(q, slots["k"], slots["v"], jnp.asarray(seen))
    real = np.arange(5) < COUNT[:, None]
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(wanted)[real], atol=2e-5)


def test_pages_refuse_spans_and_their_kernel_what_arrays_say():
    cache = pages.empty_pages("k", 3, 8, 2, 8, jnp.float32) | pages.empty_pages("v", 3, 8, 2, 8, jnp.float32)
    q, table, one = jnp.zeros((1, 2, 4, 8)), jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32)
    run = lambda mask: attend_in_rows(q, None, cache, table, one, one, KVLayout(2), mask)
    with pytest.raises(ValueError, match="no implementation of paged can serve .*its masks have no spans"):
        run(Mask(spans_BT=jnp.ones((1, 2), jnp.int32)))
    with (
        backend.use("tpu", interpret=True),
        backend.prefer(Kernels(paged="kernel")),
        pytest.raises(ValueError, match="its masks have no tree. These can: plain"),
    ):
        run(Mask(tree_BTT=jnp.ones((1, 2, 2), bool)))

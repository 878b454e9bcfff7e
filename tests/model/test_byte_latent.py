"""Byte-latent models: patches as a loop over bytes cuts them, packed as alone, decoded from a cache as in one pass,
trained end to end.

tests/goldens/make.py made the golden files; test_families.py and test_family_training.py have what all families share.
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

from model import (
    Attention,
    Block,
    Cache,
    ModelConfig,
    Rope,
    SwiGLU,
    apply,
    decoder,
    init,
    init_cache,
    load,
    save,
)
from model.blocks.common import TokenInfo
from model.blocks.ngrams import PRIMES, NGrams, polynomial_hashes
from model.blocks.patch_attention import PatchAttention, PatchPool, attend_own_bytes
from model.blocks.patches import (
    Clues,
    EntropyPatcher,
    SpacePatcher,
    StaticPatcher,
    lay_out,
)
from model.blocks.recurrence import begin
from model.blocks.residual import Residual
from model.families import FAMILIES
from model.function import logical_axes
from model.inputs.byte_latent import ByteLatent
from model.inspect.describe import describe
from model.inspect.flops import forward_flops_per_token, train_flops_per_token
from model.inspect.trace import trace
from model.kernels.attention.reference import attention
from model.layout import relayout
from model.patcher import with_patcher
from tests.policy import adamw, language_modelling, policy_state, policy_step
from train.schedules import Cosine

from .conftest import GOLDENS, applied, check_decoding, compiled_fast, random_params, random_tokens
from .test_families import config_of

forward = compiled_fast(applied, static_argnums=0)

ROPE = Rope(100.0)
BYTES = Block(Attention(2, 1, 6, ROPE, window=7), SwiGLU(20))
READS = Block(PatchAttention(2, 1, 6), None, residual=Residual(skip_scale=2.0))
ENTROPY = EntropyPatcher(8, (Block(Attention(2, 2, 4, ROPE, window=5), SwiGLU(16)),), threshold=3.905)
PATCHERS = {
    "entropy": ENTROPY,
    "rise": dataclasses.replace(ENTROPY, rule="rise", threshold=0.0, tied_head=True, final_norm=None),
    "spaces": SpacePatcher(special_ids=1),
    "static": StaticPatcher(3),
}
every_patcher = pytest.mark.parametrize(
    "name", [name if name == "entropy" else pytest.param(name, marks=pytest.mark.slow) for name in PATCHERS]
)


def tiny(name="entropy", vocab_size=61, layers=1, **fields):
    fields = {"ngrams": NGrams((2, 4), 31), "longest_patch": 4} | fields
    of_bytes = ByteLatent(
        12, (BYTES,), (READS, BYTES) * layers, PatchPool(2, 1, 6, 3), PATCHERS[name], **fields
    )
    latent = Block(Attention(4, 2, 6, ROPE), SwiGLU(40))
    return ModelConfig(
        vocab_size, 24, (latent,) * layers, tied_head=False, max_length=64, byte_latent=of_bytes
    )


@functools.cache
def built(name="entropy", **fields):
    cfg = tiny(name, **fields)
    return cfg, random_params(cfg)


def loop_over_bytes(segments, ends, longest, places):
    """(patch of each byte, last whole patch of its document, (document, number in it) of each patch)."""
    patch, read, made, known = [], [], 0, {}
    for t, document in enumerate(segments):
        if document == 0:
            patch, read = [*patch, places], [*read, None]
            continue
        if t == 0 or segments[t - 1] != document:
            of_document, length, last, is_first = 0, 0, -1, True
        length += 1
        number = made
        if number < places:
            known[number] = document, of_document
        patch.append(min(number, places))
        if is_first or ends[t] or length == longest:
            last = number if number < places else last
            made, of_document, length = made + 1, of_document + 1, 0
        elif t + 1 == len(segments) or segments[t + 1] != document:
            made += 1  # the patch stays open, and the next document has another
        is_first = False
        read.append(last)
    return patch, read, known


@pytest.mark.parametrize("longest", [None, 1, 3])
@pytest.mark.parametrize("most", [None, 4])
def test_patches_are_those_of_a_loop_over_bytes(longest, most):
    rng, segments = np.random.default_rng(0), [0, 0, *[1] * 9, *[2] * 5, 3, *[4] * 6, 0]
    info = TokenInfo(jnp.arange(24)[None], jnp.asarray([segments]))
    _, order = begin(tiny().byte_latent, jnp.zeros((1, 24, 1)), info, None)
    cut = compiled_fast(functools.partial(lay_out, longest=longest, most=most, cached=False))
    for _ in range(5):
        ends, places = rng.random((1, 24)) < 0.4, most or 24
        found, _ = cut(ends, order, info.segment_ids)
        patch, read, known = loop_over_bytes(segments, ends[0], longest, places)
        assert found.patch_BT[0].tolist() == patch
        assert [a for a, b in zip(found.read_BT[0].tolist(), read) if b is not None] == [
            b for b in read if b is not None
        ]
        of_patches = zip(found.segment_BP[0].tolist(), found.position_BP[0].tolist(), strict=True)
        assert {p: pair for p, pair in enumerate(of_patches) if pair[0]} == known


def ends_after(patcher, text):
    token = jnp.asarray([[b + 4 for b in text.encode()]])
    before = jnp.pad(token, ((0, 0), (1, 0)))[:, :-1]
    ends = patcher.ends(Clues(token, before, jnp.arange(token.shape[1])[None]))[0]
    return "".join(chr(b) + "|" * bool(end) for b, end in zip(text.encode(), ends))


def test_a_patch_ends_with_the_first_byte_after_a_word_or_every_so_many():
    assert ends_after(SpacePatcher(), "be  not,\n2b: x") == "be | not,|\n2b:| x"
    # a byte that begins a character of UTF-8 is between words, those that continue it are not
    assert ends_after(SpacePatcher(), "aé b").encode("latin-1") == "aé".encode()[:2] + b"|\xa9 |b"
    assert ends_after(StaticPatcher(3), "abcdefgh") == "a|bcd|efg|h"


def test_entropy_ends_a_patch_above_its_threshold_or_where_it_rises():
    entropy, zero = jnp.asarray([[2.0, 1.4, 1.3, 1.9, 2.5]]), jnp.zeros((1, 5), jnp.int32)
    before = jnp.pad(entropy, ((0, 0), (1, 0)))[:, :-1]
    found = Clues(zero, zero, jnp.arange(5)[None], entropy, before)
    assert dataclasses.replace(ENTROPY, threshold=1.35).ends(found)[0].tolist() == [1, 1, 0, 1, 1]
    rising = dataclasses.replace(ENTROPY, threshold=0.55, rule="rise")
    assert rising.ends(found)[0].tolist() == [1, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="rule='falls' is not one of above, rise"):
        dataclasses.replace(ENTROPY, rule="falls")


def test_the_hash_is_that_of_64_bit_integers():
    window = np.random.default_rng(0).integers(0, 260, (1, 40, 8)).astype(np.int32)  # the byte itself first
    kinds = [(prime, size) for prime in PRIMES for size in (1, 3, 8)]
    for buckets in (97, 500_002):
        found = polynomial_hashes(jnp.asarray(window), kinds, buckets)
        for i, (prime, size) in enumerate(kinds):
            total = sum(prime ** (size - 1 - s) * window[0, :, s].astype(object) for s in range(size))
            signed = (total + 2**63) % 2**64 - 2**63
            np.testing.assert_array_equal(found[0, :, i], (signed % buckets).astype(np.int32))


def test_patches_attend_to_their_own_bytes_as_with_a_mask():
    rng, (P, N, H, K, C) = np.random.default_rng(0), (4, 3, 4, 2, 5)
    q, k, v = (rng.normal(size=shape).astype("f4") for shape in ((2, P, N, H, C), (2, 9, K, C), (2, 9, K, C)))
    patch = np.array([[4, 0, 0, 1, 1, 1, 3, 4, 4], [0, 1, 1, 1, 1, 2, 2, 3, 3]])
    mask = np.repeat(patch[:, None] == np.arange(P)[:, None], N, axis=1)
    wanted = attention(jnp.asarray(q.reshape(2, P * N, H, C)), k, v, jnp.asarray(mask)).reshape(q.shape)
    found = np.array(compiled_fast(attend_own_bytes)(q, k, v, patch))
    assert (found[0, 2] == 0).all()  # a patch without bytes
    found[0, 2] = wanted[0, 2]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    summed = lambda *x: jnp.sin(attend_own_bytes(*x, patch)).sum()
    grads = compiled_fast(jax.grad(summed, argnums=(0, 1, 2)))(q, k, v)
    assert all(np.isfinite(grad).all() for grad in grads)
    along = tuple(rng.normal(size=x.shape).astype("f4") for x in (q, k, v))
    _, moved = compiled_fast(lambda args, along: jax.jvp(summed, args, along))((q, k, v), along)
    np.testing.assert_allclose(moved, sum(map(np.vdot, grads, along)), rtol=1e-5)


# one model: no leak, one result whatever the way


@every_patcher
def test_a_packed_row_equals_its_documents_alone(name):
    cfg, params = built(name)
    lengths, padding = [1, 2, 15, 9], 5
    tokens = random_tokens(cfg, (1, 32))
    segments = np.repeat([1, 2, 3, 4, 0], [*lengths, padding])[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in [*lengths, padding]])[None]
    packed = forward(cfg, params, tokens, positions, segments).logits
    alone = np.zeros((len(lengths), 32), np.int32)
    for row, stop, length in zip(alone, np.cumsum(lengths), lengths):
        row[:length] = tokens[0, stop - length : stop]
    wanted = forward(cfg, params, alone).logits
    for row, stop, length in zip(wanted, np.cumsum(lengths), lengths):
        np.testing.assert_allclose(packed[0, stop - length : stop], row[:length], atol=3e-5)


def test_padding_before_and_after_a_row_changes_nothing():
    cfg, params = built(max_patches=9)
    tokens, segments = random_tokens(cfg, (3, 24)), np.ones((3, 24), np.int32)
    segments[1, :5], segments[2, 15:] = 0, 0
    tokens[1, 5:], tokens[2, :15] = tokens[0, :19], tokens[0, :15]
    logits = forward(cfg, params, tokens, segment_ids=segments).logits
    np.testing.assert_allclose(logits[1, 5:], logits[0, :19], atol=3e-5)
    np.testing.assert_allclose(logits[2, :15], logits[0, :15], atol=3e-5)


@pytest.mark.parametrize("most", [None, 3])
def test_no_byte_sees_those_after_it(most):
    cfg, params = built(max_patches=most)
    tokens = np.repeat(random_tokens(cfg, (1, 20)), 20, axis=0)
    tokens[np.arange(20), np.arange(20)] += 1  # row t has another byte at t
    tokens %= cfg.vocab_size
    whole = forward(cfg, params, np.repeat(random_tokens(cfg, (1, 20)), 20, axis=0)).logits[0]
    changed = forward(cfg, params, tokens).logits
    for t in range(20):
        np.testing.assert_allclose(changed[t, :t], whole[:t], atol=3e-5)
        assert np.abs(changed[t, t] - whole[t]).max() > 1e-3
        if most is None and t < 19:
            assert np.abs(changed[t, t + 1 :] - whole[t + 1 :]).max() > 1e-3


@pytest.mark.parametrize(
    "name, most", [("entropy", 5)] + [pytest.param(name, None, marks=pytest.mark.slow) for name in PATCHERS]
)
def test_decoding_in_pieces_equals_the_whole_row_at_once(name, most):
    cfg, params = built(name, max_patches=most)
    tokens = random_tokens(cfg, (3, 20))
    cache = check_decoding(forward, cfg, params, tokens, init_cache(cfg, 3, 20), [7, 1, 1, 1, 1, 1, 1, 7])
    made = np.asarray(cache.layers["bytes"]["made"])
    assert ((made > 5) & (made < 20)).all()  # there are longer patches, and more than there is room for


STEPS = (
    "xxx... .x.xxx ......",
    "x . x",
    "x x x",
    "xxxxxx x....x .....x",
    "x x x",
    ". x x",
)  # a row of "x"s each


def dirty_cache(cfg):
    """Three rows with pages in no order and rows 4, 0 and 2 of a state that others have left; two rows are nobody's."""
    rng, room = np.random.default_rng(7), init_cache(cfg, 5, 24).layers
    draw = lambda x: rng.integers(0, 9, x.shape) if x.dtype == np.int32 else rng.normal(size=x.shape)
    layers = jax.tree.map(lambda x: jnp.asarray(draw(x), x.dtype), room)
    layers = jax.tree.map(lambda x: x.reshape(20, 6, *x.shape[2:]) if x.shape[:2] == (5, 24) else x, layers)
    pages = rng.permutation(20)[:12].reshape(3, 4).astype(np.int32)
    return Cache(layers, jnp.asarray(pages), jnp.zeros(3, jnp.int32), jnp.asarray([4, 0, 2]))


@pytest.mark.slow
def test_rows_of_different_length_on_reused_states_equal_the_full_pass():
    cfg, params = built()
    tokens, total = random_tokens(cfg, (3, 20)), np.zeros(3, int)
    wanted, cache = np.asarray(forward(cfg, params, tokens).logits), dirty_cache(cfg)
    untouched = jax.tree.map(lambda x: x[jnp.array([1, 3])], cache.layers["bytes"]["last"])
    for step in STEPS:
        real = np.array([[mark == "x" for mark in row] for row in step.split()])
        index = total[:, None] + np.cumsum(real, 1) - 1
        now = np.where(real, np.take_along_axis(tokens, np.maximum(index, 0), 1), 17).astype(np.int32)
        positions = np.where(real, index, 0)
        out = forward(cfg, params, now, positions, real.astype(np.int32), cache=cache)
        for b in range(3):
            np.testing.assert_allclose(out.logits[b, real[b]], wanted[b, index[b, real[b]]], atol=3e-5)
        cache, total = out.cache, total + real.sum(1)
    np.testing.assert_array_equal(cache.layers["bytes"]["last"][jnp.array([1, 3])], untouched)


@pytest.mark.slow
def test_a_scanned_model_is_the_unrolled_one_with_and_without_a_cache():
    cfg, params = built(layers=2)
    tokens = random_tokens(cfg, (2, 12))
    scanned_cfg, scanned = relayout(cfg, params, scan=True)
    wanted = forward(cfg, params, tokens).logits
    np.testing.assert_allclose(forward(scanned_cfg, scanned, tokens).logits, wanted, atol=3e-5)
    check_decoding(forward, scanned_cfg, scanned, tokens, init_cache(scanned_cfg, 2, 12), [7, 1, 1, 1, 1, 1])
    again_cfg, again = relayout(scanned_cfg, scanned, scan=False)
    assert again_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.slow
def test_the_latent_transformer_is_left_out_of_a_step_in_which_no_patch_ends():
    cfg, params = built("static", longest_patch=None)  # patches end with the bytes 0, 3, 6, ...
    nothing = jax.tree.map(lambda x: jnp.full_like(x, np.nan), params)
    broken = params | {"block_0": nothing["block_0"]}
    tokens = random_tokens(cfg, (2, 9))
    wanted = forward(cfg, params, tokens).logits
    cache = forward(cfg, params, tokens[:, :4], cache=init_cache(cfg, 2, 9)).cache
    for t in (4, 5):
        out = forward(cfg, broken, tokens[:, t : t + 1], cache=cache)
        np.testing.assert_allclose(out.logits[:, 0], wanted[:, t], atol=3e-5)
        cache = out.cache
    assert np.isnan(forward(cfg, broken, tokens[:, 6:7], cache=cache).logits).all()


# the whole life of one


def objective_batch(tokens, targets):
    ones = jnp.ones(tokens.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    weights = ones.astype(jnp.float32)
    batch = {"tokens": tokens, "targets": targets, "loss_weights": weights}
    return batch | {"segment_ids": ones, "positions": positions}


def trained(cfg, params, data, steps, rate):
    """Parameters after so many steps of AdamW on rows of a text, by the ordinary objective."""
    optimizer = adamw(cfg, steps, Cosine(5), peak_lr=rate, weight_decay=0.1)
    step, state = jax.jit(policy_step(cfg, optimizer)), policy_state(params, optimizer)
    (tokens, targets), rng = rows_of(data), np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, len(tokens), 8)
        state, _ = step(state, objective_batch(tokens[rows], targets[rows]))
    return state.params["policy"]


@pytest.mark.slow
def test_gradients_reach_every_parameter_but_the_patchers():
    cfg, params = built()
    tokens = random_tokens(cfg, (2, 21))
    batch = objective_batch(tokens[:, :-1], tokens[:, 1:])
    batch["segment_ids"] = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 1]], [9, 9, 2], axis=1))
    grads = compiled_fast(jax.grad(lambda params: language_modelling(cfg)(params, batch)[0].total))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        of_patcher = path[0].key == "patcher"
        assert np.isfinite(grad).all() and np.any(grad != 0) != of_patcher, jax.tree_util.keystr(path)


def sentences(rng, count):
    """Bytes of an English that says everything twice."""
    names, verbs = "Anna Bertrand Christina Dmitri Esperanza".split(), "finds paints remembers".split()
    things, lines = "apples lanterns photographs umbrellas".split(), []
    for _ in range(count):
        name, verb, thing = (rng.choice(words) for words in (names, verbs, things))
        number = rng.integers(2, 10)
        lines.append(f"{name} {verb} {number} {thing}. The {thing} of {name} are {number}.\n")
    return "".join(lines).encode()


def rows_of(data, length=128):
    tokens = np.frombuffer(data, np.uint8).astype(np.int32) + 4
    count = (len(tokens) - 1) // length
    cut = lambda tokens: tokens[: count * length].reshape(count, length)
    return cut(tokens), cut(tokens[1:])


def bigram_nats(data):
    """What a byte costs by the frequencies of pairs of bytes."""
    data, pairs = np.frombuffer(data, np.uint8), np.zeros((256, 256))
    np.add.at(pairs, (data[:-1], data[1:]), 1)
    known = pairs > 0
    return -(
        pairs * np.log(np.where(known, pairs / np.maximum(pairs.sum(1, keepdims=True), 1), 1))
    ).sum() / len(data)


@pytest.mark.slow
def test_a_patcher_and_then_the_model_around_it_learn_bytes():
    rng = np.random.default_rng(0)
    data, held_out = sentences(rng, 400), sentences(rng, 30)
    patcher_cfg = decoder(260, 24, 1, 2, 1, 12, 48, tied_head=False)
    patcher = trained(patcher_cfg, init(patcher_cfg, jax.random.key(0)), data, 120, 2e-2)

    local = Block(Attention(2, 2, 16, window=16), SwiGLU(48))
    reads = Block(PatchAttention(2, 2, 12), None, residual=Residual(skip_scale=2.0))
    cfg = ModelConfig(
        260,
        48,
        (Block(Attention(4, 4, 12), SwiGLU(96)),),
        tied_head=False,
        byte_latent=ByteLatent(
            *(24, (local,), (reads, local), PatchPool(2, 2, 12), StaticPatcher(4), NGrams((2, 3), 503)),
            max_patches=64,
        ),
    )
    cfg, start = with_patcher(cfg, init(cfg, jax.random.key(1)), patcher_cfg, patcher, threshold=0.7)
    params = trained(cfg, start, data, 70, 1e-2)
    jax.tree.map(np.testing.assert_array_equal, params["patcher"], patcher)  # not even decayed

    tokens, targets = rows_of(held_out)
    out = forward(cfg, params, tokens, cache=init_cache(cfg, *tokens.shape))
    patches = np.asarray(out.cache.layers["bytes"]["made"])
    assert ((patches > 6) & (patches < 128 / 3)).all()  # more than three bytes in the mean
    nats = float(optax.softmax_cross_entropy_with_integer_labels(out.logits, targets).mean())
    assert nats < 0.28 < bigram_nats(data) / 5


def test_a_patcher_is_the_model_that_was_put_in():
    cfg, params = built("static")
    patcher_cfg = ModelConfig(61, 8, ENTROPY.blocks, tied_head=False)
    patcher = random_params(patcher_cfg, seed=3)
    tokens = random_tokens(cfg, (1, 20))
    logprobs = jax.nn.log_softmax(forward(patcher_cfg, patcher, tokens).logits)
    entropy = np.asarray(-(np.exp(logprobs) * logprobs).sum(-1))[0]
    threshold = float(np.median(entropy))
    _, _, known = loop_over_bytes([1] * 20, entropy > threshold, 4, 20)
    new, joined = with_patcher(cfg, params, *relayout(patcher_cfg, patcher, scan=True), threshold=threshold)
    assert new.byte_latent.patcher == dataclasses.replace(ENTROPY, threshold=threshold)
    assert jax.tree.map(jnp.shape, joined) == jax.tree.map(jnp.shape, random_params(new))
    out = forward(new, joined, tokens, cache=init_cache(new, 1, 20))
    made = int(out.cache.layers["bytes"]["made"][0])
    assert 5 < made < 15 and made in (len(known), len(known) - 1)
    wrong = patcher_cfg.replace(logit_softcap=3.0)
    with pytest.raises(ValueError, match="a patcher of this model would have logit_softcap=None"):
        with_patcher(cfg, params, wrong, patcher)
    with pytest.raises(ValueError, match="needs a byte-latent model"):
        with_patcher(patcher_cfg, patcher, patcher_cfg, patcher)


@pytest.mark.parametrize("name", PATCHERS)
def test_a_config_is_json_and_every_parameter_has_axes(name, tmp_path):
    cfg = tiny(name, max_patches=7)
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    params = random_params(cfg)
    axes = jax.tree.map(len, logical_axes(cfg), is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert axes == jax.tree.map(jnp.ndim, params)
    if name == "rise":
        save(tmp_path / "model", cfg, params)
        again_cfg, again = load(tmp_path / "model")
        assert again_cfg == cfg
        jax.tree.map(np.testing.assert_array_equal, again, params)
        assert "local decoder block 1" in describe(tmp_path / "model")


def products(jaxpr):
    """Flops of the matrix products in a traced function."""
    total = 0
    for equation in jaxpr.eqns:
        for inner in core.jaxprs_in_params(equation.params):
            total += products(inner)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    return total


def test_flops_are_those_of_the_traced_products():
    cfg, params = built()
    traced = jax.make_jaxpr(functools.partial(apply, cfg))(params, jnp.zeros((1, 1), jnp.int32))
    pool = cfg.byte_latent.pool
    not_as_products = (
        2 * pool.vectors * pool.num_heads * pool.head_dim
    )  # values by their weights, summed by patch
    of_none = READS.mixer.flops_per_patch(12, pool.vectors)  # keys of what stands for no patch
    assert forward_flops_per_token(cfg, 1) == products(traced.jaxpr) + not_as_products - of_none


def test_flops_fall_with_the_places_for_patches_and_a_patcher_has_no_backward_pass():
    all_, half = tiny(), tiny(max_patches=32)
    latent = ModelConfig(61, 24, all_.blocks)
    blocks = lambda cfg, length: forward_flops_per_token(cfg, length) - 2 * 24 * 61
    without = lambda cfg, length: forward_flops_per_token(cfg, 64) - blocks(latent, length) * length / 64
    per_patch = without(all_, 64) - without(half, 32)  # to latent width and back
    assert 0 < per_patch < blocks(latent, 1)
    patcher = ModelConfig(61, 8, ENTROPY.blocks)
    assert train_flops_per_token(all_, 64) == pytest.approx(
        3 * forward_flops_per_token(all_, 64) - 2 * forward_flops_per_token(patcher, 64)
    )


# errors, and the family


def test_what_makes_no_byte_latent_model_is_an_error():
    cfg, params = built()
    with pytest.raises(ValueError, match="max_patches=0: give 1 or more"):
        tiny(max_patches=0)
    with pytest.raises(ValueError, match="a local decoder one with PatchAttention"):
        dataclasses.replace(cfg.byte_latent, decoder=(BYTES,))
    with pytest.raises(ValueError, match="PatchAttention belongs in the local decoder"):
        ModelConfig(61, 12, (READS,))
    seeing_all = Block(Attention(2, 1, 6, causal=False), None)
    with pytest.raises(ValueError, match="must be causal"):
        cfg.replace(byte_latent=dataclasses.replace(cfg.byte_latent, encoder=(seeing_all,)))
    with pytest.raises(ValueError, match="a trace needs a model with one stack"):
        trace(cfg, params, random_tokens(cfg, (1, 4)))


@pytest.mark.parametrize("name", ["max_patches", "spaces"])
def test_what_transformers_cannot_say_is_saved_in_our_own_format_alone(name, tmp_path):
    cfg, params = load(GOLDENS / "blt")
    change = {"max_patches": 9} if name == "max_patches" else {"patcher": SpacePatcher()}
    cfg = cfg.replace(byte_latent=dataclasses.replace(cfg.byte_latent, **change))
    with pytest.raises(ValueError, match="blt.*max_patches|blt has other parts"):
        save(tmp_path / "model", cfg, params, format="huggingface")


def test_bytes_as_patches_are_a_model_of_transformers():
    saved = config_of(GOLDENS / "blt")
    cfg = FAMILIES["blt"].read_config(saved | {"patch_in_forward": False})
    assert cfg.byte_latent.patcher == StaticPatcher(1)
    assert FAMILIES["blt"].why_not(cfg) is None


def test_every_part_of_blts_config_has_the_defaults_of_transformers(caplog):
    saved, family = json.loads((GOLDENS / "defaults.json").read_text())["blt"], FAMILIES["blt"]
    whole = family.read_config(saved)
    for part in ("patcher_config", "encoder_config", "global_config", "decoder_config"):
        for key in saved[part]:
            rest = {other: value for other, value in saved[part].items() if other != key}
            assert family.read_config(saved | {part: rest}) == whole, (part, key)
    assert not caplog.records
    with pytest.raises(ValueError, match="decoder_config.hidden_size='7'"):
        family.read_config(saved | {"decoder_config": saved["decoder_config"] | {"hidden_size": 7}})
    everywhere = {"cross_attn_all_layers": True, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match="patches read the bytes after the last layer"):
        family.read_config(saved | {"encoder_config": saved["encoder_config"] | everywhere})

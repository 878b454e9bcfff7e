"""The engine's pages: quantised, and read by the kernel for TPUs, interpreted; of a tiny model that repeats what it
reads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model import MESH_AXES, ShardingRules, apply, decoder, init, init_cache, logical_axes
from model.kernels import backend
from model.layout import relayout
from model.sharding import named_sharding
from serve import Engine, Request, SamplingParams
from serve.engine_config import EngineConfig
from serve.programs import Steps

from ..model.tpu import assert_not_moved, needs_libtpu, one_chip

QUANTIZED = {"int8": 0.1, "float8_e4m3fn": 0.5}  # how far a log-probability may be off
PERIOD, WORDS = 6, np.arange(20, 36)


@functools.cache
def repeats(count, seed=0):
    """[count, 7 * PERIOD] tokens, whose first PERIOD come again and again: as many as the engine is to say at most."""
    return np.tile(np.random.default_rng(seed).choice(WORDS, (count, PERIOD)), (1, 7)).astype(np.int32)


@pytest.fixture(scope="module")
def learnt(tokenizer):
    """(cfg, params) of one block after 150 steps."""
    cfg = decoder(tokenizer.vocab_size, 16, 1, 4, 2, 8, 32, max_length=48, tied_head=False, rope_theta=100.0)
    optimizer, params = optax.adam(1e-2), init(cfg, jax.random.key(0))

    @jax.jit
    def train(params, tokens_NBT):
        def step(carry, tokens_BT):
            params, state = carry

            def loss(params):
                logprobs = jax.nn.log_softmax(apply(cfg, params, tokens_BT[:, :-1]).logits)
                return -jnp.take_along_axis(logprobs, tokens_BT[:, 1:, None], -1)[:, PERIOD:].mean()

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), tokens_NBT)

    (params, _), losses = train(params, repeats(150 * 32).reshape(150, 32, -1))
    assert losses[-1] < 0.05
    return cfg, params


def tokens_of(learnt, tokenizer, params=None, **options):
    """What the engine says to prompts of one token and of several pages."""
    sizes = {"max_rows": 4, "page_size": 16, "prefill_chunk": 16, "decode_steps": 4}
    buckets = {"row_buckets": (), "chunk_buckets": (), "context_buckets": ()}
    engine = Engine(learnt[0], params or learnt[1], tokenizer, **(sizes | buckets | options))
    engine._speculation.payoff.pays = lambda *_: True
    sampling = SamplingParams(max_tokens=14, ignore_eos=True)
    lengths = (1, 13, 20, 24)
    prompts = [Request(row[:length].tolist(), sampling) for row, length in zip(repeats(4, 1), lengths)]
    outputs = engine.generate(prompts)
    if engine.config.draft_tokens:
        assert engine.stats.accepted_tokens > 20  # what repeats itself is guessed right
    return [out.tokens for out in outputs]


@pytest.mark.parametrize("dtype", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)])
def test_generation_from_quantised_pages_is_that_from_whole_ones(learnt, tokenizer, dtype):
    """All tokens after a prompt that says how it goes on, and log-probabilities within the stated bound."""
    wanted, found = (tokens_of(learnt, tokenizer, cache_dtype=name) for name in (None, dtype))
    assert found[1:] == wanted[1:]
    assert found[1] == repeats(4, 1)[1][1:15].tolist()
    cfg, params = learnt
    tokens = repeats(8, 2)
    logprobs = [
        jax.nn.log_softmax(apply(cfg, params, tokens, cache=init_cache(cfg, 8, 48, name)).logits)[:, PERIOD:]
        for name in (None, dtype)
    ]
    at_targets = [
        np.take_along_axis(np.asarray(x[:, :-1]), tokens[:, PERIOD + 1 :, None], -1) for x in logprobs
    ]
    assert 0 < np.abs(at_targets[0] - at_targets[1]).max() < QUANTIZED[dtype]


@pytest.mark.parametrize("dtype", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in QUANTIZED)])
def test_the_kernel_says_what_gathered_rows_say(learnt, tokenizer, dtype):
    """Also of a model whose layers are stacked."""
    wanted = tokens_of(learnt, tokenizer, cache_dtype=dtype)
    with backend.use("tpu", interpret=True):
        assert tokens_of(relayout(*learnt, scan=True), tokenizer, cache_dtype=dtype) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_the_kernel_verifies_drafts_as_gathered_rows_do(learnt, tokenizer, dtype):
    wanted = tokens_of(learnt, tokenizer, cache_dtype=dtype)
    assert tokens_of(learnt, tokenizer, cache_dtype=dtype, draft_tokens=3) == wanted
    with backend.use("tpu", interpret=True):
        assert tokens_of(learnt, tokenizer, cache_dtype=dtype, draft_tokens=3) == wanted


@pytest.mark.slow
def test_the_kernel_says_the_same_on_a_mesh(learnt, tokenizer):
    cfg, params = learnt
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 1, 1, 1, 2), MESH_AXES)
    shardings = jax.tree.map(
        lambda axes: named_sharding(mesh, ShardingRules(), axes),
        logical_axes(cfg),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    wanted = tokens_of(learnt, tokenizer, cache_dtype="int8")
    with backend.use("tpu", interpret=True):
        assert tokens_of(learnt, tokenizer, jax.device_put(params, shardings), cache_dtype="int8") == wanted


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind,chunk", [("decode", 1), ("verify", 4), ("prefill", 32)])
def test_a_program_for_a_tpu_copies_no_pages(dtype, kind, chunk):
    """Of stacked layers, and of heads whose channels don't fill a TPU's vectors."""
    cfg = decoder(4096, 576, 2, 9, 3, 64, 1024, dtype="bfloat16", scan=True)
    params = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one_chip("v5e")), params)
    config = EngineConfig(max_rows=16, num_pages=4096, page_size=128, max_length=1024, cache_dtype=dtype)
    config = dataclasses.replace(config, draft_tokens=3)
    with backend.use("tpu", "v5e"):
        steps = Steps(cfg, params, config.resolve(cfg), cfg.vocab_size)
        text = steps.lower(kind, 16, chunk, 8).compile().as_text()
    assert "paged_attention" in text
    assert_not_moved(text, jax.tree.leaves(steps.pages))


def test_a_dtype_that_pages_cannot_have_is_named(learnt, tokenizer):
    for name in ("int4", "float8_e5m2", "fp8"):
        with pytest.raises(ValueError, match="cache_dtype.*int8"):
            tokens_of(learnt, tokenizer, cache_dtype=name)

"""A document has the same logits alone, packed, padded on either side, and decoded beside a longer one.

Its rows of the cache had other texts before.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from model import Block, ModelConfig, RMSNorm, SwiGLU, init_cache, load
from model.blocks.attention import Attention
from model.blocks.mamba2 import Mamba2
from model.blocks.mixture_of_depths import MixtureOfDepths
from model.blocks.mixture_of_recursions import MixtureOfRecursions, RecursionExpertChoice
from model.blocks.moe import MoE
from model.blocks.positions import LongRopeScaling, Rope
from model.kernels import backend

from .conftest import GOLDENS, applied, compiled_fast, random_params, random_tokens
from .test_families import CHECKPOINTS, ENCODERS

DOCUMENT, NEIGHBOUR, ROW, PROMPT = 6, 5, 13, 4
QUICK = ("phi3", "mamba2", "deepseek_v3", "gpt2", "qwen3_next", "recurrent_gemma", "blt")
DECODERS = [name for name in CHECKPOINTS if name not in ENCODERS and "t5" not in name]

forward = compiled_fast(applied, static_argnums=0)


def rows_of(document, neighbour):
    """(tokens, segment ids, where the document begins), [3, ROW]: padded right, padded left, packed."""
    tokens, segments = np.zeros((3, ROW), np.int32), np.zeros((3, ROW), np.int32)
    starts = 0, ROW - DOCUMENT, NEIGHBOUR
    tokens[2, :NEIGHBOUR], segments[2, :NEIGHBOUR] = neighbour, 1
    for row, start in enumerate(starts):
        tokens[row, start : start + DOCUMENT], segments[row, start : start + DOCUMENT] = document, 2
    return tokens, segments, starts


def decoded(cfg, params, document, longer, left):
    """Logits of the document's last tokens, decoded in row 0 beside a longer prompt, after the rows had other texts."""
    width = len(longer) - (DOCUMENT - PROMPT)
    cache = init_cache(cfg, 2, 2 * width)
    before = forward(cfg, params, np.stack([longer[:width]] * 2)[:, ::-1].copy(), cache=cache).cache
    cache = dataclasses.replace(before, length=jnp.zeros_like(before.length))
    tokens, real = np.zeros((2, width), np.int32), np.zeros((2, width), np.int32)
    place = slice(width - PROMPT, width) if left else slice(0, PROMPT)
    tokens[0, place], real[0, place] = document[:PROMPT], 1
    tokens[1], real[1] = longer[:width], 1
    out = forward(cfg, params, tokens, segment_ids=real, cache=cache)
    logits = [out.logits[0, place]]
    for step in range(DOCUMENT - PROMPT):
        new = np.array([[document[PROMPT + step]], [longer[width + step]]], np.int32)
        out = forward(cfg, params, new, cache=out.cache)
        logits.append(out.logits[0])
    return np.concatenate(logits)


def check(cfg, params, atol=2e-4):
    document, neighbour = (random_tokens(cfg, (n,), seed=n) for n in (DOCUMENT, NEIGHBOUR))
    alone = np.asarray(forward(cfg, params, document[None]).logits[0])
    tokens, segments, starts = rows_of(document, neighbour)
    logits = forward(cfg, params, tokens, segment_ids=segments).logits
    scale = max(1.0, np.abs(alone).max())
    for name, row, start in zip(("padded right", "padded left", "packed"), logits, starts, strict=True):
        np.testing.assert_allclose(row[start : start + DOCUMENT], alone, atol=atol * scale, err_msg=name)
    longer = random_tokens(cfg, (11,), seed=8)
    for left in (False, True):
        found = decoded(cfg, params, document, longer, left)
        np.testing.assert_allclose(found, alone, atol=atol * scale, err_msg=f"decoded, padded left: {left}")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DECODERS]
)
def test_a_document_has_the_same_logits_whatever_is_around_it(name):
    check(*load(GOLDENS / name, dtype="float32"))


NORM = RMSNorm()
ATTENTION = Attention(4, 2, 6, Rope(100.0))
BLOCK = Block(ATTENTION, SwiGLU(20), NORM)
RECURRENT = Block(Mamba2(4, 6, 5), None, NORM)
LONG = LongRopeScaling((1.0, 1.5, 2.0), (3.0, 5.0, 9.0), original_max_length=8)
BUILT = {
    # the neighbour in the batch is beyond the original context, the document is not
    "LongRoPE": (Block(dataclasses.replace(ATTENTION, rope=Rope(100.0, LONG)), SwiGLU(20), NORM),),
    "a mixture of depths": (Block(MixtureOfDepths(BLOCK), None, None),),
    "a mixture of recursions": (
        Block(MixtureOfRecursions((BLOCK,), 2, RecursionExpertChoice((0.7, 0.4))), None, None),
    ),
    "depths over a state": (Block(MixtureOfDepths(RECURRENT), None, None),),
    "recursions over a state": (
        Block(MixtureOfRecursions((RECURRENT,), 2, RecursionExpertChoice((0.7, 0.4))), None, None),
    ),
    "experts with slots": (Block(ATTENTION, MoE(4, 2, SwiGLU(8), dispatch="capacity"), NORM),),
}


@pytest.mark.parametrize("name", ["depths over a state", "recursions over a state"])
def test_a_row_forgets_its_last_text_though_the_first_tokens_pass_by_the_block(name):
    cfg, params = model_of(BUILT[name])
    step = lambda tokens, cache: forward(cfg, params, np.array([[t] for t in tokens], np.int32), cache=cache)
    empty = init_cache(cfg, 12, 8)
    used = forward(cfg, params, np.full((12, 5), 7, np.int32), cache=empty).cache
    reused = dataclasses.replace(used, length=jnp.zeros_like(used.length))
    ours, fresh = (step(range(12), cache) for cache in (reused, empty))
    for token in range(3):
        np.testing.assert_allclose(ours.logits, fresh.logits, atol=1e-5)
        ours, fresh = (step([token] * 12, out.cache) for out in (ours, fresh))


def model_of(blocks):
    cfg = ModelConfig(61, 24, blocks, final_norm=NORM, max_length=64)
    return cfg, random_params(cfg)


@pytest.mark.parametrize("name", BUILT)
def test_so_has_it_with_blocks_that_no_family_has(name):
    check(*model_of(BUILT[name]))


def test_so_has_it_in_the_kernel_that_attends_to_pages():
    cfg, params = model_of((BLOCK,))
    document, longer = random_tokens(cfg, (DOCUMENT,), seed=6), random_tokens(cfg, (11,), seed=8)
    alone = np.asarray(forward(cfg, params, document[None]).logits[0])
    with backend.use("tpu", interpret=True):
        for left in (False, True):
            np.testing.assert_allclose(decoded(cfg, params, document, longer, left), alone, atol=2e-3)


def test_documents_share_of_a_routers_capacity_is_its_own_in_training():
    cfg, params = model_of(BUILT["a mixture of depths"][:1])
    cfg = cfg.replace(blocks=(Block(MixtureOfDepths(BLOCK, 0.5), None, None),))
    document, neighbour = (random_tokens(cfg, (n,), seed=n) for n in (DOCUMENT, NEIGHBOUR))
    trained = compiled_fast(lambda params, *arrays: applied(cfg, params, *arrays, train=True).logits)
    alone = trained(params, document[None])[0]
    tokens, segments, starts = rows_of(document, neighbour)
    for row, start in zip(trained(params, tokens, None, segments), starts, strict=True):
        np.testing.assert_allclose(row[start : start + DOCUMENT], alone, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", pytest.param("modernbert", marks=pytest.mark.slow)])
def test_an_encoder_reads_a_document_alike_whatever_is_around_it(name):
    cfg, params = load(GOLDENS / name, dtype="float32")
    document, neighbour = (random_tokens(cfg, (n,), seed=n) for n in (DOCUMENT, NEIGHBOUR))
    alone = np.asarray(forward(cfg, params, document[None]).hidden[0])
    tokens, segments, starts = rows_of(document, neighbour)
    hidden = forward(cfg, params, tokens, segment_ids=segments).hidden
    for row, start in zip(hidden, starts, strict=True):
        np.testing.assert_allclose(
            row[start : start + DOCUMENT], alone, atol=1e-4 * max(1.0, np.abs(alone).max())
        )

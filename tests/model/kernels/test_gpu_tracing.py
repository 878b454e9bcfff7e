"""What is traced for GPUs: no family's forward pass, loss, gradient or engine step takes a kernel for TPUs, and cudnn
accepts what it is handed. Nothing runs; the values of our own kernels are in test_gpu_attention.py, and those of a card
in benchmarks/gpu.py."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu_attention import as_on
from model import apply, init_pages, load_config, param_shapes
from model.cache import Cache
from model.kernels import backend
from model.kernels.attention import Mask, Scores, self_attention
from model.kernels.backend import Kernels
from model.kernels.paged_attention import PAGED_ATTENTION, KVLayout, request_for
from tests.model.conftest import applied
from tests.policy import language_modelling

from ..conftest import GOLDENS
from ..test_families import CHECKPOINTS

LARGE_VOCABULARY = 128_256  # its logits for 8 rows of 1024 tokens take 4 GB


@pytest.fixture(autouse=True)
def cudnn_as_on_a_card(monkeypatch):
    """The checks that jax makes of what cudnn takes, as if a Hopper card with cudnn 9.10 were here."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)


def primitives(jaxpr, found=None):
    """Names of all primitives, in whatever is called; of a kernel its own name."""
    found = set() if found is None else found
    for eqn in jaxpr.eqns:
        found.add(
            eqn.primitive.name if eqn.primitive.name != "pallas_call" else f"kernel {eqn.params['name']}"
        )
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                primitives(inner, found)
    return found


def tpu_kernels(names):
    return {name for name in names if name.startswith("kernel ") and not name.endswith("_gpu")}


def traced(function, *arguments):
    with backend.use("gpu"):
        return primitives(jax.make_jaxpr(function)(*arguments).jaxpr)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def batch_of(rows, length):
    batch = {key: ints(rows, length) for key in ("tokens", "targets", "segment_ids", "positions")}
    return batch | {"loss_weights": jax.ShapeDtypeStruct((rows, length), jnp.float32)}


def with_vocabulary(cfg, size):
    return cfg if cfg.byte_latent is not None else cfg.replace(vocab_size=size)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_no_family_takes_a_tpu_kernel_on_a_gpu(name):
    cfg = load_config(GOLDENS / name).replace(dtype="bfloat16")
    shapes = [(2, 16, cfg), (8, 1024, with_vocabulary(cfg, LARGE_VOCABULARY))]
    for rows, length, cfg in shapes:
        params = param_shapes(cfg)
        if cfg.encoder is not None:
            loss = functools.partial(of_encoder_decoder, cfg)
            batch = batch_of(rows, length)
        elif not cfg.causal:
            loss = functools.partial(of_encoder, cfg)
            batch = batch_of(rows, length)
        else:
            loss = functools.partial(total_of, language_modelling(cfg))
            batch = batch_of(rows, length)
        names = traced(jax.grad(loss), params, batch)
        assert not tpu_kernels(names), (name, rows, length)
        if cfg.encoder is None and cfg.causal:
            assert not tpu_kernels(traced(functools.partial(engine_step, cfg), params, ints(rows, 8)))


def of_encoder_decoder(cfg, params, batch):
    out = applied(
        cfg, params, batch["tokens"], encoder_tokens=batch["tokens"][:, :16], targets=batch["targets"]
    )
    return out.scores.logprobs.sum()


def of_encoder(cfg, params, batch):
    return (
        applied(cfg, params, batch["tokens"], segment_ids=batch["segment_ids"])
        .hidden.astype(jnp.float32)
        .sum()
    )


def total_of(objective, params, batch):
    return objective(params, batch)[0].total


def engine_step(cfg, params, tokens):
    rows = tokens.shape[0]
    cache = Cache(
        init_pages(cfg, rows * 2 + 1, 16, num_rows=rows),
        jnp.zeros((rows, 2), jnp.int32),
        jnp.zeros(rows, jnp.int32),
    )
    return apply(cfg, params, tokens, cache=cache).logits


def test_a_kernel_for_tpus_is_found_among_what_is_traced():
    """What the test above looks for."""
    q = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.bfloat16)
    attend = lambda q: self_attention(q, q, q, jnp.arange(64)[None], jnp.ones((1, 64), jnp.int32))
    assert tpu_kernels(traced(attend, q)) == set() and "kernel flash_forward_gpu" in traced(attend, q)
    with backend.use("tpu"):
        assert tpu_kernels(primitives(jax.make_jaxpr(attend)(q).jaxpr)) == {"kernel flash_forward"}


KINDS = {  # whether rows are packed, and the mask
    "causal": (False, Mask()),
    "packed": (True, Mask()),
    "window": (False, Mask(window=33)),
    "packed, window": (True, Mask(window=33)),
    "chunks": (True, Mask(chunk=32)),
    "both sides": (False, Mask(causal=False)),
    "packed, both sides": (True, Mask(causal=False)),
    "windows to both sides": (True, Mask(causal=False, window=20)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [64, 77])
@pytest.mark.parametrize("width", [64, 256])
def test_cudnn_takes_what_it_is_handed_and_our_kernels_the_rest(kind, length, width):
    """A mask of a packed row is a square in memory, so cudnn has packed rows only where it is named."""
    packed, mask = KINDS[kind]
    cudnn_can = width <= 128 and length % 2 == 0 and kind != "windows to both sides"
    assert calls_of_gradients(packed, mask, length, width) == (
        {"cudnn"} if cudnn_can and not packed and mask.chunk is None else {"triton"}
    )
    if cudnn_can:
        assert calls_of_gradients(packed, mask, length, width, named="cudnn") == {"cudnn"}


def calls_of_gradients(packed, mask, length, width, named="auto"):
    """Which of cudnn and Triton the program of a GPU calls."""
    q, k = (jax.ShapeDtypeStruct((2, length, heads, width), jnp.bfloat16) for heads in (4, 2))

    def loss(q, k, v, ids):
        positions = jnp.arange(length)[None].repeat(2, 0)
        out = self_attention(q, k, v, positions, ids if packed else None, mask, Scores())
        return out.astype(jnp.float32).sum()

    with backend.use("gpu"), backend.prefer(Kernels(attention=named)), as_on():
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, ints(2, length))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    targets = re.findall(r"custom_call @([^(]+)", text)
    return {name for name in ("cudnn", "triton") for target in targets if name in target}


def test_attention_to_pages_is_plain_on_a_gpu():
    cache = {name: jax.ShapeDtypeStruct((4, 16, 64), jnp.bfloat16) for name in ("k", "v")}
    with backend.use("gpu"):
        q_THC = jax.ShapeDtypeStruct((2, 4, 32), jnp.bfloat16)
        request = request_for(q_THC, cache, KVLayout(2), Mask(), Scores())
        assert PAGED_ATTENTION.chosen_name(request) == "plain"

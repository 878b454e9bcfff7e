"""Cross-entropy in tiles, in plain jnp and in interpreted kernels, against all logits at once; then compiled for every
TPU that we name.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import LayerNorm, ShardingRules, apply
from model.blocks.heads import Transform
from model.kernels import backend
from model.kernels import cross_entropy as cross_entropy_package
from model.kernels.cross_entropy import CROSS_ENTROPY, TileSizes, cross_entropy, from_all_logits
from model.kernels.cross_entropy.sharded import cross_entropy_on_mesh, request_on_mesh
from model.kernels.cross_entropy.stripes import stripes
from model.kernels.cross_entropy.tiled import TILE_SIZES
from model.logprobs import ScoreOptions, scores_of_logits, token_logprobs
from model.readouts.mtp import ParallelMTP
from model.readouts.vocabulary import VocabularyHead
from tests.model.conftest import applied

from ..conftest import compiled_fast as jit
from ..conftest import random_params, random_tokens, tiny
from ..tpu import CHIPS, compile_for, needs_libtpu, sweep
from .test_flash_attention import mesh_of

SMALL = {"tiles": TileSizes(128, 128, 128), "stripe_bytes": 1}  # the smallest that there are
IMPLEMENTATIONS = {
    "stripes": {"name": "plain"},
    "kernel": {"name": "tpu", "interpret": True},
}
ALL = ScoreOptions(temperature=0.7, entropy=True, likeliest=True)


def draws(N, V, D, dtype=jnp.float32, bias=True, seed=0):
    """(hidden, head, bias, targets) and a direction for (log-probabilities, log Z, entropy)."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    head = normal(V, D) * jnp.asarray(2 * D**-0.5, dtype)
    targets = jnp.asarray(rng.integers(0, V, N), jnp.int32)
    direction = tuple(normal(N).astype(jnp.float32) for _ in range(3))
    return (normal(N, D), head, normal(V) if bias else None, targets), direction


def pulled(score):
    """(scores, gradients of hidden, head and bias along a direction)."""

    def run(hidden, head, bias, targets, direction):
        def differentiable(hidden, head, bias):
            scores = score(hidden, head, targets, bias)
            return scores[:2] if scores.entropy is None else scores[:3], scores

        results, pull, scores = jax.vjp(differentiable, hidden, head, bias, has_aux=True)
        return scores, pull(direction[: len(results)])

    return run


@contextlib.contextmanager
def named(form):
    with backend.use(**IMPLEMENTATIONS[form]), backend.prefer(backend.Kernels(cross_entropy=form)):
        yield


def run_both(form, arguments, direction, **options):
    wanted = jit(pulled(functools.partial(from_all_logits, **options)))
    as_floats = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments)
    with named(form):
        ours = jit(pulled(functools.partial(cross_entropy, **options, **SMALL)))(*arguments, direction)
    return ours, wanted(*as_floats, direction)


def assert_close(ours, wanted, atol):
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert np.isfinite(want).all()
        exact = want.dtype == jnp.int32
        scale = max(1, np.abs(want).max())
        np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0 if exact else atol * scale)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_values_and_gradients_are_those_of_all_logits(form):
    """No length is a multiple of a tile; some entries may never be the likeliest."""
    score_options = ScoreOptions(temperature=0.7, entropy=True, likeliest=True, choices=300)
    ours, wanted = run_both(form, *draws(130, 333, 200), scale=1.3, softcap=3.0, score_options=score_options)
    assert (wanted[0].likeliest < 300).all()
    assert_close(ours, wanted, 2e-6)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_one_token_and_a_vocabulary_of_less_than_a_tile(form):
    ours, wanted = run_both(form, *draws(1, 5, 8, bias=False))
    assert ours[0].entropy is None and ours[0].likeliest is None
    assert_close(ours, wanted, 1e-6)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_bfloat16_is_as_near_as_its_rounding(form):
    ours, wanted = run_both(
        form, *draws(140, 300, 64, jnp.bfloat16), score_options=ScoreOptions(entropy=True)
    )
    assert all(x.dtype == jnp.float32 for x in ours[0] if x is not None)
    assert all(x.dtype == jnp.bfloat16 for x in ours[1])
    assert_close(ours[0], wanted[0], 2e-6)
    assert_close(ours[1], wanted[1], 1e-2)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_huge_logits_equal_ones_and_targets_at_the_ends(form):
    (hidden, head, _, targets), _ = draws(3, 400, 16, bias=False)
    targets = jnp.array([0, 399, 200])
    hidden = hidden.at[0].mul(1e4).at[1].set(0)  # one entry has all of the probability; all are equal
    head = head.at[333].set(head[70] * 9).at[100].set(head[70] * 9)
    hidden = hidden.at[2].set(head[100])  # 100 and 333 are the likeliest
    with named(form):
        ours = jit(
            functools.partial(
                cross_entropy, score_options=ScoreOptions(entropy=True, likeliest=True), **SMALL
            )
        )(hidden, head, targets)
    wanted = from_all_logits(hidden, head, targets, score_options=ScoreOptions(entropy=True, likeliest=True))
    assert_close(ours._replace(entropy=None), wanted._replace(entropy=None), 1e-6)
    np.testing.assert_allclose(ours.entropy, wanted.entropy, atol=1e-6 * float(jnp.abs(ours.log_z).max()))
    assert ours.likeliest[1] == 0 and ours.likeliest[2] == 100
    assert float(ours.logprobs[1]) == pytest.approx(-np.log(400), abs=1e-5)


def test_the_gradient_of_log_z_alone_is_that_of_a_z_loss():
    """With no weight on log-probabilities: 2 log Z times the mean of the head under the distribution."""
    (hidden, head, _, targets), _ = draws(7, 200, 16, bias=False)
    z_loss = lambda hidden: jnp.sum(cross_entropy(hidden, head, targets, stripe_bytes=1).log_z ** 2)
    weights = jax.nn.softmax(hidden @ head.T)
    log_z = jax.nn.logsumexp(hidden @ head.T, axis=-1)
    np.testing.assert_allclose(
        jit(jax.grad(z_loss))(hidden), 2 * log_z[:, None] * (weights @ head), atol=1e-5
    )


@pytest.mark.parametrize("V, S", [(1, 1), (7, 7), (7, 6), (640, 128), (641, 128)])
def test_every_entry_is_fresh_in_one_stripe_only(V, S):
    firsts, fresh = map(np.asarray, stripes(V, S))
    assert (firsts >= 0).all() and (firsts + S <= V).all()
    met = [entry for first, new in zip(firsts, fresh) for entry in range(new, first + S)]
    assert met == list(range(V))


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [{"data": 2, "context": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_a_mesh_that_splits_rows_tokens_and_vocabulary_changes_no_value_or_gradient(form, sizes):
    (hidden, head, bias, targets), direction = draws(24, 160, 16)
    rows = lambda x: x.reshape(2, 12, *x.shape[1:])
    options = {
        "scale": 1.3,
        "softcap": 3.0,
        "score_options": ScoreOptions(0.7, True, True, choices=70),
    }  # none on the last devices
    wanted = jit(pulled(functools.partial(from_all_logits, **options)))(
        hidden, head, bias, targets, direction
    )
    arguments = rows(hidden), head, bias, rows(targets), tuple(map(rows, direction))
    score = lambda hidden, head, targets, bias: cross_entropy_on_mesh(
        hidden, head, targets, bias, ShardingRules(), **options, **SMALL
    )
    with jax.set_mesh(mesh_of(jax.devices(), **sizes)), named(form):
        scores, (dhidden, *rest) = jit(pulled(score))(*arguments)
    flat = lambda x: x.reshape(24, *x.shape[2:])
    assert_close((jax.tree.map(flat, scores), (flat(dhidden), *rest)), wanted, 2e-6)


def test_what_does_not_fit_is_named():
    hidden, head, targets = jnp.zeros((4, 8)), jnp.zeros((10, 8)), jnp.zeros(4, jnp.int32)
    for wrong in ((hidden, head, targets[:3]), (hidden, head[:, :7], targets), (hidden, head, targets, head)):
        with pytest.raises(ValueError, match="don't fit"):
            cross_entropy(*wrong)
    with pytest.raises(ValueError, match="cast one"):
        cross_entropy(hidden.astype(jnp.bfloat16), head, targets)
    with pytest.raises(ValueError, match="128 lanes"):
        TileSizes(100)
    with (
        jax.set_mesh(mesh_of(jax.devices(), tensor=8)),
        named("stripes"),
        pytest.raises(
            ValueError,
            match="tensor = 8 do not divide the 10 entries of the vocabulary. Use axes of 1, 2, 5",
        ),
    ):
        cross_entropy_on_mesh(hidden[None], head, targets[None], rules=ShardingRules())


# The model.


def forced(monkeypatch, form):
    """The implementation that the model takes, however small its logits are."""
    monkeypatch.setattr(cross_entropy_package, "WHOLE_LOGITS_BYTES", 0)
    return backend.use(**IMPLEMENTATIONS[form])


def test_tiles_are_taken_on_tpus_and_where_the_logits_of_a_device_are_large():
    chosen = lambda *arguments: CROSS_ENTROPY.chosen_name(request_on_mesh(*arguments))
    assert chosen(1024, 131072, None) == "logits" and chosen(1025, 131072, None) == "stripes"
    with jax.set_mesh(mesh_of(jax.devices(), fsdp=2, tensor=4)):
        assert chosen(8192, 131072, ShardingRules()) == "logits"
        assert chosen(8193, 131072, ShardingRules()) == "stripes"
        assert chosen(1025, 131072, None) == "stripes"
    with backend.use("tpu"):
        assert chosen(1, 2, None) == "kernel"


HEADS = {
    "plain": {},
    "transformed, biased, scaled and capped": {"scale": 1.7, "softcap": 2.0, "transform": jnp.tanh},
}


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", HEADS)
def test_a_head_scores_targets_as_its_logits_do(name, form, monkeypatch):
    (hidden, head, bias, targets), direction = draws(18, 61, 24, bias=name != "plain")
    hidden, targets, direction = jax.tree.map(
        lambda x: x.reshape(2, 9, *x.shape[1:]), (hidden, targets, direction)
    )
    made = lambda head, bias: VocabularyHead(head, bias, **HEADS[name])
    by_logits = lambda hidden, head, y, bias: scores_of_logits(made(head, bias).logits(hidden), y, ALL)
    by_tiles = lambda hidden, head, y, bias: made(head, bias).scores(hidden, y, ALL)
    arguments = hidden, head, bias, targets, direction
    wanted = jit(pulled(by_logits))(*arguments)
    with forced(monkeypatch, form):
        program = jit(pulled(by_tiles))
        assert_close(program(*arguments), wanted, 2e-6)
        jaxpr = str(program.trace(*arguments).jaxpr)
    assert ("cross_entropy_gradients" in jaxpr) == (form == "kernel") and "2,9,61" not in jaxpr


def test_the_model_and_its_mtp_modules_score_targets(monkeypatch):
    """Module k those k tokens ahead."""
    options = {"tied_head": False, "head_bias": True, "logit_scale": 1.7, "logit_softcap": 2.0}
    cfg = tiny(layers=1, head_transform=Transform("gelu", LayerNorm()), **options)
    cfg = cfg.replace(mtp=ParallelMTP(cfg.blocks))
    params, tokens, targets = random_params(cfg), random_tokens(cfg, (2, 9)), random_tokens(cfg, (2, 9), 1)
    out = jit(applied, static_argnums=0)(cfg, params, tokens)
    asked = targets, np.pad(targets[:, 1:], ((0, 0), (0, 1)))
    wanted = [scores_of_logits(x, y, ALL) for x, y in zip((out.logits, *out.mtp_logits), asked, strict=True)]
    with forced(monkeypatch, "stripes"):
        out = jit(lambda params: apply(cfg, params, tokens, targets=targets, score_options=ALL))(params)
    assert out.logits is None and out.mtp_logits == ()
    assert_close([out.scores, *out.mtp_scores], wanted, 5e-6)


def test_targets_of_some_tokens_and_of_small_logits(small):
    cfg, params = small
    tokens, at = random_tokens(cfg, (2, 9)), np.array([[3, 8], [0, 5]])
    targets = random_tokens(cfg, (2, 2), 1)
    forward = jit(applied, static_argnums=0)
    ours = forward(cfg, params, tokens, logits_at=at, targets=targets).scores
    wanted = scores_of_logits(forward(cfg, params, tokens, logits_at=at).logits, targets)
    assert_close(ours, wanted, 1e-6)
    with_mtp = cfg.replace(mtp=ParallelMTP(cfg.blocks[:1]))
    with pytest.raises(ValueError, match="mtp=None"):
        apply(with_mtp, params, tokens, logits_at=at, targets=targets)


# Memory, and real TPUs.


def compiled_step(compiled, dtype, score, N=8192, V=128256, D=4096, bias=False, **options):
    """Values and gradients, by `compiled(function, *shapes)`."""
    shaped = jax.ShapeDtypeStruct
    arguments = shaped((N, D), dtype), shaped((V, D), dtype), shaped((V,), dtype) if bias else None
    direction = (shaped((N,), jnp.float32),) * 3
    step = pulled(functools.partial(score, **options))
    return compiled(step, *arguments, shaped((N,), jnp.int32), direction)


def temporary(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


def test_logits_are_never_in_memory():
    compiled = lambda function, *shapes: jit(function).lower(*shapes).compile()
    N, V, D = 2048, 32768, 64
    logits, small = 4 * N * V, {"score_options": ALL, "stripe_bytes": 4 << 20}
    assert (
        temporary(compiled_step(compiled, jnp.float32, from_all_logits, N, V, D, score_options=ALL)) > logits
    )
    with named("stripes"):
        assert temporary(compiled_step(compiled, jnp.float32, cross_entropy, N, V, D, **small)) < logits / 8


def test_small_logits_are_in_memory_once():
    B, T, V, D = 2, 512, 4096, 64
    keys = jax.random.split(jax.random.key(0), 3)
    hidden_BTD, head_VD = (jax.random.normal(key, shape) for key, shape in zip(keys, ((B, T, D), (V, D))))
    targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
    loss = lambda hidden, head: VocabularyHead(head).scores(hidden, targets_BT).logprobs.mean()
    program = jit(jax.value_and_grad(loss, (0, 1))).lower(hidden_BTD, head_VD).compile()
    assert temporary(program) < 1.2 * 4 * B * T * V


@pytest.mark.parametrize("at", [0, 5, 511])
def test_a_logit_that_is_not_a_number_is_not_hidden(at):
    logits_NV = jnp.zeros((3, 512)).at[1, at].set(jnp.nan)
    logprobs_N, log_z_N = token_logprobs(logits_NV, jnp.array([7, 7, 7]))
    assert np.isnan(logprobs_N).tolist() == np.isnan(log_z_N).tolist() == [False, True, False]


SMALLEST = "v4"  # of the fast memories


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_has_a_program(chip):
    with backend.use("tpu", chip):
        program = compiled_step(functools.partial(compile_for, chip), jnp.bfloat16, cross_entropy)
    for kernel in ("cross_entropy_forward", "cross_entropy_gradients"):
        assert kernel in program.as_text()
    assert temporary(program) < 4 * 8192 * 128256 / 6


KINDS = {
    "llama 3": {"V": 128256, "D": 8192},
    "qwen, biased": {"V": 151936, "D": 4096, "bias": True},
    "gemma": {
        "V": 262144,
        "D": 4096,
        "softcap": 30.0,
        "score_options": ScoreOptions(0.7, True, True, 262000),
    },
    "gpt-oss, whose width is no multiple of a tile": {"V": 201088, "D": 2880},
    "a vocabulary and tokens that are odd": {
        "N": 999,
        "V": 50257,
        "D": 1600,
        "score_options": ALL,
        "bias": True,
    },
    "less than a tile": {"N": 7, "V": 61, "D": 24, "bias": True},
}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip, kind", sweep(KINDS, SMALLEST))
def test_chips_have_a_program_for_each_kind(chip, kind):
    with backend.use("tpu", chip):
        for dtype in (jnp.bfloat16, jnp.float32):
            compiled_step(functools.partial(compile_for, chip), dtype, cross_entropy, **KINDS[kind])


@pytest.mark.slow
def test_many_tokens_and_entries_equal_all_logits():
    """8192 tokens with the tiles of the chips; a kernel can be right at small sizes and wrong at large ones."""
    arguments, direction = draws(8192, 5000, 600)
    wanted = jit(pulled(functools.partial(from_all_logits, score_options=ALL)))(*arguments, direction)
    for tiles in sorted(set(TILE_SIZES.values()), key=str):
        with backend.use("tpu", interpret=True):
            score = functools.partial(cross_entropy, score_options=ALL, tiles=tiles)
            assert_close(jit(pulled(score))(*arguments, direction), wanted, 1e-5)

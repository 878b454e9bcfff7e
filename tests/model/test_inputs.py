"""What a model reads and gives: inputs of other modalities, readouts of other kinds, and how `apply` is called."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model import Block, Inputs, Media, apply, init, init_cache, logical_axes, param_shapes
from model.blocks.common import fan_in_normal, param
from model.blocks.latent_attention import LatentAttention
from model.blocks.mamba import Mamba
from model.kernels.backend import Kernels

from .conftest import compiled_fast, random_params, random_tokens, tiny


@dataclasses.dataclass(frozen=True)
class ImagePatches:
    """A toy input: each patch of a small image becomes a vector by one linear map."""

    name: str = "image"
    size: int = 4
    channels: int = 3

    @property
    def item_shape(self):
        return self.size, self.size, self.channels

    def module(self, ctx, name):
        return ImagePatchesModule(self, ctx, name=name)


class ImagePatchesModule(nn.Module):
    spec: ImagePatches
    ctx: object

    @nn.compact
    def __call__(self, values):
        shape, axes = (*self.spec.item_shape, self.ctx.width), (None, None, None, "embed")
        w = param(self, self.ctx, "patch", shape, axes, fan_in_normal(48), 3, "a patch to its vector")
        return jnp.einsum("BNhwc,hwcD->BND", values, w)


@dataclasses.dataclass(frozen=True)
class Actions:
    """A toy readout: a vector of actions at each token."""

    name: str = "actions"
    count: int = 5

    def read(self, module, ctx, stream):
        init = fan_in_normal(ctx.width)
        w = param(module, ctx, "actions", (ctx.width, self.count), ("embed", None), init, 1, "actions")
        return jnp.tanh(jnp.einsum("BTD,DA->BTA", stream.hidden_BTD, w))


def with_images():
    return tiny(layers=2, media=(ImagePatches(),), heads=(Actions(),))


def test_patches_of_an_image_take_the_places_of_tokens_and_actions_are_read():
    cfg = with_images()
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 9))
    assert set(params) == set(random_params(tiny(layers=2))) | {"image", "actions"}
    assert logical_axes(cfg)["image"]["patch"] == (None, None, None, "embed")
    pixels = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 3)).astype(np.float32)
    places = np.array([[1, 2, 3], [4, 0, -1]], np.int32)
    run = compiled_fast(lambda params, inputs: apply(cfg, params, inputs))
    out = run(params, Inputs(tokens, media={"image": Media(pixels, places)}))
    assert out.heads["actions"].shape == (2, 9, 5)

    # by hand: a vocabulary of one more token for each patch, whose embedding is the patch's vector
    vectors = np.einsum("BNhwc,hwcD->BND", pixels, params["image"]["patch"]).reshape(6, -1)
    by_hand = params | {"embedding": jnp.concatenate([params["embedding"], vectors])}
    replaced = np.array(tokens)
    for row, item in np.argwhere(places >= 0):
        replaced[row, places[row, item]] = cfg.vocab_size + 3 * row + item
    longer = cfg.replace(vocab_size=cfg.vocab_size + 6)
    wanted = compiled_fast(lambda params, tokens: apply(longer, params, tokens))(by_hand, replaced)
    np.testing.assert_allclose(out.hidden, wanted.hidden, atol=2e-5)
    np.testing.assert_allclose(
        out.heads["actions"], np.tanh(np.asarray(wanted.hidden) @ np.asarray(params["actions"])), atol=2e-5
    )
    without = run(params, Inputs(tokens))
    assert np.abs(without.hidden - out.hidden).max() > 0.1


def test_media_are_decoded_on_from_a_cache():
    cfg = with_images()
    params, tokens = random_params(cfg), random_tokens(cfg, (1, 8))
    media = {"image": Media(jnp.ones((1, 2, 4, 4, 3)), jnp.array([[1, 2]], jnp.int32))}
    whole = apply(cfg, params, Inputs(tokens, media=media)).logits
    first = apply(cfg, params, Inputs(tokens[:, :5], media=media), init_cache(cfg, 1, 8))
    rest = apply(cfg, params, tokens[:, 5:], first.cache)
    np.testing.assert_allclose(jnp.concatenate([first.logits, rest.logits], 1), whole, atol=2e-5)


def test_a_model_learns_to_act_on_what_it_sees():
    """The mean of the red channel of an image, as the first action at the last token."""
    cfg = with_images()
    rng, optimizer = np.random.default_rng(0), optax.adam(1e-2)
    params = init(cfg, jax.random.key(0))

    def loss(params, pixels):
        batch = len(pixels)
        places = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (batch, 2))
        inputs = Inputs(jnp.zeros((batch, 3), jnp.int32), media={"image": Media(pixels, places)})
        action = apply(cfg, params, inputs).heads["actions"][:, -1, 0]
        return jnp.mean((action - pixels[..., 0].mean(axis=(1, 2, 3))) ** 2)

    @compiled_fast
    def step(params, state, pixels):
        value, grads = jax.value_and_grad(loss)(params, pixels)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    draw = lambda: (rng.normal(size=(32, 2, 1, 1, 3)) * 0.5 + np.zeros((32, 2, 4, 4, 3))).astype(np.float32)
    for _ in range(80):
        params, state, value = step(params, state, draw())
        losses.append(float(value))
    assert losses[0] > 0.1 and np.mean(losses[-5:]) < 0.02


def test_bare_token_ids_are_inputs_and_what_is_none_says_so():
    cfg = tiny(layers=1)
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 5))
    np.testing.assert_array_equal(
        apply(cfg, params, tokens).logits, apply(cfg, params, Inputs(tokens)).logits
    )
    with pytest.raises(TypeError, match=r"inputs is a dict with tokens.*Inputs.from_batch\(batch\)"):
        apply(cfg, params, {"tokens": tokens})
    with pytest.raises(ValueError, match=r"shape \(5,\). Give \[batch, tokens\]"):
        apply(cfg, params, tokens[0])
    with pytest.raises(ValueError, match=r"shape \(5,\). Give \[batch, tokens\]"):
        apply(cfg, params, Inputs(tokens[0]))
    with pytest.raises(TypeError, match="token ids are a list. Give an array"):
        apply(cfg, params, [[1, 2]])
    with pytest.raises(
        ValueError, match=r"targets have shape \(2, 4\). Give one for each scored token, \(2, 5\)"
    ):
        apply(cfg, params, tokens, targets=tokens[:, 1:])
    with pytest.raises(ValueError, match=r"logits_at has shape \(2,\). Give \[2, N\]"):
        apply(cfg, params, tokens, logits_at=jnp.array([1, 2]))
    with pytest.raises(TypeError, match="cache is a .*Array.*positions and segment ids go into Inputs"):
        apply(cfg, params, tokens, jnp.zeros_like(tokens))
    with pytest.raises(
        ValueError, match="inputs.media has sound, which this model does not read. It reads tokens"
    ):
        apply(cfg, params, Inputs(tokens, media={"sound": Media(jnp.zeros((2, 1, 3)), jnp.zeros((2, 1)))}))
    with pytest.raises(ValueError, match="It reads image"):
        apply(with_images(), params, Inputs(tokens, media={"sound": Media(jnp.zeros((2, 1, 3)), tokens)}))


@pytest.mark.parametrize("implementation", ["logits", "stripes"])
def test_no_chosen_token_gives_no_logits_no_scores_and_no_gradient(implementation):
    cfg = tiny(layers=1, kernels=Kernels(cross_entropy=implementation))
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 5))
    none = jnp.zeros((2, 0), jnp.int32)
    assert apply(cfg, params, tokens, logits_at=none).logits.shape == (2, 0, cfg.vocab_size)

    def loss(params):
        return apply(cfg, params, tokens, targets=none, logits_at=none).scores.logprobs.sum()

    value, grads = jax.value_and_grad(loss)(params)
    assert value == 0 and all((grad == 0).all() for grad in jax.tree.leaves(grads))


def test_a_batch_of_the_data_is_inputs():
    batch = {name: np.zeros((2, 3), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    inputs = Inputs.from_batch(batch, adapter_ids=np.zeros(2, np.int32))
    assert inputs.tokens is batch["tokens"] and inputs.positions is batch["positions"]
    assert inputs.segment_ids is batch["segment_ids"] and inputs.adapter_ids.shape == (2,)
    assert len(jax.tree.leaves(inputs)) == 4


def test_parameters_of_an_input_are_made_counted_and_saved_with_the_others():
    cfg = with_images()
    made = init(cfg, jax.random.key(0))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, param_shapes(cfg))
    assert made["image"]["patch"].shape == (4, 4, 3, 24) and float(made["image"]["patch"].std()) > 0.05


def test_positions_of_several_axes_turn_queries_and_keys_and_leave_the_mask_as_it_is():
    """Axes alike are plain positions; others change what attention finds, but no token sees a later one."""
    cfg = tiny(layers=2)
    rope = dataclasses.replace(cfg.blocks[0].mixer.rope, sections=(1, 1, 1))
    mixer = dataclasses.replace(cfg.blocks[0].mixer, rope=rope)
    cfg = cfg.replace(blocks=(dataclasses.replace(cfg.blocks[0], mixer=mixer),) * 2)
    params, tokens = random_params(cfg), random_tokens(cfg, (1, 8))
    run = compiled_fast(lambda tokens, positions: apply(cfg, params, Inputs(tokens, positions)).logits)
    alike = np.broadcast_to(np.arange(8)[None, :, None], (1, 8, 3)).astype(np.int32)
    plain = apply(cfg, params, tokens).logits
    np.testing.assert_allclose(run(tokens, alike), plain, atol=1e-5)
    grid = alike.copy()
    grid[0, 2:6] = [[2, 2, 2], [2, 2, 3], [2, 3, 2], [2, 3, 3]]  # an image of 2 x 2 patches
    seen = run(tokens, grid)
    assert np.abs(seen - plain)[:, 3:].max() > 0.05
    later = np.array(tokens)
    later[0, 5] = (later[0, 5] + 1) % cfg.vocab_size
    np.testing.assert_allclose(run(later, grid)[:, :5], seen[:, :5], atol=1e-6)
    cache = init_cache(cfg, 1, 8)
    first = apply(cfg, params, Inputs(tokens[:, :5], grid[:, :5]), cache)
    rest = apply(cfg, params, Inputs(tokens[:, 5:], grid[:, 5:]), first.cache)
    np.testing.assert_allclose(jnp.concatenate([first.logits, rest.logits], 1), seen, atol=2e-5)


@dataclasses.dataclass(frozen=True)
class LookUp:
    """A toy network that looks its result up by the token itself, as per-layer embeddings do."""

    vocab_size: int = 61

    def module(self, ctx, name):
        return LookUpModule(self, ctx, name=name)

    def flops_per_token(self, width):
        return 0


class LookUpModule(nn.Module):
    spec: LookUp
    ctx: object

    @nn.compact
    def __call__(self, x, info):
        shape, axes = (self.spec.vocab_size, self.ctx.width), ("vocab", "embed")
        table = param(self, self.ctx, "table", shape, axes, nn.initializers.normal(), role="by token")
        return jnp.take(table, info.tokens, axis=0), {}


def test_a_network_may_look_up_by_token():
    cfg = tiny(layers=1).replace(blocks=(Block(None, LookUp()),), final_norm=None)
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 7))
    table = params["embedding"] + params["block_0"]["ffn"]["table"]
    np.testing.assert_allclose(apply(cfg, params, tokens).hidden, table[tokens], atol=1e-6)


def whole_text_both_ways(cfg):
    blind = dataclasses.replace(cfg.blocks[0].mixer, causal=False)
    return cfg.replace(blocks=tuple(dataclasses.replace(block, mixer=blind) for block in cfg.blocks))


def test_a_prefix_of_everything_is_an_encoder_and_of_nothing_a_decoder():
    cfg = tiny(layers=2)
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 9))
    run = compiled_fast(lambda prefix: apply(cfg, params, Inputs(tokens, prefix=prefix)).logits)
    np.testing.assert_allclose(run(jnp.array([0, 1])), apply(cfg, params, tokens).logits, atol=1e-5)
    wanted = apply(whole_text_both_ways(cfg), params, tokens).logits
    np.testing.assert_allclose(run(jnp.array([9, 12])), wanted, atol=1e-5)


def test_what_a_prefix_and_a_span_show_is_seen_and_nothing_else():
    """By what changes when one token does: a brute reading of the mask."""
    cfg = tiny(layers=1)
    params, tokens = random_params(cfg), random_tokens(cfg, (1, 10))
    spans = np.array([[0, 0, 0, 1, 1, 1, 0, 2, 2, 0]], np.int32)
    run = compiled_fast(
        lambda tokens: apply(cfg, params, Inputs(tokens, prefix=jnp.array([2]), spans=spans)).logits
    )
    base, seen = np.asarray(run(tokens)), np.zeros((10, 10), bool)
    for key in range(10):
        other = np.array(tokens)
        other[0, key] = (other[0, key] + 7) % cfg.vocab_size
        seen[:, key] = np.abs(np.asarray(run(other)) - base)[0].max(-1) > 1e-5
    wanted = np.tril(np.ones((10, 10), bool))
    wanted[:2, :2] = wanted[3:6, 3:6] = wanted[7:9, 7:9] = True
    np.testing.assert_array_equal(seen, wanted)


@pytest.mark.parametrize("latent", [False, True])
def test_a_text_with_a_prefix_and_spans_is_decoded_on_from_a_cache(latent):
    cfg = tiny(layers=2)
    if latent:
        mixer = LatentAttention(4, 6, 4, 5, kv_rank=7)
        cfg = cfg.replace(blocks=(dataclasses.replace(cfg.blocks[0], mixer=mixer),) * 2)
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 10))
    prefix, spans = jnp.array([3, 0]), np.array([[0, 0, 0, 1, 1, 0], [2, 2, 2, 0, 3, 3]], np.int32)
    padded = np.pad(spans, ((0, 0), (0, 4)))
    whole = apply(cfg, params, Inputs(tokens, prefix=prefix, spans=padded)).logits
    first = apply(cfg, params, Inputs(tokens[:, :6], prefix=prefix, spans=spans), init_cache(cfg, 2, 10))
    rest = apply(cfg, params, tokens[:, 6:], first.cache)
    np.testing.assert_allclose(jnp.concatenate([first.logits, rest.logits], 1), whole, atol=3e-5)


@pytest.mark.parametrize("left", [0, 1, 3])
def test_padding_and_unwritten_slots_of_a_cache_change_no_prefix_and_no_span(left):
    """A prefix may be longer than its document, and a span may end it: only the document's tokens are seen."""
    cfg = tiny(layers=2)
    params = random_params(cfg)
    document, right = random_tokens(cfg, (1, 5)), 3 - left
    spans, prefix = np.array([[0, 0, 0, 1, 1]], np.int32), jnp.array([9])
    pad = lambda row: jnp.pad(row, ((0, 0), (left, right)))
    segment_ids = pad(jnp.ones_like(document))
    for parts in ({"prefix": prefix}, {"spans": spans}):
        alone = apply(cfg, params, Inputs(document, **parts)).logits
        padded = {name: pad(part) if name == "spans" else part for name, part in parts.items()}
        inputs = Inputs(pad(document), segment_ids=segment_ids, **padded)
        cached = apply(cfg, params, inputs, init_cache(cfg, 1, 16)).logits[:, left : left + 5]
        np.testing.assert_allclose(cached, alone, atol=2e-5)


def test_a_mixer_that_is_no_attention_has_no_spans():
    cfg = tiny(layers=1)
    cfg = cfg.replace(blocks=(dataclasses.replace(cfg.blocks[0], mixer=Mamba(20, 4, 3, 2)),))
    with pytest.raises(ValueError, match="only for attention, not for Mamba"):
        apply(cfg, random_params(cfg), Inputs(random_tokens(cfg, (1, 4)), prefix=jnp.array([2])))

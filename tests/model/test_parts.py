"""What a model is built of says at once what it can't do without, and whether it sees what comes after."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from model import (
    Attention,
    Block,
    ModelConfig,
    apply,
    init,
    init_cache,
    load_config,
)
from model.blocks.latent_attention import LatentAttention
from model.blocks.mixture_of_depths import MixtureOfDepths
from model.blocks.parallel import Parallel

from .conftest import GOLDENS
from .test_families import CHECKPOINTS


def parts_of(cfg):
    """{type: (block, field of the block, part)} of mixers and networks."""
    return {type(part): (block, name, part) for block in cfg.blocks
            for name in ("mixer", "ffn") if (part := getattr(block, name)) is not None}  # fmt: skip


PARTS = {}
for checkpoint in CHECKPOINTS:
    for kind, (block, name, part) in parts_of(load_config(GOLDENS / checkpoint)).items():
        PARTS.setdefault(kind.__name__, (checkpoint, block, name, part))


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_runs_without_a_field_or_says_that_it_needs_it(kind):
    checkpoint, block, name, part = PARTS[kind]
    cfg = load_config(GOLDENS / checkpoint)
    if cfg.encoder is not None or cfg.byte_latent is not None:
        pytest.skip("an encoder-decoder's blocks and a byte-latent model's are those of other models, too")
    tokens = jnp.zeros((1, 5), jnp.int32)
    for field in dataclasses.fields(part):
        try:
            without = dataclasses.replace(part, **{field.name: None})
            changed = cfg.replace(blocks=(dataclasses.replace(block, **{name: without}),), mtp=None)
        except ValueError as error:
            assert "None" in str(error) or field.name in str(error), (field.name, error)
            continue
        except TypeError:
            continue
        jax.eval_shape(lambda cfg=changed: apply(cfg, init(cfg, jax.random.key(0)), tokens))


def test_a_block_without_a_mixer_and_latent_attention_without_rotation_are_refused_when_they_are_made():
    with pytest.raises(ValueError, match="needs a mixer or a network"):
        Block(None, None)
    with pytest.raises(ValueError, match="rope=None"):
        LatentAttention(4, 8, 4, 8, 16, rope=None)
    with pytest.raises(ValueError, match="at least one mixer"):
        Parallel(())


SEES_AHEAD = Attention(4, 2, 8, causal=False)


@pytest.mark.parametrize("mixer", [SEES_AHEAD, Parallel((Attention(4, 2, 8), SEES_AHEAD)),
                                   MixtureOfDepths(Block(Parallel((SEES_AHEAD,)), None))])  # fmt: skip
def test_a_mixer_that_sees_ahead_is_found_wherever_it_is(mixer):
    cfg = ModelConfig(61, 32, (Block(mixer, None),))
    assert not cfg.causal
    with pytest.raises(ValueError, match="encoder"):
        init_cache(cfg, 1, 8)

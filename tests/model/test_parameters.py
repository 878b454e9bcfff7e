"""What a parameter says of itself: axes, inputs, role, decay and its place in the computation."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from model import logical_axes, param_shapes
from model.blocks.common import Context, param
from model.blocks.lora import LoRA
from model.blocks.param_box import ParamBox
from model.parameters import param_info

from .conftest import tiny
from .test_describe import EVERY_PART

CTX = Context(16, 2, jnp.dtype("float32"), jnp.dtype("float32"))


class Declares(nn.Module):
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    options: dict

    @nn.compact
    def __call__(self):
        return param(self, CTX, "w", self.shape, self.axes, nn.initializers.ones, **self.options)


def declared(shape, axes, **options) -> ParamBox:
    return jax.eval_shape(lambda: Declares(shape, axes, options).init(jax.random.key(0)))["params"]["w"]


@pytest.mark.parametrize(
    "axes, inputs, places",
    [
        (("embed", "heads", "head_dim"), 1, (0,)),
        (("heads", "head_dim", "embed"), 2, (0, 1)),
        (("experts", "embed", "mlp"), 1, (1,)),
        (("experts", "adapters", "embed", None), 1, (2,)),
        (("vocab", "embed"), (1,), (1,)),
        (("vocab", "embed"), 0, ()),
    ],
    ids=str,
)
def test_inputs_come_after_experts_and_adapters_or_are_named(axes, inputs, places):
    assert declared((2,) * len(axes), axes, inputs=inputs).input_axes == places


def test_matrices_decay_and_vectors_do_not_unless_it_is_said():
    assert declared((2, 3), ("embed", "mlp")).decays
    assert not declared((3,), ("norm",)).decays
    assert not declared((2, 3), ("heads", "head_dim"), decay=False).decays
    assert not declared((2, 3), ("adapters", "mlp")).decays  # a vector for each adapter


def test_a_box_gains_and_loses_an_axis():
    box = ParamBox(jnp.ones((2, 3)), ("embed", "mlp"), (0,), "role", True, 4)
    named = {nn.PARTITION_NAME: "layers"}
    scanned = box.add_axis(0, named)
    assert scanned.names == ("layers", "embed", "mlp") and scanned.input_axes == (1,)
    back = scanned.remove_axis(0, named)
    assert dataclasses.replace(back, value=0) == dataclasses.replace(box, value=0)
    assert box.add_axis(2, named).input_axes == (0,)


@pytest.mark.parametrize("adapters", [None, LoRA(2, 4.0, slots=3, decomposed=True)], ids=["plain", "DoRA"])
def test_a_scanned_layer_says_what_an_unrolled_one_does(adapters):
    cfg = EVERY_PART.replace(adapters=adapters)
    blocks, scanned = param_info(cfg), param_info(cfg.replace(scan=True))
    for run, block in enumerate(cfg.blocks):  # no two neighbours are equal
        of_layer = jax.tree.map(lambda info: info.of_layer(), scanned[f"run_{run}"])
        assert of_layer == blocks[f"block_{run}"], block
    leaves = jax.tree.leaves(scanned["run_0"])
    assert leaves and all(info.axes[0] == "layers" and info.lead for info in leaves)


def test_it_says_the_shapes_and_axes_of_the_parameters():
    cfg = tiny()
    assert jax.tree.map(lambda info: info.shape, param_info(cfg)) == jax.tree.map(
        lambda leaf: leaf.shape, param_shapes(cfg)
    )
    assert jax.tree.map(lambda info: info.axes, param_info(cfg)) == logical_axes(cfg)


def test_parameters_are_numbered_as_a_block_uses_them():
    block = param_info(tiny(qk_norm=True))["block_1"]
    flat = jax.tree.leaves_with_path(block)
    names = ["/".join(key.key for key in path) for path, _ in sorted(flat, key=lambda pair: pair[1].order)]
    assert names == [
        "mixer_norm/scale",
        *("mixer/q", "mixer/k", "mixer/v", "mixer/q_norm/scale", "mixer/k_norm/scale", "mixer/o"),
        "ffn_norm/scale",
        *("ffn/gate", "ffn/up", "ffn/down"),
    ]

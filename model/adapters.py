"""Adapters of a whole model: adds them, separates them from other parameters, and merges them.

An adapter of one map is in model/blocks/lora.py, PEFT folders are in model/formats/peft.py.
"""

# L leading axes of an array (layers, experts), N adapters, I inputs, R rank, O outputs

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from model.blocks.linear import within_block
from model.blocks.lora import LoRA
from model.config import ModelConfig
from model.families.tensors import Path, get
from model.function import Params, Transformer, example_inputs, logical_axes
from model.layout import relayout
from model.weights import is_quantized

PATCHER = "patcher"  # the key of a patcher's parameters
ENDS = ("_lora_a", "_lora_b", "_lora_magnitude")


def add_adapters(
    cfg: ModelConfig, params: Params, adapters: LoRA, key: jax.Array
) -> tuple[ModelConfig, Params]:
    """The same function with new adapters, which have no effect before training.

    Raises:
      ValueError: the model has adapters, or no linear map of it is a target.
    """
    if cfg.adapters is not None:
        raise ValueError(f"the model has adapters ({cfg.adapters}); merge them first, or drop them.")
    scan, (flat_cfg, flat) = cfg.scan, relayout(cfg, params, scan=False)
    flat_cfg = flat_cfg.replace(adapters=adapters)

    @jax.jit
    def fresh(params: Params, key: jax.Array) -> dict[Path, jax.Array]:
        # The module makes missing parameters; the compiler drops the forward pass.
        _, made = Transformer(flat_cfg).apply(
            {"params": params}, example_inputs(cfg), mutable=["params"], rngs={"params": key}
        )
        made = _flat(nn.meta.unbox(made)["params"])
        return {path: x for path, x in made.items() if is_adapter(path)}

    new = fresh(flat, key)
    if not new:
        names = sorted({"/".join(within_block(path)) for path in _flat(flat) if len(path) > 1})
        raise ValueError(
            f"targets={adapters.targets}: no linear map of this model matches. Its parameters are "
            f"{', '.join(names)}."
        )
    return relayout(flat_cfg, unflatten_dict(flatten_dict(flat) | new), scan=scan)


def is_adapter(path: Path) -> bool:
    """Whether a parameter, by its path, belongs to the adapters."""
    return path[-1].endswith(ENDS)


def is_readout(path: Path) -> bool:
    """Whether a parameter, by its path, belongs to one of `cfg.heads`, such as a value."""
    return len(path) == 1 and path[0].endswith(("_head", "_head_bias"))


def split_trained(params: Params) -> tuple[Params, Params]:
    """(trained parameters, the rest).

    Trained are adapters and readouts if there are any adapters, else all but a byte-latent model's patcher.
    """
    flat = _flat(params)
    adapted = any(map(is_adapter, flat))
    is_trained = (
        (lambda path: is_adapter(path) or is_readout(path)) if adapted else lambda path: path[0] != PATCHER
    )
    trained = {path: x for path, x in flat.items() if is_trained(path)}
    if len(trained) == len(flat):
        return params, {}
    return unflatten_dict(trained), unflatten_dict({p: x for p, x in flat.items() if p not in trained})


def join(trained: Params, rest: Params) -> Params:
    """The inverse of `split_trained`."""
    return unflatten_dict(_flat(trained) | _flat(rest)) if rest else trained


def drop_adapters(cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The model without adapters."""
    rest = {path: value for path, value in flatten_dict(params).items() if not is_adapter(path)}
    return cfg.replace(adapters=None), unflatten_dict(rest)


def merge_adapter(cfg: ModelConfig, params: Params, slot: int = 0) -> tuple[ModelConfig, Params]:
    """A model without adapters that computes what this one does with the adapter `slot`.

    The sum is in float32, because in bfloat16 it would lose most of a small adapter.
    """
    if cfg.adapters is None or not 0 <= slot < cfg.adapters.slots:
        raise ValueError(f"slot={slot}: the model's adapters are {cfg.adapters}.")
    plain, merged = drop_adapters(cfg, params)
    axes = logical_axes(cfg)
    flat = _flat(merged)
    for path in flatten_dict(params):
        if path[-1].endswith("_lora_a"):
            base = (*path[:-1], path[-1].removesuffix("_lora_a"))
            flat[base] = _merged(cfg.adapters, params, base, slot, get(axes, path).index("adapters"))
    return plain, unflatten_dict(flat)


def check_without_adapters(cfg: ModelConfig) -> None:
    """Raises ValueError for a model with adapters, for formats without them."""
    if cfg.adapters is not None:
        raise ValueError(
            "the format does not support adapters: merge its adapters (model.adapters.merge_adapter), "
            'save them separately (model.formats.peft.save_adapter), or save both with format="native".'
        )


def low_rank_update(
    adapters: LoRA, params: Params, base: Path, slot: int, lead: int
) -> tuple[jax.Array, Any]:
    """(the adapter's change of the map [*L, I, O], DoRA's lengths [*L, O] or None), float32."""
    of = lambda end: jnp.take(
        jnp.asarray(get(params, (*base[:-1], base[-1] + end)), jnp.float32), slot, axis=lead
    )
    a, b = of("_lora_a"), of("_lora_b")
    leading = a.shape[:lead]
    a_LIR = a.reshape(*leading, -1, a.shape[-1])
    b_LRO = b.reshape(*leading, b.shape[lead], -1)
    lengths = of("_lora_magnitude").reshape(*leading, -1) if adapters.decomposed else None
    return adapters.scale * jnp.einsum("...IR,...RO->...IO", a_LIR, b_LRO), lengths


def _merged(adapters: LoRA, params: Params, base: Path, slot: int, lead: int) -> jax.Array:
    found = get(params, base)
    if is_quantized(found):
        raise ValueError(
            f"{'/'.join(base)} is quantized, and would lose most of a small adapter: dequantize the weights first "
            "(model.dequantize)."
        )
    weight = jnp.asarray(found)
    update_LIO, lengths_LO = low_rank_update(adapters, params, base, slot, lead)
    sum_LIO = weight.astype(jnp.float32).reshape(update_LIO.shape) + update_LIO
    if lengths_LO is not None:
        square_LO = jnp.sum(sum_LIO**2, axis=-2)
        sum_LIO *= (lengths_LO / jnp.sqrt(jnp.where(square_LO > 0, square_LO, 1.0)))[..., None, :]
    return sum_LIO.reshape(weight.shape).astype(weight.dtype)


def _flat(params: Params) -> dict[Path, jax.Array]:
    return cast(dict, flatten_dict(params))

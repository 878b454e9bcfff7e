"""The size and cost of a model: parameters by group, flops, cache and memory. Reads no weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from model.cache import cache_axes, init_pages
from model.config import ModelConfig
from model.function import Params, apply, param_shapes
from model.inputs import Inputs
from model.inspect.flops import forward_flops_per_token, mtp_flops_per_token, train_flops_per_token
from model.logprobs import token_logprobs
from model.parameters import ParamInfo, param_info
from model.readouts.mtp import mtp_blocks


@dataclasses.dataclass(frozen=True)
class Group:
    """A parameter array, or the same array in `count` equal blocks."""

    name: str
    stack: str  # name of its stack, "" for the main stack, "mtp" for an MTP module
    blocks: tuple[int, int] | None  # first and last of a run of equal blocks; None: outside the blocks
    shape: tuple[int, ...]  # of one block
    axes: tuple[str | None, ...]
    parameters: int  # of all its blocks
    active: int  # parameters that one token uses
    role: str

    @property
    def count(self) -> int:
        return 1 if self.blocks is None else self.blocks[1] - self.blocks[0] + 1


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """`batch` rows of `context` tokens; memory in bytes."""

    batch: int
    context: int
    groups: tuple[Group, ...]
    parameters: int
    active_parameters: int
    forward_flops_per_token: float  # mean over the row
    backward_flops_per_token: float  # including multi-token prediction
    cache_bytes_per_token: int  # of pages, in `cfg.dtype`
    state_bytes_per_row: int  # of recurrent mixers, at any length of the row
    training: dict[str, int]  # name -> bytes
    serving: dict[str, int]
    mtp_flops_per_token: float = 0.0  # of the forward pass, only in training


def anatomy(cfg: ModelConfig, batch: int = 1, context: int | None = None) -> Anatomy:
    """The `Anatomy` of a model.

    Args:
      batch, context: rows and tokens a row for flops, cache and memory; default: one row of full length.

    Raises:
      ValueError: no rows or no tokens.
    """
    context = cfg.max_length if context is None else context
    if batch < 1 or context < 1:
        raise ValueError(f"batch={batch} and context={context} must be at least 1.")
    groups = parameter_groups(cfg)
    parameters = sum(group.parameters for group in groups)
    forward, mtp = forward_flops_per_token(cfg, context), mtp_flops_per_token(cfg, context)
    return Anatomy(
        batch,
        context,
        groups,
        parameters,
        sum(group.active for group in groups),
        forward,
        train_flops_per_token(cfg, context) - forward - mtp,
        cache_bytes_per_token(cfg),
        state_bytes_per_row(cfg),
        training_memory(cfg, batch, context),
        serving_memory(cfg, batch, context),
        mtp,
    )


def parameter_groups(cfg: ModelConfig) -> tuple[Group, ...]:
    """In the order of the computation, equal neighbouring blocks together."""
    scanned = cfg.replace(scan=True)
    infos: dict[str, ParamInfo] = _flat(param_info(scanned))
    runs = {
        f"{stack.name}/{run.name}".lstrip("/"): (stack.name, run)
        for stack in scanned.stacks
        for run in stack.runs(scan=True)
    }
    modules = mtp_blocks(cfg.mtp)
    block_groups: dict[str, list[tuple[int, Group]]] = {name: [] for name in (*runs, *modules)}
    outside = []
    for path, info in infos.items():
        top = next((run for run in runs if path.startswith(f"{run}/")), path.partition("/")[0])
        name = path.removeprefix(f"{top}/")
        size, one = math.prod(info.shape), info.of_layer()
        if top in runs:
            stack, (_, block, layers) = runs[top]
            active = round(size * block.active_share(name))
            what = name, stack, (layers[0], layers[-1]), one.shape, one.axes, size, active
        elif top in modules:
            k = 1 + list(modules).index(top)
            active = round(size * modules[top].active_share(name.removeprefix("block_0/")))
            what = name, "mtp", (k, k), one.shape, one.axes, size, active
        else:
            what = path, "", None, one.shape, one.axes, size, size
        in_block = top in runs or name.startswith("block_0/")
        (block_groups[top] if in_block else outside).append((info.order, Group(*what, info.role)))
    return _in_order(outside, list(block_groups.values()))


def _in_order(
    outside: list[tuple[int, Group]], block_groups: list[list[tuple[int, Group]]]
) -> tuple[Group, ...]:
    """Merges the groups outside blocks with those of blocks, in the order of the computation."""
    found: list[Group] = []
    by_number = lambda numbered: sorted(numbered, key=lambda pair: pair[0])
    left = [[group for _, group in by_number(groups)] for groups in block_groups]
    for number, group in by_number(outside):
        while len(found) < number:
            found += left.pop(0)
        found.append(group)
    return (*found, *(group for groups in left for group in groups))


def parameter_count(cfg: ModelConfig) -> int:
    """The parameters of the whole model; a tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(cfg.replace(scan=True))))


def cache_bytes_per_token(cfg: ModelConfig) -> int:
    """Bytes a token of one row, over all blocks, in `cfg.dtype`."""
    return _cache_bytes(cfg, "slots")


def state_bytes_per_row(cfg: ModelConfig) -> int:
    """Bytes a row of recurrent states, and of cross attention for the longest encoder text."""
    return _cache_bytes(cfg, "rows")


def training_memory(cfg: ModelConfig, batch: int, context: int) -> dict[str, int]:
    """Bytes of a training step on one device: parameters, gradients and AdamW's two moments in float32, activations."""
    weights = 4 * parameter_count(cfg)
    return {
        "parameters": weights,
        "gradients": weights,
        "AdamW's moments": 2 * weights,
        "activations": activation_bytes(cfg, batch, context),
    }


def serving_memory(cfg: ModelConfig, batch: int, context: int) -> dict[str, int]:
    """Bytes of `batch` full rows, with parameters in `cfg.dtype`."""
    return {
        "parameters": parameter_count(cfg) * jnp.dtype(cfg.dtype).itemsize,
        "cache": batch * (context * cache_bytes_per_token(cfg) + state_bytes_per_row(cfg)),
    }


def activation_bytes(cfg: ModelConfig, batch: int, context: int) -> int:
    """Bytes saved for the backward pass, as traced; the compiler may save less.

    With remat: the blocks' inputs and the activations of one block.
    """
    cfg = cfg.replace(scan=True)
    saved = _residual_bytes(cfg, batch, context)
    if cfg.remat == "none":
        return saved
    return saved + (_residual_bytes(cfg.replace(remat="none"), batch, context) - saved) // len(cfg.blocks)


def _flat(tree: Params, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return found


def _cache_bytes(cfg: ModelConfig, axis: str) -> int:
    """The cache of one page with one slot and one row; {} for an encoder."""
    if not cfg.causal:
        return 0
    cfg = cfg.replace(scan=False)
    axes, state = cache_axes(cfg), jax.eval_shape(lambda: init_pages(cfg, 1, 1))
    axis_bytes = lambda names, x: math.prod(x.shape) * x.dtype.itemsize if axis in names else 0
    sizes = jax.tree.map(axis_bytes, axes, state, is_leaf=lambda x: isinstance(x, tuple))
    return sum(jax.tree.leaves(sizes))


def _residual_bytes(cfg: ModelConfig, batch: int, context: int) -> int:
    def loss(params: Params, tokens: jax.Array) -> jax.Array:
        out = apply(cfg, params, Inputs(tokens, encoder_tokens=None if cfg.encoder is None else tokens))
        read = [token_logprobs(logits, tokens)[0].sum() for logits in (out.logits, *out.mtp_logits)]
        return -jnp.stack(read).sum()

    tokens = jax.ShapeDtypeStruct((batch, context), jnp.int32)
    pullback = lambda params, tokens: jax.tree.leaves(jax.vjp(lambda p: loss(p, tokens), params)[1])
    jaxpr = jax.make_jaxpr(pullback)(param_shapes(cfg), tokens).jaxpr
    made = {var for var in jaxpr.outvars if isinstance(var, Var)} - set(jaxpr.invars)
    arrays = [cast(Any, var.aval) for var in made]
    arrays = [array for array in arrays if array.memory_space != jax.memory.Space.Host]
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)

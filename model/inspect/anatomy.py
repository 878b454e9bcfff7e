"""What a model is made of and what it costs, in numbers: parameters by group, flops, cache and
memory. Reads no weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from model.cache import cache_axes, init_pages
from model.config import STACKS, ModelConfig
from model.function import Params, apply, logical_axes, param_shapes
from model.inspect.flops import forward_flops_per_token, mtp_flops_per_token, train_flops_per_token
from model.logprobs import token_logprobs
from model.readouts.mtp import MTP, mtp_blocks

ADAPTER_ROLES = {"a": "down to their rank", "b": "up from it", "magnitude": "each output's length"}


@dataclasses.dataclass(frozen=True)
class Group:
    """One array of parameters, or the same array of `count` equal blocks."""

    name: str
    stack: str  # one of STACKS ("" in the model's own blocks), or "mtp_" in a module that says a later token
    blocks: tuple[int, int] | None  # first and last, of a run of equal blocks; None: outside the blocks
    shape: tuple[int, ...]  # of one block
    axes: tuple[str | None, ...]
    parameters: int  # of all its blocks
    active: int  # those that one token uses
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
    forward_flops_per_token: float  # the mean over the row
    backward_flops_per_token: float  # that of multi-token prediction too
    cache_bytes_per_token: int  # of pages, in the dtype of the computation
    state_bytes_per_row: int  # of recurrent mixers, however long the row is
    training: dict[str, int]  # what -> bytes
    serving: dict[str, int]
    mtp_flops_per_token: float = 0.0  # of the forward pass, in training alone


def anatomy(cfg: ModelConfig, batch: int = 1, context: int | None = None) -> Anatomy:
    """Of the model that `cfg` defines.

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
    shapes, axes = _flat(param_shapes(scanned)), _flat(logical_axes(scanned))
    runs = {name: (stack, block, numbers) for stack in STACKS for name, block, numbers in scanned.runs(stack)}
    modules = mtp_blocks(cfg.mtp)
    keyed = []
    for path, array in shapes.items():
        run, _, name = path.partition("/")
        size = math.prod(array.shape)
        if run in runs:
            stack, block, numbers = runs[run]
            place, role = _role(block.roles, name)
            what = name, stack, (numbers[0], numbers[-1]), array.shape[1:], axes[path][1:]
            order = 1 + STACKS.index(stack)
            active = round(size * block.active_share(name))
            keyed.append(((order, numbers[0], place), Group(*what, size, active, role)))
        elif run in modules:
            block, k = modules[run], 1 + list(modules).index(run)
            place, role = _role(cast(MTP, cfg.mtp).roles_with(block), name)
            active = round(size * block.active_share(name.removeprefix("block_0/")))
            what = name, "mtp_", (k, k), array.shape, axes[path]
            keyed.append(((2 + len(STACKS), k, place), Group(*what, size, active, role)))
        else:
            place, role = _role(roles(cfg), path)
            last = 1 + len(STACKS) if place >= list(roles(cfg)).index("final_norm") else 0
            keyed.append(((last, 0, place), Group(path, "", None, array.shape, axes[path], size, size, role)))
    return tuple(group for _, group in sorted(keyed, key=lambda pair: pair[0]))


def parameter_count(cfg: ModelConfig) -> int:
    """Of the whole model; a tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(cfg.replace(scan=True))))


def cache_bytes_per_token(cfg: ModelConfig) -> int:
    """Of one row, over all blocks, in the dtype of the computation."""
    return _cache_bytes(cfg, "slots")


def state_bytes_per_row(cfg: ModelConfig) -> int:
    """What recurrent blocks keep of a row of any length, and cross attention of an encoder's longest text."""
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
    """Bytes of `batch` full rows with parameters in the dtype of the computation."""
    return {
        "parameters": parameter_count(cfg) * jnp.dtype(cfg.dtype).itemsize,
        "cache": batch * (context * cache_bytes_per_token(cfg) + state_bytes_per_row(cfg)),
    }


def activation_bytes(cfg: ModelConfig, batch: int, context: int) -> int:
    """What the forward pass keeps for the backward pass, as traced: the compiler may keep less. With remat, the
    blocks' inputs and one block's inside."""
    cfg = cfg.replace(scan=True)
    kept = _residual_bytes(cfg, batch, context)
    if cfg.remat == "none":
        return kept
    return kept + (_residual_bytes(cfg.replace(remat="none"), batch, context) - kept) // len(cfg.blocks)


def roles(cfg: ModelConfig) -> dict[str, str]:
    """What each parameter outside the blocks does, in the order of the computation."""
    tied = ", in and out (tied head)" if cfg.tied_head else ""
    heads = {f"{head.name}_head": f"the {head.name} of each token" for head in cfg.heads}
    pooled = "the vector that stands for the text, from its first token"
    return {
        "embedding": "a vector for each token" + tied,
        "token_types": "a vector for each kind of token",
        **{f"positions/{path}": text for path, text in getattr(cfg.positions, "roles", {}).items()},
        "embed_norm": "what the first block reads",
        "encoder_final_norm": "what the encoder gives",
        **(cfg.byte_latent.roles if cfg.byte_latent else {}),
        "final_norm": "the last hidden state",
        "pooler/dense": pooled,
        "head_transform/dense": "what the logits are read from",
        "head_transform/norm": "what the logits are read from",
        "head": "logits: one direction for each token of the vocabulary",
        **heads,
    }


def _role(named: Mapping[str, str], path: str) -> tuple[int, str]:
    """Place in the order, and text: of the parameter itself, of a norm's parameter, or of a bias."""
    order = list(named)
    parent, _, leaf = path.rpartition("/")
    biased = path.removesuffix("_bias")
    adapted, mark, end = path.rpartition("_lora_")
    if path in named:
        return order.index(path), named[path]
    if parent in named:
        return order.index(parent), f"{leaf} of {named[parent]}"
    if biased in named:
        return order.index(biased), f"bias of {biased.split('/')[-1]}"
    if mark and adapted in named:
        return order.index(adapted), f"adapters of {adapted.split('/')[-1]}: {ADAPTER_ROLES[end]}"
    return len(order), ""


def _flat(tree: Params, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return found


def _cache_bytes(cfg: ModelConfig, axis: str) -> int:
    """Of one page of one slot and one row; an encoder alone has no cache."""
    if not cfg.causal:
        return 0
    cfg = cfg.replace(scan=False)
    axes, state = cache_axes(cfg), jax.eval_shape(lambda: init_pages(cfg, 1, 1))
    leaves = [leaf for name, part in state.items() for key, leaf in part.items() if axis in axes[name][key]]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _residual_bytes(cfg: ModelConfig, batch: int, context: int) -> int:
    def loss(params: Params, tokens: jax.Array) -> jax.Array:
        source: dict[str, Any] = {"encoder_tokens": tokens} if cfg.encoder is not None else {}
        out = apply(cfg, params, tokens, **source)
        read = [token_logprobs(logits, tokens)[0].sum() for logits in (out.logits, *out.mtp_logits)]
        return -jnp.stack(read).sum()

    tokens = jax.ShapeDtypeStruct((batch, context), jnp.int32)
    pullback = lambda params, tokens: jax.tree.leaves(jax.vjp(lambda p: loss(p, tokens), params)[1])
    jaxpr = jax.make_jaxpr(pullback)(param_shapes(cfg), tokens).jaxpr
    made = {var for var in jaxpr.outvars if isinstance(var, Var)} - set(jaxpr.invars)
    arrays = [cast(Any, var.aval) for var in made]
    arrays = [array for array in arrays if array.memory_space != jax.memory.Space.Host]
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)

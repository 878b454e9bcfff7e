"""Balances experts without a loss: each router's choice bias has a step of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from model import Block, ModelConfig
from model.blocks.moe import MoE
from model.readouts.mtp import mtp_blocks


def balance_experts(
    cfg: ModelConfig, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, except that each MoE's `choice_bias` steps by `balance_rate` against its gradient's sign.

    This gradient is an expert's load above the mean (see `model.blocks.moe`). `optimizer` does not see it, so it
    affects neither the clipping norm nor the moments. Wang et al. 2024, arXiv:2408.15664.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    runs = [(stack.name, run) for stack in cfg.stacks for run in stack.runs(cfg.scan)]
    rates = {(*([stack] if stack else []), run.name): _balance_rate(run.block) for stack, run in runs}
    rates |= {(name,): _balance_rate(block) for name, block in mtp_blocks(cfg.mtp).items()}
    if not any(rates.values()):
        return optimizer

    def is_choice_bias(path) -> bool:
        return path[-1].key == "choice_bias"

    def rate_of(path) -> float:
        keys = tuple(entry.key for entry in path)
        return rates[keys[:1]] if keys[:1] in rates else rates[keys[:2]]

    def update(updates, state, params=None, **extra):
        grads = updates  # optax uses one name for gradients and updates
        hidden = jax.tree_util.tree_map_with_path(
            lambda path, g: jnp.zeros_like(g) if is_choice_bias(path) else g, grads
        )
        updates, state = optimizer.update(hidden, state, params, **extra)
        updates = jax.tree_util.tree_map_with_path(
            lambda path, u, g: -rate_of(path) * jnp.sign(g) if is_choice_bias(path) else u,
            updates,
            grads,
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _balance_rate(block: Block) -> float:
    rates = {network.balance_rate for network in block.networks if isinstance(network, MoE)}
    if len(rates) > 1:
        raise ValueError(
            f"MoE layers within one block have different balance_rate {sorted(rates)}; give them one."
        )
    return rates.pop() if rates else 0.0

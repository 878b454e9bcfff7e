"""AdamW with its decay mask and schedules, on optax; expert balancing without a loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from model import Block, ModelConfig
from model.adapters import split_trained
from model.blocks.moe import MoE
from model.kernels import cpu
from model.parameters import param_info
from model.readouts.mtp import mtp_blocks
from train.config import OptimizerSpec


def learning_rate(spec: OptimizerSpec, steps: int) -> optax.Schedule:
    """Linear warmup, then cosine, constant, or warmup-stable-decay (Hu et al. 2024, arXiv:2404.06395)."""
    final = spec.peak_lr * spec.final_lr_fraction
    warmup = min(spec.warmup_steps, steps)
    rise = optax.linear_schedule(spec.peak_lr / max(warmup, 1), spec.peak_lr, max(warmup - 1, 1))
    rest = max(steps - warmup, 1)
    if spec.schedule == "cosine":
        after = optax.cosine_decay_schedule(spec.peak_lr, rest, alpha=spec.final_lr_fraction)
    elif spec.schedule == "wsd":
        decay = min(spec.decay_steps or max(steps // 5, 1), rest)
        stable = optax.constant_schedule(spec.peak_lr)
        fall = optax.linear_schedule(spec.peak_lr, final, decay)
        after = optax.join_schedules([stable, fall], [rest - decay])
    else:
        after = optax.constant_schedule(spec.peak_lr)
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def adamw(spec: OptimizerSpec, steps: int, cfg: ModelConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, Adam, weight decay of matrices, the schedule."""
    parts = [clip_by_global_norm(spec.clip_norm)] if spec.clip_norm else []
    parts += [
        optax.scale_by_adam(spec.b1, spec.b2, spec.eps),
        optax.add_decayed_weights(spec.weight_decay, decay_mask(cfg)),
        optax.scale_by_learning_rate(learning_rate(spec, steps)),
    ]
    return balance_experts(cfg, optax.chain(*parts))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """As `optax.clip_by_global_norm`, with this module's `global_norm`."""

    def update(updates, state, params=None):
        norm = global_norm(updates)
        # one factor, so that memory holds no divided copy of the gradients
        scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def global_norm(tree) -> jax.Array:
    """The square root of the sum of all squares, float32."""
    squares = (cpu.sum_of_squares(x.astype(jnp.float32)) for x in jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def balance_experts(
    cfg: ModelConfig, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`optimizer`, except that each MoE's `choice_bias` steps by `balance_rate` against its gradient's sign.

    This gradient is an expert's load above the mean (see `model.blocks.moe`). `optimizer` does not see it, so it
    affects neither the clipping norm nor the moments. Wang et al. 2024, arXiv:2408.15664.
    """
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

    def update(updates, state, params=None):
        grads = updates  # optax uses one name for gradients and updates
        hidden = jax.tree_util.tree_map_with_path(
            lambda path, g: jnp.zeros_like(g) if is_choice_bias(path) else g, grads
        )
        updates, state = optimizer.update(hidden, state, params)
        updates = jax.tree_util.tree_map_with_path(
            lambda path, u, g: -rate_of(path) * jnp.sign(g) if is_choice_bias(path) else u,
            updates,
            grads,
        )
        return updates, state

    return optax.GradientTransformation(optimizer.init, update)


def _balance_rate(block: Block) -> float:
    rates = {network.balance_rate for network in block.networks if isinstance(network, MoE)}
    if len(rates) > 1:
        raise ValueError(
            f"MoE layers within one block have different balance_rate {sorted(rates)}; give them one."
        )
    return rates.pop() if rates else 0.0


def decay_mask(cfg: ModelConfig):
    """True for each trained parameter with weight decay: matrices, not norms, biases and scalars."""
    trained, _ = split_trained(param_info(cfg))
    return jax.tree.map(lambda info: info.decays, trained)

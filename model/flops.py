"""Floating-point operations of the model, from its config alone, and the peak rate of the chip under it.

A multiply-add counts two. Matrix products and attention are counted, elementwise work is not; causal attention counts
half of the square, a mixture of experts those that a token uses. The backward pass is twice the forward pass;
recomputation (remat) is not useful work and does not count. What says the tokens after the next one counts in training
alone, where it is computed. So MFU = tokens/s * train_flops_per_token / (peak flops/s
of all devices).
Chowdhery et al. 2022, arXiv:2204.02311.
"""

from __future__ import annotations

import collections
import functools
import time

import jax
import jax.numpy as jnp

from model.blocks.block import Block
from model.blocks.patches import EntropyPatcher
from model.byte_latent import ByteLatent
from model.config import ModelConfig

MFU_FORMULA = "MFU = tokens/s * 3 * (2 * active matrix parameters + causal attention) / peak flops/s"

# bf16 dense peak of one chip by jax's device_kind, flops/s (vendors' data sheets)
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def forward_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Mean over the tokens of a full row of `seq_len` tokens; an encoder reads as many besides."""
    outside = _head_flops(cfg) + (2 * cfg.token_width**2 if cfg.pooler else 0)
    if cfg.byte_latent is not None:
        return outside + _byte_latent_flops(cfg, cfg.byte_latent, seq_len) + _patcher_flops(cfg, seq_len)
    encoder = cfg.encoder.blocks if cfg.encoder else ()
    return outside + _stack_flops(encoder + cfg.blocks, cfg.width, seq_len)


def _byte_latent_flops(cfg: ModelConfig, spec: ByteLatent, seq_len: int) -> float:
    """Without the patcher; the latent transformer runs over all places for patches, taken or not."""
    patches = spec.patches(seq_len)
    return (
        _stack_flops(spec.encoder + spec.decoder, spec.width, seq_len)
        + spec.flops_per_byte(cfg.width, seq_len)
        + _stack_flops(cfg.blocks, cfg.width, patches) * patches / seq_len
    )


def _patcher_flops(cfg: ModelConfig, seq_len: int) -> float:
    patcher = cfg.byte_latent.patcher if cfg.byte_latent else None
    if not isinstance(patcher, EntropyPatcher):
        return 0
    return _stack_flops(patcher.blocks, patcher.width, seq_len) + 2 * patcher.width * cfg.vocab_size


def _stack_flops(blocks: tuple[Block, ...], width: int, seq_len: int) -> float:
    counts = collections.Counter(blocks)
    return sum(count * block.flops_per_token(width, seq_len) for block, count in counts.items())


def future_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Of the forward pass of what says the tokens after the next one, each with logits of its own."""
    if cfg.future is None:
        return 0.0
    return cfg.future.flops_per_token(cfg.width, seq_len) + len(cfg.future.blocks) * _head_flops(cfg)


def _head_flops(cfg: ModelConfig) -> float:
    transform = 2 * cfg.token_width**2 if cfg.head_transform else 0
    return transform + 2 * cfg.token_width * cfg.vocab_size


def train_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Three times the forward pass, but for a patcher, which has no backward pass; twice where adapters are trained,
    since the maps beside them need no gradients of their own (adapters' own work is small and not counted)."""
    forward = forward_flops_per_token(cfg, seq_len) + future_flops_per_token(cfg, seq_len)
    times = 3 if cfg.adapters is None else 2
    return times * forward - (times - 1) * _patcher_flops(cfg, seq_len)


@functools.cache
def peak_flops_per_device() -> float:
    """Of the default device; on a chip outside the table (a CPU) the rate of a float32 matrix product,
    measured.
    """
    device = jax.devices()[0]
    if device.device_kind in PEAK_FLOPS:
        return PEAK_FLOPS[device.device_kind]
    return _measured_matmul_rate() / jax.local_device_count()


def _measured_matmul_rate(n: int = 1536, repeats: int = 4) -> float:
    multiply = jax.jit(lambda a: a @ a)
    a = jnp.ones((n, n), jnp.float32)
    multiply(a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best

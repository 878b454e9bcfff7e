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
    encoder = cfg.encoder.blocks if cfg.encoder else ()
    blocks = collections.Counter(encoder + cfg.blocks)
    per_block = {block: block.flops_per_token(cfg.width, seq_len) for block in blocks}
    pooler = 2 * cfg.width**2 if cfg.pooler else 0
    return sum(count * per_block[block] for block, count in blocks.items()) + pooler + _head_flops(cfg)


def future_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Of the forward pass of what says the tokens after the next one, each with logits of its own."""
    if cfg.future is None:
        return 0.0
    return cfg.future.flops_per_token(cfg.width, seq_len) + len(cfg.future.blocks) * _head_flops(cfg)


def _head_flops(cfg: ModelConfig) -> float:
    transform = 2 * cfg.width**2 if cfg.head_transform else 0
    return transform + 2 * cfg.width * cfg.vocab_size


def train_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    return 3 * (forward_flops_per_token(cfg, seq_len) + future_flops_per_token(cfg, seq_len))


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

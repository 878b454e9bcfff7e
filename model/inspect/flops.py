"""Floating-point operations of a model, from its config, and the peak rate of the chip.

A multiply-add counts two. Matrix products and attention count, elementwise operations do not. Causal attention counts
half of the square, an MoE the experts that a token uses. The backward pass is twice the forward pass; recomputation
(remat) does not count. Multi-token prediction counts in training only.
MFU = tokens/s * train_flops_per_token / (peak flops/s of all devices).
Chowdhery et al. 2022, arXiv:2204.02311.
"""

from __future__ import annotations

import collections
import time
from typing import Any

import jax
import jax.numpy as jnp

from model.blocks.block import Block
from model.blocks.patches import EntropyPatcher
from model.config import ModelConfig
from model.inputs.byte_latent import ByteLatent

MFU_FORMULA = "MFU = tokens/s * 3 * (2 * active matrix parameters + causal attention) / peak flops/s"

# Dense bfloat16 peak of one chip (float16 if it has no bfloat16), flops/s, from vendors' data sheets. The first key
# that jax's device_kind starts with or, on GPUs, contains.
PEAK_FLOPS = {
    "TPU v2": 46e12,
    "TPU v3": 123e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 2307e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "GB300": 2500e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A6000": 155e12,
    "T4": 65e12,
    "V100": 125e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX 5090": 210e12,
    "MI250X": 191e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
    "MI355X": 2500e12,
}


def forward_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Mean FLOPs a token of the forward pass of a row of `seq_len` tokens; an encoder reads as many more."""
    outside = _head_flops(cfg) + (2 * cfg.token_width**2 if cfg.pooler else 0)
    if cfg.byte_latent is not None:
        return outside + _byte_latent_flops(cfg, cfg.byte_latent, seq_len) + _patcher_flops(cfg, seq_len)
    encoder = cfg.encoder.blocks if cfg.encoder else ()
    return outside + _stack_flops(encoder + cfg.blocks, cfg.width, seq_len)


def _byte_latent_flops(cfg: ModelConfig, spec: ByteLatent, seq_len: int) -> float:
    """Without the patcher; the latent transformer runs over the most patches of a row."""
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


def mtp_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """FLOPs of the forward pass of the MTP modules, with their logits."""
    if cfg.mtp is None:
        return 0.0
    return cfg.mtp.flops_per_token(cfg.width, seq_len) + len(cfg.mtp.blocks) * _head_flops(cfg)


def _head_flops(cfg: ModelConfig) -> float:
    transform = 2 * cfg.token_width**2 if cfg.head_transform else 0
    return transform + 2 * cfg.token_width * cfg.vocab_size


def train_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """FLOPs of a training step a token: three times the forward pass; a patcher has no backward pass.

    Twice the forward pass for adapters, because their maps need no gradients; the adapters' own FLOPs do not count.
    """
    forward = forward_flops_per_token(cfg, seq_len) + mtp_flops_per_token(cfg, seq_len)
    times = 3 if cfg.adapters is None else 2
    return times * forward - (times - 1) * _patcher_flops(cfg, seq_len)


def mfu(flops_per_second: float, devices: int) -> float | None:
    """The share of the peak of `devices` devices, 0 to 1; None if the peak is unknown.

    A share above 1 means that the peak was measured on a busy machine. Then it is measured again, and the result is
    None if the share is still above 1.
    """
    peak = peak_flops_per_device()
    if peak is not None and flops_per_second > peak * devices and is_measured():
        peak = _measure_again()
    if peak is None or flops_per_second > peak * devices:
        return None
    return flops_per_second / (peak * devices)


def peak_flops_per_device() -> float | None:
    """The peak of the default device, flops/s; None for a chip that `PEAK_FLOPS` lacks.

    On a CPU it is the best measured rate of a float32 matrix product.
    """
    device = jax.devices()[0]
    if is_measured():
        return _MEASURED.get("best") or _measure_again()
    for name, peak in PEAK_FLOPS.items():
        if device.device_kind.startswith(name) or (device.platform == "gpu" and name in device.device_kind):
            return peak / _devices_of_a_chip(device)
    return None


def is_measured() -> bool:
    """Whether the peak is measured, because no data sheet has it."""
    return jax.devices()[0].platform == "cpu"


def peak_text() -> str:
    """The peak and its source, for a log."""
    peak = peak_flops_per_device()
    if peak is None:
        return (
            f"no peak is known for {jax.devices()[0].device_kind}, so no MFU is shown; see PEAK_FLOPS in "
            "model/inspect/flops.py"
        )
    how = (
        "measured by a float32 product when this run began"
        if is_measured()
        else "bfloat16, by its data sheet"
    )
    return f"peak {peak / 1e9:,.0f} GFLOP/s a device, {how}"


def _devices_of_a_chip(device: Any) -> int:
    """Devices a chip: a TPU v2, v3 or 7x has two, with one core each and the same coordinates."""
    coords = getattr(device, "coords", None)
    if coords is None:
        return 1
    return sum(getattr(other, "coords", None) == coords for other in jax.local_devices()) or 1


_MEASURED: dict[str, float] = {}


def _measure_again() -> float:
    rate = _measured_matmul_rate() / jax.local_device_count()
    _MEASURED["best"] = max(rate, _MEASURED.get("best", 0.0))
    return _MEASURED["best"]


def _measured_matmul_rate(n: int = 1536, repeats: int = 8) -> float:
    multiply = jax.jit(lambda a: a @ a)
    a = jnp.ones((n, n), jnp.float32)
    multiply(a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best

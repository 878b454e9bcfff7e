"""Rotary position embedding and its context scalings. Su et al. 2021, arXiv:2104.09864."""

# B batch, T tokens, H heads, C head width, F = C // 2 frequencies

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's context extension: low frequencies divided by `factor`, a smooth ramp between the two bounds."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int

    def scale(self, frequencies_F: np.ndarray) -> np.ndarray:
        wavelengths_F = 2 * math.pi / frequencies_F
        ramp_F = (self.original_max_length / wavelengths_F - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        keep_F = np.clip(ramp_F, 0.0, 1.0)
        return frequencies_F * (keep_F + (1 - keep_F) / self.factor)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotation of the pairs (c, c + C/2), the layout of Hugging Face checkpoints."""

    theta: float = 10_000.0
    scaling: Llama3Scaling | None = None

    def frequencies(self, head_dim: int) -> np.ndarray:
        """[C // 2] float32 radians a token."""
        frequencies_F = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.scaling is not None:
            frequencies_F = self.scaling.scale(frequencies_F)
        return frequencies_F.astype(np.float32)

    def __call__(self, x_BTHC: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Rotate `x` by its positions; angles in float32, result in the dtype of `x`."""
        angles_BT1F = positions_BT[:, :, None, None].astype(jnp.float32) * self.frequencies(x_BTHC.shape[-1])
        cos, sin = jnp.cos(angles_BT1F), jnp.sin(angles_BT1F)
        a, b = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHC.dtype)

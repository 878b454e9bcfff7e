"""Positions of tokens: rotary embedding with its context scalings, biases of the scores, learned, sinusoidal.

Rotary: Su et al. 2021, arXiv:2104.09864; with several axes (M-RoPE): Wang et al. 2024, arXiv:2409.12191. ALiBi: Press
et al. 2021, arXiv:2108.12409. Sinusoidal: Vaswani et al. 2017, arXiv:1706.03762.
"""

# B batch, T tokens, A axes of a position, D model width, H heads, C head width
# R rotated channels of a head, F = R // 2 frequencies

from __future__ import annotations

import dataclasses
import functools
import math
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from model.blocks.common import Context, param
from model.kernels import backend, cpu


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor`. Chen et al. 2023, arXiv:2306.15595."""

    factor: float

    def scale(self, frequencies_F: np.ndarray, theta: float) -> np.ndarray:
        return frequencies_F / self.factor


@dataclasses.dataclass(frozen=True)
class NTKScaling:
    """A larger theta, which divides the lowest frequency by `factor` and leaves the highest unchanged.

    "NTK-aware" scaling, as in section 3.1 of Peng et al. 2023, arXiv:2309.00071.
    """

    factor: float

    def scale(self, frequencies_F: np.ndarray, theta: float) -> np.ndarray:
        R = 2 * len(frequencies_F)
        theta *= self.factor ** (R / (R - 2))
        return theta ** (-np.arange(0, R, 2, dtype=np.float64) / R)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's context extension: low frequencies are divided by `factor`, with a ramp between the two bounds."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int

    def scale(self, frequencies_F: np.ndarray, theta: float) -> np.ndarray:
        wavelengths_F = 2 * math.pi / frequencies_F
        turns_F = self.original_max_length / wavelengths_F
        width = self.high_freq_factor - self.low_freq_factor
        # Llama 4 Scout has no ramp: the two bounds are one
        ramp_F = (turns_F - self.low_freq_factor) / width if width else turns_F > self.high_freq_factor
        keep_F = np.clip(ramp_F, 0.0, 1.0)
        return frequencies_F * (keep_F + (1 - keep_F) / self.factor)


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN, Peng et al. 2023, arXiv:2309.00071.

    Frequencies with fewer than `beta_slow` rotations in the original context are divided by `factor`, those with more
    than `beta_fast` stay as they are, and rotated vectors are multiplied by `magnitude`.
    """

    factor: float
    original_max_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float = 1.0  # multiplies cosine and sine; the paper has 0.1 ln(factor) + 1
    truncate: bool = True  # round the ramp's bounds to whole channels

    def scale(self, frequencies_F: np.ndarray, theta: float) -> np.ndarray:
        low, high = (self._channel(turns, theta, frequencies_F) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * len(frequencies_F) - 1)
        width = high - low or 0.001
        divided_F = np.clip((np.arange(len(frequencies_F)) - low) / width, 0.0, 1.0)
        return frequencies_F * (divided_F / self.factor + (1 - divided_F))

    def _channel(self, turns: float, theta: float, frequencies_F: np.ndarray) -> float:
        """The channel with this many rotations in the original context."""
        wavelength = self.original_max_length / (turns * 2 * math.pi)
        return len(frequencies_F) * math.log(wavelength) / math.log(theta)


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE: a searched divisor for each frequency, one set for short and one for long documents.

    Ding et al. 2024, arXiv:2402.13753. When decoding crosses `original_max_length`, later keys have other frequencies
    than earlier ones.
    """

    short: tuple[float, ...]  # F divisors
    long: tuple[float, ...]
    original_max_length: int
    magnitude: float = 1.0  # multiplies cosine and sine

    def scale(self, frequencies_F: np.ndarray, theta: float, long: bool = False) -> np.ndarray:
        divisors_F = np.array(self.long if long else self.short)
        if divisors_F.shape != frequencies_F.shape:
            raise ValueError(
                f"LongRopeScaling has {len(divisors_F)} divisors; the head rotates {len(frequencies_F)} frequencies."
            )
        return frequencies_F / divisors_F


Scaling = LinearScaling | NTKScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotation of pairs of channels: (c, c + R/2), the layout of Hugging Face checkpoints, or (2c, 2c + 1)."""

    theta: float = 10_000.0
    scaling: Scaling | None = None
    fraction: float = 1.0  # share of a head's channels that have frequencies, the first ones
    interleaved: bool = False  # pairs are neighbouring channels
    # p-RoPE (arXiv:2410.06205): share of the frequencies, highest first; the rest is unrotated
    rotated_fraction: float = 1.0
    # M-RoPE: frequencies of each axis of a position (time, height, width); None: positions have one axis
    sections: tuple[int, ...] | None = None
    # Qwen3-VL: the axes alternate, one frequency each, until the later axes are complete; False: axis after axis
    sections_interleaved: bool = False

    def __post_init__(self):
        if self.sections is not None and (not self.sections or min(self.sections) < 0):
            raise ValueError(f"sections={self.sections}: give how many frequencies each axis has.")

    def frequencies(self, head_dim: int, long: bool = False) -> np.ndarray:
        """[R // 2] float32 radians a token; `long`: for LongRoPE's long documents."""
        R = self.rotated(head_dim)
        frequencies_F = self.theta ** (-np.arange(0, R, 2, dtype=np.float64) / R)
        if isinstance(self.scaling, LongRopeScaling):
            frequencies_F = self.scaling.scale(frequencies_F, self.theta, long)
        elif self.scaling is not None:
            frequencies_F = self.scaling.scale(frequencies_F, self.theta)
        frequencies_F[int(self.rotated_fraction * R / 2) :] = 0.0
        return frequencies_F.astype(np.float32)

    def rotated(self, head_dim: int) -> int:
        """The number of channels of a head in rotated pairs."""
        return int(head_dim * self.fraction)

    def __call__(
        self, x_BTHC: jax.Array, positions: jax.Array, segment_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        """Rotate `x` by its positions; angles in float32, result in the dtype of `x`.

        Args:
          positions: int32 [B, T], or [B, T, A] where `sections` has A numbers.
          segment_ids_BT: the documents of each row, for LongRoPE; None: one document a row.
        """
        C = x_BTHC.shape[-1]
        R = self.rotated(C)
        frequencies = self._frequencies(C, positions, segment_ids_BT)
        angles_BT1F = self._by_frequency(positions, R // 2)[:, :, None].astype(jnp.float32) * frequencies
        magnitude = getattr(self.scaling, "magnitude", 1.0)
        cos, sin = _cos_and_sin(angles_BT1F, magnitude)
        if backend.current().name == "tpu":
            return _rotate_by_matmul(self, x_BTHC, *self._of_channels(C, cos, sin))
        x32 = x_BTHC[..., :R].astype(jnp.float32)
        if self.interleaved:
            a, b = x32[..., 0::2], x32[..., 1::2]
            rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x32.shape)
        else:
            a, b = jnp.split(x32, 2, axis=-1)
            rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        rotated = rotated.astype(x_BTHC.dtype)
        return rotated if R == C else jnp.concatenate([rotated, x_BTHC[..., R:]], axis=-1)

    def axis_of_frequency(self, count: int) -> np.ndarray:
        """[F] int: the axis of the position that each of `count` frequencies uses."""
        sections = cast(tuple[int, ...], self.sections)
        if sum(sections) != count:
            raise ValueError(f"sections={sections} are {sum(sections)} frequencies, and a head has {count}.")
        if not self.sections_interleaved:
            return np.repeat(np.arange(len(sections)), sections)
        axis_F = np.zeros(count, int)
        for axis, size in enumerate(sections[1:], 1):
            axis_F[axis : size * len(sections) : len(sections)] = axis
        return axis_F

    def _by_frequency(self, positions: jax.Array, count: int) -> jax.Array:
        """[B, T, F] ([B, T, 1] for one axis): the position that each frequency uses."""
        if positions.ndim == 2:
            return positions[..., None]
        if self.sections is None or positions.shape[-1] != len(self.sections):
            raise ValueError(
                f"positions have {positions.shape[-1]} axes and the rotary embedding has sections={self.sections}. "
                "Give positions [batch, tokens], or a rope with a section for each axis."
            )
        return positions[..., self.axis_of_frequency(count)]

    def _of_channels(self, head_dim: int, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
        """cos and sin of pairs [..., F] expanded to all channels [..., C]; 1 and 0 for unrotated channels."""
        both = lambda x: jnp.repeat(x, 2, axis=-1) if self.interleaved else jnp.concatenate([x, x], axis=-1)
        still = [(0, 0)] * (cos.ndim - 1) + [(0, head_dim - self.rotated(head_dim))]
        return jnp.pad(both(cos), still, constant_values=1.0), jnp.pad(both(sin), still)

    def partners(self, head_dim: int) -> np.ndarray:
        """[C, C] float32: a matrix that maps each pair of channels (a, b) to (-b, a)."""
        R, partners_CC = self.rotated(head_dim), np.zeros((head_dim, head_dim), np.float32)
        first = np.arange(0, R, 2) if self.interleaved else np.arange(R // 2)
        second = first + 1 if self.interleaved else first + R // 2
        partners_CC[second, first], partners_CC[first, second] = -1.0, 1.0
        return partners_CC

    def _frequencies(
        self, head_dim: int, positions: jax.Array, segment_ids_BT: jax.Array | None
    ) -> jax.Array | np.ndarray:
        if not isinstance(self.scaling, LongRopeScaling):
            return self.frequencies(head_dim)
        positions_BT = positions if positions.ndim == 2 else positions.max(axis=-1)
        is_long_BT = _last_position(positions_BT, segment_ids_BT) >= self.scaling.original_max_length
        return jnp.where(
            is_long_BT[..., None, None], self.frequencies(head_dim, long=True), self.frequencies(head_dim)
        )


def _last_position(positions_BT: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """[B, T] ([B, 1] without segment ids): the position of the last token of each token's document."""
    if segment_ids_BT is None:
        return positions_BT.max(axis=1, keepdims=True)
    T = positions_BT.shape[1]
    ends_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    end_BT = jax.lax.cummin(jnp.where(ends_BT, jnp.arange(T), T - 1), axis=1, reverse=True)
    return jnp.take_along_axis(positions_BT, end_BT, axis=1)


def _cos_and_sin(angles: jax.Array, magnitude: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, materialized: XLA on CPU would recompute them for each head."""
    return cpu.materialize(lambda x: (magnitude * jnp.cos(x), magnitude * jnp.sin(x)))(angles)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate_by_matmul(rope: Rope, x_BTHC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotation for TPUs: swaps the channels of each pair by a product with a matrix of zeros and ones, which is exact.

    If the channels were split in halves, XLA would store each half in main memory, padded to 128 lanes, in float32. The
    gradient is the rotation by the opposite angle.
    """
    precision = jax.lax.Precision.HIGHEST if x_BTHC.dtype == jnp.float32 else None
    partners_CC = jnp.asarray(rope.partners(x_BTHC.shape[-1]), x_BTHC.dtype)
    partner_BTHC = jnp.einsum("BTHa,ac->BTHc", x_BTHC, partners_CC, precision=precision)
    return (x_BTHC.astype(jnp.float32) * cos + partner_BTHC.astype(jnp.float32) * sin).astype(x_BTHC.dtype)


def _rotate_forward(rope: Rope, x_BTHC: jax.Array, cos: jax.Array, sin: jax.Array):
    return _rotate_by_matmul(rope, x_BTHC, cos, sin), (cos, sin)


def _rotate_backward(rope: Rope, saved: tuple[jax.Array, jax.Array], d_BTHC: jax.Array):
    cos, sin = saved
    return _rotate_by_matmul(rope, d_BTHC, cos, -sin), None, None


_rotate_by_matmul.defvjp(_rotate_forward, _rotate_backward)


@dataclasses.dataclass(frozen=True)
class Alibi:
    """Adds slope * (key's position - query's position) to a head's scores; slopes 2^(-max_bias h / H)."""

    max_bias: float = 8.0
    scale: float = 1.0  # multiplies the bias

    def slopes(self, num_heads: int) -> np.ndarray:
        """[H] float32. Heads beyond a power of two have slopes between those of the first ones."""
        power = 2 ** math.floor(math.log2(num_heads))
        first = 2.0 ** (-self.max_bias * np.arange(1, power + 1) / power)
        between = 2.0 ** (-self.max_bias * np.arange(1, 2 * power + 1, 2) / (2 * power))
        return (self.scale * np.concatenate([first, between])[:num_heads]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """T5's bias: adds to a head's scores a learned number for the key's distance. Raffel et al. 2019, arXiv:1910.10683.

    Near distances have a bucket each. Farther ones share buckets of increasing width, up to `max_distance`. Without
    causality, each direction has half of the buckets.
    """

    buckets: int = 32
    max_distance: int = 128
    own: bool = True  # False: uses the table of the last earlier block with one

    def __post_init__(self):
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"buckets={self.buckets}, max_distance={self.max_distance}: give at least 4 buckets, and a distance "
                "beyond half of them."
            )

    def buckets_of(self, causal: bool) -> np.ndarray:
        """[2 * max_distance + 1] int32: the bucket of each distance (key's position - query's), in ascending order."""
        to_a_side = self.buckets if causal else self.buckets // 2
        exact = to_a_side // 2
        away = np.arange(self.max_distance + 1)
        share = np.log(np.maximum(away, 1).astype(np.float32) / exact) / math.log(self.max_distance / exact)
        shared = exact + (share * (to_a_side - exact)).astype(np.int32)
        before = np.where(away < exact, away, np.minimum(shared, to_a_side - 1))
        after = np.zeros_like(before) if causal else before + to_a_side
        return np.concatenate([before[::-1], after[1:]]).astype(np.int32)

    def __call__(self, table_NH: jax.Array, causal: bool, distance: jax.Array) -> jax.Array:
        """The bias [..., H, T, S] float32 at distances [..., T, S]; `table` has a number for each bucket and head."""
        index = jnp.clip(distance, -self.max_distance, self.max_distance) + self.max_distance
        bias = jnp.take(table_NH[self.buckets_of(causal)].astype(jnp.float32), index, axis=0)
        return jnp.moveaxis(bias, -1, -3)


@dataclasses.dataclass(frozen=True)
class LearnedPositions:
    """A trained vector for each position, added to the embedding. Positions past `length` use the last vector."""

    length: int

    def module(self, ctx: Context, name: str) -> nn.Module:
        return LearnedPositionsModule(self, ctx, name=name)


class LearnedPositionsModule(nn.Module):
    spec: LearnedPositions
    ctx: Context

    @nn.compact
    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        shape, init = (self.spec.length, self.ctx.width), nn.initializers.normal(0.1 * self.ctx.width**-0.5)
        role = "a vector for each position"
        table_PD = param(self, self.ctx, "table", shape, ("norm", "embed"), init, 0, role)
        return jnp.take(table_PD, positions_BT, axis=0, mode="clip")


@dataclasses.dataclass(frozen=True)
class SinusoidalPositions:
    """sin and cos of the position at wavelengths from 2 pi to 2 pi theta, first all sines, then all cosines."""

    theta: float = 10_000.0

    def module(self, ctx: Context, name: str) -> nn.Module:
        return SinusoidalPositionsModule(self, ctx, name=name)


class SinusoidalPositionsModule(nn.Module):
    spec: SinusoidalPositions
    ctx: Context

    @nn.compact
    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        F = self.ctx.width // 2
        frequencies_F = self.spec.theta ** (-np.arange(F, dtype=np.float32) / max(F - 1, 1))
        angles_BTF = positions_BT[:, :, None].astype(jnp.float32) * frequencies_F
        return jnp.concatenate([jnp.sin(angles_BTF), jnp.cos(angles_BTF)], axis=-1).astype(self.ctx.dtype)

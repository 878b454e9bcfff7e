"""How a model knows the order of its tokens: rotary embedding and its context scalings, biases, learned, sinusoidal.

Rotary: Su et al. 2021, arXiv:2104.09864; of several axes (M-RoPE): Wang et al. 2024, arXiv:2409.12191. ALiBi: Press et
al. 2021, arXiv:2108.12409. Sinusoidal: Vaswani et al. 2017, arXiv:1706.03762.
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
    """A larger theta, so that the lowest frequency is divided by `factor` and the highest is kept.

    "NTK-aware" scaling, as in section 3.1 of Peng et al. 2023, arXiv:2309.00071.
    """

    factor: float

    def scale(self, frequencies_F: np.ndarray, theta: float) -> np.ndarray:
        R = 2 * len(frequencies_F)
        theta *= self.factor ** (R / (R - 2))
        return theta ** (-np.arange(0, R, 2, dtype=np.float64) / R)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's context extension: low frequencies divided by `factor`, a smooth ramp between the two bounds."""

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
    """Frequencies that turn less than `beta_slow` times in the original context are divided by `factor`, those that
    turn more than `beta_fast` times are kept, and the rotated vectors grow by `magnitude`.

    Peng et al. 2023, arXiv:2309.00071.
    """

    factor: float
    original_max_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float = 1.0  # of cosine and sine; the paper has 0.1 ln(factor) + 1
    truncate: bool = True  # the bounds of the ramp are whole numbers of channels

    def scale(self, frequencies_F: np.ndarray, theta: float) -> np.ndarray:
        low, high = (self._channel(turns, theta, frequencies_F) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * len(frequencies_F) - 1)
        width = high - low or 0.001
        divided_F = np.clip((np.arange(len(frequencies_F)) - low) / width, 0.0, 1.0)
        return frequencies_F * (divided_F / self.factor + (1 - divided_F))

    def _channel(self, turns: float, theta: float, frequencies_F: np.ndarray) -> float:
        """The channel that turns so many times in the original context."""
        wavelength = self.original_max_length / (turns * 2 * math.pi)
        return len(frequencies_F) * math.log(wavelength) / math.log(theta)


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """A searched divisor for each frequency, one set for documents within the original context and one for longer ones.

    Ding et al. 2024, arXiv:2402.13753. A document that crosses the bound while decoding turns its later keys by other
    frequencies than its earlier ones.
    """

    short: tuple[float, ...]  # F divisors
    long: tuple[float, ...]
    original_max_length: int
    magnitude: float = 1.0  # of cosine and sine

    def scale(self, frequencies_F: np.ndarray, theta: float, long: bool = False) -> np.ndarray:
        divisors_F = np.array(self.long if long else self.short)
        if divisors_F.shape != frequencies_F.shape:
            raise ValueError(
                f"LongRopeScaling has {len(divisors_F)} divisors; {len(frequencies_F)} frequencies turn."
            )
        return frequencies_F / divisors_F


Scaling = LinearScaling | NTKScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotation of pairs of channels: (c, c + R/2), the layout of Hugging Face checkpoints, or (2c, 2c + 1)."""

    theta: float = 10_000.0
    scaling: Scaling | None = None
    fraction: float = 1.0  # of a head's channels that are rotated, the first ones
    interleaved: bool = False  # pairs of neighbours
    turning: float = (
        1.0  # p-RoPE (arXiv:2410.06205): of the frequencies, highest first; the others stand still
    )
    # M-RoPE: how many frequencies turn by each axis of a position (time, height, width); None: positions have one axis
    sections: tuple[int, ...] | None = None
    # axes take turns, one frequency each, until the later axes have theirs (Qwen3-VL); False: one axis after the other
    sections_interleaved: bool = False

    def __post_init__(self):
        if self.sections is not None and (not self.sections or min(self.sections) < 0):
            raise ValueError(f"sections={self.sections}: give how many frequencies each axis has.")

    def frequencies(self, head_dim: int, long: bool = False) -> np.ndarray:
        """[R // 2] float32 radians a token; `long`: those of LongRoPE's longer rows."""
        R = self.rotated(head_dim)
        frequencies_F = self.theta ** (-np.arange(0, R, 2, dtype=np.float64) / R)
        if isinstance(self.scaling, LongRopeScaling):
            frequencies_F = self.scaling.scale(frequencies_F, self.theta, long)
        elif self.scaling is not None:
            frequencies_F = self.scaling.scale(frequencies_F, self.theta)
        frequencies_F[int(self.turning * R / 2) :] = 0.0
        return frequencies_F.astype(np.float32)

    def rotated(self, head_dim: int) -> int:
        """Channels of a head that are rotated."""
        return int(head_dim * self.fraction)

    def __call__(
        self, x_BTHC: jax.Array, positions: jax.Array, segment_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        """Rotate `x` by its positions; angles in float32, result in the dtype of `x`.

        Args:
          positions: int32 [B, T], or [B, T, A] where `sections` has A numbers.
          segment_ids_BT: where documents end, which LongRoPE asks for; None: each row is one.
        """
        C = x_BTHC.shape[-1]
        R = self.rotated(C)
        frequencies = self._frequencies(C, positions, segment_ids_BT)
        angles_BT1F = self._by_frequency(positions, R // 2)[:, :, None].astype(jnp.float32) * frequencies
        magnitude = getattr(self.scaling, "magnitude", 1.0)
        cos, sin = _cos_and_sin(angles_BT1F, magnitude)
        if backend.current().name == "tpu":
            return _turned_by_product(self, x_BTHC, *self._of_channels(C, cos, sin))
        x32 = x_BTHC[..., :R].astype(jnp.float32)
        if self.interleaved:
            a, b = x32[..., 0::2], x32[..., 1::2]
            turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x32.shape)
        else:
            a, b = jnp.split(x32, 2, axis=-1)
            turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        turned = turned.astype(x_BTHC.dtype)
        return turned if R == C else jnp.concatenate([turned, x_BTHC[..., R:]], axis=-1)

    def axis_of_frequency(self, count: int) -> np.ndarray:
        """[F] int: the axis of the position by which each of `count` frequencies turns."""
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
        """[B, T, F] ([B, T, 1] of one axis): the positions that each frequency turns by."""
        if positions.ndim == 2:
            return positions[..., None]
        if self.sections is None or positions.shape[-1] != len(self.sections):
            raise ValueError(
                f"positions have {positions.shape[-1]} axes and the rotary embedding has sections={self.sections}. "
                "Give positions [batch, tokens], or a rope with a section for each axis."
            )
        return positions[..., self.axis_of_frequency(count)]

    def _of_channels(self, head_dim: int, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of pairs [..., F] to those of all channels [..., C]: where nothing is rotated, 1 and 0."""
        both = lambda x: jnp.repeat(x, 2, axis=-1) if self.interleaved else jnp.concatenate([x, x], axis=-1)
        still = [(0, 0)] * (cos.ndim - 1) + [(0, head_dim - self.rotated(head_dim))]
        return jnp.pad(both(cos), still, constant_values=1.0), jnp.pad(both(sin), still)

    def partners(self, head_dim: int) -> np.ndarray:
        """[C, C] float32: to the second of a pair of channels the first, to the first minus the second."""
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
    """[B, T] ([B, 1] for rows of one document): of the last token of each token's document."""
    if segment_ids_BT is None:
        return positions_BT.max(axis=1, keepdims=True)
    T = positions_BT.shape[1]
    ends_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    end_BT = jax.lax.cummin(jnp.where(ends_BT, jnp.arange(T), T - 1), axis=1, reverse=True)
    return jnp.take_along_axis(positions_BT, end_BT, axis=1)


def _cos_and_sin(angles: jax.Array, magnitude: float) -> tuple[jax.Array, jax.Array]:
    """Computed once: XLA on CPU would take up cosines in the loop over heads and compute them for each anew."""
    return cpu.materialize(lambda x: (magnitude * jnp.cos(x), magnitude * jnp.sin(x)))(angles)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turned_by_product(rope: Rope, x_BTHC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """A TPU's form: channels are brought to their partners by a product with zeros and ones, which changes no number.

    Cut into halves, XLA lays each out in main memory, filled up to 128 lanes, and in float32 before. Its gradient turns
    back.
    """
    precision = jax.lax.Precision.HIGHEST if x_BTHC.dtype == jnp.float32 else None
    partners_CC = jnp.asarray(rope.partners(x_BTHC.shape[-1]), x_BTHC.dtype)
    partner_BTHC = jnp.einsum("BTHa,ac->BTHc", x_BTHC, partners_CC, precision=precision)
    return (x_BTHC.astype(jnp.float32) * cos + partner_BTHC.astype(jnp.float32) * sin).astype(x_BTHC.dtype)


def _turned_forward(rope: Rope, x_BTHC: jax.Array, cos: jax.Array, sin: jax.Array):
    return _turned_by_product(rope, x_BTHC, cos, sin), (cos, sin)


def _turned_backward(rope: Rope, saved: tuple[jax.Array, jax.Array], d_BTHC: jax.Array):
    cos, sin = saved
    return _turned_by_product(rope, d_BTHC, cos, -sin), None, None


_turned_by_product.defvjp(_turned_forward, _turned_backward)


@dataclasses.dataclass(frozen=True)
class Alibi:
    """Adds slope * (key's position - query's position) to a head's scores; slopes 2^(-max_bias h / H)."""

    max_bias: float = 8.0
    scale: float = 1.0  # of the bias

    def slopes(self, num_heads: int) -> np.ndarray:
        """[H] float32. Beyond a power of two, the further heads have the slopes between those of the first."""
        power = 2 ** math.floor(math.log2(num_heads))
        first = 2.0 ** (-self.max_bias * np.arange(1, power + 1) / power)
        between = 2.0 ** (-self.max_bias * np.arange(1, 2 * power + 1, 2) / (2 * power))
        return (self.scale * np.concatenate([first, between])[:num_heads]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """Adds to a head's scores a learned number for the key's distance: near distances have one each, farther ones share
    a bucket, the wider the farther, up to `max_distance`; without causality half of the buckets are for either side.

    T5, Raffel et al. 2019, arXiv:1910.10683.
    """

    buckets: int = 32
    max_distance: int = 128
    own: bool = True  # the block has the table; False: it uses that of the last block before it that has one

    def __post_init__(self):
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"buckets={self.buckets}, max_distance={self.max_distance}: give at least 4 buckets, and a distance "
                "beyond half of them."
            )

    def buckets_of(self, causal: bool) -> np.ndarray:
        """[2 * max_distance + 1] int32: the bucket of each distance (key's position - query's), the least first."""
        to_a_side = self.buckets if causal else self.buckets // 2
        exact = to_a_side // 2
        away = np.arange(self.max_distance + 1)
        share = np.log(np.maximum(away, 1).astype(np.float32) / exact) / math.log(self.max_distance / exact)
        shared = exact + (share * (to_a_side - exact)).astype(np.int32)
        before = np.where(away < exact, away, np.minimum(shared, to_a_side - 1))
        after = np.zeros_like(before) if causal else before + to_a_side
        return np.concatenate([before[::-1], after[1:]]).astype(np.int32)

    def __call__(self, table_NH: jax.Array, causal: bool, distance: jax.Array) -> jax.Array:
        """[..., H, T, S] float32 for distances [..., T, S] and a table of numbers for each bucket and head."""
        index = jnp.clip(distance, -self.max_distance, self.max_distance) + self.max_distance
        bias = jnp.take(table_NH[self.buckets_of(causal)].astype(jnp.float32), index, axis=0)
        return jnp.moveaxis(bias, -1, -3)


@dataclasses.dataclass(frozen=True)
class LearnedPositions:
    """A trained vector for each position, added to the token's. Positions past the last have the last one's."""

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

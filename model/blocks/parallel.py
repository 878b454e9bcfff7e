"""Several mixers in parallel on the same tokens: Falcon-H1's and Hymba's hybrid heads.

Zuo et al. 2025, arXiv:2507.22448; Dong et al. 2024, arXiv:2411.13676.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, Report, TokenInfo
from model.blocks.norms import Norm


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The sum of out_scale * norm(mixer(in_scale * x)) over the mixers."""

    mixers: tuple[Any, ...]  # each a `Mixer` of model.blocks.common
    in_scales: tuple[float, ...] | None = None  # None: all 1
    out_scales: tuple[float, ...] | None = None
    out_norm: Norm | None = None  # norm of each mixer's output before its scale (Hymba)

    def __post_init__(self):
        if not self.mixers:
            raise ValueError(f"Parallel needs at least one mixer; given mixers={self.mixers}.")
        for name in ("in_scales", "out_scales"):
            scales = getattr(self, name)
            if scales is not None and len(scales) != len(self.mixers):
                raise ValueError(f"{name} has {len(scales)} numbers for {len(self.mixers)} mixers.")

    def module(self, ctx: Context, name: str) -> nn.Module:
        return ParallelModule(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """The cache of each mixer, with its name and a slash as prefix."""
        states = [mixer.init_cache(num_pages, page_size, num_rows, dtype) for mixer in self.mixers]
        return {f"mixer_{i}/{key}": value for i, state in enumerate(states) for key, value in state.items()}

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        axes = [mixer.cache_axes() for mixer in self.mixers]
        return {
            f"mixer_{i}/{key}": value
            for i, mixer_axes in enumerate(axes)
            for key, value in mixer_axes.items()
        }

    def flops_per_token(self, width: int, seq_len: int) -> float:
        return sum(mixer.flops_per_token(width, seq_len) for mixer in self.mixers)


class ParallelModule(nn.Module):
    spec: Parallel
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec, count = self.spec, len(self.spec.mixers)
        new_cache, total_BTD, report = {}, jnp.zeros_like(x_BTD), Report()
        for i, mixer in enumerate(spec.mixers):
            prefix = f"mixer_{i}/"
            own = None
            if cache is not None:
                own = {key.removeprefix(prefix): v for key, v in cache.items() if key.startswith(prefix)}
            read_BTD = x_BTD * (spec.in_scales or (1.0,) * count)[i]
            y_BTD, own, *own_more = mixer.module(self.ctx, f"mixer_{i}")(read_BTD, info, own)
            report = report.join(*own_more)
            if spec.out_norm is not None:
                role = f"what {type(mixer).__name__} gives"
                y_BTD = spec.out_norm.module(self.ctx, f"norm_{i}", role=role)(y_BTD)
            total_BTD += y_BTD * (spec.out_scales or (1.0,) * count)[i]
            new_cache |= {prefix + key: value for key, value in (own or {}).items()}
        return total_BTD, None if cache is None else new_cache, report

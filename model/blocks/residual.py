"""Residual connections: how the output of a mixer or a network joins the residual stream."""

# B batch, T tokens, D model width, N copies of the stream

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, param


class Connection(Protocol):
    """One residual connection of a block: around its mixer, its cross attention or its network."""

    def read(self, x: jax.Array) -> jax.Array:
        """The [B, T, D] that the sublayer reads (before its norm) from the stream."""
        ...

    def write(self, x: jax.Array, y_BTD: jax.Array) -> jax.Array:
        """The stream with the sublayer's output y added."""
        ...


class ResidualPart(Protocol):
    """A kind of residual connections, `Block.residual`; a frozen dataclass."""

    @property
    def parallel(self) -> Literal["no", "one norm", "two norms"]:
        """Whether mixer and network are added in one sum, with one norm for both or two norms."""
        ...

    @property
    def copies(self) -> int | None:
        """The stream is [B, T, copies, D]; None: [B, T, D]. All blocks of a stack have the same."""
        ...

    def begin(self, x_BTD: jax.Array) -> jax.Array:
        """The stream that a stack's first block reads."""
        ...

    def end(self, x: jax.Array) -> jax.Array:
        """The [B, T, D] that comes out of a stack."""
        ...

    def connection(self, ctx: Context, name: str) -> Connection:
        """Call it within a compact method; it may be a submodule of this name."""
        ...


@dataclasses.dataclass(frozen=True)
class Residual:
    """x * skip_scale + y * scale, for the mixer, then the network. Both 1: He et al. 2015, arXiv:1512.03385."""

    scale: float = 1.0  # multiplies y
    skip_scale: float = 1.0  # multiplies x

    parallel: ClassVar[Literal["no"]] = "no"
    copies: ClassVar[None] = None

    def begin(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD

    def end(self, x: jax.Array) -> jax.Array:
        return x

    def connection(self, ctx: Context, name: str) -> Connection:
        return self

    def read(self, x: jax.Array) -> jax.Array:
        return x

    def write(self, x: jax.Array, y_BTD: jax.Array) -> jax.Array:
        return x * self.skip_scale + y_BTD * self.scale


@dataclasses.dataclass(frozen=True)
class ParallelResidual:
    """x * skip_scale + (mixer(norm(x)) + ffn(norm(x))) * scale: Wang and Komatsuzaki 2021 (GPT-J)."""

    norms: Literal["one norm", "two norms"] = "one norm"  # for mixer and network together, or one each
    scale: float = 1.0
    skip_scale: float = 1.0

    copies: ClassVar[None] = None

    @property
    def parallel(self) -> Literal["one norm", "two norms"]:
        return self.norms

    def begin(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD

    def end(self, x: jax.Array) -> jax.Array:
        return x

    def connection(self, ctx: Context, name: str) -> Connection:
        return Residual(self.scale, self.skip_scale)


@dataclasses.dataclass(frozen=True)
class HyperConnections:
    """Hyper-connections, the static version: Zhu et al. 2024, arXiv:2409.19606.

    The stream has `copies` vectors a token. Each sublayer reads a learned mix of them, writes to all of them, and mixes
    them. At first all copies are equal and each sublayer reads nearly their mean, as in a plain residual.
    """

    copies: int = 4

    parallel: ClassVar[Literal["no"]] = "no"

    def __post_init__(self):
        if self.copies < 1:
            raise ValueError(f"copies={self.copies}: hyper-connections need at least one copy of the stream.")

    def begin(self, x_BTD: jax.Array) -> jax.Array:
        return jnp.repeat(x_BTD[:, :, None], self.copies, axis=2)

    def end(self, x: jax.Array) -> jax.Array:
        return x.mean(axis=2)

    def connection(self, ctx: Context, name: str) -> Connection:
        return HyperConnectionModule(self, ctx, name=name)


class HyperConnectionModule(nn.Module):
    spec: HyperConnections
    ctx: Context

    def setup(self):
        n = (self.spec.copies,)
        near = nn.initializers.normal(0.02)
        ones, eye = nn.initializers.ones, lambda key, shape, dtype: jnp.eye(shape[0], dtype=dtype)
        mean = lambda key, shape, dtype: 1 / shape[0] + near(key, shape, dtype)
        declare = lambda name, shape, init, role: param(
            self, self.ctx, name, shape, (None,) * len(shape), init, role=role, decay=False
        )
        self.read_N = declare("read", n, mean, "weight of each copy of the stream in the input")
        self.write_N = declare("write", n, ones, "weight of the output in each copy of the stream")
        self.mix_NN = declare("mix", n * 2, eye, "how the copies of the stream mix")

    def read(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("BTND,N->BTD", x, self.read_N)

    def write(self, x: jax.Array, y_BTD: jax.Array) -> jax.Array:
        return jnp.einsum("BTND,NM->BTMD", x, self.mix_NN) + y_BTD[:, :, None] * self.write_N[:, None]

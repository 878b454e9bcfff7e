"""The block, a model's unit of depth: what mixes tokens, what works on each, and how both are added to the stream.

Also `run_stack`, which runs blocks one after the other, equal neighbours in one scan where the model says so.
"""

# B batch, T tokens, D model width

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, Literal

import flax.linen as nn
import jax

from model.blocks.common import Context, FeedForward, More, TokenInfo
from model.blocks.cross_attention import CrossAttention
from model.blocks.norms import Norm, RMSNorm
from model.blocks.remat import rematerialised
from model.sharding import constrain

Run = tuple[str, "Block", range]


@dataclasses.dataclass(frozen=True)
class Block:
    """One residual block: x + mixer(norm(x)), then, in a decoder with an encoder, x + cross(norm(x)), then
    x + ffn(norm(x)).

    Norms may stand elsewhere: on the mixer's and the network's results before they are added (`post_norm`; with `norm`
    as well the sandwich of Gemma 2, without it OLMo 2), or on the sums (`sum_norm`: BERT; with `skip_scale` DeepNorm).
    """

    mixer: Any  # a `Mixer` of model.blocks.common
    ffn: Any  # a `FeedForward`; None: the mixer is all
    norm: Norm | None = RMSNorm()
    norm_mixer: bool = (
        True  # False: the mixer reads x itself (ModernBERT's first block: the embedding has a norm)
    )
    post_norm: Norm | None = None
    sum_norm: Norm | None = None
    # x + mixer(norm(x)) + ffn(norm(x)) in one sum, with a norm for each of the two or one for both
    parallel: Literal["no", "two norms", "one norm"] = "no"
    cross: CrossAttention | None = None  # to the encoder of `ModelConfig.encoder`
    residual_scale: float = 1.0  # of what is added
    skip_scale: float = 1.0  # of what it is added to

    def __post_init__(self):
        if self.mixer is None:
            raise ValueError(
                "a block needs a mixer, and mixer=None was given. Put its network beside another block's."
            )
        if self.cross is not None and self.parallel != "no":
            raise ValueError(f"parallel={self.parallel!r} blocks have no place for cross attention.")

    @property
    def roles(self) -> dict[str, str]:
        """What each parameter does, in the order of the computation."""
        under = lambda name, part: {
            f"{name}/{path}": text for path, text in getattr(part, "roles", {}).items()
        }
        return {
            "mixer_norm": "what the mixer reads",
            **under("mixer", self.mixer),
            "mixer_post_norm": "what the mixer adds",
            "mixer_sum_norm": "the sum after the mixer",
            "cross_norm": "what cross attention reads",
            **under("cross", self.cross),
            "ffn_norm": "what the feed-forward network reads",
            **under("ffn", self.ffn),
            "ffn_post_norm": "what the feed-forward network adds",
            "ffn_sum_norm": "the sum after the feed-forward network",
        }

    @property
    def networks(self) -> tuple[FeedForward, ...]:
        """Its feed-forward network, and those of blocks within it."""
        inside = (network for block in getattr(self.mixer, "blocks", ()) for network in block.networks)
        return *(() if self.ffn is None else (self.ffn,)), *inside

    def active_share(self, path: str) -> float:
        """Of a parameter, by its path within the block: what one token uses."""
        part, _, rest = path.partition("/")
        of_part = getattr(getattr(self, part, None), "active_share", None)
        return 1.0 if of_part is None else of_part(rest)

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """Of the forward pass, in the mean over a row of `seq_len` tokens."""
        mixed = self.mixer.flops_per_token(width, seq_len)
        crossed = self.cross.flops_per_token(width, seq_len) if self.cross else 0
        return mixed + crossed + (self.ffn.flops_per_token(width) if self.ffn else 0)


def runs_of(blocks: tuple[Block, ...], prefix: str, scan: bool, last_alone: bool = False) -> list[Run]:
    """Name, block and layer numbers of each group of parameters: equal neighbours together when scanned, but for the
    last block if that is to be alone."""
    if not scan:
        return [(f"{prefix}block_{i}", block, range(i, i + 1)) for i, block in enumerate(blocks)]
    runs, start = [], 0
    alike = zip(blocks, [False] * (len(blocks) - 1) + [last_alone])
    for (block, _), group in itertools.groupby(alike):
        count = len(list(group))
        runs.append((f"{prefix}run_{len(runs)}", block, range(start, start + count)))
        start += count
    return runs


def run_stack(
    ctx: Context, runs: list[Run], x_BTD: jax.Array, states: dict | None, info: TokenInfo
) -> tuple[jax.Array, dict, dict]:
    """What comes out of the last block, each group's new state, and what the blocks report.

    Call it within a compact method: the groups become submodules of the module that calls.
    """
    x_BTD, new_states, more = run_part(ctx, runs, x_BTD, states, info)
    return x_BTD, new_states, more.aux


def run_part(
    ctx: Context, runs: list[Run], x_BTD: jax.Array, states: dict | None, info: TokenInfo
) -> tuple[jax.Array, dict, More]:
    """As `run_stack`, with what these blocks leave for those that come after them."""
    new_states, gathered = {}, More({}, info.shared)
    for name, block, numbers in runs:
        run = _run(ctx, name, block, len(numbers))
        x_BTD, (new_states[name], more) = run(x_BTD, None if states is None else states[name], info)
        run_aux, shared = more
        if ctx.scan:
            run_aux = jax.tree.map(lambda a: a.sum(0), run_aux)
            shared = jax.tree.map(lambda s: s[-1], shared)
        gathered = gathered.join(More(run_aux, shared))
        info = dataclasses.replace(info, shared=gathered.shared)
    return x_BTD, new_states, gathered


def _run(ctx: Context, name: str, block: Block, count: int):
    if not ctx.scan:
        return _traced_once(ctx.remat)(block, ctx, name=name)
    scanned = nn.scan(
        rematerialised(BlockModule, ctx.remat, scan=True),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  # flax takes a tuple too
        length=count,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(block, ctx, name=name)


@functools.cache
def _traced_once(remat: str) -> type[nn.Module]:
    """Equal blocks are traced and lowered once, however many there are; a compiler sees each in its place."""
    return nn.jit(rematerialised(BlockModule, remat, scan=False))


class BlockModule(nn.Module):
    spec: Block
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, state: dict | None, info: TokenInfo):
        spec = self.spec
        if spec.ffn is not None and spec.parallel != "no":
            x_BTD, more = self._parallel(spec.ffn, x_BTD, state, info)
        else:
            x_BTD, more = self._one_after_the_other(x_BTD, state, info)
        self.sow("intermediates", "residual", x_BTD)
        return x_BTD, more

    def _one_after_the_other(self, x_BTD: jax.Array, state: dict | None, info: TokenInfo):
        spec, ctx = self.spec, self._ctx(info)
        y_BTD, mixed, more = self._mix(self._read(x_BTD), _part(state, cross=False), info)
        x_BTD = self._add("mixer", x_BTD, y_BTD)
        if spec.cross is not None:
            read_BTD = self._norm(spec.norm, "cross_norm", x_BTD)
            y_BTD, crossed = spec.cross.module(ctx, "cross")(read_BTD, info, _part(state, cross=True))
            x_BTD = self._add("cross", x_BTD, y_BTD)
            mixed = mixed if crossed is None else mixed | crossed
        if spec.ffn is not None:
            y_BTD, aux = spec.ffn.module(ctx, "ffn")(self._norm(spec.norm, "ffn_norm", x_BTD), info)
            x_BTD = self._add("ffn", x_BTD, y_BTD)
            more = more.join(More(aux))
        return x_BTD, (mixed, more)

    def _parallel(self, ffn: FeedForward, x_BTD: jax.Array, state: dict | None, info: TokenInfo):
        spec = self.spec
        read_BTD = self._read(x_BTD)
        y_BTD, state, more = self._mix(read_BTD, state, info)
        if spec.parallel == "two norms":
            read_BTD = self._norm(spec.norm, "ffn_norm", x_BTD)
        z_BTD, aux = ffn.module(self._ctx(info), "ffn")(read_BTD, info)
        return self._add("mixer", x_BTD, y_BTD + z_BTD), (state, more.join(More(aux)))

    def _ctx(self, info: TokenInfo) -> Context:
        """What the parts are built with."""
        return dataclasses.replace(self.ctx, adapter=info.adapter)

    def _read(self, x_BTD: jax.Array) -> jax.Array:
        """What the mixer reads."""
        return self._norm(self.spec.norm if self.spec.norm_mixer else None, "mixer_norm", x_BTD)

    def _mix(self, read_BTD: jax.Array, state: dict | None, info: TokenInfo):
        y_BTD, state, *more = self.spec.mixer.module(self._ctx(info), "mixer")(read_BTD, info, state)
        return y_BTD, state, More().join(*more)

    def _norm(self, norm: Norm | None, name: str, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if norm is None else norm.module(self.ctx, name)(x_BTD)

    def _add(self, part: str, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        spec = self.spec
        y_BTD = self._norm(spec.post_norm, f"{part}_post_norm", y_BTD)
        x_BTD = x_BTD * spec.skip_scale + y_BTD * spec.residual_scale
        x_BTD = self._norm(spec.sum_norm, f"{part}_sum_norm", x_BTD)
        return constrain(x_BTD, self.ctx.rules, "batch", "length", "act_embed")


def _part(state: dict | None, *, cross: bool) -> dict | None:
    """Of a block's state, what its mixer or its cross attention has."""
    if state is None:
        return None
    return {key: value for key, value in state.items() if key.startswith("cross_") == cross}

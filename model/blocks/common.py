"""What every block module needs of the model around it, and how it declares a parameter."""

# B batch, T tokens, D model width

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from model.blocks.lora import LoRA
from model.blocks.param_box import Axes, ParamBox, input_axes_of, is_matrix, made_before
from model.sharding import ShardingRules
from model.weighted import WeightedSum
from model.weights import Weight, is_quantized


class Mixer(Protocol):
    """What mixes tokens with each other: attention, or a recurrence."""

    def module(self, ctx: Context, name: str) -> nn.Module:
        """Called with (x_BTD, info, cache or None); gives (y_BTD, cache), or (y_BTD, cache, `Report`)."""
        ...

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]: ...

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of `init_cache`: those of keys and values begin with "pages", "slots", those of a recurrent
        state with "rows"."""
        ...

    def flops_per_token(self, width: int, seq_len: int) -> float: ...


class FeedForward(Protocol):
    """What works on each token alone."""

    def module(self, ctx: Context, name: str) -> nn.Module:
        """Called with (x_BTD, info); gives (y_BTD, aux)."""
        ...

    def flops_per_token(self, width: int) -> float: ...


@dataclasses.dataclass(frozen=True)
class Context:
    """The model-wide settings that a block's module is built with."""

    width: int
    num_blocks: int
    dtype: jnp.dtype  # of the computation
    param_dtype: jnp.dtype  # of freshly made parameters
    rules: ShardingRules | None = None
    scan: bool = False  # equal neighbours among blocks in one scan
    remat: str = "none"
    train: bool = False  # routers with a capacity keep to it, by what comes later in a document; see `apply`
    adapters: LoRA | None = None  # beside the linear maps of blocks
    adapter: jax.Array | None = (
        None  # [B] int32: the one that each row has, -1 for none; None: all have the first
    )


@flax.struct.dataclass
class Carry:
    """What blocks leave for later blocks beside the residual stream; None where no block has left it yet.

    It is all that passes between blocks besides the stream and what `TokenInfo` holds for every block, so a pipeline
    may be cut between any two blocks.
    """

    shared_kv: dict[str, jax.Array] | None = None  # keys and values, or the pages that hold them, by name
    relative_bias: jax.Array | None = None  # [buckets, H], of `RelativeBias`
    first_values: jax.Array | None = None  # [B, T, H, C], the values of RWKV-7's first block

    def update(self, new: Carry) -> Carry:
        """With what `new` has."""
        pairs = {f.name: (getattr(self, f.name), getattr(new, f.name)) for f in dataclasses.fields(Carry)}
        return Carry(**{name: mine if theirs is None else theirs for name, (mine, theirs) in pairs.items()})


class Report(NamedTuple):
    """What a mixer gives beside its result and its state."""

    aux: dict[str, WeightedSum] = {}  # losses and metrics
    carry: Carry = Carry()  # for later blocks

    def join(self, *others: Report) -> Report:
        """With that of others; what several report is summed."""
        aux, carry = self
        for other in others:
            aux, carry = add_up(aux, other.aux), carry.update(other.carry)
        return Report(aux, carry)


def add_up(aux: dict[str, WeightedSum], more: dict[str, WeightedSum]) -> dict[str, WeightedSum]:
    """The union; what both have is summed."""
    return aux | {key: aux[key] + value if key in aux else value for key, value in more.items()}


@flax.struct.dataclass
class TokenInfo:
    """What every block must know of the tokens in front of it."""

    positions: jax.Array  # [B, T] int32
    segment_ids: jax.Array | None  # [B, T] int32, 0 is padding
    page_table: jax.Array | None = None  # [B, P] int32, set when there is a cache
    write_page: jax.Array | None = (
        None  # [B, T] int32 page of the cache that takes this token; out of range: none
    )
    write_slot: jax.Array | None = None  # [B, T] int32 slot within that page
    rows: jax.Array | None = None  # [B] int32 row of a recurrent mixer's state, set when there is a cache
    encoder: jax.Array | None = (
        None  # [B, S, D] what the encoder made of its tokens, where it has just read them
    )
    encoder_segment_ids: jax.Array | None = None  # [B, S] int32, 0 is padding
    carry: Carry = flax.struct.field(default_factory=Carry)  # from earlier blocks
    adapter: jax.Array | None = None  # [B] int32, see `Context`
    # [B] bool, where a block passed tokens over: rows that begin a document among them; None: position 0 says so
    begins: jax.Array | None = None
    weights: jax.Array | None = None  # [B, T] float32, of each token in what blocks add to the loss; None: 1
    # [B, S] bool, where a block passed tokens over: slots that hold one; None: all up to a token's own position
    slots_filled: jax.Array | None = None
    # [B] int32, tokens of the row in the cache before these, which go on from there one by one, with padding before and
    # after them alone; None: they may stand anywhere
    cached: jax.Array | None = None
    tokens: jax.Array | None = None  # [B, T] int32, for blocks that look up by token; None: patches of bytes
    rope_positions: jax.Array | None = None  # [B, T, A] int32, of several axes; None: `positions`
    prefix: jax.Array | None = None  # [B] or [B, T] int32, see `Inputs`
    spans: jax.Array | None = None  # [B, T] int32, see `Inputs`
    patch_vectors: jax.Array | None = None  # [B, P, N, D], for a local decoder's `PatchAttention`
    patch_read: jax.Array | None = None  # [B, T] int32, the patch that each byte reads

    @property
    def rotary_positions(self) -> jax.Array:
        """[B, T] or [B, T, A]: what rotary embeddings turn by."""
        return self.positions if self.rope_positions is None else self.rope_positions


NO_PAGE = 2**30  # of a token that is not written; beyond any number of pages


def write_places(
    page_table_BP: jax.Array, page_size: int, positions_BT: jax.Array, skipped_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(page, slot) of each position; no page for what is skipped and what is beyond a row's pages."""
    column_BT = jnp.minimum(positions_BT // page_size, page_table_BP.shape[1] - 1)
    page_BT = jnp.take_along_axis(page_table_BP, column_BT, axis=1)
    beyond_BT = positions_BT >= page_table_BP.shape[1] * page_size
    nowhere_BT = beyond_BT if skipped_BT is None else beyond_BT | skipped_BT
    return jnp.where(nowhere_BT, NO_PAGE, page_BT), positions_BT % page_size


def fan_in_normal(fan_in: int, scale: float = 1.0) -> Callable:
    """Normal with standard deviation scale / sqrt(fan_in), cut at two deviations."""
    return nn.initializers.truncated_normal(stddev=scale * fan_in**-0.5)


def in_float32(ctx: Context) -> Context:
    """The same, computing in float32: for what must not be rounded."""
    return dataclasses.replace(ctx, dtype=jnp.dtype("float32"))


def bias_param(
    module: nn.Module,
    ctx: Context,
    name: str,
    shape: tuple[int, ...],
    axes: Axes,
    init: Callable = nn.initializers.zeros,
    role: str | None = None,
) -> jax.Array:
    """Declare a bias, by default the one that `name` says ("q_bias"), which weight decay leaves alone."""
    role = f"bias of {name.removesuffix('_bias')}" if role is None else role
    return param(module, ctx, name, shape, axes, init, 0, role, decay=False)


def param(
    module: nn.Module,
    ctx: Context,
    name: str,
    shape: tuple[int, ...],
    axes: Axes,
    init: Callable,
    inputs: int | tuple[int, ...] = 0,
    role: str = "",
    decay: bool | None = None,
) -> jax.Array:
    """Declare a parameter and give it in the dtype of the computation.

    Args:
      axes: logical names.
      inputs: of a linear map, how many of its axes after those of experts and adapters are inputs, or which ones.
      role: what it does in the model, for readers of `python -m model describe`.
      decay: whether weight decay shrinks it; default: where it is a matrix or more.
    """
    box = functools.partial(
        ParamBox,
        names=axes,
        input_axes=input_axes_of(axes, inputs),
        role=role,
        decays=is_matrix(axes) if decay is None else decay,
    )
    return _declared(module, ctx, name, shape, init, box)


def weight_param(
    module: nn.Module,
    ctx: Context,
    name: str,
    shape: tuple[int, ...],
    axes: Axes,
    init: Callable,
    inputs: int | tuple[int, ...] = 1,
    role: str = "",
) -> Weight:
    """As `param`, of a linear map: give it to `model.weights.matmul`, since it may be quantized."""
    if module.has_variable("params", name):
        found = module.get_variable("params", name)
        if is_quantized(found):
            if found.shape != shape:
                path = "/".join((*module.path, name))
                raise ValueError(
                    f"{path} is quantized with the shape {found.shape}; the config says {shape}."
                )
            return found
    places = input_axes_of(axes, inputs)
    box = functools.partial(
        ParamBox, names=axes, input_axes=places, role=role, decays=is_matrix(axes), is_weight=True
    )
    return _declared(module, ctx, name, shape, init, box)


def _declared(
    module: nn.Module,
    ctx: Context,
    name: str,
    shape: tuple[int, ...],
    init: Callable,
    box: Callable[..., ParamBox],
) -> jax.Array:
    boxed = lambda key, *args: box(init(key, *args), order=made_before(module))
    return jnp.asarray(module.param(name, boxed, shape, ctx.param_dtype), ctx.dtype)

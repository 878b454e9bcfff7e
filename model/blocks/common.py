"""What all blocks share: the protocols of mixers and networks, the context, token information, and `param`."""

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
    """A part that mixes tokens: attention or a recurrence."""

    def module(self, ctx: Context, name: str) -> nn.Module:
        """A module that maps (x_BTD, info, cache or None) to (y_BTD, cache) or (y_BTD, cache, `Report`)."""
        ...

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]: ...

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of `init_cache`. Keys and values start with "pages", "slots"; recurrent states with "rows"."""
        ...

    def flops_per_token(self, width: int, seq_len: int) -> float: ...


class FeedForward(Protocol):
    """A part that maps each token by itself."""

    def module(self, ctx: Context, name: str) -> nn.Module:
        """A module that maps (x_BTD, info) to (y_BTD, aux)."""
        ...

    def flops_per_token(self, width: int) -> float: ...


@dataclasses.dataclass(frozen=True)
class Context:
    """The model-wide settings of a block's module."""

    width: int
    num_blocks: int
    dtype: jnp.dtype  # of activations
    param_dtype: jnp.dtype  # of new parameters
    rules: ShardingRules | None = None
    scan: bool = False  # one lax.scan over equal neighbouring blocks
    remat: str = "none"
    train: bool = False  # routers apply their capacity, which depends on later tokens; see `apply`
    adapters: LoRA | None = None  # low-rank adapters of the blocks' linear maps
    adapter: jax.Array | None = None  # [B] int32: each row's adapter, -1 for none; None: the first for all


@flax.struct.dataclass
class Carry:
    """What blocks pass to later blocks beside the residual stream; None: no block has set it yet.

    Blocks share nothing else but the stream and the `TokenInfo` of all blocks, so a pipeline may be cut between any two
    blocks.
    """

    shared_kv: dict[str, jax.Array] | None = None  # keys and values by name, or their pages
    relative_bias: jax.Array | None = None  # [buckets, H], the table of `RelativeBias`
    first_values: jax.Array | None = None  # [B, T, H, C], the values of RWKV-7's first block

    def update(self, new: Carry) -> Carry:
        """This carry, with the fields that `new` sets."""
        pairs = {f.name: (getattr(self, f.name), getattr(new, f.name)) for f in dataclasses.fields(Carry)}
        return Carry(**{name: mine if theirs is None else theirs for name, (mine, theirs) in pairs.items()})


class Report(NamedTuple):
    """What a mixer returns beside its output and its cache."""

    aux: dict[str, WeightedSum] = {}  # losses and metrics
    carry: Carry = Carry()  # for later blocks

    def join(self, *others: Report) -> Report:
        """The union with other reports; entries of the same name are summed."""
        aux, carry = self
        for other in others:
            aux, carry = add_up(aux, other.aux), carry.update(other.carry)
        return Report(aux, carry)


def add_up(aux: dict[str, WeightedSum], more: dict[str, WeightedSum]) -> dict[str, WeightedSum]:
    """The union; entries of the same name are summed."""
    return aux | {key: aux[key] + value if key in aux else value for key, value in more.items()}


@flax.struct.dataclass
class TokenInfo:
    """What every block knows of its tokens."""

    positions: jax.Array  # [B, T] int32
    segment_ids: jax.Array | None  # [B, T] int32, 0 is padding
    page_table: jax.Array | None = None  # [B, P] int32, set when there is a cache
    # [B, T] int32, the cache page of each token; out of range: not written
    write_page: jax.Array | None = None
    write_slot: jax.Array | None = None  # [B, T] int32, the slot within that page
    rows: jax.Array | None = None  # [B] int32, the row of a recurrent state; set when there is a cache
    encoder: jax.Array | None = None  # [B, S, D], the encoder's output, in the call that runs the encoder
    encoder_segment_ids: jax.Array | None = None  # [B, S] int32, 0 is padding
    carry: Carry = flax.struct.field(default_factory=Carry)  # from earlier blocks
    adapter: jax.Array | None = None  # [B] int32, see `Context`
    # [B] bool, rows that begin a document, for blocks that skip tokens; None: rows with position 0
    begins: jax.Array | None = None
    weights: jax.Array | None = None  # [B, T] float32, each token's weight in the losses of blocks; None: 1
    # [B, S] bool, slots that hold a token, for blocks that skip tokens; None: all up to a token's position
    slots_filled: jax.Array | None = None
    # [B] int32, tokens of the row that the cache already holds, when the new tokens directly follow them and have
    # padding only before and after; None: the new tokens may have any positions
    cached: jax.Array | None = None
    # [B, T] int32, for blocks that read token ids; None in blocks over patches
    tokens: jax.Array | None = None
    rope_positions: jax.Array | None = None  # [B, T, A] int32, positions of A axes; None: `positions`
    prefix: jax.Array | None = None  # [B] or [B, T] int32, see `Inputs`
    spans: jax.Array | None = None  # [B, T] int32, see `Inputs`
    patch_vectors: jax.Array | None = None  # [B, P, N, D], for a local decoder's `PatchAttention`
    patch_read: jax.Array | None = None  # [B, T] int32, the patch that each byte attends to

    @property
    def rotary_positions(self) -> jax.Array:
        """[B, T] or [B, T, A]: the positions for rotary embeddings."""
        return self.positions if self.rope_positions is None else self.rope_positions


NO_PAGE = 2**30  # page of a token that is not written; larger than any number of pages


def write_places(
    page_table_BP: jax.Array, page_size: int, positions_BT: jax.Array, skipped_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(page, slot) of each position; `NO_PAGE` for skipped tokens and for positions beyond a row's pages."""
    column_BT = jnp.minimum(positions_BT // page_size, page_table_BP.shape[1] - 1)
    page_BT = jnp.take_along_axis(page_table_BP, column_BT, axis=1)
    beyond_BT = positions_BT >= page_table_BP.shape[1] * page_size
    nowhere_BT = beyond_BT if skipped_BT is None else beyond_BT | skipped_BT
    return jnp.where(nowhere_BT, NO_PAGE, page_BT), positions_BT % page_size


def fan_in_normal(fan_in: int, scale: float = 1.0) -> Callable:
    """Normal with standard deviation scale / sqrt(fan_in), truncated at two deviations."""
    return nn.initializers.truncated_normal(stddev=scale * fan_in**-0.5)


def in_float32(ctx: Context) -> Context:
    """The same context with float32 activations."""
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
    """Declare a bias such as "q_bias"; it has no weight decay."""
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
    """Declare a parameter and return it in `ctx.dtype`.

    Args:
      axes: logical names.
      inputs: for a linear map, the number of input axes after those of experts and adapters, or their indices.
      role: what it does in the model, as `python -m model describe` shows it.
      decay: whether weight decay applies; default: to matrices and larger arrays.
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
    """As `param`, for the weight of a linear map. It may be quantized, so multiply with `model.weights.matmul`."""
    if (found := quantized_param(module, name, shape)) is not None:
        return found
    places = input_axes_of(axes, inputs)
    box = functools.partial(
        ParamBox, names=axes, input_axes=places, role=role, decays=is_matrix(axes), is_weight=True
    )
    return _declared(module, ctx, name, shape, init, box)


def quantized_param(module: nn.Module, name: str, shape: tuple[int, ...]) -> Weight | None:
    """The parameter `name` if it is quantized, else None."""
    if not module.has_variable("params", name) or not is_quantized(
        found := module.get_variable("params", name)
    ):
        return None
    if found.shape != shape:
        path = "/".join((*module.path, name))
        raise ValueError(f"{path} is quantized with the shape {found.shape}; the config says {shape}.")
    return found


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

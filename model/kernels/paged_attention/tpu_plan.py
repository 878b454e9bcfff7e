"""The static plan of paged attention: which tokens are computed at once, and what the kernel reads for them.

Tokens are cut into work items of up to Q tokens of one row. A work item reads its row in blocks of pages, from the
first that some of its tokens see to the last. Old tokens come from the row's pages. New ones come from `fresh`, cut as
the slots of pages are, in groups that are written as a whole. So no work item waits for what another writes. Of a work
item of few tokens, as of a row that decodes beside prompts, only a small tile of rows is computed.
"""

# R rows, T tokens, P pages a row, N pages, Z slots a page, W slots of a group, U groups, I work items, Q tokens of one
# H query heads, K key/value heads, G = H // K, X channels of a slot

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.kernels.attention import Mask
from model.kernels.paged_attention.pages import SCALE
from model.kernels.paged_attention.rows import Rows

LANES = 128
SUBLANES = 8  # of 32 bits


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How much of a chip's fast memory a kernel takes for blocks of pages, and how many cores share its work items."""

    block_bytes: int = 2**21  # keys and values of one block; there are two, and as much again for new tokens
    cores: int = 1


# A copy of 1 MiB takes longer than its start on every chip (0.4 us of v5p's 2.8 TB/s). Two such blocks with
# their queries and what the compiler keeps beside them fit the 16 MiB of a kernel on v4, v5e and
# v5p, where two of 2 MiB do not; v6e and tpu7x give it more. On v4 and v5p one device is two cores.
BLOCK_SIZES = {
    "v4": BlockSizes(2**20, cores=2),
    "v5e": BlockSizes(2**20),
    "v5p": BlockSizes(2**20, cores=2),
    "v6e": BlockSizes(2**21),
    "tpu7x": BlockSizes(2**21),
}
MAX_BLOCK = 1024  # slots
MAX_SCORES = 2**17  # of one matrix of queries and one block: 512 KiB in float32, several times over
MAX_ROWS = 512  # of a matrix of queries
MAX_OUTPUTS = 2**18  # numbers in a work item's outputs: 1 MiB in float32
MAX_TABLE = 2**17  # entries of the page table, which is in a core's scalar memory, at most 1 MiB


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of pages. Its slots are rows of a matrix; those of scales [K, Z] are columns."""

    name: str
    width: int  # X, or K of scales
    group: int  # slots that are written as a whole
    scales: bool

    def shape(self, slots: int) -> tuple[int, int]:
        return (self.width, slots) if self.scales else (slots, self.width)


@dataclasses.dataclass(frozen=True)
class PagedCall:
    """The static arguments of one paged attention."""

    keys: tuple[str, ...]  # parts whose channels, side by side, are a key
    values: str
    parts: tuple[Part, ...]
    num_pages: int
    page_size: int
    pages_a_row: int
    block_pages: int  # pages of a block
    heads: int  # K
    group: int  # query heads of one key/value head
    together: int  # key/value heads that one matrix of queries looks at, each query at its own only
    tokens: int  # of a work item, a power of two
    max_new: int | None  # new tokens of a row at most; None: nothing is written
    mask: Mask
    scale: float
    softcap: float | None
    cores: int
    interpret: bool

    @property
    def block(self) -> int:
        return self.block_pages * self.page_size

    @property
    def matrix_heads(self) -> int:
        """Query heads of one matrix of queries: its rows of one token."""
        return self.together * self.group

    @property
    def rows(self) -> int:
        """M, of a matrix of queries: token by token, and of a token head by head."""
        return self.matrix_heads * self.tokens

    @property
    def small_tile(self) -> int:
        """Tokens whose rows fit one vector. Of a work item with no more tokens only those rows are computed."""
        return min(self.tokens, max(1, 2 * SUBLANES // self.matrix_heads))

    @property
    def matrices(self) -> int:
        """J, of a work item."""
        return self.heads // self.together

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def width_of(self, name: str) -> int:
        """Channels of one head."""
        return self.part(name).width // self.heads

    def fresh_groups(self, part: Part) -> int:
        """At most so many groups of a block are new."""
        return min(self.block // part.group, groups_of(self.max_new or 1, part.group))

    def fresh_shape(self, part: Part) -> tuple[int, int]:
        """Of a group of new slots; where a row has but one, of this one."""
        return (1, part.width) if self.max_new == 1 else part.shape(part.group)


def groups_of(tokens: int, group: int) -> int:
    """At most so many groups do consecutive slots touch."""
    return (tokens + group - 2) // group + 1


def tokens_together(H: int, K: int, C: int, E: int, longest: int, chunk: int | None) -> tuple[int, int]:
    """(tokens of a work item, key/value heads that one matrix of queries looks at).

    Few tokens: all heads at once, since time goes into reading and multiplying by zeros costs nothing beside it. Many
    tokens: so many heads as fill a vector.
    """
    longest = _power(longest) if chunk is None else min(_power(longest), _power(chunk + 1) // 2)
    if longest * H <= MAX_ROWS // 2 or longest == 1:
        return longest, K
    together = next((n for n in range(1, K) if K % n == 0 and n * C % LANES == 0 and n * E % LANES == 0), K)
    most = min(MAX_ROWS // (together * (H // K)), MAX_OUTPUTS // (H * together * E))
    return max(1, min(longest, _power(most + 1) // 2)), together


def _power(n: int) -> int:
    """The power of two at or above it."""
    return 1 << (n - 1).bit_length()


def parts_of(cache: dict[str, jax.Array], names: tuple[str, ...], interpret: bool) -> tuple[Part, ...]:
    """The arrays of pages of these names and their scales."""
    page_size = cache[names[0]].shape[1]
    group = max(SUBLANES * 4 // cache[name].dtype.itemsize for name in names)
    if page_size % group:
        if not interpret:
            raise ValueError(
                f"pages of {page_size} slots of {cache[names[0]].dtype.name} can't be written in the {group} slots "
                f"that a TPU moves at once. Give a page_size that is a multiple of {group}."
            )
        group = page_size
    parts = []
    for name in names:
        parts.append(Part(name, cache[name].shape[2], group, False))
        if name + SCALE in cache:
            if page_size % LANES and not interpret:
                raise ValueError(
                    f"pages of {page_size} slots: the scales of quantised pages fill a TPU's vectors of {LANES} lanes "
                    f"slot by slot. Give a page_size that is a multiple of {LANES}."
                )
            parts.append(Part(name + SCALE, cache[name + SCALE].shape[1], page_size, True))
    return tuple(parts)


def block_pages(
    parts: tuple[Part, ...],
    cache: dict[str, jax.Array],
    page_size: int,
    pages_a_row: int,
    rows: int,
    sizes: BlockSizes,
) -> int:
    """Pages of a block, for matrices of so many rows of queries; no more than a row has."""
    bytes_a_slot = sum(part.width * cache[part.name].dtype.itemsize for part in parts)
    slots = min(MAX_BLOCK, sizes.block_bytes // bytes_a_slot, MAX_SCORES // rows)
    pages = max(1, min(slots // page_size, pages_a_row))
    # whole vectors of slots: so long are the rows of scores
    aligned = max(1, LANES // page_size)
    return -(-pages // aligned) * aligned


class Scalars(NamedTuple):
    """What the kernel knows of its work items and rows, int32."""

    num_work_items: jax.Array  # [1]
    work_item_row: jax.Array  # [I]
    work_item_token: jax.Array  # [I] the first token, among all
    work_item_first: jax.Array  # [I] its position
    work_item_count: jax.Array  # [I] tokens
    row_start: jax.Array  # [R] position of the first new token; what is before it is in pages
    row_group: jax.Array  # [R] where the row's groups begin among `fresh`
    row_page: jax.Array  # [R] where its pages begin among fresh scales
    table: jax.Array  # [R * P]


def work_items(call: PagedCall, rows: Rows, T: int, longest: int) -> Scalars:
    """Without groups and table."""
    Q, R = call.tokens, len(rows.count_R)
    I = min(T, T // Q + R, R * -(-longest // Q))
    I += -I % call.cores
    ends_R = jnp.cumsum(-(-rows.count_R // Q))
    work_item_I = jnp.arange(I, dtype=jnp.int32)
    row_I = jnp.minimum(jnp.searchsorted(ends_R, work_item_I, side="right"), R - 1).astype(jnp.int32)
    begins_R = ends_R - -(-rows.count_R // Q)
    done_I = (work_item_I - begins_R[row_I]) * Q
    count_I = jnp.clip(rows.count_R[row_I] - done_I, 0, Q)
    zeros_R = jnp.zeros((R,), jnp.int32)
    scalars = (
        ends_R[-1:],
        row_I,
        rows.first_R[row_I] + done_I,
        rows.start_R[row_I] + done_I,
        count_I,
        rows.start_R,
        zeros_R,
        zeros_R,
        zeros_R,
    )
    return Scalars(*(x.astype(jnp.int32) for x in scalars))


def groups(rows: Rows, T: int, longest: int, group: int) -> tuple[jax.Array, jax.Array | None]:
    """(where each row's groups begin [R], the token of each slot of each group [U, W], any for slots that have none).
    None: a row has at most one new token, which is its group."""
    if longest == 1:
        return rows.first_R.astype(jnp.int32), None
    R = len(rows.count_R)
    U = max(1, min(T, T // group + 2 * R, R * groups_of(longest, group)))
    first_R = rows.start_R // group
    count_R = jnp.where(rows.count_R > 0, (rows.start_R + rows.count_R - 1) // group - first_R + 1, 0)
    ends_R = jnp.cumsum(count_R)
    group_U = jnp.arange(U)
    row_U = jnp.minimum(jnp.searchsorted(ends_R, group_U, side="right"), R - 1)
    begins_R = ends_R - count_R
    position_UW = ((first_R[row_U] + group_U - begins_R[row_U]) * group)[:, None] + jnp.arange(group)
    since_UW = position_UW - rows.start_R[row_U][:, None]
    token_UW = jnp.clip(rows.first_R[row_U][:, None] + since_UW, 0, T - 1)
    return begins_R.astype(jnp.int32), token_UW


def fresh_of(part: Part, new_TX: jax.Array, token_UW: jax.Array | None) -> jax.Array:
    """New tokens as groups of slots, see `PagedCall.fresh_shape`."""
    if token_UW is None:
        return new_TX[:, None]
    fresh_UWX = new_TX[token_UW]
    return fresh_UWX.swapaxes(1, 2) if part.scales else fresh_UWX


@functools.cache
def head_of_rows(together: int, group: int, tokens: int) -> np.ndarray:
    """[M, n] 1 where a row of the matrix of queries looks at this head."""
    of_token = np.repeat(np.eye(together, dtype=np.float32), group, axis=0)
    return np.tile(of_token, (tokens, 1))


@functools.cache
def spread(together: int, width: int) -> np.ndarray:
    """[C, n * C]: identities side by side."""
    return np.tile(np.eye(width, dtype=np.float32), (1, together))

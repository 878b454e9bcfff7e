"""Attention of new tokens to rows in pages, and the write of those tokens: the form in plain jnp, and which one runs.

Kwon et al. 2023, arXiv:2309.06180; flat tokens of rows of any length, as in "ragged paged attention" of vLLM's TPU back
end. Pages are those of model.kernels.paged_attention.pages. There is no gradient: what is trained has no cache.
"""

# T tokens of all rows, R rows, H query heads, K key/value heads, C channels of a key, E channels of a value
# N pages, Z slots a page, P pages a row, S = P * Z slots a row

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.kernels import backend
from model.kernels.attention.reference import Scores, Sight, attention
from model.kernels.paged_attention import pages
from model.kernels.paged_attention.third_party import ragged, ragged_refusal
from model.kernels.paged_attention.tpu_plan import Rows, row_of_token


@dataclasses.dataclass(frozen=True)
class Kept:
    """What pages hold: the names of arrays whose channels, side by side, are a key, and of the values."""

    heads: int  # key/value heads
    keys: tuple[str, ...] = ("k",)
    values: str = "v"  # may be one of the keys

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.keys, self.values)))

    def key_of(self, parts: dict[str, jax.Array]) -> jax.Array:
        """The parts of a key as one."""
        first, *more = (parts[name] for name in self.keys)
        return jnp.concatenate([first, *more], -1) if more else first


def paged_attention(
    q_THC: jax.Array,
    new: dict[str, jax.Array] | None,
    cache: dict[str, jax.Array],
    page_table_RP: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    kept: Kept,
    sight: Sight = Sight(),
    scores: Scores = Scores(),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Write new tokens into pages and attend to them and to all before them in their rows.

    Args:
      new: what `kept` names, of these tokens, [T, K, C] each (one head: [T, C]); None: the pages hold them already.
      cache: pages [N, Z, K * C] and scales; given back with the new tokens, in the same memory where it is donated.
      page_table_RP: int32; entries past a row's length may be anything.
      cu_q_lens: [R + 1] int32; row r's are the tokens cu_q_lens[r] to cu_q_lens[r + 1], none where both are equal.
      kv_lens: [R] int32, tokens of each row with the new ones, which are its last.

    Returns:
      ([T, H, E] in the dtype of `q`, zero for tokens of no row; cache).
    """
    count_R = cu_q_lens[1:] - cu_q_lens[:-1]
    rows = Rows(cu_q_lens[:-1], count_R, kv_lens - count_R)
    return _no_gradient(kept, sight, dataclasses.replace(scores, sinks_H=None), q_THC.shape[0])(
        q_THC, new, cache, page_table_RP, rows, scores.sinks_H
    )


def attend_in_rows(
    q_BTHC: jax.Array,
    new: dict[str, jax.Array] | None,
    cache: dict[str, jax.Array],
    page_table_BP: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    kept: Kept,
    sight: Sight = Sight(),
    scores: Scores = Scores(),
    first_B: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`paged_attention` of rows of T places, `count_B` of which, from `first_B` on (None: 0), are tokens, at positions
    from `start_B` on."""
    B, T = q_BTHC.shape[:2]
    begins_B = jnp.arange(B, dtype=jnp.int32) * T
    rows = Rows(begins_B if first_B is None else begins_B + first_B, count_B, start_B)
    flat = lambda x: x.reshape(B * T, *x.shape[2:])
    found_THE, cache = _no_gradient(kept, sight, dataclasses.replace(scores, sinks_H=None), T)(
        flat(q_BTHC), jax.tree.map(flat, new), cache, page_table_BP, rows, scores.sinks_H
    )
    return found_THE.reshape(B, T, *found_THE.shape[1:]), cache


def _no_gradient(kept: Kept, sight: Sight, scores: Scores, longest: int):
    """The form that runs; to ask for its derivative is an error."""

    @jax.custom_jvp
    def run(q_THC, new, cache, page_table_RP, rows, sinks_H):
        of_scores = dataclasses.replace(scores, sinks_H=sinks_H)
        new = None if new is None else pages.as_stored(cache, {k: x[None] for k, x in new.items()})
        new = None if new is None else {name: x[0] for name, x in new.items()}
        inputs = q_THC, new, cache, page_table_RP, rows, kept, sight, of_scores
        form, chosen = form_for(q_THC, cache, kept, sight, of_scores), backend.current()
        if form == "kernel":
            from model.kernels.paged_attention.tpu import by_kernel  # here, since Pallas takes long to import

            return by_kernel(*inputs, longest, chosen)
        return in_plain(*inputs) if form == "plain" else _by_ragged(*inputs)

    @run.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(
            "paged attention has no gradient: a cache serves, it does not train. Call apply without a cache, on whole "
            "texts, for what is to be differentiated."
        )

    return run


def form_for(q_THC: jax.Array, cache: dict[str, jax.Array], kept: Kept, sight: Sight, scores: Scores) -> str:
    """The form of `FORMS` that the config or the platform chooses; ValueError where it can't serve this."""
    named, chosen = backend.kernels().paged, backend.current()
    if named == "auto":
        return "kernel" if chosen.name == "tpu" else "plain"
    reasons = {form: f"kernels here are for {chosen.name}" for form in FORMS if form != "plain"}
    if chosen.name == "tpu":
        refusal = "JAX can't interpret it" if chosen.interpret else None
        reasons = {"ragged": ragged_refusal(q_THC, cache, kept.names, sight, scores) or refusal}
    can = [form for form in FORMS if reasons.get(form) is None]
    if named not in FORMS:
        raise ValueError(f"kernels.paged={named!r} is not one of auto, {', '.join(FORMS)}.")
    if named not in can:
        raise ValueError(
            f"kernels.paged={named!r} can't serve this: {reasons[named]}. These can: {', '.join(can)}."
        )
    return named


FORMS = ("plain", "kernel", "ragged")  # gathered rows; ours; JAX's, which copies all pages


def _by_ragged(
    q_THC, stored, cache, page_table_RP, rows, kept, sight, scores
) -> tuple[jax.Array, dict[str, jax.Array]]:
    at = _places(rows, q_THC.shape[0])
    if stored is not None:
        cache = _write(stored, cache, page_table_RP, at)
    found_THE = ragged(q_THC, cache, page_table_RP, rows, kept.heads, sight, scores)
    return jnp.where(at.real_T[:, None, None], found_THE, 0), cache


def in_plain(
    q_THC: jax.Array,
    stored: dict[str, jax.Array] | None,
    cache: dict[str, jax.Array],
    page_table_RP: jax.Array,
    rows: Rows,
    kept: Kept,
    sight: Sight,
    scores: Scores,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The whole of each token's row is gathered. `stored`: see `pages.as_stored`."""
    at = _places(rows, q_THC.shape[0])
    if stored is not None:
        cache = _write(stored, cache, page_table_RP, at)
    read = functools.partial(
        pages.read, cache, page_table_BP=page_table_RP, heads=kept.heads, dtype=q_THC.dtype
    )
    parts = {name: read(name) for name in kept.names}
    k_RSKC = kept.key_of(parts)
    mask_TS = sight.sees(at.position_T[:, None], jnp.arange(k_RSKC.shape[1])) & at.real_T[:, None]
    of_tokens = k_RSKC[at.row_T], parts[kept.values][at.row_T]
    found = attention(q_THC[:, None], *of_tokens, mask_TS[:, None], scores)
    return jnp.where(at.real_T[:, None, None], found[:, 0], 0), cache


class _Places(NamedTuple):
    """Of each token."""

    row_T: jax.Array
    position_T: jax.Array
    real_T: jax.Array  # whether it is of a row


def _places(rows: Rows, T: int) -> _Places:
    row_T = row_of_token(rows, T)
    since_T = jnp.arange(T) - rows.first_R[row_T]
    return _Places(row_T, rows.start_R[row_T] + since_T, (since_T >= 0) & (since_T < rows.count_R[row_T]))


def _write(stored, cache, page_table_RP, at: _Places) -> dict[str, jax.Array]:
    Z, P = (
        next(x.shape[1] for name, x in cache.items() if not name.endswith(pages.SCALE)),
        page_table_RP.shape[1],
    )
    page_T = page_table_RP[at.row_T, jnp.clip(at.position_T // Z, 0, P - 1)]
    page_T = jnp.where(at.real_T & (at.position_T < P * Z), page_T, 2**30)
    slot_T, written = at.position_T % Z, {}
    for name, x in stored.items():
        there = (page_T, slice(None), slot_T) if name.endswith(pages.SCALE) else (page_T, slot_T)
        written[name] = cache[name].at[there].set(x, mode="drop")
    return cache | written

"""The kernels at sizes of real models: what each computes, what that costs at least, and what stands beside it.

Costs are closed forms of the mathematics: pairs of tokens that see each other, not blocks that a kernel visits; the
linear recurrence token by token, not its chunks; a backward pass twice the forward, without what is computed again.
"""

# B rows, T tokens, H query heads, K key/value heads, C width of a key, E width of a value; M rows, I inputs, O outputs

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import model
from model.function import param_shapes
from model.kernels import backend, delta_rule, ssd
from model.kernels.attention import Mask, Scores, self_attention
from model.kernels.cross_entropy import cross_entropy
from model.kernels.cross_entropy import from_all_logits as all_logits
from model.kernels.grouped_matmul import grouped_matmul
from model.kernels.paged_attention import KVLayout, attend_in_rows, paged_attention
from model.kernels.quantized_matmul import quantized_matmul
from model.kernels.quantized_matmul.formats import quantize
from model.kernels.quantized_matmul.reference import widened_whole
from train.optimizers import AdamW, make_optimizer
from train.schedules import Cosine

T = 8192  # tokens of a row where a model is trained


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to compute a case: run(differentiated, rest), both tuples, whose shapes these are."""

    run: Callable[[tuple, tuple], Any]
    floats: tuple  # what has gradients
    rest: tuple = ()
    donated: tuple[int, ...] = ()  # 0: floats, 1: rest; what comes in is what goes out


@dataclasses.dataclass(frozen=True)
class Case:
    shape: str  # in words
    flops: float  # forward
    forms: dict[str, Form]  # ours first
    bytes: float | None = None  # None: all that comes in and goes out, once
    backward: bool = True  # whether there is one


def shaped(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


ints = functools.partial(shaped, dtype=jnp.int32)
numbers = functools.partial(shaped, dtype=jnp.float32)


def preferring(**kernels: str) -> Callable:
    """A decorator: with these forms of the kernels, by name."""

    def decorate(run):
        def chosen(floats, rest):
            with backend.prefer(backend.Kernels(**kernels)):
                return run(floats, rest)

        return chosen

    return decorate


def plainly(run: Callable) -> Callable:
    """With what is plain jnp, left to the compiler."""

    def plain(floats, rest):
        with backend.use("plain"):
            return run(floats, rest)

    return plain


def pairs(tokens: int, window: int | None = None, before: int = 0) -> int:
    """(query, key) pairs of one row's last tokens that see each other; `before` of the row are not queries."""
    if window is None or window >= tokens + before:
        return tokens * before + tokens * (tokens + 1) // 2
    return sum(min(before + t + 1, window) for t in range(tokens))


def attention_flops(seen: int, H: int, C: int, E: int) -> float:
    """Of scores and of weighted values."""
    return 2.0 * seen * H * (C + E)


def flash_case(
    name: str, H: int, K: int, C: int, E: int, mask: Mask = Mask(), softcap=None, sinks: bool = False
) -> Case:
    """One row, packed: its ids are given, and counted as one document."""
    floats = shaped(1, T, H, C), shaped(1, T, K, C), shaped(1, T, K, E), *([numbers(H)] if sinks else [])

    def run(floats, rest):
        q, k, v, *sinks_H = floats
        scores = Scores(softcap=softcap, sinks_H=sinks_H[0] if sinks_H else None)
        return self_attention(q, k, v, *rest, mask, scores)

    rest, flops = (ints(1, T), ints(1, T)), attention_flops(pairs(T, mask.window), H, C, E)
    return Case(
        f"{name}: {T} tokens, {H}/{K} heads of {C if C == E else f'{C}/{E}'}",
        flops,
        {"ours": Form(run, floats, rest), "splash": Form(preferring(attention="splash")(run), floats, rest)},
    )


def flash() -> list[Case]:
    return [
        flash_case("Llama 8B", 32, 8, 128, 128),
        flash_case("Gemma 2, window 4096, soft-cap", 32, 16, 128, 128, Mask(window=4096), 50.0),
        flash_case("gpt-oss, window 128, sinks", 64, 8, 64, 64, Mask(window=128), sinks=True),
        flash_case("DeepSeek-V3, latent", 128, 128, 192, 128),
    ]


def grouped_case(name: str, E: int, I: int, O: int, M: int) -> Case:
    def run(floats, rest):
        return grouped_matmul(*floats, *rest)

    floats, rest = (shaped(M, I), shaped(E, I, O)), (ints(E),)
    by = lambda form: Form(preferring(grouped=form)(run), floats, rest)
    forms = {"ours": Form(run, floats, rest), "megablox": by("megablox"), "ragged_dot": by("ragged_dot")}
    return Case(f"{name}: {M} rows, {E} x {I} x {O}", 2.0 * M * I * O, forms)


def grouped() -> list[Case]:
    return [
        grouped_case("Mixtral", 8, 4096, 14336, 16384),
        grouped_case("DeepSeek-V3", 256, 7168, 2048, 65536),
    ]


def vocabulary() -> list[Case]:
    N, D, V = T, 4096, 128256
    floats, rest = (shaped(N, D), shaped(V, D)), (ints(N),)
    by = lambda score: Form(lambda floats, rest: score(*floats, *rest), floats, rest)
    tiles = by(cross_entropy)
    plain = dataclasses.replace(tiles, run=plainly(tiles.run))
    forms = {"ours": tiles, "XLA in stripes": plain, "XLA with all logits": by(all_logits)}
    return [Case(f"Llama 8B: {N} tokens x {D} x {V}", 2.0 * N * D * V, forms)]


HEADS = KVLayout(8)  # of Llama 8B: 32 query heads, keys and values of 128
THEIR_BLOCK = 1024, 32  # tokens in pages and queries of a step: what JAX's table has for these heads


def paged_case(name: str, rows: list[tuple[int, int]], page: int, flat: bool) -> Case:
    """`rows`: (new tokens, tokens in all). The pages hold as many tokens as there are."""
    R, new = len(rows), sum(count for count, _ in rows)
    P = -(-max(length for _, length in rows) // page)
    fresh = {"k": shaped(new, 8, 128), "v": shaped(new, 8, 128)}
    cache = {"k": shaped(R * P + 1, page, 1024), "v": shaped(R * P + 1, page, 1024)}
    both = shaped(R * P + 1, page, 16, 128)
    q, table, offsets, lengths = shaped(new, 32, 128), ints(R, P), ints(R + 1), ints(R)

    def ours(floats, rest):
        q, fresh, table, offsets, lengths = floats
        if flat:
            return paged_attention(q, fresh, *rest, table, offsets, lengths, HEADS)
        in_rows = functools.partial(jax.tree.map, lambda x: x[:, None])
        return attend_in_rows(
            in_rows(q), in_rows(fresh), *rest, table, lengths - 1, jnp.ones_like(lengths), HEADS
        )

    floats = q, fresh, table, offsets, lengths
    forms = {
        "ours": Form(ours, floats, (cache,), (1,)),
        "JAX's, written before": Form(_ragged_paged, floats, (both,), (1,)),
    }
    kept, token = sum(length for _, length in rows), 2 * 8 * 128 * 2  # bytes of a token
    moved = (kept + new) * token + 2 * new * 32 * 128 * 2 + 4 * (R * P + 2 * R + 1)
    seen = sum(pairs(count, before=length - count) for count, length in rows)
    return Case(
        f"{name}, pages of {page}", attention_flops(seen, 32, 128, 128), forms, float(moved), backward=False
    )


def _ragged_paged(floats, rest):
    """Its kernel only reads: new tokens are scattered into the pages first."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import ragged_paged_attention

    (q, fresh, table, offsets, lengths), (both,) = floats, rest
    page, (kept, queries) = both.shape[1], THEIR_BLOCK
    tokens = jnp.arange(len(q))
    row = jnp.searchsorted(offsets, tokens, side="right") - 1
    position = lengths[row] - offsets[row + 1] + tokens
    beside = jnp.stack([fresh["k"], fresh["v"]], axis=2).reshape(len(q), *both.shape[2:])
    both = both.at[table[row, position // page], position % page].set(beside)
    many = jnp.asarray([len(lengths)], jnp.int32)
    out = ragged_paged_attention(
        *(q, both, lengths, table, offsets, many),
        sm_scale=128**-0.5,
        num_kv_pages_per_block=min(kept // page, table.shape[1]),
        num_queries_per_block=queries,
        vmem_limit_bytes=32 << 20,
    )
    return out, both


def paged() -> list[Case]:
    mixed = [(1, 1024)] * 60 + [(241, 1024)] * 4
    return [
        paged_case("Llama 8B decode: 256 rows of 2048", [(1, 2048)] * 256, 128, flat=False),
        *(
            paged_case("Llama 8B: 60 rows' 1 and 4 rows' 241 of 1024", mixed, page, True)
            for page in (16, 128)
        ),
    ]


def quantized_case(kind: str) -> Case:
    M, I, O = 64, 4096, 14336
    w = jax.eval_shape(lambda w: quantize(w, kind), numbers(I, O))  # type: ignore[arg-type]
    by = lambda product: Form(lambda floats, rest: product(*floats, *rest), (shaped(M, I),), (w,))
    forms = {"ours": by(quantized_matmul), "XLA": by(widened_whole)}
    return Case(f"{kind}: {M} x {I} x {O}", 2.0 * M * I * O, forms, backward=False)


def quantized() -> list[Case]:
    return [quantized_case(kind) for kind in ("int8", "int4", "mxfp4")]


def state_space() -> list[Case]:
    H, P, N = 64, 64, 128
    keys = shaped(1, T, 1, N)
    floats = shaped(1, T, H, P), numbers(1, T, H), keys, keys, numbers(1, H, P, N), numbers(1, T, H)

    def run(function, floats, rest):
        *tokens, state, scale = floats
        return function(*tokens, *rest, state, scale_BTH=scale)

    by = lambda function: Form(functools.partial(run, function), floats, _first())
    forms = {"ours": by(ssd.ssd), "XLA": by(ssd.in_chunks)}
    return [Case(f"Mamba-2 1.3B: {T} tokens, {H} heads, state {P} x {N}", 4.0 * T * H * P * N, forms)]


def delta() -> list[Case]:
    H, K, V = 32, 128, 128
    floats = numbers(1, T, H, K), numbers(1, T, H, K), shaped(1, T, H, V), numbers(1, T, H, 1)
    floats, rest = (*floats, numbers(1, T, H), numbers(1, H, K, V)), _first()

    def run(function, floats, rest):
        return function(*floats[:-1], *rest, floats[-1])

    by = lambda function: Form(functools.partial(run, function), floats, rest)
    forms = {"ours": by(delta_rule.delta_rule), "XLA": by(delta_rule.in_chunks)}
    return [Case(f"Qwen3-Next: {T} tokens, {H} heads, state {K} x {V}", 6.0 * T * H * K * V, forms)]


def _first() -> tuple:
    return (shaped(1, T, dtype=jnp.bool_),)


ADAM_FLOPS = 19  # a parameter: norm 2, clip 1, moments 3 + 4, their corrections 2, step 4, decay 2, add 1


def adam_case(clip: float) -> Case:
    """Of a decoder's tree of 1e8 numbers; gradients, moments and parameters are float32."""
    cfg = model.decoder(32000, 768, 12, 12, 4, 64, 2048, scan=True, param_dtype="float32")
    params, optimizer = param_shapes(cfg), make_optimizer(AdamW(clip_norm=clip), Cosine(), 1000, cfg)
    state = jax.eval_shape(optimizer.init, params)

    def update(floats, rest):
        (grads,), (params, state) = floats, rest
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    count = sum(x.size for x in jax.tree.leaves(params))
    words = "clipped by the norm of all" if clip else "not clipped"
    return Case(
        f"AdamW, {words}: {count / 1e6:.0f} M parameters",
        float(count * ADAM_FLOPS),
        {"optax": Form(update, (params,), (params, state), (1,))},
        float((8 if clip else 7) * 4 * count),  # the norm is of all gradients before the first can be clipped
        backward=False,
    )


def optimizer() -> list[Case]:
    return [adam_case(0.0), adam_case(1.0)]


KERNELS = {
    "flash_attention": flash,
    "grouped_matmul": grouped,
    "cross_entropy": vocabulary,
    "paged_attention": paged,
    "quantized_matmul": quantized,
    "ssd": state_space,
    "delta_rule": delta,
    "optimizer": optimizer,
}

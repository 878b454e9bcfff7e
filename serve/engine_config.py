"""EngineConfig: how many rows, pages and tokens the engine works with, and the fixed shapes it compiles."""

from __future__ import annotations

import dataclasses

from model import ModelConfig
from model.cache import has_recurrent_state
from model.kernels.paged_attention.pages import check_cache_dtype

_FIRST_CHUNK = 32  # tokens of the smallest prefill chunk
_FIRST_CONTEXT = 256  # tokens of the narrowest page table


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine. None means: chosen by `resolve`.

    Every program is compiled for one shape out of these buckets: a decode for (rows, context), a prefill for
    (rows, chunk, context). Fewer buckets compile sooner, more buckets pad less.
    """

    max_rows: int = 8  # sequences that are decoded at once
    max_length: int | None = None  # tokens of prompt and answer together; default: the model's max_length
    page_size: int = 16  # tokens a page
    num_pages: int | None = None  # pages of the cache; default: enough for max_rows rows of max_length
    prefill_chunk: int = 256  # most tokens of one prompt that one step computes
    prefill_tokens: int = 2048  # most tokens (rows times chunk) that one prefill computes, padding included
    decode_steps: int = 8  # most tokens a row gets from one dispatch
    # fewer decode steps in a dispatch, and smaller chunks of prompts, when they would take longer than this
    burst_seconds: float | None = None
    # keep the pages of prefixes for requests that begin with the same tokens; default: where the model allows it
    prefix_cache: bool | None = None
    draft_tokens: int = 0  # most tokens that prompt lookup guesses for one step of a row; 0: no speculation
    prompt_logprobs: bool = False  # whether log-probabilities of prompts are served
    adapter_slots: int = 0  # LoRA adapters that can be loaded at one time
    adapter_rank: int = 16  # the largest of them; smaller ones are padded
    adapter_targets: tuple[str, ...] = ("*",)  # linear maps that they may change, see model.blocks.lora
    row_buckets: tuple[int, ...] | None = None  # default: 1, 2, 4, 8, ... max_rows
    chunk_buckets: tuple[int, ...] | None = None  # tokens; default: 32, 256, ... prefill_chunk
    context_buckets: tuple[int, ...] | None = None  # tokens; default: 256, 1024, ... max_length
    # of keys and values; default: that of the computation. "int8", "float8_e4m3fn": quantised, each head of each token
    # with a scale of its own
    cache_dtype: str | None = None
    copy_params: bool = False  # keep own copies, for a trainer that donates its parameters
    seed: int = 0  # of requests that bring no seed of their own

    def resolve(self, cfg: ModelConfig) -> EngineSizes:
        """Every size for this model; ValueError names a setting that can't be."""
        if cfg.encoder is not None or not cfg.causal:
            raise ValueError(
                "the engine continues texts with a decoder alone, and this model has an encoder. Use model.embed, or "
                "model.generate with encoder_prompts."
            )
        for name in ("max_rows", "page_size", "prefill_chunk", "prefill_tokens", "decode_steps"):
            _check_positive(name, getattr(self, name))
        length = cfg.max_length if self.max_length is None else self.max_length
        _check_positive("max_length", length)
        check_cache_dtype(self.cache_dtype or cfg.dtype)
        if length < 2:
            raise ValueError(
                f"max_length={length} leaves no room for a prompt and an answer; give at least 2."
            )
        row_pages = -(-length // self.page_size)
        num_pages = self.max_rows * row_pages if self.num_pages is None else self.num_pages
        if num_pages < row_pages:
            raise ValueError(
                f"num_pages={num_pages} of page_size={self.page_size} hold {num_pages * self.page_size} tokens, fewer "
                f"than one row of max_length={length}. Give num_pages >= {row_pages} or a smaller max_length."
            )
        _check_positive("adapter_rank", self.adapter_rank)
        for name in ("draft_tokens", "adapter_slots"):
            _check_positive(name, getattr(self, name), least=0)
        by_row = has_recurrent_state(cfg)
        for name in ("prefix_cache", "draft_tokens"):
            if by_row and getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)}: this model has states of whole rows (recurrent blocks), which "
                    f"cannot be shared or taken back. Leave {name} out."
                )
        chunk = min(self.prefill_chunk, length)
        return EngineSizes(
            max_rows=self.max_rows,
            max_length=length,
            page_size=self.page_size,
            num_pages=num_pages,
            prefill_tokens=self.prefill_tokens,
            decode_steps=self.decode_steps,
            burst_seconds=self.burst_seconds,
            prefix_cache=not by_row if self.prefix_cache is None else self.prefix_cache,
            draft_tokens=self.draft_tokens,
            prompt_logprobs=self.prompt_logprobs,
            adapter_slots=self.adapter_slots,
            adapter_rank=self.adapter_rank,
            adapter_targets=tuple(self.adapter_targets),
            row_buckets=_buckets("row_buckets", self.row_buckets, 1, 2, self.max_rows),
            chunk_buckets=_buckets("chunk_buckets", self.chunk_buckets, _FIRST_CHUNK, 8, chunk),
            context_buckets=_buckets("context_buckets", self.context_buckets, _FIRST_CONTEXT, 4, length),
            cache_dtype=self.cache_dtype or cfg.dtype,
            copy_params=self.copy_params,
            seed=self.seed,
        )


@dataclasses.dataclass(frozen=True)
class EngineSizes:
    """An `EngineConfig` with every default filled in; the buckets end at the largest size there is."""

    max_rows: int
    max_length: int
    page_size: int
    num_pages: int
    prefill_tokens: int
    decode_steps: int
    burst_seconds: float | None
    prefix_cache: bool
    draft_tokens: int
    prompt_logprobs: bool
    adapter_slots: int
    adapter_rank: int
    adapter_targets: tuple[str, ...]
    row_buckets: tuple[int, ...]
    chunk_buckets: tuple[int, ...]  # tokens
    context_buckets: tuple[int, ...]  # tokens
    cache_dtype: str
    copy_params: bool
    seed: int

    @property
    def page_buckets(self) -> tuple[int, ...]:
        """Widths of the page table, in pages."""
        return tuple(dict.fromkeys(-(-tokens // self.page_size) for tokens in self.context_buckets))

    def prefill_rows(self, chunk: int) -> tuple[int, ...]:
        """Row buckets of a prefill with this chunk: each four times the one before, within `prefill_tokens`, and at
        least the smallest."""
        kept: list[int] = []
        for rows in self.row_buckets:
            if not kept or rows >= 4 * kept[-1] or rows == self.row_buckets[-1]:
                kept.append(rows)
        return tuple(rows for rows in kept if rows * chunk <= self.prefill_tokens) or self.row_buckets[:1]

    def shapes(self) -> list[tuple[str, int, int, int]]:
        """Every program there is, the smallest first: (kind, rows, chunk, pages a row); the chunk of a decode is 1.

        "score" is a prefill with log-probabilities of the prompt, "verify" checks drafts.
        """
        chunks = {"prefill": self.chunk_buckets, "decode": (1,)}
        if self.draft_tokens:
            chunks["verify"] = (self.draft_tokens + 1,)
        if self.prompt_logprobs:
            chunks["score"] = self.chunk_buckets
        shapes = [
            (kind, rows, chunk, pages)
            for kind, of_kind in chunks.items()
            for chunk in of_kind
            for rows in (self.prefill_rows(chunk) if kind in ("prefill", "score") else self.row_buckets)
            for pages in self.page_buckets
        ]
        # A request alone needs the first two; while the second compiles, the first decodes as well.
        shapes.sort(key=lambda shape: (shape[1] * shape[3], shape[0] not in ("prefill", "decode"), shape[2]))
        shapes.sort(key=lambda shape: shape != self.first_shape)
        return [*shapes, ("clean", 1, 1, self.page_buckets[-1])]

    @property
    def first_shape(self) -> tuple[str, int, int, int]:
        """The program that can do everything, slowly, for one short row."""
        return "prefill", self.row_buckets[0], self.chunk_buckets[0], self.page_buckets[0]


def bucket_of(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `size`."""
    return next(bucket for bucket in buckets if bucket >= size)


def _buckets(name: str, given: tuple[int, ...] | None, first: int, factor: int, last: int) -> tuple[int, ...]:
    """The given buckets, cut at `last`, or a ladder first, first * factor, ... ; always with `last` at the end."""
    if given is None:
        given, size = (), first
        while size < last:
            given, size = (*given, size), size * factor
    for size in given:
        _check_positive(name, size)
    return (*sorted({size for size in given if size < last}), last)


def _check_positive(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}; wanted a whole number of at least {least}.")

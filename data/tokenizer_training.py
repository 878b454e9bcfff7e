"""Training a tokenizer: byte-level BPE (`tokenizers`) or SentencePiece BPE and unigram, with settings that
lose nothing.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from data.chat import DEFAULT_CHAT_TEMPLATE, DEFAULT_SPECIAL_TOKENS
from data.tokenizer import Tokenizer

TokenizerKind = Literal["bpe", "sentencepiece_bpe", "sentencepiece_unigram"]


def train_tokenizer(
    kind: TokenizerKind,
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = DEFAULT_SPECIAL_TOKENS,
    chat_template: str | None = DEFAULT_CHAT_TEMPLATE,
    *,
    bos: str | None = "<|endoftext|>",
    eos: Sequence[str] = ("<|endoftext|>", "<|im_end|>"),
    pad: str | None = "<|pad|>",
    digits: int = 2,
    max_bytes: int | None = None,
) -> Tokenizer:
    """Trains a tokenizer; the same texts in the same order give the same tokenizer.

    Args:
        kind: "bpe" (byte-level), "sentencepiece_bpe" or "sentencepiece_unigram" (identity normalisation, byte
            fallback).
        vocab_size: ids in all, special tokens and the 256 bytes among them. A text too small for it is an
            error.
        special_tokens: control tokens, first in the vocabulary. `bos`, `eos` (all stop; the first ends a
            document) and `pad` must be among them.
        digits: numbers are cut into groups of up to 1, 2 or 3 digits ("bpe"; SentencePiece: 1 or none).
        max_bytes: stop reading texts after so many bytes of UTF-8; bounds memory.

    Raises ValueError naming what does not fit.
    """
    trainers = {
        "bpe": _train_bpe,
        "sentencepiece_bpe": _train_sentencepiece,
        "sentencepiece_unigram": _train_sentencepiece,
    }
    if kind not in trainers:
        raise ValueError(f"kind={kind!r}; known are {', '.join(trainers)}")
    roles = [name for name in (bos, *eos, pad) if name is not None]
    if missing := [name for name in roles if name not in special_tokens]:
        raise ValueError(
            f"bos, eos and pad must be special tokens; {missing} are not among {list(special_tokens)}"
        )
    smallest = 256 + len(special_tokens) + (kind != "bpe")
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: bytes and special tokens alone are {smallest}"
        )
    names = {"bos": bos, "eos": list(eos), "pad": pad, "chat_template": chat_template}
    return trainers[kind](kind, _bounded(texts, max_bytes), vocab_size, list(special_tokens), digits, names)


def _bounded(texts: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    seen = 0
    for text in texts:
        seen += len(text.encode("utf-8"))
        if max_bytes is not None and seen > max_bytes:
            return
        yield text


def _train_bpe(
    kind: str, texts: Iterator[str], vocab_size: int, special_tokens: list[str], digits: int, names: dict
) -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from data.huggingface_tokenizer import HuggingFaceTokenizer
    from data.pretokenizers import PreTokenizer, digits_pattern

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = PreTokenizer((digits_pattern(digits),)).build()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the texts give only {backend.get_vocab_size()} tokens, not vocab_size={vocab_size}. "
            "Give more text or ask for a smaller vocabulary."
        )
    return HuggingFaceTokenizer(backend, special_tokens=special_tokens, **names)


def _train_sentencepiece(
    kind: str, texts: Iterator[str], vocab_size: int, special_tokens: list[str], digits: int, names: dict
) -> Tokenizer:
    import sentencepiece

    from data.sentencepiece_tokenizer import SentencePieceTokenizer

    model = io.BytesIO()
    # Lines, because SentencePiece learns no piece across a newline and drops what is too long.
    lines = (line for text in texts for line in text.split("\n") if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=kind.removeprefix("sentencepiece_"),
            vocab_size=vocab_size,
            control_symbols=special_tokens,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=digits == 1,
            max_sentence_length=1 << 20,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece could not train {vocab_size} pieces: {error}. Give more text or ask for a "
            "smaller vocabulary."
        ) from error
    return SentencePieceTokenizer(model.getvalue(), **names)

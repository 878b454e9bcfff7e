"""Training a tokenizer: byte-level BPE, SentencePiece BPE and unigram, WordPiece, raw bytes, with settings that lose
nothing where the kind allows it.

Texts are read once, as they come. What is kept of them is how often each word occurs.
"""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from data.chat import DEFAULT_CHAT_TEMPLATE, DEFAULT_SPECIAL_TOKENS
from data.tokenizer.byte_pairs import learn_merges
from data.tokenizer.interface import Tokenizer
from data.tokenizer.word_counts import SPACE_BEFORE_TEXT, SPACE_WITHIN_TEXT, WordCounts, count_words

TokenizerKind = Literal["bpe", "sentencepiece_bpe", "sentencepiece_unigram", "wordpiece", "bytes"]
PatternName = Literal["ours", "gpt2", "cl100k", "o200k", "llama3"]
Progress = Callable[[str, int], None]  # ("bytes", read so far) and then ("tokens", learned so far)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Control tokens, first in the vocabulary, what they are for, and the template that writes them."""

    names: Sequence[str] = DEFAULT_SPECIAL_TOKENS
    reserved: int = 0  # so many more, <|reserved_0|> and on, for uses that are found later
    bos: str | None = "<|endoftext|>"
    eos: Sequence[str] = ("<|endoftext|>", "<|im_end|>")  # all stop; the first ends a document
    pad: str | None = "<|pad|>"
    chat_template: str | None = DEFAULT_CHAT_TEMPLATE

    def vocabulary(self) -> list[str]:
        """Raises ValueError for a token that is there twice, or a role whose token is not there."""
        tokens = [*self.names, *(f"<|reserved_{i}|>" for i in range(self.reserved))]
        if len(set(tokens)) != len(tokens):
            raise ValueError(f"a special token is there twice: {tokens}")
        roles = [name for name in (self.bos, *self.eos, self.pad) if name is not None]
        if missing := [name for name in roles if name not in tokens]:
            raise ValueError(f"bos, eos and pad must be special tokens; {missing} are not among {tokens}")
        return tokens

    def roles(self) -> dict[str, Any]:
        """As the constructors of tokenizers name them."""
        return {"bos": self.bos, "eos": list(self.eos), "pad": self.pad, "chat_template": self.chat_template}


@dataclasses.dataclass(frozen=True)
class TextLimits:
    """How much of the texts is read, and how much of that is kept."""

    max_bytes: int | None = None  # of UTF-8 to read; None: all
    max_words: int = 1 << 23  # different words to keep; see `count_words`


def train_tokenizer(
    kind: TokenizerKind,
    texts: Iterable[str],
    vocab_size: int,
    special: SpecialTokens = SpecialTokens(),
    *,
    pattern: PatternName = "ours",
    digits: int | None = None,
    limits: TextLimits = TextLimits(),
    progress: Progress = lambda what, done: None,
) -> Tokenizer:
    """Trains a tokenizer; the same texts in the same order give the same tokenizer.

    Args:
        kind: "bpe" (byte-level), "sentencepiece_bpe" or "sentencepiece_unigram" (identity normalisation, byte
            fallback), "wordpiece" (BERT's, lower case, loses white space and accents), or "bytes" (learns nothing).
        vocab_size: ids in all, special tokens and the 256 bytes among them. A text too small for it is an error.
            Not looked at for "bytes", whose size is 256 and the special tokens.
        pattern: how "bpe" cuts text into words: "ours", "gpt2", "cl100k", "o200k" or "llama3".
        digits: numbers are cut into groups of up to 1, 2 or 3 digits; None: as the pattern does ("ours": 2).
            SentencePiece has 1 or None, others None.

    Raises ValueError naming what does not fit.
    """
    if kind not in _TRAINERS:
        raise ValueError(f"kind={kind!r}; known are {', '.join(_TRAINERS)}")
    specials = special.vocabulary()
    smallest = len(specials) + {"bpe": 256, "wordpiece": 1, "bytes": 0}.get(kind, 257)
    if vocab_size < smallest and kind != "bytes":
        raise ValueError(
            f"vocab_size={vocab_size} is too small: bytes and special tokens alone are {smallest}"
        )
    job = _Job(kind, texts, vocab_size, specials, special.roles(), pattern, digits, limits, progress)
    return _TRAINERS[kind](job)


@dataclasses.dataclass(frozen=True)
class _Job:
    """The arguments of `train_tokenizer`."""

    kind: TokenizerKind
    texts: Iterable[str]
    vocab_size: int
    specials: list[str]
    roles: dict[str, Any]
    pattern: PatternName
    digits: int | None
    limits: TextLimits
    progress: Progress

    def count(
        self, pattern: str, border: str = SPACE_BEFORE_TEXT, texts: Iterable[str] | None = None
    ) -> WordCounts:
        counts = count_words(
            self.texts if texts is None else texts,
            pattern,
            border,
            self.limits.max_bytes,
            self.limits.max_words,
            lambda done: self.progress("bytes", done),
        )
        if counts.bad:
            _log.warning("%d texts left out: they have lone surrogates, which is no Unicode.", counts.bad)
        if counts.rare:
            _log.warning(
                "%d rare words left out: more than max_words=%d.", counts.rare, self.limits.max_words
            )
        return counts

    def merges(self, symbols: np.ndarray, counts: WordCounts, lengths: list[int], spellings: list, join):
        """Lets `spellings` grow to the vocabulary's size, special tokens aside; the pairs of ids that made them."""
        merges = learn_merges(
            symbols,
            np.asarray(lengths, np.int64),
            np.fromiter(counts.words.values(), np.int64, len(counts.words)),
            spellings,
            join,
            self.vocab_size - len(self.specials),
            lambda done: self.progress("tokens", done + len(self.specials)),
        )
        size = len(spellings) + len(self.specials)
        if size != self.vocab_size:
            raise ValueError(
                f"the texts give only {size} tokens, not vocab_size={self.vocab_size}. "
                "Give more text or ask for a smaller vocabulary."
            )
        return merges


def _train_bpe(job: _Job) -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models

    from data.tokenizer.huggingface import HuggingFaceTokenizer
    from data.tokenizer.pretokenizers import pattern
    from data.tokenizer.spellings import byte_alphabet

    style = pattern(job.pattern, job.digits)
    counts = job.count(style.patterns[0])
    words = [word.encode("utf-8") for word in counts.words]
    alphabet = dict(sorted(byte_alphabet().items()))  # the order of ids that `tokenizers` gives too
    spellings = list(alphabet)
    id_of_byte = np.empty(256, np.int32)
    id_of_byte[list(alphabet.values())] = np.arange(256)
    symbols = id_of_byte[np.frombuffer(b"".join(words), np.uint8)]
    merges = job.merges(symbols, counts, [len(word) for word in words], spellings, str.__add__)
    vocabulary = {token: i for i, token in enumerate([*job.specials, *spellings])}
    pairs = [(spellings[left], spellings[right]) for left, right in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=style.ignore_merges))
    backend.pre_tokenizer, backend.decoder = style.build(), decoders.ByteLevel()
    return HuggingFaceTokenizer(backend, special_tokens=job.specials, **job.roles)


def _train_wordpiece(job: _Job) -> Tokenizer:
    """BPE over characters, where those that go on a word are symbols of their own, as `tokenizers` trains WordPiece."""
    from data.tokenizer.huggingface import HuggingFaceTokenizer
    from data.tokenizer.wordpiece import PREFIX, UNKNOWN, backend_of, normalizer

    if job.digits is not None:
        raise ValueError(f"digits={job.digits}: WordPiece does not cut numbers; give None")
    normalise = normalizer(lowercase=True).normalize_str
    counts = job.count(r"\w+|[^\w\s]|_", texts=(normalise(text) for text in job.texts))
    first, further = (
        sorted({character for word in counts.words for character in part(word)})
        for part in (lambda word: word[:1], lambda word: word[1:])
    )
    specials = job.specials if UNKNOWN in job.specials else [*job.specials, UNKNOWN]
    job = dataclasses.replace(job, specials=specials)
    spellings = [*first, *(PREFIX + character for character in further)]
    ids = {spelling: i for i, spelling in enumerate(spellings)}
    if len(spellings) + len(specials) > job.vocab_size:
        raise ValueError(
            f"vocab_size={job.vocab_size} is too small: the texts have {len(spellings)} different characters"
        )
    symbols = [ids[c if i == 0 else PREFIX + c] for word in counts.words for i, c in enumerate(word)]
    lengths = [len(word) for word in counts.words]
    job.merges(np.asarray(symbols), counts, lengths, spellings, lambda a, b: a + b.removeprefix(PREFIX))
    backend = backend_of([*specials, *spellings], lowercase=True)
    return HuggingFaceTokenizer(backend, special_tokens=job.specials, **job.roles)


def _train_bytes(job: _Job) -> Tokenizer:
    from data.tokenizer.raw_bytes import ByteTokenizer

    return ByteTokenizer(job.specials, **job.roles)


def _train_sentencepiece(job: _Job) -> Tokenizer:
    import sentencepiece

    from data.tokenizer.sentencepiece import SentencePieceTokenizer

    if job.digits not in (None, 1):
        raise ValueError(
            f"digits={job.digits}: SentencePiece cuts numbers into single digits (1) or not (None)"
        )
    # Counted words instead of lines: SentencePiece keeps every line that it is given in memory. It learns no
    # piece over a newline or a tab, which are symbols of their own.
    counts = job.count(r" *[^ \n\t]+| +", SPACE_WITHIN_TEXT)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_counted_lines(counts),
            input_format="tsv",
            model_writer=model,
            model_type=job.kind.removeprefix("sentencepiece_"),
            vocab_size=job.vocab_size,
            control_symbols=job.specials,
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
            split_digits=job.digits == 1,
            max_sentence_length=1 << 20,
            num_threads=2,  # a fixed number: unigram's sums depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece could not train {job.vocab_size} pieces: {error}. Give more text or ask for a "
            "smaller vocabulary."
        ) from error
    return SentencePieceTokenizer(model.getvalue(), **job.roles)


def _counted_lines(counts: WordCounts) -> Iterator[str]:
    return (f"{word}\t{count}" for word, count in counts.words.items())


_TRAINERS: dict[str, Callable[[_Job], Tokenizer]] = {
    "bpe": _train_bpe,
    "sentencepiece_bpe": _train_sentencepiece,
    "sentencepiece_unigram": _train_sentencepiece,
    "wordpiece": _train_wordpiece,
    "bytes": _train_bytes,
}

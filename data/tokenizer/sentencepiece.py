"""SentencePiece tokenizers (BPE and unigram): our own lossless ones, a Hugging Face tokenizer.model, or
pieces from a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from configs.files import atomic_write
from data.tokenizer.interface import Tokenizer
from data.tokenizer.spellings import piece_bytes

_META_SPACE = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model behind our interface. Kudo and Richardson 2018, arXiv:1808.06226.

    SentencePiece itself spells a space as '▁' and so can't tell the two apart; here a '▁' in the text is
    written as its three bytes, and text survives unchanged when the model's own normalisation is the
    identity.
    """

    def __init__(
        self,
        model: bytes,
        *,
        added_tokens: Mapping[str, int] | None = None,
        bos: str | None = None,
        eos: Iterable[str] = (),
        pad: str | None = None,
        chat_template: str | None = None,
        strips: Mapping[str, tuple[bool, bool]] | None = None,
        words: Mapping[str, Word] | None = None,
        longest_first: bool = False,
        add_prefix_space: bool | None = None,
        prefix_after_special: bool = False,
        roles: Mapping[str, str] | None = None,
        around: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    ):
        """`model`: a serialised ModelProto.

        Args:
            added_tokens: special tokens beside the model's control pieces.
            words: tokens that are no control tokens, found whole in a text before the model cuts it.
            longest_first: the longest of them is looked for in the whole text first (llama.cpp), not the one that
                begins first (transformers).
            add_prefix_space: whether a text begins with a space mark; by default as the model says.
            prefix_after_special: whether the text after a special token or a word does too (transformers' `legacy`,
                and llama.cpp).

        Raises ValueError for bytes that are not a model and names that the vocabulary lacks.
        """
        proto = parse_model(model)
        if add_prefix_space is not None and add_prefix_space != proto.normalizer_spec.add_dummy_prefix:
            proto.normalizer_spec.add_dummy_prefix = add_prefix_space
            model = proto.SerializeToString()
        self._model = model
        self._processor = _processor(model)
        self._prefix = proto.normalizer_spec.add_dummy_prefix
        self._strip_leading_space = self._prefix
        self.prefix_after_special = bool(self._prefix and prefix_after_special)
        proto.normalizer_spec.add_dummy_prefix = False
        self._continuation = _processor(proto.SerializeToString()) if self._prefix else self._processor
        added = dict(added_tokens or {})
        self._words, self._longest_first = dict(words or {}), longest_first
        found = {name: word.id for name, word in self._words.items()}
        ids = {piece.piece: i for i, piece in enumerate(proto.pieces)} | found | added
        special = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == p.CONTROL} | added
        self._tokens = {i: piece.piece for i, piece in enumerate(proto.pieces)} | {
            i: t for t, i in (found | added).items()
        }
        self._bytes = {i: piece_bytes(piece.piece) for i, piece in enumerate(proto.pieces)}
        for i, piece in enumerate(proto.pieces):
            if piece.type == piece.UNKNOWN:
                self._bytes[i] = "\ufffd".encode()
        self._bytes |= {word.id: name.encode("utf-8") for name, word in self._words.items()}
        self.is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
        self._byte_ids = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == p.BYTE}
        self.vocab_size = max(self._tokens) + 1

        def id_of(name: str | None) -> int | None:
            if name is not None and name not in ids:
                raise ValueError(f"token {name!r} is not in the vocabulary")
            return None if name is None else ids[name]

        self._set_specials(
            special,
            id_of(bos),
            [i for t in eos if (i := id_of(t)) is not None],
            id_of(pad),
            chat_template,
            strips,
            roles,
            around,
        )
        self._added = added

    @property
    def model(self) -> bytes:
        """The serialised ModelProto."""
        return self._model

    @property
    def words(self) -> dict[str, Word]:
        """Tokens that are text, found whole before the model cuts it."""
        return dict(self._words)

    @property
    def added_tokens(self) -> dict[str, int]:
        """Special tokens beside the model's own pieces."""
        return dict(self._added)

    def _encode(self, texts: list[str], continuation: bool) -> list[list[int]]:
        for text in texts:
            text.encode("utf-8")
        if self._words:
            return [self._encode_with_words(text, continuation) for text in texts]
        return self._encode_plain(texts, continuation)

    def _encode_with_words(self, text: str, continuation: bool) -> list[int]:
        ids: list[int] = []
        for part, word in split_words(text, self._words, self._longest_first):
            if word is not None:
                ids.append(word.id)
            elif part:
                goes_on = continuation or bool(ids)
                ids += self._encode_plain([part], goes_on and not (ids and self.prefix_after_special))[0]
        return ids

    def _encode_plain(self, texts: list[str], continuation: bool) -> list[list[int]]:
        processor = self._continuation if continuation else self._processor
        if not self._byte_ids or not any(_META_SPACE in text for text in texts):
            return processor.encode(texts)
        return [self._encode_with_meta_space(text, processor) for text in texts]

    def _encode_with_meta_space(self, text: str, processor: Any) -> list[int]:
        as_bytes = [self._byte_ids[f"<0x{b:02X}>"] for b in _META_SPACE.encode()]
        first, *rest = text.split(_META_SPACE)
        ids = processor.encode(first)
        for part in rest:
            ids += as_bytes + self._continuation.encode(part)
        return ids

    def token_of(self, token_id: int) -> str:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self._tokens.get(token_id, f"<unused {token_id}>")

    def bytes_of(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return b"" if token_id in self._special_ids else self._bytes.get(token_id, b"")

    def _save_vocabulary(self, folder: Path) -> dict[str, Any]:
        atomic_write(folder / "tokenizer.model", self._model)
        written = {"tokenizer_class": "LlamaTokenizer", "legacy": self.prefix_after_special}
        words = {
            str(word.id): {"content": name, "special": False, "normalized": False}
            | {"lstrip": word.lstrip, "rstrip": word.rstrip, "single_word": word.single_word}
            for name, word in self._words.items()
        }
        return written | {"add_prefix_space": bool(self._prefix), "added_tokens_decoder": words}


class Word(NamedTuple):
    """An added token that is text: its id, and what of its surroundings it takes or minds."""

    id: int
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def split_words(
    text: str, words: Mapping[str, Word], longest_first: bool = False
) -> Iterator[tuple[str, Word | None]]:
    """(part, the word that it is or None) of a text, in order; white space that a word takes is left out."""
    by_length = sorted(words, key=len, reverse=True)
    parts: list[tuple[str, Word | None]] = [(text, None)]
    for names in [[name] for name in by_length] if longest_first else [by_length]:
        pattern = re.compile("|".join(_pattern(name, words[name]) for name in names))
        parts = [
            new for part, word in parts for new in ([(part, word)] if word else _cut(part, pattern, words))
        ]
    yield from parts


def _pattern(name: str, word: Word) -> str:
    alone = rf"(?<!\w)({re.escape(name)})(?!\w)" if word.single_word else f"({re.escape(name)})"
    return (r"\s*" if word.lstrip else "") + alone + (r"\s*" if word.rstrip else "")


def _cut(text: str, pattern: re.Pattern, words: Mapping[str, Word]) -> Iterator[tuple[str, Word | None]]:
    at = 0
    for match in pattern.finditer(text):
        if match.start() > at:
            yield text[at : match.start()], None
        name = match[match.lastindex or 0]
        yield name, words[name]
        at = match.end()
    if at < len(text):
        yield text[at:], None


def parse_model(model: bytes):
    """The ModelProto in `model`. Raises ValueError when it is none."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    pb: Any = sentencepiece_model_pb2  # makes its classes when it is imported
    try:
        proto = pb.ModelProto.FromString(model)
    except DecodeError as error:
        raise ValueError(f"not a SentencePiece model ({len(model)} bytes): {error}") from error
    if not proto.pieces:
        raise ValueError(f"not a SentencePiece model ({len(model)} bytes): it has no pieces")
    return proto


def _processor(model: bytes):
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"not a usable SentencePiece model ({len(model)} bytes): {error}") from error

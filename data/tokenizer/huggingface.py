"""Tokenizers that the `tokenizers` library runs: our byte-level BPE and WordPiece, and whatever a tokenizer.json
holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from configs.files import atomic_write
from data.tokenizer.interface import Tokenizer


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` behind our interface.

    Tokens that the file marks as special are control tokens; its other added tokens (runs of spaces,
    `<think>`) are text like any other, as in transformers.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Iterable[str] = (),
        bos: str | None = None,
        eos: Iterable[str] = (),
        pad: str | None = None,
        chat_template: str | None = None,
    ):
        """`special_tokens`: more names to treat as special than the backend marks itself.

        Raises ValueError for a name that the vocabulary lacks, or a decoder that does not give back bytes.
        """
        missing = [name for name in special_tokens if backend.token_to_id(name) is None]
        if missing:
            raise ValueError(f"special tokens {missing} are not in the vocabulary")
        backend.add_special_tokens(list(special_tokens))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # text that spells a special token stays text
        self._backend = backend
        self._continuation = _without_prefix_space(backend)
        added = backend.get_added_tokens_decoder()
        special = {token.content: i for i, token in sorted(added.items()) if token.special}
        unknown = _unknown_word(backend)  # what text becomes, so no control token
        special.pop(unknown, None)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1

        def id_of(name: str | None) -> int | None:
            if name is not None and name not in vocabulary:
                raise ValueError(f"token {name!r} is not in the vocabulary")
            return None if name is None else vocabulary[name]

        self._set_specials(
            special,
            id_of(bos),
            [id_of(name) for name in eos],
            id_of(pad),
            chat_template,
            {t.content: (t.lstrip, t.rstrip) for t in added.values() if t.special and (t.lstrip or t.rstrip)},
        )
        self._bytes, self._strip_leading_space = _token_bytes(backend, vocabulary, added)
        if unknown is not None:
            self._bytes[vocabulary[unknown]] = " \ufffd".encode()

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """What the library runs, for conversion to other formats; not to be changed."""
        return self._backend

    def _encode(self, texts: list[str], continuation: bool) -> list[list[int]]:
        for text in texts:
            text.encode("utf-8")
        backend = self._continuation if continuation else self._backend
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def token_of(self, token_id: int) -> str:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        token = self._backend.id_to_token(token_id)
        return f"<unused {token_id}>" if token is None else token

    def bytes_of(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self._bytes.get(token_id, b"")

    def _save_vocabulary(self, folder: Path) -> dict[str, Any]:
        atomic_write(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        return {"tokenizer_class": "PreTrainedTokenizerFast"}


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character to byte (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def piece_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece piece: '<0x0A>' is one byte, '▁' is a space."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace("\u2581", " ").encode("utf-8")


def _kinds(node: Any) -> dict[str, Mapping]:
    """Every {"type": ...} object in a tokenizer.json section, by type."""
    found: dict[str, Mapping] = {}
    if isinstance(node, dict):
        if "type" in node:
            found[node["type"]] = node
        for child in node.values():
            found |= _kinds(child)
    elif isinstance(node, list):
        for child in node:
            found |= _kinds(child)
    return found


def _token_bytes(
    backend: tokenizers.Tokenizer, vocabulary: Mapping[str, int], added: Mapping[int, Any]
) -> tuple[dict[int, bytes], bool]:
    """Bytes of every id, and whether decoding drops one leading space."""
    decoder = json.loads(backend.to_str())["decoder"]
    kinds = _kinds(decoder)
    strips = "Strip" in kinds or kinds.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
    if "ByteLevel" in kinds:
        alphabet = byte_alphabet()

        def spell(token: str) -> bytes:
            known = all(c in alphabet for c in token)
            return bytes(alphabet[c] for c in token) if known else token.encode("utf-8")
    elif kinds.keys() & {"ByteFallback", "Metaspace"}:
        spell = piece_bytes
    elif "WordPiece" in kinds:
        prefix, strips = kinds["WordPiece"]["prefix"], True

        def spell(token: str) -> bytes:
            goes_on = token.startswith(prefix) and token != prefix
            return (token[len(prefix) :] if goes_on else " " + token).encode("utf-8")
    else:
        raise ValueError(
            f"tokenizer.json has the decoder {sorted(kinds) or decoder}, which does not say what bytes a "
            "token is. "
            "Known: ByteLevel (GPT-2 style), ByteFallback or Metaspace (SentencePiece style), and WordPiece."
        )
    table = {i: spell(token) for token, i in vocabulary.items() if i not in added}
    for i, token in added.items():
        table[i] = b"" if token.special else token.content.encode("utf-8")
    return table, strips


def _unknown_word(backend: tokenizers.Tokenizer) -> str | None:
    """The token that WordPiece gives for a word that it can't spell; None for other kinds."""
    model = backend.model
    unknown = model.unk_token if isinstance(model, tokenizers.models.WordPiece) else None
    return unknown if unknown is not None and backend.token_to_id(unknown) is not None else None


def _without_prefix_space(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for text that goes on after other text: adds no space in front."""
    spec = json.loads(backend.to_str())
    changed = False
    for part in ("pre_tokenizer", "normalizer"):
        for kind, node in _kinds(spec[part]).items():
            if kind == "Metaspace" and node.get("prepend_scheme", "always") != "never":
                node["prepend_scheme"], changed = "never", True
            elif kind == "ByteLevel" and node.get("add_prefix_space"):
                node["add_prefix_space"], changed = False, True
            elif kind == "Prepend" and node.get("prepend"):
                node["prepend"], changed = "", True
    if not changed:
        return backend
    if any(n.get("type") == "Prepend" for n in _kinds(spec["normalizer"]).values()):
        spec["normalizer"] = _drop_prepend(spec["normalizer"])
    copy = tokenizers.Tokenizer.from_str(json.dumps(spec))
    copy.encode_special_tokens = True
    return copy


def _drop_prepend(normalizer: dict[str, Any]) -> dict[str, Any] | None:
    if normalizer["type"] == "Prepend":
        return None
    if normalizer["type"] == "Sequence":
        kept = [child for child in map(_drop_prepend, normalizer["normalizers"]) if child is not None]
        return {"type": "Sequence", "normalizers": kept}
    return normalizer

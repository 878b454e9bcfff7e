"""What bytes a token is, as the decoder of a tokenizer.json says it (huggingface/tokenizers, src/decoders).

A decoder there turns all tokens of a text into one string. Here every id stands for bytes of its own, so that text can
be streamed; a decoder that needs the whole text at once is refused by name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from data.tokenizer.spellings import byte_alphabet, byte_of_piece


@dataclasses.dataclass(frozen=True)
class Decoder:
    """`spell`: the bytes of a token; `spell_added`: of one that was added; `strips`: the text's first token loses the
    space that was put before the text, by `first`; `late`: characters that are replaced in the finished text."""

    spell: Callable[[str], bytes]
    spell_added: Callable[[str], bytes]
    strips: bool = False
    first: Callable[[bytes], bytes] = lambda piece: piece.removeprefix(b" ")
    late: tuple[tuple[str, str], ...] = ()
    unknown: bytes = "\ufffd".encode()  # what a token stands for that is put where no token spells the text


def read_decoder(spec: Mapping[str, Any] | None) -> Decoder:
    """Raises ValueError for a decoder that does not say what bytes a token is."""
    steps = list(spec["decoders"]) if spec and spec["type"] == "Sequence" else [spec or {"type": "none"}]
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return Decoder(_byte_level, str.encode)
    if kinds == ["WordPiece"]:
        return _word_piece(steps[0])
    if {"ByteFallback", "Metaspace", "Replace"} & set(kinds):
        return _sentence_piece(steps)
    raise _refusal(steps)


def _refusal(steps: list[Any]) -> ValueError:
    return ValueError(
        f"tokenizer.json has the decoder {json.dumps(steps)}, which does not say what bytes a token is. Known: "
        "ByteLevel (GPT-2 style); Metaspace or Replace, ByteFallback, Fuse and Strip in this order (SentencePiece "
        "style); and WordPiece."
    )


def _byte_level(token: str) -> bytes:
    alphabet = byte_alphabet()
    known = all(character in alphabet for character in token)
    return bytes(alphabet[character] for character in token) if known else token.encode("utf-8")


def _word_piece(step: Mapping[str, Any]) -> Decoder:
    prefix = step["prefix"]
    marks = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m")]
    marks += [(" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")]

    def spell(token: str) -> bytes:
        goes_on = token.startswith(prefix) and token != prefix
        text = token[len(prefix) :] if goes_on else " " + token
        for old, new in marks if step.get("cleanup") else ():
            text = text.replace(old, new)
        return text.encode("utf-8")

    return Decoder(spell, spell, strips=True, unknown=" \ufffd".encode())


def _sentence_piece(steps: list[Any]) -> Decoder:
    """Replacements, then bytes, then what is done to the whole text: a strip at its start, other characters."""
    early: list[tuple[str, str]] = []
    late: list[tuple[str, str]] = []
    has_bytes = fused = strips = False
    first = Decoder.first
    for step in steps:
        kind = step["type"]
        if kind == "Metaspace":
            early.append((step["replacement"], " "))
            if step.get("prepend_scheme", "always") != "never":
                strips, first = True, _without_spaces
        elif kind == "Replace" and "String" in step["pattern"]:
            pair = (step["pattern"]["String"], step["content"])
            if fused or has_bytes:
                if len(pair[0]) != 1:
                    raise _refusal(steps)  # its parts may lie in two tokens
                late.append(pair)
            early.append(pair)
        elif kind == "ByteFallback":
            has_bytes = True
        elif kind == "Fuse":
            fused = True
        elif (
            kind == "Strip" and fused and step["content"] == " " and step["start"] >= 1 and step["stop"] == 0
        ):
            strips, first = True, functools.partial(_without_first_spaces, step["start"])
        else:
            raise _refusal(steps)

    def spell(token: str) -> bytes:
        if has_bytes and (byte := byte_of_piece(token)) is not None:
            return byte
        for old, new in early:
            token = token.replace(old, new)
        return token.encode("utf-8")

    return Decoder(spell, str.encode, strips, first, tuple(late))


def _without_first_spaces(count: int, piece: bytes) -> bytes:
    spaces = len(piece) - len(piece.lstrip(b" "))
    return piece[min(spaces, count) :]


def _without_spaces(piece: bytes) -> bytes:
    return piece.replace(b" ", b"")  # Metaspace drops every mark of the first token

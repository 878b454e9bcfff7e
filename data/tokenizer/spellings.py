"""How vocabularies spell bytes: GPT-2's alphabet, SentencePiece's byte pieces and its mark for a space."""

from __future__ import annotations

import functools
import re


@functools.lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character to byte (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def byte_of_piece(piece: str) -> bytes | None:
    """The byte of a piece such as '<0x0A>', None for any other."""
    found = re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)
    return bytes([int(found[1], 16)]) if found else None


def piece_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece piece: '<0x0A>' is one byte, '▁' is a space."""
    byte = byte_of_piece(piece)
    return piece.replace("\u2581", " ").encode("utf-8") if byte is None else byte

"""A tokenizer's facts, and a text cut into its pieces, each in a colour with its id below."""

from __future__ import annotations

from typing import Any

from data.tokenizer.interface import Tokenizer

_COLOURS = (
    "black on #a6cee3",
    "black on #fdbf6f",
    "black on #b2df8a",
    "black on #fb9a99",
    "black on #cab2d6",
)


def facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What there is to know of a tokenizer at a glance."""
    from data.tokenizer.compare import number_shapes

    def spelled(i: int | None) -> str:
        return "none" if i is None else f"{i} {tokenizer.token_of(i)}"

    lengths = sorted((len(tokenizer.bytes_of(i)), i) for i in range(tokenizer.vocab_size))
    specials = tokenizer.special_tokens
    return {
        "kind": type(tokenizer).__name__,
        "ids": tokenizer.vocab_size,
        "special tokens": f"{len(specials)}: {' '.join(list(specials)[:12])}{' ...' if len(specials) > 12 else ''}",
        "begins a document": spelled(tokenizer.bos_id),
        "stops": ", ".join(map(spelled, tokenizer.eos_ids)) or "none",
        "fills rows": spelled(tokenizer.pad_id),
        "chat template": "none"
        if tokenizer.chat_template is None
        else f"{len(tokenizer.chat_template)} characters",
        "longest tokens": ", ".join(repr(tokenizer.token_of(i)) for _, i in lengths[:-6:-1]),
        "1234 is cut": " ".join(tokenizer.token_of(i) for i in tokenizer.encode("1234")),
        "3-digit numbers": ", ".join(
            f"{n} as {shape}" for shape, n in list(number_shapes(tokenizer, 3).items())[:3]
        ),
    }


def coloured(tokenizer: Tokenizer, text: str, width: int = 100) -> Any:
    """The pieces of a text for `rich`, with their ids below; \u240a is a line end, \u00b7 a space.

    A piece that is a part of a character is shown as its bytes.
    """
    from rich.text import Text

    out, above, below = Text(), Text(), Text()
    for number, i in enumerate(tokenizer.encode(text)):
        piece, colour = _visible(tokenizer.bytes_of(i)), _COLOURS[number % len(_COLOURS)]
        cells = max(Text(piece).cell_len, len(str(i)))
        if above.cell_len + cells + 1 > width:
            out.append_text(above).append("\n").append_text(below).append("\n\n")
            above, below = Text(), Text()
        above.append(piece, colour).append(" " * (cells - Text(piece).cell_len + 1))
        below.append(str(i).ljust(cells + 1), "dim")
    return out.append_text(above).append("\n").append_text(below)


def _visible(piece: bytes) -> str:
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "<" + piece.hex(" ") + ">"
    text = text.replace("\n", "\u240a").replace("\t", "\u2409").replace("\r", "\u240d").replace(" ", "\u00b7")
    return "".join(c if c.isprintable() else f"<{ord(c):x}>" for c in text) or "<>"

"""Text in one spelling: Unicode's composed form, one kind of newline."""

from __future__ import annotations

import dataclasses
import unicodedata

from data.documents import DocumentType
from data.stage import Transform, Verdict


@dataclasses.dataclass(frozen=True)
class Normalise(Transform):
    """NFC, newlines as \\n, no NUL and no byte-order mark; text without a visible character goes."""

    applies_to: DocumentType = "any"
    nfc: bool = True

    def apply(self, text: str) -> Verdict:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return text.encode("utf-8", "replace").decode(), "normalise: lone surrogates"
        text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").removeprefix("\ufeff")
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        return text, None if text.strip() else "normalise: empty"

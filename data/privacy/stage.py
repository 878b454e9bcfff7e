"""What identifies a person is masked, or the document dropped, by kind."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from typing import Any, ClassVar, Literal

from data.documents import Document, DocumentType
from data.privacy.finders import FINDERS, find
from data.stage import Transform, Verdict

Policy = Literal["mask", "drop", "keep"]
_MASKS = {
    "email": "<EMAIL>",
    "phone": "<PHONE>",
    "social": "<SSN>",
    "ip": "<IP>",
    "card": "<CARD>",
    "iban": "<IBAN>",
    "key": "<KEY>",
    "home": "<USER>",
}
_NAMES = {  # pseudonyms that stay what they stand for: a mail address to whoever reads on
    "email": "{}@example.com",
    "ip": "<IP-{}>",
    "home": "user-{}",
}


@dataclasses.dataclass(frozen=True)
class Privacy(Transform):
    """Each kind is masked, or its document dropped, or kept. The counts by kind are in the metadata as "privacy".

    Masks are fixed words, or with a `pseudonym_key` names made by a keyed hash of the value (BLAKE2): one address has
    one name in all documents, whatever their order, and nobody without the key can try addresses out.
    """

    applies_to: DocumentType = "any"
    email: Policy = "mask"
    phone: Policy = "mask"
    social: Policy = "mask"  # Social Security numbers of the United States
    ip: Policy = "mask"
    card: Policy = "mask"
    iban: Policy = "mask"
    key: Policy = "mask"
    home: Policy = "mask"  # names of folders under /home, /Users and C:\Users
    pseudonym_key: str = ""  # empty: fixed masks
    masks: dict[str, str] = dataclasses.field(default_factory=dict)  # by kind, instead of <EMAIL> and so on
    max_finds: int = 0  # a document with more goes, as a list of addresses; 0: no limit

    version: ClassVar[int] = 3

    def __post_init__(self):
        if unknown := sorted(set(self.masks) - set(_MASKS)):
            raise ValueError(f"masks: {unknown[0]!r} is no kind; there are {', '.join(_MASKS)}")

    def apply(self, text: str) -> Verdict:
        masked, reason, _ = self._masked(text)
        return masked, reason

    def edit(self, document: Document) -> tuple[Document, str | None]:
        text, reason, counts = self._masked(document["text"])
        if reason is not None or not counts:
            return document, reason
        metadata: dict[str, Any] = document["metadata"] | {"privacy": dict(sorted(counts.items()))}
        return {**document, "text": text, "metadata": metadata}, None

    def _masked(self, text: str) -> tuple[str, str | None, Counter[str]]:
        policies = {kind: getattr(self, kind) for kind in FINDERS}
        found = find(text, tuple(kind for kind, policy in policies.items() if policy != "keep"))
        counts = Counter(kind for kind, _ in found)
        for kind, _ in found:
            if policies[kind] == "drop":
                return text, f"privacy: {kind}", counts
        if self.max_finds and len(found) > self.max_finds:
            return text, "privacy: many", counts
        parts, at = [], 0
        for kind, span in found:
            parts += (text[at : span.start], self._mask(kind, span.value))
            at = span.stop
        return "".join([*parts, text[at:]]), None, counts

    def _mask(self, kind: str, value: str) -> str:
        if not self.pseudonym_key:
            return self.masks.get(kind, _MASKS[kind])
        key = hashlib.blake2b(self.pseudonym_key.encode(), digest_size=32).digest()
        name = hashlib.blake2b(f"{kind}:{value}".encode(), key=key, digest_size=5).hexdigest()
        return _NAMES.get(kind, f"<{kind.upper()}-{{}}>").format(name)

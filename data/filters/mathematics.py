"""Mathematical text: how much of it there is, whatever its notation.

OpenWebMath (Paster et al. 2023, arXiv:2310.06786) keeps pages with LaTeX or MathML or a high score of a classifier,
and loosens Gopher's rules, which take formulas for noise; so does `MATHEMATICS_GOPHER`.
"""

from __future__ import annotations

import dataclasses
import re

from data.documents import DocumentType
from data.filters.gopher import GopherQuality, GopherRepetition
from data.stage import Filter, Signals

_LATEX = re.compile(
    r"\\(?:frac|sum|int|sqrt|lim|alpha|beta|theta|pi|infty|mathbb|begin\{|left|right|cdot|times|leq?|geq?)"
)
_DELIMITED = re.compile(r"\$[^$\n]{1,300}\$|\\\(.{1,300}?\\\)|\\\[.{1,1000}?\\\]", re.DOTALL)
_SYMBOLS = re.compile("[\u2200-\u22ff\u00b1\u00d7\u00f7\u221a\u03b1-\u03c9\u2070-\u209f]")
_EQUATION = re.compile(r"\b\w+\s*(?:[-+*/^]\s*\w+\s*)*=\s*[-\w(\\]")
_TERMS = re.compile(
    r"\b(?:theorem|lemma|proof|equation|integral|derivative|polynomial|matrix|vector|triangle|fraction|integer"
    r"|probability|variable|solve|algebra|calculus|geometry)\b",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Mathematics(Filter):
    """Formulas, signs and terms in a thousand words; a text with less than `min_score` of them all goes."""

    applies_to: DocumentType = "prose"
    min_score: float = 5.0  # formulas + signs + terms / 2, in a thousand words

    def signals(self, text: str) -> Signals:
        per_thousand = 1000 / max(len(text.split()), 1)
        formulas = len(_DELIMITED.findall(text)) + len(_LATEX.findall(text)) + len(_EQUATION.findall(text))
        found = {
            "formulas": formulas * per_thousand,
            "signs": len(_SYMBOLS.findall(text)) * per_thousand,
            "terms": len(_TERMS.findall(text)) * per_thousand,
        }
        return found | {"score": found["formulas"] + found["signs"] + found["terms"] / 2}

    def reason(self, signals: Signals) -> str | None:
        return "mathematics: too little" if signals["score"] < self.min_score else None


MATHEMATICS_GOPHER = (
    GopherQuality(
        min_mean_word_length=2.0,
        max_symbols_per_word=0.3,
        max_bullet_lines=0.95,
        min_alphabetic_words=0.5,
        min_stop_words=1,
    ),
    GopherRepetition(
        max_top_ngrams=(0.25, 0.22, 0.2), max_duplicate_ngrams=(0.25, 0.24, 0.23, 0.22, 0.21, 0.2)
    ),
)

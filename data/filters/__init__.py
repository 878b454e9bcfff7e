"""Heuristic quality filters, each a frozen dataclass with its thresholds; `signals` measures, `reason` decides."""

from data.filters.c4 import C4Lines, C4Paragraphs
from data.filters.code import CodeQuality
from data.filters.dclm import DclmLines
from data.filters.fineweb import FineWebQuality
from data.filters.gopher import GopherQuality, GopherRepetition
from data.filters.language import Language, LanguageParagraphs
from data.filters.mathematics import MATHEMATICS_GOPHER, Mathematics
from data.filters.normalise import Normalise

__all__ = [
    "C4Lines",
    "C4Paragraphs",
    "CodeQuality",
    "DclmLines",
    "FineWebQuality",
    "GopherQuality",
    "GopherRepetition",
    "Language",
    "LanguageParagraphs",
    "MATHEMATICS_GOPHER",
    "Mathematics",
    "Normalise",
]

"""Heuristic quality filters, each a frozen dataclass with its thresholds; `signals` measures, `reason` decides."""

from data.filters.code import CodeQuality
from data.filters.gopher import GopherQuality, GopherRepetition
from data.filters.normalise import Normalise

__all__ = ["CodeQuality", "GopherQuality", "GopherRepetition", "Normalise"]

"""Benchmarks out of the training text, and what of them is in it all the same."""

from data.decontaminate.stages import Decontaminate, DecontaminateSpans

__all__ = ["Decontaminate", "DecontaminateSpans"]

"""Quality by models: a trained classifier, perplexity, lists and a classifier of harm, and a served model's score."""

from data.quality.classifier import QualityClassifier
from data.quality.educational import EducationalScore
from data.quality.harm import HarmClassifier, UrlList, WordList
from data.quality.perplexity import CruciblePerplexity, NgramPerplexity

__all__ = [
    "CruciblePerplexity",
    "EducationalScore",
    "HarmClassifier",
    "NgramPerplexity",
    "QualityClassifier",
    "UrlList",
    "WordList",
]

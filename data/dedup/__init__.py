"""Deduplication: exact, by lines, near, by shared passages and by meaning. What stays depends on the set of documents
and a stated rule, never on workers."""

from data.dedup.exact import ExactDedup
from data.dedup.lines import BloomDedup, LineDedup
from data.dedup.minhash import MinHashDedup, jaccard
from data.dedup.semantic import SemanticDedup
from data.dedup.substring import SubstringDedup

__all__ = [
    "BloomDedup",
    "ExactDedup",
    "LineDedup",
    "MinHashDedup",
    "SemanticDedup",
    "SubstringDedup",
    "jaccard",
]

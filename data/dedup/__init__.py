"""Deduplication: exact, by lines, near, by shared passages and by meaning. What stays depends on the set of documents
and a stated rule, never on workers."""

from data.dedup.exact import ExactDedup
from data.dedup.minhash import MinHashDedup, jaccard

__all__ = ["ExactDedup", "MinHashDedup", "jaccard"]

"""Curation: sources, then a list of stages, then train, validation and test as text datasets."""

from data.curation.config import DEFAULT_STAGES, CurationConfig
from data.curation.run import StageReport, curate, table
from data.curation.splits import split_of
from data.curation.workers import Workers

__all__ = ["DEFAULT_STAGES", "CurationConfig", "StageReport", "Workers", "curate", "split_of", "table"]

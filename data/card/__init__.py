"""The data card: what a curation did, as one HTML page."""

from data.card.facts import gather
from data.card.page import write_card

__all__ = ["gather", "write_card"]

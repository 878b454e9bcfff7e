"""What identifies people, found and masked."""

from data.privacy.finders import FINDERS, find
from data.privacy.stage import Privacy

__all__ = ["FINDERS", "Privacy", "find"]

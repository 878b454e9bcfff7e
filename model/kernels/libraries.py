"""Optional kernel libraries."""

from __future__ import annotations

from types import ModuleType

from absl import flags


def tokamax() -> ModuleType:
    """The library. Its settings are absl flags; they have their defaults if the command has parsed none."""
    try:
        import tokamax as library
    except ImportError as error:
        raise ImportError('a kernel named "tokamax" needs tokamax: pip install "crucible-lm[gpu]"') from error
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return library

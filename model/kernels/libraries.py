"""Libraries of kernels that are installed by choice."""

from __future__ import annotations

from types import ModuleType

from absl import flags


def tokamax() -> ModuleType:
    """The library, whose own settings are absl flags: where the command has not read any, they keep their defaults."""
    try:
        import tokamax as library
    except ImportError as error:
        raise ImportError('a kernel named "tokamax" needs tokamax: pip install "crucible-lm[gpu]"') from error
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return library

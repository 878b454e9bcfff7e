"""Functions that a config names, "package.module:function": how a stage gets what stands on a floor above it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from configs.typed import ConfigError


def named(name: str) -> Callable[..., Any]:
    """The function that `name` names. Raises ConfigError saying what is missing."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f'{name!r} names no function: wanted "package.module:function"')
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{name!r}: {error}") from error
    if not callable(getattr(found, attribute, None)):
        raise ConfigError(f"{name!r}: {module} has no function {attribute}")
    return getattr(found, attribute)

"""Matches module names with the lists and patterns of an adapter_config.json, as PEFT does.

A pattern may come from a hostile file, so its length, syntax and time are limited.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import regex

from model.families.common import Reader

MAX_PATTERN = 1000  # characters
MAX_REPEATS = 10_000  # the product of all {n}
SECONDS = 1.0  # for all patterns of a config


class Patterns:
    """Matches the patterns of one config, with `SECONDS` for all of them."""

    def __init__(self, config: Reader):
        self._config, self._left, self._compiled = config, SECONDS, {}

    def fullmatch(self, key: str, pattern: Any, text: str, form: str = "{}") -> Any:
        """`re.fullmatch` of `form` with the pattern in it. Raises ValueError that names `key`."""
        start = time.monotonic()
        if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
            raise self._wrong(key, pattern, f"is no pattern of at most {MAX_PATTERN} characters")
        try:
            if (pattern, form) not in self._compiled:
                self._check(key, pattern)
                self._compiled[pattern, form] = regex.compile(form.format(pattern))
            left = self._left - (time.monotonic() - start)
            if left <= 0:
                raise TimeoutError
            found = self._compiled[pattern, form].fullmatch(text, timeout=left)
        except TimeoutError:
            raise self._wrong(
                key,
                pattern,
                f"and the patterns before it take more than {SECONDS:g} seconds; give simpler ones",
            ) from None
        except (regex.error, RecursionError) as error:
            raise self._wrong(key, pattern, f"is no pattern: {error}") from None
        self._left -= time.monotonic() - start
        return found

    def _check(self, key: str, pattern: str) -> None:
        if re.search(r"\(\?(?!:|=|!|<|P<)", pattern):
            raise self._wrong(key, pattern, "has a flag or another extension, which is not supported")
        counts = [
            max(int(n) for n in pair if n) for pair in re.findall(r"\{(\d*),?(\d*)\}", pattern) if any(pair)
        ]
        if math.prod(max(count, 1) for count in counts) > MAX_REPEATS:
            raise self._wrong(key, pattern, f"repeats a part more than {MAX_REPEATS} times")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise self._wrong(key, pattern, f"is no pattern: {error}") from None

    def _wrong(self, key: str, pattern: Any, problem: str) -> ValueError:
        return ValueError(f"{self._config.where}{key}: {str(pattern)[:100]!r} {problem}.")


def read_by_module(
    config: Reader, key: str, read: Callable[[Reader, str], Any], modules: Iterable[str], patterns: Patterns
) -> dict[str, Any]:
    """`alpha_pattern` or `rank_pattern`: the value of each module with a matching pattern; the first match counts."""
    given = config.part(key)
    values = {pattern: read(given, pattern) for pattern in given.saved}
    found = {}
    for module in modules:
        for pattern, value in values.items():
            if patterns.fullmatch(key, pattern, module, r"(?:.*\.)?(?:{})"):
                found[module] = value
                break
    return found


def check_targets(config: Reader, modules: Iterable[str], patterns: Patterns) -> None:
    """Raises ValueError for a module with tensors that the config does not name: PEFT would ignore them."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    layers = _layers(config)
    for module in modules:
        if excluded and _named("exclude_modules", excluded, module, patterns):
            raise _passed_over(config, "exclude_modules", excluded, module)
        if targets is not None and targets != "all-linear":
            if not _named("target_modules", targets, module, patterns):
                raise _passed_over(config, "target_modules", targets, module)
        if layers is not None and not isinstance(targets, str):
            layer = _layer_of(config, module, patterns)
            if layer not in layers:
                raise _passed_over(config, "layers_to_transform", sorted(layers), module)


def _passed_over(config: Reader, key: str, value: Any, module: str) -> ValueError:
    return ValueError(
        f"{config.where}{key}={str(value)[:200]} leaves out {module}, but the folder has its tensors. Correct the key "
        "or remove the tensors."
    )


def _named(key: str, names: Any, module: str, patterns: Patterns) -> bool:
    """Whether a pattern matches the whole name, or a list has the name or its last parts."""
    if isinstance(names, str):
        return patterns.fullmatch(key, names, module) is not None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key}={str(names)[:200]} is neither a pattern nor a list of names.")
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layers(config: Reader) -> set[int] | None:
    given = config.get("layers_to_transform")
    layers = [given] if type(given) is int else given
    if layers is not None and (not isinstance(layers, list) or any(type(i) is not int for i in layers)):
        raise ValueError(
            f"{config.where}layers_to_transform={str(given)[:200]} is not a list of layer numbers."
        )
    if not layers and config.get("layers_pattern"):
        raise ValueError(f"{config.where}layers_pattern has no effect without layers_to_transform.")
    return set(layers) if layers else None


def _layer_of(config: Reader, module: str, patterns: Patterns) -> int | None:
    """The layer number of a module: the number after a name of `layers_pattern`, or the first number."""
    given = config.get("layers_pattern")
    names = [given] if isinstance(given, str) and given else given or []
    if not isinstance(names, list):
        raise ValueError(f"{config.where}layers_pattern={str(given)[:200]} is not a list of names.")
    if not names:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
        return int(found[1]) if found else None
    for name in names:
        found = patterns.fullmatch(
            "layers_pattern", name, module, r"(?:|.*?\.)(?:{})\.(?P<layer_number>\d+)\..*"
        )
        if found:
            return int(found["layer_number"])
    return None

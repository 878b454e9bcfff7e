"""Command-line overrides `--config.a.b=value`: which key each names, which type that key has, and their
effect.

Paths are ml_collections': dots for fields and dict keys, `[0]` for items of a tuple, `['a.b']` for a dict key
with dots.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ml_collections
from ml_collections.config_flags import config_path

from configs.typed import (
    KIND,
    ConfigError,
    choices,
    did_you_mean,
    init_fields,
    is_config,
    nearest,
    overlay,
    tagged,
    type_hints,
    type_name,
)

__all__ = ["Override", "apply", "did_you_mean", "find", "flag_tree", "leaves", "nearest_strings", "plain"]

_SCALARS = {int: 0, float: 0.0, bool: False, str: ""}


@dataclasses.dataclass(frozen=True)
class Override:
    """One overridden key: its path as written, split into keys, and the type of what it holds."""

    path: str
    keys: tuple[str | int, ...]
    type: Any
    chooses: bool = False  # whether this is the `kind` of a union, rather than a field

    @property
    def wanted(self) -> str:
        return type_name(self.type)


def find(cls: type, mapping: Mapping[str, Any], argv: Sequence[str]) -> list[Override]:
    """The overrides in `argv`, each once.

    Raises ConfigError for a key that neither `cls` nor the classes chosen in `mapping` and `argv` have.
    """
    texts: dict[str, str | None] = {}
    for i, arg in enumerate(argv):
        if match := re.match(r"--?(?:no)?config\.([^=]*)(?:=(.*))?$", arg, re.DOTALL):
            following = argv[i + 1] if match[2] is None and i + 1 < len(argv) else None
            texts[match[1]] = match[2] if match[2] is not None else following
    split = {path: _split(path) for path in texts}
    for inner in texts:
        for outer in texts:
            if len(split[outer]) < len(split[inner]) and split[inner][: len(split[outer])] == split[outer]:
                raise ConfigError(
                    f"--config.{outer} and --config.{inner} set the same thing twice; give one of them."
                )
    kinds = {split[path][:-1]: text for path, text in texts.items() if split[path][-1] == KIND and text}
    return [Override(path, split[path], *_resolve(cls, mapping, path, split[path], kinds)) for path in texts]


def flag_tree(wanted: Sequence[Override]) -> ml_collections.ConfigDict:
    """The nested ConfigDict over which config_flags defines a flag for each override.

    int, float, bool and str keys have a value of that type, so that absl parses and checks them; every other
    key is text here, and `apply` reads it by its type.
    """
    tree: dict[Any, Any] = {}
    for item in wanted:
        node = tree
        for key in item.keys[:-1]:
            node = node.setdefault(key, {})
        node[item.keys[-1]] = _SCALARS.get(item.type, "") if isinstance(item.type, type) else ""
    return ml_collections.ConfigDict(tree, allow_dotted_keys=True)


def apply(
    cls: type, mapping: Mapping[str, Any], wanted: Sequence[Override], values: Mapping[str, Any]
) -> dict[str, Any]:
    """`mapping` with the overrides' values in it, overlaid on the defaults again (for a part whose class
    changed).
    """
    result = json.loads(json.dumps(mapping))
    for item in sorted(wanted, key=lambda item: not item.chooses):
        value = values[item.path]
        if item.type not in _SCALARS:
            value = read_text(item.type, value, f"--config.{item.path}")
        if item.chooses:
            _choose(result, item.keys[:-1], value)
        else:
            node = _descend(result, item.keys[:-1])
            node[item.keys[-1]] = value
    return overlay(cls, result)


def read_text(tp: Any, text: str, where: str) -> Any:
    """A value of type `tp` from a flag's text: None, true, 3e-4, (1, 2) or 1,2, {'web': 0.5}, or JSON."""
    members = choices(tp)
    if type(None) in typing.get_args(tp) and text in ("None", "none", "null"):
        return None
    for member in sorted(members, key=lambda member: member is str):  # text is the last resort of a union
        value = _read_member(member, text)
        if value is not _UNREAD:
            return value
    raise ConfigError(f"{where}={text} is ill-typed; wanted {type_name(tp)}.{_how_to_write(tp, text, where)}")


def _how_to_write(tp: Any, text: str, where: str) -> str:
    """An example of a value of a type that users often write wrong, with a space before; "" for other types."""
    if names := tagged(tp):
        name = next((name for name in names if name.lower() == text.lower()), next(iter(names)))
        return f" Choose one by {where}.{KIND}={name}."
    members = choices(tp)
    if any(member is dict or typing.get_origin(member) is dict for member in members):
        return f" For example: {where}=\"{{'NAME': 1.0}}\"."
    options = [str(o) for m in members if typing.get_origin(m) is Literal for o in typing.get_args(m)]
    close = [option for option in options if option.lower() == text.lower()] or nearest_strings(
        text, options, 1
    )
    return f" Did you mean {close[0]}?" if close else ""


def leaves(cls: type, mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(path, type, value) of every key that can be overridden; a required key without a value has `...`."""
    found, hints = [], type_hints(cls)
    for field in init_fields(cls):
        path, tp, value = prefix + field.name, hints[field.name], mapping.get(field.name, ...)
        chosen = _chosen(tp, value)
        if chosen is not None and isinstance(value, Mapping):
            if names := tagged(tp):
                found.append((f"{path}.{KIND}", Literal[tuple(names)], value[KIND]))
            found += leaves(chosen, value, path + ".")
        else:
            found.append((path, tp, value))
    return found


def plain(value: Any) -> Any:
    """A ConfigDict, with all that is in it, as dicts, lists and scalars."""
    if isinstance(value, (ml_collections.ConfigDict, Mapping)):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.get() if isinstance(value, ml_collections.FieldReference) else value


def nearest_strings(given: str, known: Sequence[str], count: int = 3) -> list[str]:
    """Up to `count` of `known` that look like `given`."""
    return difflib.get_close_matches(given, known, n=count, cutoff=0.6)


_UNREAD = object()


def _read_member(tp: Any, text: str) -> Any:
    """`text` as one type that is no union, or _UNREAD."""
    origin = typing.get_origin(tp)
    if tp is str:
        return text
    if tp is bool:
        return {"true": True, "false": False}.get(text.lower(), _UNREAD)
    if tp in (int, float):
        try:
            return tp(text)
        except ValueError:
            return _UNREAD
    if origin is Literal:
        return next((option for option in typing.get_args(tp) if str(option) == text), _UNREAD)
    value = _literal(text)
    if tp is Any or tp is object:
        return text if value is _UNREAD else value
    if tp is tuple or origin is tuple:
        return _read_tuple(typing.get_args(tp), text, value)
    if tp is dict or origin is dict or is_config(tp):
        return plain(value) if isinstance(value, Mapping) else _UNREAD
    return _UNREAD


def _read_tuple(args: tuple[Any, ...], text: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)) and not isinstance(value, str):
        return plain(value)
    item_type = args[0] if args else Any
    if not text.strip():
        return []
    parts = [_read_member(item_type, part.strip()) for part in text.split(",")]
    return _UNREAD if any(part is _UNREAD for part in parts) else parts


def _literal(text: str) -> Any:
    for read in (ast.literal_eval, json.loads):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return _UNREAD


def _split(path: str) -> tuple[str | int, ...]:
    try:
        keys = config_path.split(path)
    except (ValueError, AttributeError, TypeError):
        keys = ()
    if not keys or not all(isinstance(key, (str, int)) for key in keys):
        raise ConfigError(f"--config.{path}: not a key. Write --config.a.b=value, --config.a[0].b=value.")
    return keys


def _resolve(cls: type, mapping: Any, path: str, keys: tuple, kinds: Mapping[tuple, str | None]) -> tuple:
    """(type, whether it is a union's `kind`) of what `keys` names, following the classes chosen in `mapping`
    or, first, by overrides of `kind`.
    """
    tp, value = cls, mapping
    for depth, key in enumerate(keys):
        done = keys[:depth]
        names = tagged(tp)
        if names and key == KIND and depth + 1 == len(keys):
            return Literal[tuple(names)], True
        chosen = names.get(kinds[done] or "") if names and done in kinds else _chosen(tp, value)
        if names and done in kinds and chosen is None:
            bad = ".".join(map(str, done))
            raise ConfigError(
                f"--config.{bad}.{KIND}={kinds[done]} is unknown; it is one of {', '.join(names)}."
            )
        step = _step(chosen, tp, value, key)
        if step is None:
            known = [leaf for leaf, _, _ in leaves(cls, mapping)] if isinstance(mapping, Mapping) else []
            if chosen is not None:
                prefix = "".join(f"{part}." for part in done)
                known += [prefix + field.name for field in init_fields(chosen)]
            raise ConfigError(f"--config.{path} is not a key of the config. " + _hint(path, known))
        tp, value = step
    return tp, False


def _hint(path: str, known: Sequence[str]) -> str:
    close = nearest(path, known)
    if close:
        return "Did you mean " + " or ".join(f"--config.{key}" for key in close) + "?"
    return "See --help for every key."


def _chosen(tp: Any, value: Any) -> type | None:
    """The dataclass that a value of type `tp` has or, where it is None, would have."""
    names = tagged(tp)
    if names and value is None and type(None) in typing.get_args(tp):
        return next(iter(names.values()))
    if names:
        return names.get(str(value.get(KIND))) if isinstance(value, Mapping) else None
    return next((member for member in choices(tp) if is_config(member)), None)


def _step(chosen: type | None, tp: Any, value: Any, key: str | int) -> tuple[Any, Any] | None:
    """(type, value) one key further in, or None where there is no such key."""
    if chosen is not None:
        if key not in [field.name for field in init_fields(chosen)]:
            return None
        return type_hints(chosen)[str(key)], value.get(key) if isinstance(value, Mapping) else None
    for member in choices(tp):
        origin, args = typing.get_origin(member), typing.get_args(member)
        if origin is dict and isinstance(key, str):
            return args[1], value.get(key) if isinstance(value, Mapping) else None
        if origin is tuple and args and isinstance(key, int):
            if not isinstance(value, (list, tuple)) or not 0 <= key < len(value):
                return None
            return args[0] if args[-1] is ... else args[key], value[key]
        if member is Any or member is dict:
            return Any, value.get(key) if isinstance(value, Mapping) else None
    return None


def _descend(node: Any, keys: tuple) -> Any:
    """The container that `keys` lead to; a part that is None or absent becomes an empty mapping (all
    defaults).
    """
    for key in keys:
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]
    return node


def _choose(result: dict, keys: tuple, kind: str) -> None:
    """Makes the part at `keys` of class `kind`; when it was of another class it starts from that class'
    defaults.
    """
    parent = _descend(result, keys[:-1])
    before = parent[keys[-1]] if isinstance(keys[-1], int) else parent.get(keys[-1])
    if not isinstance(before, Mapping) or before.get(KIND) != kind:
        parent[keys[-1]] = {KIND: kind}

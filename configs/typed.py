"""Frozen dataclasses from plain mappings and back: strict types, errors that name the key and its like.

What a field may be: `int`, `float`, `bool`, `str`, `Any`, `Literal`, `tuple[T, ...]`, `tuple[A, B]`,
`dict[str, T]`, `T | None`, a dataclass, or a union of dataclasses. A value of such a union is written as a
mapping with the name of the class under the key `kind`; without it, the class is that of the field's default, or the
first of the union where the default is None. Ints are taken for floats; bools are never ints; "1" is
never 1.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")
KIND = "kind"  # the key that names the class where a field is a union of dataclasses


class ConfigError(ValueError):
    """A config, an override or a path that the user has to mend; its message needs no trace."""


def check_at_least(least: int, **values: float) -> None:
    """Raises ValueError that names the first key below `least`, or not finite."""
    for name, value in values.items():
        if not least <= value < math.inf:
            raise ValueError(f"{name}={value}; wanted at least {least}.")


def check_above(bound: int, **values: float) -> None:
    """Raises ValueError that names the first key not above `bound`, or not finite."""
    for name, value in values.items():
        if not bound < value < math.inf:
            raise ValueError(f"{name}={value}; wanted more than {bound}.")


def build(cls: type[T], mapping: Mapping[str, Any], where: str = "config") -> T:
    """An instance of the dataclass `cls` from a nested mapping; keys left out take their defaults.

    `where` opens every error, e.g. "configs/demo.py: config". Raises ConfigError for an unknown or missing
    key, for a value of another type, and for what a dataclass' own `__post_init__` refuses with a ValueError.
    """
    return typing.cast(T, _convert(cls, mapping, where))


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON-able mapping (tuples as lists, unions tagged) from which `build` makes an equal instance."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"to_dict wants a dataclass instance, not {config!r}")
    return _to_plain(type(config), config)


def overlay(cls: type, mapping: Mapping[str, Any], where: str = "config") -> dict[str, Any]:
    """The defaults of `cls` overlaid with `mapping`, as a plain nested dict.

    Keys and types are checked as by `build`, but a required key that is missing stays missing, so that it can
    still be given by an override.
    """
    mapping = _a_mapping(cls, mapping, where)
    _check_keys(cls, mapping, where)
    hints, merged = type_hints(cls), {}
    for field in init_fields(cls):
        if field.name in mapping:
            value = with_kind(hints[field.name], mapping[field.name], default_of(field))
            merged[field.name] = _overlay_value(hints[field.name], value, f"{where}.{field.name}")
        elif (default := default_of(field)) is not dataclasses.MISSING:
            merged[field.name] = _to_plain(hints[field.name], default)
    return merged


def nearest(given: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` of the dotted keys `known` that `given` may have been meant for, best first."""
    known = list(known)
    last = given.rsplit(".", 1)[-1]
    by_last = [
        key for key in known if difflib.SequenceMatcher(None, last, key.rsplit(".", 1)[-1]).ratio() > 0.8
    ]
    whole = difflib.get_close_matches(given, known, n=count, cutoff=0.7)
    by_last.sort(key=lambda key: -difflib.SequenceMatcher(None, given, key).ratio())
    return list(dict.fromkeys([*whole, *by_last]))[:count]


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The last sentence of an error about an unknown key: the nearest keys, or those that there are."""
    known = sorted(known)
    if close := nearest(given, known):
        return "Did you mean " + " or ".join(close) + "?"
    if not known:
        return "No keys are known here."
    return "Known here: " + ", ".join(known[:12]) + (", ..." if len(known) > 12 else "") + "."


def type_name(tp: Any) -> str:
    """How a type is written in help and errors: `float`, `float | None`, `tuple[int, ...]`, `Adam | Muon`."""
    if tp is type(None):
        return "None"
    if is_union(tp):
        return " | ".join(type_name(arg) for arg in typing.get_args(tp))
    if isinstance(tp, type) and not typing.get_args(tp):
        return tp.__name__
    if typing.get_origin(tp) is Literal:
        return " | ".join(repr(arg) for arg in typing.get_args(tp))
    if (origin := typing.get_origin(tp)) is not None:
        return f"{origin.__name__}[{', '.join(type_name(arg) for arg in typing.get_args(tp))}]"
    return "..." if tp is ... else str(tp).removeprefix("typing.")


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    """The resolved type of every field of a dataclass."""
    return typing.get_type_hints(cls)


def init_fields(cls: type) -> list[dataclasses.Field]:
    """The fields that a config may set."""
    return [field for field in dataclasses.fields(cls) if field.init]


def default_of(field: dataclasses.Field) -> Any:
    """A field's default, called each time when it has a factory; `dataclasses.MISSING` when it is required."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def is_config(tp: Any) -> bool:
    """Whether `tp` is a dataclass."""
    return isinstance(tp, type) and dataclasses.is_dataclass(tp)


def is_union(tp: Any) -> bool:
    """Whether `tp` is `A | B`, `Union[A, B]` or `Optional[A]`."""
    return typing.get_origin(tp) in (Union, types.UnionType)


def choices(tp: Any) -> tuple[Any, ...]:
    """The members of a union without None; of any other type, that type alone."""
    members = typing.get_args(tp) if is_union(tp) else (tp,)
    return tuple(member for member in members if member is not type(None))


def tagged(tp: Any) -> dict[str, type]:
    """{class name: class} when `tp` is a union of two or more dataclasses (None aside), else {}."""
    classes = [member for member in choices(tp) if is_config(member)]
    if len(classes) < 2:
        return {}
    for cls in classes:
        if any(field.name == KIND for field in dataclasses.fields(cls)):
            raise TypeError(
                f"{cls.__name__} is in a union, so it cannot have a field of its own named {KIND!r}"
            )
    return {cls.__name__: cls for cls in classes}


def with_kind(tp: Any, value: Any, default: Any) -> Any:
    """`value` of a field of type `tp`; where it names no class of a union, with that of the field's default."""
    names = tagged(tp)
    if not names or not isinstance(value, Mapping) or KIND in value or default is dataclasses.MISSING:
        return value
    if default is None:
        return {KIND: next(iter(names)), **value}
    return {KIND: type(default).__name__, **value} if type(default).__name__ in names else value


def class_of(tp: Any, value: Any, where: str) -> tuple[type | None, Any]:
    """The dataclass that `value` is written for, and the value without its tag; (None, value) for other
    types.
    """
    if not isinstance(value, Mapping):
        return (
            (type(value), value)
            if any(type(value) is member for member in choices(tp) if is_config(member))
            else (None, value)
        )
    by_name = tagged(tp)
    if not by_name:
        classes = [member for member in choices(tp) if is_config(member)]
        return (classes[0] if classes else None), value
    kind = value.get(KIND)
    if kind not in by_name:
        got = f"{where}.{KIND}={kind!r} is unknown" if KIND in value else f"{where} has no {KIND!r}"
        raise ConfigError(
            f"{got}; it says which of {', '.join(by_name)} this is. " + did_you_mean(str(kind), by_name)
        )
    return by_name[kind], {key: item for key, item in value.items() if key != KIND}


def _convert(tp: Any, value: Any, where: str) -> Any:
    """`value` as the type `tp`, or a ConfigError that opens with `where`."""
    if is_union(tp):
        return _convert_union(tp, value, where)
    if is_config(tp):
        return value if type(value) is tp else _construct(tp, _a_mapping(tp, value, where), where)
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if tp is Any or tp is object:
        return _json_value(value, where)
    if origin is Literal:
        for allowed in args:
            if type(value) is type(allowed) and value == allowed:
                return value
        raise _wrong_type(tp, value, where)
    if tp is tuple or origin is tuple:
        return _convert_tuple(tp, args, value, where)
    if tp is dict or origin is dict:
        return _convert_dict(tp, args, value, where)
    if tp is float and type(value) is int:
        return _int_as_float(value, where)
    if tp in (int, float, str, bool):
        if type(value) is not tp:
            raise _wrong_type(tp, value, where)
        if value != value:
            raise ConfigError(f"{where}=nan is no number. Wanted {type_name(tp)}.")
        return value
    raise TypeError(
        f"{where}: {type_name(tp)} is not a type that a config field can have (see configs/typed.py)"
    )


def _convert_union(tp: Any, value: Any, where: str) -> Any:
    if value is None:
        if type(None) in typing.get_args(tp):
            return None
        raise _wrong_type(tp, value, where)
    cls, body = class_of(tp, value, where)
    if cls is not None:
        return _convert(cls, body, where)
    members = choices(tp)
    if len(members) == 1 and (is_config(members[0]) or typing.get_origin(members[0]) in (tuple, dict)):
        return _convert(members[0], value, where)  # whose error may be deeper inside
    if type(value) is int and int in members:  # an int meant as such, in `float | int`
        return value
    for member in members:
        if is_config(member):
            continue
        try:
            return _convert(member, value, where)
        except ConfigError:
            continue
    raise _wrong_type(tp, value, where)


def _construct(cls: type, mapping: Mapping[str, Any], where: str) -> Any:
    _check_keys(cls, mapping, where)
    hints, values = type_hints(cls), {}
    for field in init_fields(cls):
        if field.name in mapping:
            value = with_kind(hints[field.name], mapping[field.name], default_of(field))
            values[field.name] = _convert(hints[field.name], value, f"{where}.{field.name}")
        elif default_of(field) is dataclasses.MISSING:
            raise ConfigError(
                f"{where}.{field.name} is required and has no default; wanted {type_name(hints[field.name])}."
            )
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert_tuple(tp: Any, args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong_type(tp, value, where)
    if not args or (len(args) == 2 and args[1] is ...):
        kinds: Iterable[Any] = [args[0] if args else Any] * len(value)
    elif len(args) != len(value):
        raise ConfigError(f"{where}={value!r} has {len(value)} items; wanted {type_name(tp)}.")
    else:
        kinds = args
    return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value)))


def _convert_dict(tp: Any, args: tuple[Any, ...], value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong_type(tp, value, where)
    if args and args[0] is not str:
        raise TypeError(f"{where}: a config's dict has str keys, not {type_name(args[0])}")
    return {key: _convert(args[1] if args else Any, item, f"{where}.{key}") for key, item in value.items()}


def _json_value(value: Any, where: str) -> Any:
    """An untyped value: JSON's types, with tuples as lists so that saving and loading changes nothing."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        return [_json_value(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _json_value(item, f"{where}.{key}") for key, item in value.items()}
    raise ConfigError(f"{where}={value!r} is of type {type(value).__name__}; wanted what JSON can hold.")


def _int_as_float(value: int, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{where} is an int of {value.bit_length()} bits, too large for a float.") from None


def _overlay_value(tp: Any, value: Any, where: str) -> Any:
    cls, body = class_of(tp, value, where)
    if cls is not None:
        body = to_dict(body) if dataclasses.is_dataclass(body) else body
        tag = {KIND: cls.__name__} if tagged(tp) else {}
        return tag | overlay(cls, body, where)
    return _to_plain(tp, _convert(tp, value, where))


def _to_plain(tp: Any, value: Any) -> Any:
    """The JSON-able form of a value whose declared type is `tp` (which decides whether it is tagged)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = type_hints(type(value))
        plain = {
            field.name: _to_plain(hints[field.name], getattr(value, field.name))
            for field in init_fields(type(value))
        }
        return {KIND: type(value).__name__} | plain if tagged(tp) else plain
    if isinstance(value, Mapping):
        item_type = _item_types(tp, Mapping)
        return {key: _to_plain(item_type(0), item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        item_type = _item_types(tp, tuple)
        return [_to_plain(item_type(i), item) for i, item in enumerate(value)]
    return value


def _item_types(tp: Any, container: type) -> Any:
    """index -> declared type of an item in a tuple or dict type (looked for in a union too), else Any."""
    for member in choices(tp):
        origin, args = typing.get_origin(member), typing.get_args(member)
        if container is tuple and origin is tuple and args:
            return lambda i, args=args: args[0] if args[-1] is ... else args[i]
        if container is Mapping and origin is dict and args:
            return lambda i, args=args: args[1]
    return lambda i: Any


def _a_mapping(cls: type, value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{where}={value!r} is of type {type(value).__name__}; wanted a mapping of {cls.__name__}'s keys."
        )
    return value


def _check_keys(cls: type, mapping: Mapping[str, Any], where: str) -> None:
    known = [field.name for field in init_fields(cls)]
    for key in mapping:
        if key not in known:
            raise ConfigError(
                f"{where}.{key} is not a key of {cls.__name__}. " + did_you_mean(str(key), known)
            )


def _wrong_type(tp: Any, value: Any, where: str) -> ConfigError:
    return ConfigError(f"{where}={value!r} is of type {type(value).__name__}; wanted {type_name(tp)}.")

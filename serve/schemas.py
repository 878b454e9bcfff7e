"""JSON schemas with `oneOf`, which llguidance can't count: it becomes `anyOf` where no value matches two branches."""

from __future__ import annotations

import itertools
import json
from typing import Any

_DEPTH = 12  # of references and branches that are followed; beyond, nothing is known
_DATA = ("const", "enum", "default", "examples")  # keys with values instead of schemas
_KINDS = ("object", "array", "string", "number", "boolean", "null")


def with_exclusive_branches(schema: Any) -> Any:
    """The schema, with each `oneOf` of branches that exclude each other as the `anyOf` that accepts the same values."""
    return _rewritten(schema, schema)


def _rewritten(node: Any, root: Any) -> Any:
    if isinstance(node, list):
        return [_rewritten(member, root) for member in node]
    if not isinstance(node, dict):
        return node
    new = {key: value if key in _DATA else _rewritten(value, root) for key, value in node.items()}
    branches = node.get("oneOf")
    if isinstance(branches, list) and all(
        _exclude(a, b, root) for a, b in itertools.combinations(branches, 2)
    ):
        # In `allOf`, because the schema can have an `anyOf` of its own.
        name, value = (
            ("allOf", [*new.get("allOf", []), {"anyOf": new["oneOf"]}])
            if "anyOf" in new
            else ("anyOf", new["oneOf"])
        )
        new = {key: kept for key, kept in new.items() if key != "oneOf"} | {name: value}
    return new


def _exclude(a: Any, b: Any, root: Any, depth: int = _DEPTH) -> bool:
    """Whether it is certain that no value matches both schemas."""
    if a is False or b is False:
        return True
    if not (isinstance(a, dict) and isinstance(b, dict)) or depth == 0:
        return False
    for one, other in ((a, b), (b, a)):
        if "$ref" in one and _exclude(_target(one["$ref"], root), other, root, depth - 1):
            return True
        if any(_exclude(part, other, root, depth - 1) for part in _schemas(one, "allOf")):
            return True
        for key in ("anyOf", "oneOf"):
            parts = _schemas(one, key)
            if parts and all(_exclude(part, other, root, depth - 1) for part in parts):
                return True
    if not _kinds(a) & _kinds(b):
        return True
    values_a, values_b = _values(a), _values(b)
    if values_a is not None and values_b is not None and not values_a & values_b:
        return True
    objects = _kinds(a) == _kinds(b) == {"object"}
    return objects and _exclude_by_properties(a, b, root, depth)


def _exclude_by_properties(a: dict, b: dict, root: Any, depth: int) -> bool:
    """Of objects: one requires a property that the other forbids, or both require one that can't match both."""
    for one, other in ((a, b), (b, a)):
        for name in _required(one):
            schemas = _properties(other)
            closed = other.get("additionalProperties") is False and not other.get("patternProperties")
            if schemas.get(name, not closed) is False:
                return True
    return any(
        _exclude(_properties(a).get(name), _properties(b).get(name), root, depth - 1)
        for name in _required(a) & _required(b)
    )


def _kinds(schema: dict) -> set[str]:
    """The types of value that the schema may match; an integer is a number."""
    kinds: set[str] = set(_KINDS)
    named = schema.get("type")
    if isinstance(named, (str, list)):
        named = [named] if isinstance(named, str) else named
        kinds &= {"number" if name == "integer" else name for name in named}
    values = _data(schema)
    return kinds if values is None else kinds & {_kind(value) for value in values}


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    kinds = {dict: "object", list: "array", str: "string"}
    return kinds.get(type(value), "number")


def _data(schema: dict) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _values(schema: dict) -> set[str] | None:
    """The values of `const` or `enum`, as text; equal numbers are equal texts."""
    values = _data(schema)
    return None if values is None else {json.dumps(_whole(value), sort_keys=True) for value in values}


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(member) for member in value]
    return {key: _whole(member) for key, member in value.items()} if isinstance(value, dict) else value


def _properties(schema: dict) -> dict[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _required(schema: dict) -> set[str]:
    required = schema.get("required")
    return {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()


def _schemas(schema: dict, key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _target(reference: Any, root: Any) -> Any:
    """What a reference within the schema points to; None for any other."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    node = root
    for part in reference[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node

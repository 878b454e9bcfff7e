"""Request bodies, read strictly: JSON within bounds, and a reason for everything that is wrong."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import pydantic
from pydantic import ConfigDict

from serve.http.errors import ApiError

MAX_NESTING = 64  # levels of objects and lists in a body


class Strict(pydantic.BaseModel):
    """Takes no other fields, and no value of another type."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


BodyType = TypeVar("BodyType", bound=pydantic.BaseModel)


def validated(kind: type[BodyType], fields: dict[str, Any]) -> BodyType:
    """The fields as a model; ApiError with status 400 that names the first wrong one. Nulls ask for nothing."""
    try:
        return kind.model_validate({name: value for name, value in fields.items() if value is not None})
    except pydantic.ValidationError as error:
        raise _first_reason(error) from None


def json_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`; ApiError with status 400 for anything else."""

    def no_constant(name: str):
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=no_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # escapes can spell lone surrogates
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply.") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body has a lone surrogate (half of a \\ud83d\\ude42 pair).") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}.") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object; it is {shown(value)}.")
    _check_nesting(value)
    return value


def _check_nesting(value: Any) -> None:
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, (dict, list))]:
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
        depth += 1
        if depth > MAX_NESTING:
            raise ApiError(400, f"the body is nested too deeply: more than {MAX_NESTING} levels.")


def _first_reason(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {path[:100]}", path[:100])
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: {path}.", path)
    return ApiError(400, f"{path}={shown(first['input'])}: {first['msg']}.", path)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value as an error shows it."""
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 100 else text[:97] + "..."

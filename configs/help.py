"""What `--help` prints: the stage, how to call it, and every config key with its type, value and meaning."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Mapping
from typing import Any

from configs.overrides import leaves
from configs.typed import KIND, choices, is_config, tagged, type_hints, type_name


def help_text(
    cls: type,
    mapping: Mapping[str, Any],
    description: str,
    program: str,
    flags: Mapping[str, Any],
    default_config: str | None,
    workdir_required: bool,
) -> str:
    """The whole help page; `mapping` is the config (defaults overlaid with a file) whose values are shown."""
    config = f"[--config=FILE]  (default {default_config})" if default_config else "--config=FILE"
    workdir = "--workdir=FOLDER" if workdir_required else "[--workdir=FOLDER]"
    lines = [
        description.strip(),
        "",
        "usage:",
        f"  {program} {config} {workdir} [--config.KEY=VALUE ...]",
        "",
    ]
    lines += [
        "  --config=FILE       a .py file with get_config() (FILE.py:ARGUMENT passes it an argument),",
        "                      a saved config.json, or the folder of an earlier run",
        "  --workdir=FOLDER    where this run keeps everything; the same command again resumes it",
    ]
    lines += [
        f"  --{name}={flag.type.__name__}  {flag.doc} (default {flag.default})"
        for name, flag in flags.items()
    ]
    keys = leaves(cls, mapping)
    if examples := _examples(keys):
        lines += ["", "examples of overrides:", *(f"  {example}" for example in examples)]
    lines += ["", "config keys:"]
    for path, tp, value in keys:
        shown = "(required)" if value is ... else f"= {json.dumps(value)}"
        lines += textwrap.wrap(
            f"--config.{path}  {type_name(tp)} {shown}", 110, initial_indent="  ", subsequent_indent="      "
        )
        if doc := _doc_at(cls, mapping, path):
            lines += textwrap.wrap(doc, 104, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines).lstrip("\n")


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """{field: what it is for}.

    From `field(metadata={"doc": ...})`, else the class' source: the comment on the field's line, the string
    below it, or the comment lines above it.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base) and "__dataclass_fields__" in vars(base):
            docs |= _docs_in_source(base)
    for field in dataclasses.fields(cls):
        if "doc" in field.metadata:
            docs[field.name] = field.metadata["doc"]
    return docs


def _docs_in_source(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
        body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError, IndexError):
        return {}
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    docs = {}
    for node, after in zip(body, [*body[1:], None]):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above, number = [], node.lineno - 1
        while number in comments and lines[number - 1].lstrip().startswith("#"):
            above.insert(0, comments[number])
            number -= 1
        same_line = [
            comments[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in comments
        ]
        below = ""
        if (
            isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            below = inspect.cleandoc(after.value.value)
        if doc := " ".join(same_line) or below or " ".join(above):
            docs[node.target.id] = doc
    return docs


def _doc_at(cls: type, mapping: Mapping[str, Any], path: str) -> str:
    """The documentation of the field that a leaf's path names."""
    *parts, last = path.split(".")
    for part in parts:
        tp, value = type_hints(cls)[part], mapping.get(part)
        names = tagged(tp)
        if last == KIND and part == parts[-1] and names:
            return field_docs(cls).get(part, "")
        fields = value if isinstance(value, Mapping) else {}
        chosen = names[str(fields[KIND])] if names else next(filter(is_config, choices(tp)))
        cls, mapping = chosen, fields
    return field_docs(cls).get(last, "")


def _examples(keys: list[tuple[str, Any, Any]]) -> list[str]:
    """A real override for each of a few types, made of this config's own keys."""
    found = {}
    for path, tp, value in keys:
        name = type_name(tp)
        if value in (..., None, [], {}) or name in found or len(found) == 5:
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        text = f"'{text}'" if any(mark in text for mark in '[{" (') else text
        if len(text) < 60:
            found[name] = f"--config.{path}={text}"
    return list(found.values())

"""A constitution: a file of principles, each with the requests for a critique and for a revision by it.

JSON or JSONL: an array (or lines) of texts or of objects {"text", "critique", "revision"}. Markdown: each item of a
list is a principle, with items below it that begin with "critique:" or "revision:"; headings and paragraphs are for
readers.

    - The answer is polite.
      - critique: Is anything in your answer impolite? Quote it.
      - revision: Write the answer again without it.

Bai et al. 2022 (Constitutional AI), arXiv:2212.08073.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs import ConfigError
from data.row_files import RowError, read_rows

CRITIQUE = (
    "Read your last answer again under this principle: {principle}\n"
    "Name each place in which the answer goes against the principle, and say why. Do not write a new answer yet."
)
REVISION = (
    "Write your last answer again so that it follows this principle: {principle}\n"
    "Mend what the critique names and keep all that was good. Write nothing but the new answer."
)
MAX_CHARACTERS = 8000  # of each text of a principle
_KEYS = ("text", "critique", "revision")
_MARKDOWN = (".md", ".markdown")
_ITEM = re.compile(r"(?P<indent>[ \t]*)(?:[-*+]|\d+[.)])(?:\s+(?P<text>.*))?$")


@dataclasses.dataclass(frozen=True)
class Principle:
    """`{principle}` in a request stands for the principle's text."""

    text: str
    critique: str = CRITIQUE
    revision: str = REVISION

    @property
    def critique_request(self) -> str:
        return fill(self.critique, principle=self.text)

    @property
    def revision_request(self) -> str:
        return fill(self.revision, principle=self.text)


def read_constitution(path: str | os.PathLike) -> tuple[Principle, ...]:
    """The principles of a file. Raises ConfigError that names file, line, what was wrong and what was wanted."""
    path = Path(path)
    if not path.name:
        raise ConfigError("give config.constitution: a JSON or Markdown file of principles.")
    rows = _markdown_rows(path) if path.suffix in _MARKDOWN else ((r.where, r.value) for r in read_rows(path))
    found: dict[str, str] = {}
    principles = []
    for where, row in rows:
        if isinstance(row, RowError):
            raise ConfigError(f"{path}, {where}: {row}.")
        principle = _principle(row, f"{path}, {where}")
        if principle.text in found:
            raise ConfigError(f"{path}, {where}: the principle of {found[principle.text]} again. Remove one.")
        found[principle.text] = where
        principles.append(principle)
    if not principles:
        wanted = "a list with an item for each principle" if path.suffix in _MARKDOWN else "an array of texts"
        raise ConfigError(f"{path}: holds no principle; wanted {wanted}.")
    return tuple(principles)


def draw(principles: tuple[Principle, ...], seed: int, prompt: int, round: int) -> Principle:
    """The principle of a prompt and round: the same for the same numbers."""
    return principles[int(np.random.default_rng([seed, prompt, round]).integers(len(principles)))]


def fill(template: str, **texts: str) -> str:
    """The template with {name} replaced by texts[name], in one pass: braces in a text stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), template)


def check_template(name: str, template: str, *wanted: str) -> None:
    """Raises ValueError where a template lacks a place that it must have."""
    missing = [place for place in wanted if f"{{{place}}}" not in template]
    if missing:
        raise ValueError(f"{name} lacks {{{missing[0]}}}: what it stands for would never be shown.")


def _principle(row: Any, where: str) -> Principle:
    row = {"text": row} if isinstance(row, str) else row
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where}: {row!r:.60} is no principle; wanted a text, or an object with 'text'.")
    if unknown := [key for key in row if key not in _KEYS]:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r:.60}; known are {', '.join(_KEYS)}.")
    if "text" not in row:
        raise ConfigError(f"{where}: a principle without 'text'.")
    for key, text in row.items():
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{where}: {key} is {text!r:.60}; wanted a text that is not empty.")
        if len(text) > MAX_CHARACTERS:
            raise ConfigError(
                f"{where}: {key} has {len(text)} characters; at most {MAX_CHARACTERS} are read."
            )
    return Principle(**{key: text.strip() for key, text in row.items()})


def _markdown_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, principle as an object or the RowError in its place) of each item of the outermost lists."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist (from {os.getcwd()}).")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error
    where, row, key, goes_on = "", {}, "", False
    for number, line in enumerate(lines, start=1):
        item = _ITEM.match(line)
        indented, followed = line[:1] in (" ", "\t"), goes_on
        goes_on = bool(line.strip()) and (item is not None or goes_on or indented)
        if item is not None and not item["indent"]:
            if row:
                yield where, row
            where, row, key = f"line {number}", {"text": item["text"] or ""}, "text"
        elif item is not None:
            key, _, text = (item["text"] or "").partition(":")
            key = key.strip().lower()
            if not row or key not in _KEYS[1:] or key in row:
                what = (
                    f"{line.strip()[:60]!r}; wanted one '- critique: ...' and one '- revision: ...' at most"
                )
                yield f"line {number}", RowError("an item that belongs to no principle", what)
                return
            row[key] = text.strip()
        elif row and line.strip() and (indented or (followed and not line.startswith("#"))):
            row[key] = f"{row[key]} {line.strip()}".strip()
        elif line.strip():  # a heading or paragraph ends the list
            if row:
                yield where, row
            row = {}
    if row:
        yield where, row

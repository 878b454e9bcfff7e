"""The running interpreter's library as a source: prose and code that lie on every Python machine."""

from __future__ import annotations

import ast
import dataclasses
import sys
import sysconfig
import tokenize
from collections.abc import Sequence
from pathlib import Path

from data.documents import Document, Rejected, make_document
from data.shards import hash_of
from data.sources.base import Items, SourceBase


@dataclasses.dataclass(frozen=True)
class PythonStdlib(SourceBase):
    """Prose and code that lie on every Python machine: the running interpreter's library.

    Its sources (without tests and site-packages) are code; the docstrings of each module, and the language
    reference in `pydoc_data.topics`, are prose. A module's code and docstrings are one group, so that a split
    never has a docstring on one side and its source on the other.
    """

    code: bool = True
    docstrings: bool = True
    topics: bool = True
    max_bytes: int | None = None  # of source files, taken in the order of a hash of their names
    name: str = "python_stdlib"

    def files(self) -> list[str]:
        return [str(path) for path in self._modules()]

    def within(self, path: str) -> str:
        return Path(path).relative_to(sysconfig.get_paths()["stdlib"]).as_posix()

    def state(self) -> str:
        return sys.version

    def groups(self) -> list[list[str]]:
        return [self.files()]  # and the topics, which are no file

    def _modules(self) -> list[Path]:
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {
            "test",
            "tests",
            "idle_test",
            "site-packages",
            "dist-packages",
            "lib2to3",
            "__pycache__",
            "ensurepip",
        }
        found = [p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts)]
        found = [p for p in found if p.relative_to(root).as_posix() != "pydoc_data/topics.py" and p.is_file()]
        found.sort(key=lambda p: hash_of(p.relative_to(root).as_posix()))
        if self.max_bytes is None:
            return found
        kept, size = [], 0
        for path in found:
            size += path.stat().st_size
            if size > self.max_bytes:
                break
            kept.append(path)
        return kept

    def documents(self, paths: Sequence[str] | None = None) -> Items:
        root = Path(sysconfig.get_paths()["stdlib"])
        for path in map(Path, self.files() if paths is None else paths):
            yield from self._module(path, path.relative_to(root).as_posix())
        if self.topics:
            from pydoc_data.topics import topics

            for topic, text in sorted(topics.items()):
                yield _stdlib_document(f"topics/{topic}", text, "prose", f"topics/{topic}")

    def _module(self, path: Path, name: str) -> Items:
        try:
            with tokenize.open(path) as file:  # honours the coding line
                text = file.read()
        except (OSError, SyntaxError, ValueError) as error:
            yield Rejected(f"python_stdlib/{name}", f"unreadable: {error}", "python_stdlib")
            return
        if self.code:
            yield _stdlib_document(name, text, "code", name)
        if self.docstrings:
            try:
                prose = _docstrings(text, name)
            except (SyntaxError, ValueError, RecursionError) as error:
                yield Rejected(
                    f"python_stdlib/{name}#docstrings", f"does not parse: {error}", "python_stdlib"
                )
                return
            if prose:
                yield _stdlib_document(f"{name}#docstrings", prose, "prose", name)


def _stdlib_document(name: str, text: str, kind: str, group: str) -> Document:
    metadata = {"type": kind, "path": name, "group": group}
    return make_document(f"python_stdlib/{name}", text, "python_stdlib", "PSF-2.0", metadata)


def _docstrings(text: str, name: str) -> str:
    """The docstrings of a module, its classes and functions, each under its qualified name."""
    parts: list[str] = []

    def visit(
        node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, qualified: str
    ) -> None:
        if doc := ast.get_docstring(node):
            parts.append(f"{qualified}\n\n{doc}")
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                visit(child, f"{qualified}.{child.name}")

    visit(ast.parse(text), name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    return "\n\n".join(parts)

"""Stages and a source that fail on documents, or die of them, as libraries do: for worker processes to import."""

import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from data.dedup import ExactDedup
from data.documents import DocumentType, make_document
from data.sources.base import SourceBase
from data.stage import Filter, Transform


def harm(text: str, where: str) -> None:
    """A text of "die: PLACE ..." kills the process there; with "raise: PLACE ..." it raises; with "die in: FOLDER" only
    where the folder has no file "died" yet."""
    for line in text.splitlines():
        if line == f"die: {where}":
            os.kill(os.getpid(), signal.SIGKILL)
        if line == f"raise: {where}":
            raise ZeroDivisionError("by this text")
        if line.startswith("die in: "):
            folder = Path(line.removeprefix("die in: "))
            if not (folder / "died").exists():
                (folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class FragileFilter(Filter):
    """Passes all texts that it survives; each process that sees one leaves its number in the folder $SEEN, if any."""

    applies_to: DocumentType = "any"

    def signals(self, text):
        harm(text, "signals")
        if "SEEN" in os.environ:
            (Path(os.environ["SEEN"]) / str(os.getpid())).touch()
        return {"text": text}

    def reason(self, signals):
        harm(signals["text"], "reason")
        return None


@dataclasses.dataclass(frozen=True)
class FragileTransform(Transform):
    """Changes nothing."""

    def apply(self, text):
        harm(text, "transform")
        return text, None


@dataclasses.dataclass(frozen=True)
class FragileDedup(ExactDedup):
    """As its parent."""

    dies: bool = False

    def features(self, documents):
        for _, document in documents:
            harm(document["text"], "features")
        return super().features(documents)

    def resolve(self, corpus):
        if self.dies:
            list(corpus.map(die, ["first", "second"], 1e6))
        yield from super().resolve(corpus)


def die(item):
    os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class FragileFiles(SourceBase):
    """Documents of text files, one a line; "die" and "raise" as the beginning of a line do so."""

    path: str
    name: str = "files"

    def files(self):
        return sorted(str(path) for path in Path(self.path).glob("*.txt"))

    def documents(self, paths: Sequence[str] | None = None):
        for path in self.files() if paths is None else paths:
            for number, line in enumerate(Path(path).read_text().splitlines()):
                if line.startswith("die"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if line.startswith("raise"):
                    raise ZeroDivisionError("by this line")
                yield make_document(f"{Path(path).stem}/{number}", line, "files", "CC0", {"type": "prose"})

"""Sources of documents that other libraries hold: TensorFlow Datasets, seqio Tasks and Mixtures, and datasets in the
form of the Hugging Face hub.

TFDS is read through its data sources, which need no TensorFlow (array_record files only). seqio brings TensorFlow
and is an extra; `datasets` is asked for only where a name of the hub is given.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.typed import ConfigError
from data.documents import Document, Rejected, make_document
from data.row_files import RowError, files_of, read_rows
from data.sources.base import Items, SourceBase


@dataclasses.dataclass(frozen=True)
class TensorFlowDataset(SourceBase):
    """A split of a TFDS builder that has been prepared as array_record, by name or by its folder."""

    name: str  # "wiki40b/en:1.3.0", or the folder that holds dataset_info.json
    split: str = "train"  # also a part: "train[:10%]"
    data_dir: str | None = None  # None: where TFDS keeps its data
    text_field: str = "text"  # "a/b" is field b inside a
    type: str = "prose"
    licence: str = "unknown"

    def files(self) -> list[str]:
        name = re.split(r"\[", self.split)[0]
        return [str(path) for path in self._builder().info.splits[name].filepaths]

    def groups(self) -> list[list[str]]:
        return [self.files()]  # one reader goes through the split

    def documents(self, paths: Sequence[str] | None = None) -> Items:
        builder = self._builder()
        try:
            examples = builder.as_data_source(split=self.split)
        except (ValueError, KeyError) as error:
            known = ", ".join(builder.info.splits)
            raise ConfigError(f"{self.name} has no split {self.split!r}: there are {known}.") from error
        source = builder.info.full_name
        for i in range(len(examples)):
            yield _document(f"{source}/{self.split}/{i}", examples[i], self.text_field, source, self)

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            if (Path(self.name) / "dataset_info.json").is_file():
                builder = tfds.builder_from_directory(self.name)
            else:
                builder = tfds.builder(self.name, data_dir=self.data_dir)
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            raise ConfigError(
                f"TFDS has no dataset {self.name!r}: {str(error).splitlines()[0]} Give a name, or the folder with its "
                "dataset_info.json."
            ) from error
        if not builder.info.splits:
            raise ConfigError(
                f"{self.name} is not prepared in {builder.data_dir}: run tfds build {self.name} "
                "--file_format=array_record, or set data_dir."
            )
        kept_as = builder.info.file_format.value if builder.info.file_format else "no known format"
        if kept_as != "array_record":
            raise ConfigError(
                f"{self.name} is kept as {kept_as}; only array_record is read without TensorFlow: "
                f"run tfds build {self.name} --file_format=array_record."
            )
        return builder


@dataclasses.dataclass(frozen=True)
class SeqioTask(SourceBase):
    """A split of a seqio Task or Mixture, once through. Roberts et al. 2022, arXiv:2203.17189.

    Preprocessors run as the Task has them; what they kept as text is joined into one document.
    """

    name: str  # as it is registered
    module: str = ""  # imported first, so that it registers the Task
    split: str = "train"
    text_fields: tuple[str, ...] = ("inputs_pretokenized", "targets_pretokenized")  # joined by an empty line
    seed: int = 0  # of a Mixture's draws
    type: str = "prose"
    licence: str = "unknown"

    def files(self) -> list[str]:
        """None: what a Task reads is its own affair, so a finished stage is not redone when that changes."""
        self._provider()
        return []

    def groups(self) -> list[list[str]]:
        return [self.files()]

    def documents(self, paths: Sequence[str] | None = None) -> Items:
        provider = self._provider()
        if self.split not in provider.splits:
            known = ", ".join(provider.splits)
            raise ConfigError(f"{self.name} has no split {self.split!r}: there are {known}.")
        # A Task keeps what is beside its output features; a Mixture has to be told.
        keep = {"passthrough_features": self.text_fields} if hasattr(provider, "tasks") else {}
        examples = provider.get_dataset(
            None, split=self.split, shuffle=False, seed=self.seed, num_epochs=1, **keep
        )
        for i, example in enumerate(examples.as_numpy_iterator()):
            name = f"{self.name}/{self.split}/{i}"
            parts = [_as_text(example[field]) for field in self.text_fields if field in example]
            if not parts:
                fields = ", ".join(example)
                raise ConfigError(
                    f"{self.name}: none of text_fields={self.text_fields} is in its examples, which have {fields}. "
                    "Tokenised fields are no text: name those that the Task keeps as text."
                )
            text = "\n\n".join(part for part in parts if part)
            metadata = {"type": self.type, "path": self.name}
            yield _whole(name, text, self.name, self.licence, metadata)

    def _provider(self) -> Any:
        try:
            seqio: Any = importlib.import_module("seqio")
        except ImportError as error:
            raise ConfigError(
                f"seqio is needed for {self.name!r} and can't be imported ({error}): "
                'pip install "crucible-lm[seqio]".'
            ) from error
        if self.module:
            try:
                importlib.import_module(self.module)
            except ImportError as error:
                raise ConfigError(f"module={self.module!r} can't be imported: {error}") from error
        try:
            return seqio.get_mixture_or_task(self.name)
        except ValueError as error:
            raise ConfigError(
                f"seqio knows no Task or Mixture {self.name!r}: set module to the one that registers it."
            ) from error


@dataclasses.dataclass(frozen=True)
class HuggingFaceDataset(SourceBase):
    """A split of a dataset: a local folder as the hub has them (Parquet or JSON files), or a name on the hub.

    A file is of the split whose name is a word of its path ("data/train-00000-of-00002.parquet"); where no path has
    the name of any split, all files are of "train".
    """

    name: str  # folder, or "owner/name" (needs the `datasets` package and the network)
    split: str = "train"
    subset: str | None = None  # sub-folder; on the hub, the configuration
    text_field: str = "text"
    type: str = "prose"
    licence: str = "unknown"

    def files(self) -> list[str]:
        folder = Path(self.name) / (self.subset or "")
        if not folder.is_dir():
            return []
        found = [path for path in map(Path, files_of((str(folder),))) if path.name not in _NOT_DATA]
        words = {path: _words(path.relative_to(folder).as_posix()) for path in found}
        named = [path for path in found if self.split in words[path]]
        if named:
            return [str(path) for path in named]
        if self.split == "train" and not any(_SPLITS & path_words for path_words in words.values()):
            return [str(path) for path in found]
        known = sorted({word for path_words in words.values() for word in path_words & _SPLITS})
        raise ConfigError(f"{folder} has no split {self.split!r}: there are {', '.join(known) or 'none'}.")

    def groups(self) -> list[list[str]]:
        return [[path] for path in self.files()] or [[]]  # nothing to list where it is on the hub

    def documents(self, paths: Sequence[str] | None = None) -> Items:
        source = self.name.rstrip("/").rsplit("/", 1)[-1]
        if not os.path.isdir(self.name):
            for i, row in enumerate(self._from_hub()):
                yield _document(f"{self.name}/{self.split}/{i}", row, self.text_field, self.name, self)
            return
        for path in map(Path, self.files() if paths is None else paths):
            for row in read_rows(path):
                name = f"{source}/{path.relative_to(self.name).as_posix()}/{row.where.split()[-1]}"
                if isinstance(row.value, RowError):
                    yield Rejected(name, f"bad row: {row.value}", source)
                else:
                    yield _document(name, row.value, self.text_field, source, self)

    def _from_hub(self) -> Any:
        download = f"hf download {self.name} --repo-type dataset --local-dir FOLDER, and give the folder"
        try:
            import datasets
        except ImportError as error:
            raise ConfigError(
                f"{self.name!r} is no folder; to read it from the hub: pip install datasets. Or: {download}."
            ) from error
        try:
            return datasets.load_dataset(self.name, self.subset, split=self.split, streaming=True)
        except (
            Exception
        ) as error:  # the library raises errors of many kinds for a name, a network and a split
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"{self.name!r} is no folder, and the hub gives none: {what} Or: {download}."
            ) from error


_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json")
_SPLITS = {"train", "validation", "valid", "val", "dev", "test", "eval"}


def _words(path: str) -> set[str]:
    return set(re.split(r"[^A-Za-z0-9]+", path.lower()))


def _document(
    name: str, example: Any, field: str, source: str, of: TensorFlowDataset | HuggingFaceDataset
) -> Document | Rejected:
    value = example
    for key in field.split("/"):
        if not isinstance(value, Mapping) or key not in value:
            has = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            return Rejected(name, f"bad row: no field {field!r} among {has}", source)
        value = value[key]
    if not isinstance(value, (str, bytes)):
        return Rejected(name, f"bad row: {field} is {type(value).__name__}, not text", source)
    return _whole(name, _as_text(value), source, of.licence, {"type": of.type, "path": of.name})


def _whole(
    name: str, text: str | None, source: str, licence: str, metadata: dict[str, Any]
) -> Document | Rejected:
    if text is None:
        return Rejected(name, "bad row: not UTF-8", source)
    return make_document(name, text, source, licence, metadata)


def _as_text(value: Any) -> str | None:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return value if isinstance(value, str) else None

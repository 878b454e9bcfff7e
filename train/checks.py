"""Checks before training: the datasets against the tokenizer, the model against the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs import ConfigError, to_dict
from data.batches import BatchKind, Reading, open_mixture
from data.mixture import Mixture, Phase, sources_of
from data.shards import read_manifest
from data.tokenize import fingerprint
from data.tokenizer import Tokenizer
from model import ModelConfig
from train.config import DataSpec
from train.presets import Preset


def check_datasets(spec: DataSpec, tokenizer: Tokenizer, source: object, rows: int) -> None:
    """The datasets, validation included, hold ids of this tokenizer; the model's embedding has `rows` rows.

    A manifest without a tokenizer cannot be checked, which is printed.

    Raises:
      ConfigError: names the dataset, its tokenizer, and the fix.
    """
    ours = None
    for folder in _folders(spec):
        manifest = read_manifest(Path(folder))
        size, theirs = manifest.get("vocab_size"), manifest.get("tokenizer")
        if size is not None and size > rows:
            raise ConfigError(
                f"{folder} was written with a tokenizer of {size} tokens, and the model has {rows} rows for them "
                f"(its tokenizer {source} has {tokenizer.vocab_size} tokens). Write the dataset with {source}."
            )
        if theirs is None:
            print(f"{folder} does not name its tokenizer; whether it is {source} is not checked.")
            continue
        ours = ours or fingerprint(tokenizer)
        if theirs != ours and spec.check_tokenizer:
            raise ConfigError(
                f"{folder} was written with another tokenizer (fingerprint {theirs}, {size} tokens) than this run's "
                f"{source} (fingerprint {ours}, {tokenizer.vocab_size} tokens). Write the dataset with {source}, or "
                "give the dataset's tokenizer. If they differ in the chat template or the end tokens alone, set "
                "config.data.check_tokenizer=False."
            )


def check_validation(spec: DataSpec, kind: BatchKind) -> None:
    """The validation data fill at least one row, so that a run does not fail when it first validates.

    Raises:
      DatasetError: a folder is no dataset of this kind, or no record of it fits a row.
    """
    if spec.validation:
        per_step = spec.batch_size // (2 if kind == "preference" else 1)
        reading = Reading(kind, spans=spec.spans)
        opened = open_mixture(spec.validation, per_step, spec.seq_len, spec.seed, reading)
        for folder, source in opened.sources.items():
            if source.packer.dropped:
                print(
                    f"warning: {source.packer.dropped:,} of {opened.sizes[folder].documents:,} records of {folder} are "
                    "longer than a row and left out of the validation: raise seq_len."
                )


def content_of(spec: DataSpec) -> dict[str, str]:
    """A hash of what each training dataset holds, by folder."""
    folders = sources_of(spec.whole_mixture())
    return {folder: read_manifest(Path(folder)).get("sha256", "") for folder in folders}


def check_same_model(stored: ModelConfig, wanted: ModelConfig, workdir: Path, spec: Preset) -> None:
    """A resumed run has the model of its checkpoint.

    Raises:
      ConfigError: names the keys of config.model that differ, or else the parts of the model.
    """
    if stored == wanted:
        return
    before = workdir / "config.json"
    old = json.loads(before.read_text(encoding="utf-8")).get("model", {}) if before.is_file() else {}
    changed = _changes("config.model", old, {"kind": type(spec).__name__} | to_dict(spec)) if old else []
    changed = changed or _changes("model", stored.to_dict(), wanted.to_dict())
    raise ConfigError(
        f"{workdir} holds a checkpoint of another model than the config builds: {', '.join(changed[:8])}. Give the "
        "old values (and config.init_from, if the run began from a model), or start a new run in another --workdir."
    )


def _changes(key: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for name in new for line in _changes(f"{key}.{name}", old.get(name), new[name])]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i in range(len(new)) for line in _changes(f"{key}[{i}]", old[i], new[i])]
    if isinstance(old, list) and isinstance(new, list):
        return [f"{key} has {len(new)} entries (was {len(old)})"]
    return [] if old == new else [f"{key}={new!r} (was {old!r})"]


def _folders(spec: DataSpec) -> Iterable[str]:
    data_mixtures = [spec.whole_mixture()] + ([Mixture((Phase(spec.validation),))] if spec.validation else [])
    return dict.fromkeys(folder for each in data_mixtures for folder in sources_of(each))

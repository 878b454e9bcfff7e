"""What is held together before a run trains: its datasets and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from configs import ConfigError
from data.batches import BatchKind, Reading, open_mixture
from data.mixture import Mixture, Phase, sources_of
from data.shards import read_manifest
from data.tokenize import fingerprint
from data.tokenizer import Tokenizer
from train.config import DataSpec


def check_datasets(spec: DataSpec, tokenizer: Tokenizer, source: object, rows: int) -> None:
    """The datasets, validation too, hold ids of this tokenizer; `rows` are those of the model's embedding.

    A manifest that names no tokenizer can't be checked: that is printed.

    Raises:
      ConfigError: names the dataset, what it was written with, and the mend.
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
            print(f"{folder} does not say which tokenizer wrote it; that it is {source} is not checked.")
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
    """Validation data give rows; else a run would learn it when it first validates, maybe at its end.

    Raises:
      DatasetError: a folder that is no dataset of this kind, or none of whose records fits a row.
    """
    if spec.validation:
        per_step = spec.batch_size // (2 if kind == "preference" else 1)
        open_mixture(spec.validation, per_step, spec.seq_len, spec.seed, Reading(kind))


def _folders(spec: DataSpec) -> Iterable[str]:
    mixtures = [spec.whole_mixture()] + ([Mixture((Phase(spec.validation),))] if spec.validation else [])
    return dict.fromkeys(folder for mixture in mixtures for folder in sources_of(mixture))

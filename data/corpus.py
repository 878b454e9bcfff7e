"""The whole of `python -m data`: curation, a tokenizer trained on the result, and token datasets to train
on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from configs.files import atomic_write, save
from configs.typed import ConfigError, to_dict
from data import storage
from data.curation import CurationConfig, curate
from data.curation import table as curation_table
from data.curation.run import Log
from data.load import load_tokenizer
from data.shards import Dataset, hash_of
from data.tasks import INSTRUCTION, TaskSpec, dialogue, generate
from data.tokenize import tokenize_dataset
from data.tokenizer import Tokenizer, read_json
from data.tokenizer.training import PatternName, SpecialTokens, TextLimits, TokenizerKind, train_tokenizer


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer is trained on the training split, or taken from elsewhere."""

    kind: TokenizerKind = "bpe"
    vocab_size: int = 8192  # ids in all; special tokens and the 256 bytes are among them
    pattern: PatternName = "ours"  # how bpe cuts text into words
    digits: int | None = (
        None  # numbers are cut into groups of up to so many digits; None: as the pattern does
    )
    reserved: int = 0  # special tokens <|reserved_0|> and on, for later uses
    max_bytes: int | None = 256 << 20  # of text to train on; None: all of it
    tasks: tuple[TaskSpec, ...] = ()  # reasoning-gym tasks whose dialogues are learned from too
    task_problems: int = 1000  # how many of these dialogues, from the tasks' training split
    instruction: str = INSTRUCTION  # follows each question in them
    path: str | None = None  # a tokenizer, model or run folder to use as it is, and train none


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Raw text to a curated corpus, a tokenizer and token datasets."""

    curation: CurationConfig = dataclasses.field(default_factory=CurationConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What `build_corpus` made: text and token datasets by split (train, validation, test), and the
    tokenizer.
    """

    workdir: Path
    text: dict[str, Dataset]
    tokens: dict[str, Dataset]
    tokenizer: Tokenizer

    def table(self) -> str:
        """Counts of every stage and split, to print."""
        lines = [curation_table(self.workdir), "", f"tokenizer: {self.tokenizer.vocab_size:,} ids"]
        for split, dataset in self.tokens.items():
            tokens, size = dataset.manifest["tokens"], dataset.manifest["bytes"]
            lines.append(
                f"tokens/{split}: {tokens:,} tokens of {size:,} bytes, {size / max(tokens, 1):.2f} bytes a "
                "token"
            )
        return "\n".join(lines)


def build_corpus(config: CorpusConfig, workdir: str | os.PathLike, log: Log | None = None) -> Corpus:
    """Makes (or finds made) `workdir/text/*`, `workdir/tokenizer` and `workdir/tokens/*`, in that order.

    The same call again goes on where an earlier one stopped, and redoes only what a changed config touches.
    `log` takes a line of progress (default: stderr). Raises ConfigError for what the user has to mend.
    """
    workdir = storage.local(workdir, "the workdir")
    save(config, workdir / "config.json")
    text = curate(config.curation, workdir, log)
    tokenizer = _tokenizer(config.tokenizer, text["train"], workdir, log)
    tokens = {}
    for split in {"validation", "test"} - set(text):
        shutil.rmtree(workdir / "tokens" / split, ignore_errors=True)  # of an earlier run
    for split in text:
        tokens[split] = tokenize_dataset(
            workdir / "text",
            tokenizer,
            workdir / "tokens" / split,
            split=split,
            processes=config.curation.workers.processes,
            log=log or (lambda line: None),
        )
    return Corpus(workdir, text, tokens, tokenizer)


def _dialogue_texts(config: TokenizerConfig) -> Iterator[str]:
    if config.tasks:
        for problem in generate(config.tasks, "train", config.task_problems, seed=0):
            yield from (f"{m['role']}\n{m['content']}" for m in dialogue(problem, config.instruction))


def _tokenizer(config: TokenizerConfig, text: Dataset, workdir: Path, log: Log | None) -> Tokenizer:
    folder = workdir / "tokenizer"
    key = hash_of(to_dict(config), None if config.path else text.manifest["sha256"])
    done = read_json(folder / "training.json") if folder.is_dir() else None
    if done is not None and done.get("key") == key:
        return load_tokenizer(folder)
    if config.path:
        tokenizer = load_tokenizer(config.path)
    else:
        if log:
            log(f"tokenizer: training {config.vocab_size} ids ({config.kind})")
        texts = itertools.chain((document["text"] for document in text), _dialogue_texts(config))
        try:
            tokenizer = train_tokenizer(
                config.kind,
                texts,
                config.vocab_size,
                SpecialTokens(reserved=config.reserved),
                pattern=config.pattern,
                digits=config.digits,
                limits=TextLimits(config.max_bytes),
            )
        except ValueError as error:
            raise ConfigError(f"config.tokenizer: {error}") from error
    if folder.is_dir():
        for (
            file
        ) in folder.iterdir():  # the marker goes first: half a tokenizer is never taken for a whole one
            if file.name == "training.json":
                file.unlink()
        for name in ("tokenizer.json", "tokenizer.model", "generation_config.json", "chat_template.jinja"):
            (folder / name).unlink(missing_ok=True)
    tokenizer.save(folder)
    atomic_write(folder / "training.json", json.dumps({"key": key, **to_dict(config)}, indent=2) + "\n")
    return load_tokenizer(folder)

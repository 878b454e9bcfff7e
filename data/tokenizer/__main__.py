"""`python -m data.tokenizer train|compare|show|convert`: tokenizers from texts, beside each other, looked into, and
from one file format to another.

    python -m data.tokenizer train book.txt notes/ --out=runs/tokenizer --vocab_size=8192
    python -m data.tokenizer compare runs/tokenizer gpt2.tiktoken --texts english=book.txt notes/ --out=runs/compare
    python -m data.tokenizer show runs/tokenizer --text="It's 1234 o'clock."
    python -m data.tokenizer convert runs/tokenizer our.tiktoken --format=tiktoken

A tokenizer is a run, checkpoint or Hugging Face folder, or a .gguf, .tiktoken, .model or tokenizer.json file. Texts are
plain files, JSONL, Parquet, folders of these, and text datasets.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import sys
import time
import typing
from collections import Counter
from pathlib import Path

from configs.commands import Commands
from configs.files import atomic_write
from data import storage
from data.load import load_tokenizer
from data.tokenizer.convert import FORMATS, convert
from data.tokenizer.interface import to_json
from data.tokenizer.training import PatternName, SpecialTokens, TextLimits, TokenizerKind, train_tokenizer


def main(argv: list[str] | None = None) -> int:
    return _commands().run(argv)


def _commands() -> Commands:
    commands = Commands("python -m data.tokenizer", __doc__)

    train = commands.add("train", _train, "Trains a tokenizer on texts and writes a Hugging Face folder.")
    train.add_argument("texts", nargs="+", help="files, folders or text datasets")
    train.add_argument("--out", required=True, help="the folder to write")
    train.add_argument(
        "--kind", choices=typing.get_args(TokenizerKind), default="bpe", help="what is trained"
    )
    train.add_argument("--vocab_size", type=int, default=32768, help="ids in all, special tokens among them")
    train.add_argument(
        "--pattern", choices=typing.get_args(PatternName), default="ours", help="how bpe cuts words"
    )
    train.add_argument(
        "--digits", type=int, choices=(1, 2, 3), help="of a group in a number; none: the pattern's"
    )
    train.add_argument(
        "--special_tokens", nargs="+", help="instead of the usual four; the first ends a document"
    )
    train.add_argument(
        "--reserved", type=int, default=0, help="further special tokens, <|reserved_0|> and on"
    )
    train.add_argument("--max_bytes", type=int, help="of text to read; none: all")
    train.add_argument(
        "--max_words", type=int, default=1 << 23, help="different words to keep; bounds memory"
    )
    train.add_argument("--text_field", default="text", help="of JSONL and Parquet")

    compare = commands.add(
        "compare", _compare, "Tokenizers over the same texts: a table, compare.json and compare.png."
    )
    compare.add_argument("tokenizers", nargs="+", help="paths, or NAME=PATH")
    compare.add_argument(
        "--texts", nargs="+", required=True, help="NAME=PATH, or folders or .zip of one file a language"
    )
    compare.add_argument("--only", nargs="+", default=[], help="names of texts to keep")
    compare.add_argument("--english", help="the texts that parity is against, which the others translate")
    compare.add_argument("--text_field", default="text", help="of JSONL and Parquet")
    compare.add_argument(
        "--out", default="runs/tokenizers", help="the folder of compare.json and compare.png"
    )

    show = commands.add("show", _show, "A tokenizer's facts, and a text cut into its pieces.")
    show.add_argument("tokenizer")
    show.add_argument(
        "--text", default="def f(x):\n    return x + 1234  # It's na\u00efve, \u4e2d\u6587 \U0001f600"
    )

    to = commands.add("convert", _convert, "Writes a tokenizer in another format; its ids stay the same.")
    to.add_argument("tokenizer")
    to.add_argument("destination", help="a folder (huggingface) or a file")
    to.add_argument("--format", choices=list(FORMATS), required=True)
    return commands


def _train(options: argparse.Namespace) -> int:
    from data.tokenizer.texts import read_texts, size_of

    out, unread = storage.local(options.out, "--out"), Counter[str]()
    texts = read_texts(options.texts, options.text_field, unread)
    start = time.perf_counter()
    with _Progress(size_of(options.texts), options.max_bytes, options.vocab_size) as progress:
        tokenizer = train_tokenizer(
            options.kind,
            texts,
            options.vocab_size,
            _special(options),
            pattern=options.pattern,
            digits=options.digits,
            limits=TextLimits(options.max_bytes, options.max_words),
            progress=progress.update,
        )
    tokenizer.save(out)
    peaks = [
        resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    peak = peaks[0] + (os.cpu_count() or 1) * peaks[1]  # all processes together
    print(
        f"{options.out}: {tokenizer.vocab_size:,} ids ({options.kind}) from {progress.bytes / 1e6:,.1f} MB of text in "
        f"{time.perf_counter() - start:.1f} s; peak memory {peak / 1e6:,.0f} MB"
    )
    for reason, count in unread.most_common():
        print(f"left out: {count:,} with {reason!r}")
    return 0


def _special(options: argparse.Namespace) -> SpecialTokens:
    if not options.special_tokens:
        return SpecialTokens(reserved=options.reserved)
    names, end = options.special_tokens, options.special_tokens[0]
    return SpecialTokens(names, options.reserved, bos=end, eos=(end,), pad=None, chat_template=None)


class _Progress:
    """Two bars on stderr, bytes read and tokens learned, each with its rate and the time left."""

    def __init__(self, size: int | None, max_bytes: int | None, vocab_size: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.bytes, self._started = 0, {}
        known = [n for n in (size, max_bytes) if n is not None]
        self._totals = {"bytes": min(known) if size is not None else None, "tokens": vocab_size}
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        ]
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._tasks: dict[str, typing.Any] = {}

    def __enter__(self) -> _Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, what: str, done: int) -> None:
        """`what`: "bytes" or "tokens"."""
        name, unit, scale = {"bytes": ("reading", "MB", 1e6), "tokens": ("merging", "tokens", 1)}[what]
        if what not in self._tasks:
            self._started[what] = time.perf_counter(), 0 if what == "bytes" else done
            self._tasks[what] = self._bars.add_task(name, total=self._totals[what], rate="")
        if what == "bytes":
            self.bytes = done
        start, first = self._started[what]
        rate = (done - first) / scale / max(time.perf_counter() - start, 1e-9)
        shown = f"{done / scale:,.0f} {unit}, {rate:,.1f} {unit}/s"
        self._bars.update(self._tasks[what], completed=done, rate=shown)


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from data.tokenizer.compare import compare, draw, table
    from data.tokenizer.texts import read_groups

    tokenizers = {}
    for given in options.tokenizers:
        name, _, path = given.rpartition("=")
        tokenizers[name or Path(path).name] = load_tokenizer(path)
    results = compare(
        tokenizers, read_groups(options.texts, options.text_field, options.only), options.english
    )
    console = Console(width=None if sys.stdout.isatty() else 160)
    for part in table(results, options.english):
        console.print(part)
    out = storage.local(options.out, "--out")
    content = {name: dataclasses.asdict(result) for name, result in results.items()}
    atomic_write(out / "compare.json", to_json({"english": options.english, "tokenizers": content}))
    draw(results, options.english, out / "compare.png")
    print(f"{out / 'compare.json'} and compare.png are written.")
    return 0


def _show(options: argparse.Namespace) -> int:
    from rich.console import Console

    from data.tokenizer.show import coloured, facts

    tokenizer, console = load_tokenizer(options.tokenizer), Console()
    for name, value in facts(tokenizer).items():
        console.print(f"{name:>18}  {value}", markup=False, highlight=False)
    console.print()
    console.print(coloured(tokenizer, options.text, console.width - 1))
    ids = tokenizer.encode(options.text)
    size = len(options.text.encode("utf-8"))
    console.print(f"\n{len(ids)} tokens, {size / max(len(ids), 1):.2f} bytes a token", highlight=False)
    return 0


def _convert(options: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(options.tokenizer)
    convert(tokenizer, options.destination, options.format)
    print(f"{options.destination}: {tokenizer.vocab_size:,} ids written as {options.format}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m data --config=configs/data/stdlib.py --workdir=runs/corpus`: raw text to token datasets."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import configs
from configs.typed import ConfigError
from data.card import write_card
from data.corpus import CorpusConfig, build_corpus

DESCRIPTION = """\
Curates text, trains a tokenizer on it, and writes token datasets to train on.

  workdir/text/{train,validation,test}     curated documents
  workdir/dropped/                         every document that a stage dropped, with its reason (Parquet)
  workdir/card.html                        the data card: what each stage did, samples, scores, shares
  workdir/manifest.json                    sources with licences, counts and config hash of every stage
  workdir/tokenizer                        a Hugging Face tokenizer folder
  workdir/tokens/{train,validation,test}   token ids, for `python -m train`

Try configs/data/stdlib.py (needs no data: the Python library itself) or configs/data/folder.py (your own
files: --config=configs/data/folder.py:FOLDER).
The same command again redoes only what changed."""


def main(config: CorpusConfig, workdir: Path) -> int:
    try:
        corpus = build_corpus(config, workdir, log=lambda line: print(line, file=sys.stderr, flush=True))
    except ConfigError:
        if (workdir / "manifest.json").exists():
            print(f"What was dropped, and why: {write_card(workdir)}", file=sys.stderr)
        raise
    print(corpus.table())
    print(f"\nWhat was kept, what went and why: {write_card(workdir)}")
    return 0


if __name__ == "__main__":
    code = configs.run(main, CorpusConfig, description=DESCRIPTION)
    sys.stdout.flush()
    if code == 130:
        os._exit(
            code
        )  # daft's threads are still in a stage; taking Python away under them aborts with a core dump
    sys.exit(code)

"""`python -m data.synthetic --config=configs/data/synthetic.py --workdir=runs/synthetic`: text and dialogues
by a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import configs
from data.synthetic.config import SyntheticConfig
from data.synthetic.run import synthesise

DESCRIPTION = """\
Has a model write text to pretrain on or dialogues to fine-tune on, and keeps what passes.

  recipes   Rephrase, Textbook (text); QuestionAnswer, Backtranslate, SelfInstruct, EvolInstruct, Reasoning (kept where
            a verifier accepts the answer), Code (kept where its tests pass)
  endpoint  any OpenAI-compatible server (`python -m serve` is one), or a function "module:function"

  workdir/text/ or chat.jsonl   what was taken, each row with its provenance
  workdir/rejected.parquet      what was not, with its reason
  workdir/mixture.json          weights beside the real text, which is kept whole unless mix.mode is "replace"
  workdir/report.json           counts, reasons, tokens, diversity, the share of synthetic text

The same command again asks only what was not answered before."""


def main(config: SyntheticConfig, workdir: Path) -> int:
    print(table(synthesise(config, workdir)))
    return 0


def table(report: dict[str, Any]) -> str:
    """The report in lines to print."""
    lines = [f"{report['taken']:,} of {report['jobs']:,} rows taken, from {report['seeds']:,} seeds"]
    lines += [
        f"  {count:8,}  {reason}" for reason, count in sorted(report["rejected"].items(), key=lambda r: -r[1])
    ]
    lines.append(
        f"{report['requests']:,} requests, {report['from_cache']:,} from the cache, {report['failed']:,} failed; "
        f"{report['tokens']:,} tokens"
    )
    lines.append(
        f"different pairs of words {report['diversity']['distinct_2']:.1%}, "
        f"different beginnings {report['diversity']['first_words']:.1%}"
    )
    share = report["share"]
    if share["synthetic_share"] is not None:
        lines.append(f"{share['synthetic_share']:.1%} synthetic beside {share['real']} ({share['mode']})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(configs.run(main, SyntheticConfig, description=DESCRIPTION))

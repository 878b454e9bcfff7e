"""`python -m data.synthetic --config=configs/data/synthetic.py --workdir=runs/synthetic`: text that a model makes."""

from __future__ import annotations

import sys
from pathlib import Path

import configs
from data.synthetic import run
from data.synthetic.config import SyntheticConfig

DESCRIPTION = f"""\
Makes text from seeds with a served model (any OpenAI-compatible endpoint, `python -m serve` is one) or a function, and
keeps what passes the rules.

{(run.__doc__ or "").partition(chr(10))[2].strip(chr(10))}

Recipes: Rephrase, Textbook, QuestionAnswer, Backtranslate, SelfInstruct, EvolInstruct, Reasoning, Code; their prompts
are in data/synthetic/recipes/."""


def main(config: SyntheticConfig, workdir: Path) -> int:
    report = run.synthesise(config, workdir)
    print(f"{report['requests_asked']:,} requests asked, {report['requests_cached']:,} from the cache")
    for label, counts in report["recipes"].items():
        print(f"{label}: " + ", ".join(f"{count:,} {reason}" for reason, count in counts.items()))
    if mixture := report.get("mixture"):
        print(
            f"synthetic share of {workdir / 'mixed' / 'train'}: {mixture['synthetic_share']:.1%} of the bytes"
        )
    return 0


if __name__ == "__main__":
    sys.exit(configs.run(main, SyntheticConfig, description=DESCRIPTION))

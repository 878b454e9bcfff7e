"""`python -m evals --config=configs/evals/core.py --config.model=PATH [--workdir=FOLDER]`: a table of
scores.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import configs
from evals.config import EvalConfig

DESCRIPTION = """Measure a model: bits per byte of texts, exact match on generated tasks, any lm-eval task.

Prints a table with standard errors and writes results.json and samples.jsonl to the workdir (by default
runs/evals/ and the model's path). The same command, given again, measures only what is not measured yet."""


def main(config: EvalConfig, workdir: Path | None) -> int:
    from rich.console import Console

    from evals.evaluate import evaluate
    from evals.results import table
    from model.compilation import prepare_compiler

    prepare_compiler()
    workdir = workdir or default_workdir(config.model)
    results = evaluate(config, workdir)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table(results["rows"], title=results["model"]))
    print(f"\n{workdir / 'results.json'} has these figures, {workdir / 'samples.jsonl'} each item.")
    return 0


def default_workdir(model: str) -> Path:
    """runs/evals/ and the model's path in one name."""
    return Path("runs") / "evals" / (re.sub(r"[^\w.=-]+", "-", model).strip("-.") or "model")


if __name__ == "__main__":
    sys.exit(configs.run(main, EvalConfig, description=DESCRIPTION, workdir_required=False))

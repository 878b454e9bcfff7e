"""`python -m benchmarks.rl_seeds --run=runs/demo`: the gain of GRPO over the fine-tuned model, seed by seed.

Runs the demo's RL stage again under each seed from the same DPO model, measures each policy on the same held-out
problems as the fine-tuned model, and prints a table. Finished seeds are not redone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import configs
from evals.config import EvalConfig
from launch.lifecycle import LifecycleConfig
from rl.config import RLConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished lifecycle's workdir")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    devices = configs.load(LifecycleConfig, options.run / "config.json").cpu_devices
    before = _accuracy(options.run / "eval-sft" / "results.json")
    print(f"{'seed':>6} {'fine-tuned':>18} {'after RL':>18} {'points':>8} {'minutes':>8}", flush=True)
    for seed in options.seeds:
        folder = options.run / "rl-seeds" / str(seed)
        policy = dataclasses.replace(
            configs.load(RLConfig, options.run / "rl" / "stage_config.json"), seed=seed
        )
        measured = configs.load(EvalConfig, options.run / "eval-rl" / "stage_config.json")
        measured = dataclasses.replace(measured, model=str(folder / "rl"), texts={})
        _run("rl", policy, folder / "rl", devices)
        _run("evals", measured, folder / "eval")
        after = _accuracy(folder / "eval" / "results.json")
        gain = 100 * (after[0] - before[0])
        seconds = sum(r["seconds_sampling"] + r["seconds_training"] for r in _training_rows(folder / "rl"))
        shown = [f"{value:.1%} +- {error:.1%}" for value, error in (before, after)]
        print(f"{seed:>6} {shown[0]:>18} {shown[1]:>18} {gain:>+8.1f} {seconds / 60:>8.1f}", flush=True)


def _run(module: str, config: object, folder: Path, devices: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    wanted = configs.save(config, folder / "wanted.json")
    with open(folder / "log.txt", "ab") as log:
        command = [sys.executable, "-m", module, f"--config={wanted}", f"--workdir={folder}"]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _accuracy(results: Path) -> tuple[float, float]:
    rows = json.loads(results.read_text())["rows"]
    row = next(row for row in rows if row["metric"] == "accuracy")
    return row["value"], row["stderr"]


def _training_rows(folder: Path) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == "train"]


if __name__ == "__main__":
    main()

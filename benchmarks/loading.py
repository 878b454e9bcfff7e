"""What loading and converting a made-up checkpoint of 2 GB take: private memory at most, seconds, bytes read.

    python -m benchmarks.loading [--megabytes=2000]

Eight fake devices with parameters split over all of them (fsdp). Memory is that of the process without mapped files
(RssAnon), each figure from a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.model.made_up import write_made_up
from tests.model.test_lazy import MEASURE

HOW = {"eight devices": "mesh", "to Hugging Face": "convert", "to native": "native", "to GGUF": "gguf"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=2000)
    options = parser.parse_args()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    print(
        f"{'checkpoint':<10} {'what':<18} {'peak MB':>8} {'of parameters':>14} {'largest MB':>11} {'seconds':>8}"
    )
    for kind, experts in (("llama", False), ("mixtral", True)):
        with tempfile.TemporaryDirectory() as folder:
            total, largest = write_made_up(Path(folder) / "model", options.megabytes, experts)
            for what, how in HOW.items():
                if experts and how == "gguf":
                    continue
                target = Path(folder) / ("copy.gguf" if how == "gguf" else how)
                command = [sys.executable, "-c", MEASURE, str(Path(folder) / "model"), how, str(target)]
                start = time.monotonic()
                run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                seconds, peak = time.monotonic() - start, json.loads(run.stdout.splitlines()[-1])
                print(
                    f"{kind:<10} {what:<18} {peak / 1e6:>8.0f} {peak / total:>14.2f} {largest / 1e6:>11.1f} "
                    f"{seconds:>8.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""The commands that measure one GPU run on a CPU at a small size, and their parity is of the whole loss."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu
from tests.conftest import ROOT


def test_a_wrong_gradient_is_seen():
    cfg = gpu.models()["llama"]
    assert gpu.difference(cfg, "float32")["worst_gradient"] < 1e-6
    found = gpu.difference(cfg, "bfloat16")
    assert 1e-4 < found["worst_gradient"] < 0.1 and abs(found["loss"] - found["loss_on_cpu"]) < 0.01


@pytest.mark.parametrize("part", ["step", "decode"])
def test_a_part_prints_a_line_of_json(part):
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        part,
        "--small",
        "--rows=2",
        "--length=32",
        "--batch",
        "2",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    said = json.loads(run.stdout.splitlines()[-1])
    assert said["part"] == part and said["device"] == "cpu" and said["tokens_per_second"] > 0

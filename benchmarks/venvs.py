"""Peers live each in a virtual environment of its own, made when a benchmark first asks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / ".venvs"


def python_of(name: str, *requirements: str) -> Path:
    """The interpreter of `.venvs/name` with these packages; pip installs them if the folder is new."""
    folder = FOLDER / name
    python, done = folder / "bin" / "python", folder / ".ready"
    if not done.exists() or done.read_text().split() != list(requirements):
        print(f"Making {folder} with {', '.join(requirements)}.", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements], check=True)
        # Also where PYTHONDONTWRITEBYTECODE is set: what a peer's start takes is then its own.
        subprocess.run([str(python), "-m", "compileall", "-q", str(folder / "lib")], check=False)
        done.write_text(" ".join(requirements))
    return python

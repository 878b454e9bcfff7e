"""Runs a program that a model wrote in a confined process: see `data.confined` for what holds it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile

from data.confined import Limits
from data.confined.limits import warn_if_open
from data.confined.pool import environment

_BOOT = """
import json, sys
path, limits, folder = json.loads(sys.argv[1])
libraries, sys.path[:] = list(sys.path), path
from data.confined.limits import Limits, confine
with open("program.py", encoding="utf-8") as file:
    source = file.read()
sys.path[:] = libraries
sys.argv[:] = ["program.py"]
confine(Limits(**limits), folder)
exec(compile(source, "program.py", "exec"), {"__name__": "__main__", "__file__": "program.py"})
"""


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """What a program may use: no network, no other program, and no file outside an empty folder that is its own."""

    seconds: float = 10.0
    memory_megabytes: int = 512
    file_megabytes: int = 16


def run_python(program: str, sandbox: Sandbox) -> str:
    """ "" where the program ends well, else why not: "timeout", or the name of what it raised."""
    warn_if_open()
    limits = Limits(sandbox.seconds, sandbox.memory_megabytes, sandbox.file_megabytes)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as outer:
        folder, errors = os.path.join(outer, "folder"), os.path.join(outer, "errors")
        os.mkdir(folder)
        with open(os.path.join(folder, "program.py"), "w", encoding="utf-8", errors="replace") as file:
            file.write(program)
        path = [os.path.abspath(entry) for entry in sys.path]
        setting = json.dumps([path, dataclasses.asdict(limits), folder])
        with open(errors, "wb") as said:  # a file, whose size is limited, and no pipe, whose is not
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, setting],
                cwd=folder,
                env=environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
        try:
            process.wait(sandbox.seconds)
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
            except ProcessLookupError:
                pass
            process.wait()
        if process.returncode == 0:
            return ""
        with open(errors, "rb") as said:
            said.seek(max(os.path.getsize(errors) - 4096, 0))
            lines = said.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].split(":")[0][:80] if lines else f"exit code {process.returncode}"

"""Runs a program that a model wrote in a confined process: see `data.confined` for what holds it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from data.confined import Limits
from data.confined.limits import warn_if_open
from data.confined.pool import environment

_BOOT = """
import json, sys
path, limits, folder, end, nonce = json.loads(sys.argv[1])
libraries, sys.path[:] = list(sys.path), path
from data.confined.limits import Limits, confine
from data.confined.worker import die_with_parent
die_with_parent()
with open("program.py", encoding="utf-8") as file:
    source = file.read()
sys.path[:] = libraries
sys.argv[:] = ["program.py"]
confine(Limits(**limits), folder)
exec(compile(source, "program.py", "exec"), {"__name__": "__main__", "__file__": "program.py"})
import os
os.write(end, nonce.encode())
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
    with _temporary_folder() as outer:
        folder, errors = os.path.join(outer, "folder"), os.path.join(outer, "errors")
        os.mkdir(folder)
        with open(os.path.join(folder, "program.py"), "w", encoding="utf-8", errors="replace") as file:
            file.write(program)
        path = [os.path.abspath(entry) for entry in sys.path]
        end, nonce = (
            os.path.join(outer, "end"),
            secrets.token_hex(16),
        )  # which a program that leaves early lacks
        # The size of a file is limited; that of a pipe is not.
        with open(errors, "wb") as said, open(end, "wb") as ended:
            setting = json.dumps([path, dataclasses.asdict(limits), folder, ended.fileno(), nonce])
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, setting],
                cwd=folder,
                env=environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                pass_fds=(ended.fileno(),),
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
        with open(end, "rb") as ended:
            if process.returncode == 0 and ended.read(100) == nonce.encode():
                return ""
        with open(errors, "rb") as said:
            said.seek(max(os.path.getsize(errors) - 4096, 0))
            lines = said.read().decode("utf-8", "replace").strip().splitlines()
        if lines:
            return lines[-1].split(":")[0][:80]
        return f"exit code {process.returncode}" if process.returncode else "it left before its end"


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """Removed whatever a program made in it: folders within folders are deeper than Python's own removal goes."""
    folder = tempfile.mkdtemp(prefix="crucible-program-")
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder)
        except (OSError, RecursionError):
            subprocess.run(["rm", "-rf", "--", folder], check=False, stderr=subprocess.DEVNULL)

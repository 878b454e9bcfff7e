"""Runs code that a model wrote in a process of its own, with limits: time, memory, size of files, an empty folder and
environment, and no network where the kernel lets a user have a namespace. It is a fence and no prison: for code
from a model that may mean harm, run the whole stage in a container.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """What a program may use."""

    seconds: float = 10.0
    memory_megabytes: int = 512
    file_megabytes: int = 16


def run_python(program: str, sandbox: Sandbox) -> str:
    """ "" where the program ends well, else why not: "timeout", or the name of what it raised."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "program.py")
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            file.write(program)
        errors = os.path.join(folder, "errors")  # a file, whose size is limited, and no pipe, whose is not
        command = [*_without_network(), sys.executable, "-I", path]
        with open(errors, "wb") as said:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": folder},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                preexec_fn=functools.partial(_limit, sandbox),
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


def _limit(sandbox: Sandbox) -> None:
    limits = {
        resource.RLIMIT_AS: sandbox.memory_megabytes << 20,
        resource.RLIMIT_CPU: int(sandbox.seconds) + 1,
        resource.RLIMIT_FSIZE: sandbox.file_megabytes << 20,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in limits.items():
        resource.setrlimit(which, (value, value))


@functools.cache
def _without_network() -> tuple[str, ...]:
    """What a command begins with so that it sees no network; nothing where that is not to be had."""
    found = shutil.which("unshare")
    if found and subprocess.run([found, "-rn", "true"], capture_output=True).returncode == 0:
        return (found, "-rn")
    return ()

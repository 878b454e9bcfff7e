"""Running Python that a model wrote, in a process of its own with little time, memory and disk, and no network
where the system lets one be taken away. It guards against accidents, not against an attacker: run it in a
container for those."""

from __future__ import annotations

import ast
import ctypes
import resource
import subprocess
import sys
import tempfile

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # clone flags of Linux
_FILE_BYTES = 1 << 20


def run_python(program: str, seconds: float, megabytes: int) -> tuple[bool, str]:
    """Whether the program ends without an error, and the kind of error otherwise ("AssertionError", "timeout" ...)."""

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":
            ctypes.CDLL(None).unshare(
                _NEW_USER | _NEW_NETWORK
            )  # not allowed everywhere; then there is a network

    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-"],
                input=program.encode("utf-8", "replace"),
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": folder, "PYTHONHASHSEED": "0"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=seconds,
                preexec_fn=limits,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False, "timeout"
    if done.returncode == 0:
        return True, ""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return False, lines[-1].split(":")[0].strip() if lines and done.returncode > 0 else "killed"


def without_bodies(program: str) -> str:
    """The program with functions that do nothing: tests that it still passes test nothing."""
    tree = ast.parse(program)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [ast.Pass()]
    return ast.unparse(ast.fix_missing_locations(tree))

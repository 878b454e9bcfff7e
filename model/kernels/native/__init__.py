"""Kernels in C++ for CPUs, where XLA has no product with packed weights. Called through XLA's foreign functions (FFI).

They are compiled once, by the machine's own compiler for its own processor, and kept in ~/.cache/crucible/native.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

SOURCES = ("panels.cc", "paged.cc")
HEADERS = ("vectors.h",)
TARGETS = ("crucible_panels", "crucible_paged")
_FLAGS = ("-std=c++20", "-O3", "-shared", "-fPIC", "-ffp-contract=off")
_SECONDS = 300  # for the compiler

_log = logging.getLogger(__name__)


def missing() -> str | None:
    """Why there are no native kernels, as a clause; None: they are ready."""
    if jax.default_backend() != "cpu":
        return f"they are for CPUs, and the platform is {jax.default_backend()}"
    return _prepared()


@functools.cache
def _prepared() -> str | None:
    compiler = next(
        filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None
    )
    if compiler is None:
        return "there is no C++ compiler (install g++ or clang, or set CXX)"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        return f"{compiler} could not compile them: {str(detail).strip():.300}"
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return None


def _compiled(compiler: str) -> Path:
    """The library; it is compiled unless it is in the cache for these sources, this compiler and this processor."""
    sources = [Path(__file__).with_name(name) for name in SOURCES]
    flags = (*_FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native")
    if platform.system() == "Darwin":
        flags += ("-undefined", "dynamic_lookup")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    read = [Path(__file__).with_name(name).read_text() for name in (*SOURCES, *HEADERS)]
    parts = [*read, *flags, version, importlib.metadata.version("jaxlib"), _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = root / "crucible" / "native" / f"{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    _log.info("Compiling %s with %s, once.", ", ".join(SOURCES), compiler)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        new = Path(folder) / library.name
        command = [compiler, *flags, f"-I{jax.ffi.include_dir()}", *map(str, sources), "-o", str(new)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
        os.replace(new, library)
    return library


def _processor() -> str:
    """What the compiler's "native" depends on, for homes that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())

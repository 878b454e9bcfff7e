"""`Limits`, and `confine`, which holds the calling process to them for good."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import resource
import sys
from collections.abc import Iterable

from data.confined import landlock, seccomp

logger = logging.getLogger(__name__)

# What an interpreter reads while it runs: shared libraries, time zones, its own modules.
_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/etc/localtime", "/dev/urandom", "/dev/random", "/proc/self")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a confined process may use.

    Attributes:
      seconds: for one answer; whoever starts the process kills it then.
      memory_megabytes: of address space, beside what the process holds when it is confined.
      file_megabytes: for one file; 0: nothing can be written.
      reply_kilobytes: the longest reply that is read.
      processes: whether it may fork (never start programs).
    """

    seconds: float = 5.0
    memory_megabytes: int = 2048
    file_megabytes: int = 0
    reply_kilobytes: int = 64
    processes: bool = False


def confine(limits: Limits, folder: str | None = None, read: Iterable[str] = ()) -> None:
    """Hold this process to `limits`, without network and environment, from now until it ends.

    Files can be read below the interpreter's folders, those of its libraries and of this code, and `read`, and written
    in `folder` if `file_megabytes` is above 0. Where the kernel has no Landlock nothing can be written.

    Raises:
      OSError: on Linux, the kernel refuses a limit. Other systems keep time and memory only, see `warn_if_open`.
    """
    for name in list(os.environ):
        del os.environ[name]
    _limit_resources(limits)
    if not seccomp.available():
        return
    write = limits.file_megabytes > 0 and folder is not None and landlock.version() > 0
    if landlock.version() > 0:
        paths = [*_SYSTEM_FOLDERS, sys.prefix, sys.base_prefix, *_library_folders(), *read]
        landlock.restrict(paths, folder)
    seccomp.install(write=write, processes=limits.processes)


@functools.cache
def warn_if_open() -> None:
    """Say once what this system does not hold."""
    if not seccomp.available():
        logger.warning(
            "%s has no seccomp filter that is known here: what a model wrote is scored in a process with limits of "
            "time and memory, but not cut from the network and from files. Run it in a container.", sys.platform
        )  # fmt: skip


def _limit_resources(limits: Limits) -> None:
    now = _address_space()
    wanted = {
        resource.RLIMIT_AS: now + (limits.memory_megabytes << 20),
        resource.RLIMIT_FSIZE: limits.file_megabytes << 20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: _threads_of_user() + 64 if limits.processes else 0,
        resource.RLIMIT_CPU: math.ceil(limits.seconds) + 2,  # should nobody be left to kill it
    }
    for which, value in wanted.items():
        most = resource.getrlimit(which)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(which, (value, value))


def _library_folders() -> list[str]:
    """Of `sys.path`, what holds installed libraries, and this code's own packages: not a folder where a user works."""
    installed = [entry for entry in sys.path if {"site-packages", "dist-packages"} & set(entry.split(os.sep))]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return [*installed, *(os.path.join(root, name) for name in ("configs", "data", "model", "rl", "evals"))]


def _threads_of_user() -> int:
    """How many threads this user has by now: the limit counts them all."""
    import psutil

    mine, count = os.getuid(), 0
    for process in psutil.process_iter():
        try:
            count += process.num_threads() if process.uids().real == mine else 0
        except psutil.Error:
            continue
    return count


def _address_space() -> int:
    """Bytes of address space of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0

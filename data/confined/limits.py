"""`Limits`, and `confine`, which holds the calling process to them for good."""

from __future__ import annotations

import dataclasses
import functools
import logging
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

    Files can be read below the interpreter's folders, `sys.path` and `read`, and written in `folder` if
    `file_megabytes` is above 0. Where the kernel has no Landlock nothing can be written.

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
        paths = [*_SYSTEM_FOLDERS, sys.prefix, sys.base_prefix, *filter(None, sys.path), *read]
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
        resource.RLIMIT_NPROC: 128 if limits.processes else 0,
    }
    for which, value in wanted.items():
        most = resource.getrlimit(which)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(which, (value, value))


def _address_space() -> int:
    """Bytes of address space of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0

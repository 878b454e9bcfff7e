"""A Landlock ruleset for Linux: the files that a process may read and the one folder where it may write.

Linux: Documentation/userspace-api/landlock.rst. It holds for the calling thread and for all that it starts.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same numbers on every architecture
_READ = 1 << 2 | 1 << 3  # files, folders
_EXECUTE = 1 << 0
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_ALL_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
_DEVICE_IOCTL = 1 << 15  # version 5
_PR_SET_NO_NEW_PRIVS = 38


def version() -> int:
    """Of the kernel's Landlock; 0 where there is none."""
    found = ctypes.CDLL(None, use_errno=True).syscall(_CREATE, None, ctypes.c_size_t(0), 1)
    return max(int(found), 0)


def restrict(read: Iterable[str], write: str | None) -> None:
    """Allow reading below `read`, and everything but running programs below `write`.

    Raises:
      OSError: the kernel refuses the ruleset.
    """
    libc, abi = ctypes.CDLL(None, use_errno=True), version()
    handled = _ALL_BY_VERSION[min(abi, 3)] | (_DEVICE_IOCTL if abi >= 5 else 0)
    network = 3 if abi >= 4 else 0  # bind and connect over TCP
    scoped = 3 if abi >= 6 else 0  # abstract Unix sockets and signals of others
    attributes = struct.pack("QQQ", handled, network, scoped)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _checked(
        libc.syscall(_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock_create"
    )
    try:
        for path in read:
            _allow(libc, ruleset, path, _READ | _EXECUTE)
        if write is not None:
            _allow(libc, ruleset, write, handled & ~_EXECUTE)
        _allow(libc, ruleset, os.devnull, 1 << 2 | _WRITE_FILE)
        _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        _checked(libc.syscall(_RESTRICT, ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, access: int) -> None:
    if not os.path.exists(path):
        return
    if not os.path.isdir(path):
        access &= _EXECUTE | _WRITE_FILE | 1 << 2 | _TRUNCATE
    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("<Qi", access, folder)  # packed: no padding after the descriptor
        _checked(libc.syscall(_ADD, ruleset, 1, rule, 0), "landlock_add_rule")
    finally:
        os.close(folder)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return result

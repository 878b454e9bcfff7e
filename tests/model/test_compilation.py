"""Memory that a compiler leaves behind goes back to the system."""

import ctypes
import re
from pathlib import Path

import jax
import pytest

from model.compilation import prepare_compiler

libc = ctypes.CDLL(None)


def resident() -> int:
    """Bytes of this process that are in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(
    not hasattr(libc, "malloc_trim"), reason="malloc gives pages back by request in glibc only"
)
def test_freed_pieces_leave_the_process_after_a_program_is_compiled():
    prepare_compiler()
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    pieces = [libc.malloc(65_536) for _ in range(2_000)]
    for piece in pieces:
        ctypes.memset(ctypes.c_void_p(piece), 1, 65_536)
    for piece in pieces[:-1]:  # the last one keeps malloc's heap from shrinking
        libc.free(piece)
    before = resident()
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 0.1)
    assert resident() > before - 30e6  # a small program is not worth the time
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 0.5)
    assert resident() < before - 100e6
    libc.free(pieces[-1])

"""What every test has: eight fake CPU devices, a cache of compiled functions, real data where it is there."""

import gc
import os
import signal
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("DO_NOT_TRACK", "true")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    )
_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "crucible" / "jax-tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))  # tests' subprocesses use it too
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402  (it reads the variables above)
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts its background jobs so
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the project; a test that reads it is skipped where it is absent."""
    folder = Path(os.environ.get("CRUCIBLE_SHARED", ROOT.parent / "shared"))
    if not (folder / "data" / "MANIFEST.md").is_file():
        pytest.skip(f"the shared data folder {folder} is not here (set CRUCIBLE_SHARED to one)")
    return folder


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped():
    """After each file: a process may map 65530 pieces of memory, and all files' programs together need more."""
    yield
    _drop_programs()


@pytest.fixture(autouse=True)
def programs_are_dropped_within_a_file():
    """Where one file's programs come near that many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        _drop_programs()


def _drop_programs() -> None:
    jax.clear_caches()
    gc.collect()

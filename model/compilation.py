"""Compilation: a cache on disk for faster restarts, and options for each platform."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import jax

from model.kernels.backend import CHIPS


def prepare_compiler() -> None:
    """For commands with large programs: cache them on disk, and release the compiler's memory."""
    _keep_programs()
    _give_memory_back()


def _keep_programs() -> None:
    """Cache programs in $JAX_COMPILATION_CACHE_DIR, by default ~/.cache/crucible/jax."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "crucible" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@functools.cache  # it listens once
def _give_memory_back() -> None:
    """Return free memory to the system after each program is compiled or read from disk.

    XLA for CPUs leaves hundreds of MB to malloc, in pieces too small for a step's arrays.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # a function of glibc
    if trim is None:
        return

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration") and duration_secs > 0.2:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)


def training_options(platform: str | None = None, chip: str | None = None) -> dict[str, bool | int | str]:
    """XLA's options for programs that train; for `jax.jit(compiler_options=...)`.

    On TPUs, collectives of parameters and gradients overlap with products. On v5e a collective is also fused with a
    product ("continuation fusion"), which newer compilers refuse on other chips. On CPUs, matrix products use Eigen
    instead of the slower YNNPACK, and vectors are as wide as registers.

    Args:
      platform: None: that of the current devices.
      chip: a value of `model.kernels.backend.CHIPS`; None: that of the current devices.
    """
    platform = platform or jax.default_backend()
    if platform != "tpu":
        return _TRAINING.get(platform, {})
    if chip is None and jax.default_backend() == "tpu":
        chip = CHIPS.get(jax.devices()[0].device_kind)
    return _TRAINING["tpu"] | (_FUSED_COLLECTIVES if chip == "v5e" else {})


_TRAINING: dict[str, dict[str, bool | int | str]] = {
    "tpu": {
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
        "xla_enable_async_all_reduce": True,
        # combined collectives do not overlap, so only small ones are combined
        "xla_jf_crs_combiner_threshold_in_bytes": 4 << 20,
        # no loop over the parts of a small gathered matrix: it would add up partial results in main memory
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1 << 20,
    },
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "", "xla_cpu_prefer_vector_width": 512},
}

_FUSED_COLLECTIVES: dict[str, bool | int | str] = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
}

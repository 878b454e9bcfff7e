"""How programs are compiled: a cache on disk, so that a second start does not compile again, and each platform's
options."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import jax

from model.kernels.backend import CHIPS


def prepare_compiler() -> None:
    """For commands that compile large programs: keep them on disk, and no memory that the compiler has used."""
    _keep_programs()
    _give_memory_back()


def _keep_programs() -> None:
    """In $JAX_COMPILATION_CACHE_DIR, by default ~/.cache/crucible/jax."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "crucible" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@functools.cache  # it listens once
def _give_memory_back() -> None:
    """After each program, compiled or read from disk: XLA for CPUs leaves hundreds of MB to malloc, in pieces that a
    step's arrays don't fit in."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is None:
        return

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration") and duration_secs > 0.2:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)


def training_options(platform: str | None = None, chip: str | None = None) -> dict[str, bool | int | str]:
    """XLA's options for programs that train; for `jax.jit(compiler_options=...)`.

    On TPU, what each layer gathers of its parameters and adds up of its gradients goes on beside its products. On a v5e
    such a collective is fused with a product ("continuation fusion"); newer compilers call that unsafe on other chips,
    and refuse it. On CPU, matrix products go to Eigen instead of YNNPACK, which is slower there, and vectors are as
    wide as registers.

    Args:
      platform: None: that of the devices that are here.
      chip: of `model.kernels.backend.CHIPS`' values; None: that of the devices that are here.
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
        # those that are combined into one are waited for, so only small ones are
        "xla_jf_crs_combiner_threshold_in_bytes": 4 << 20,
        # a product is not cut into a loop over the parts of a small gathered matrix, whose results it would add up in
        # main memory
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

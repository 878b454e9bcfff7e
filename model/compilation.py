"""How programs are compiled: a cache on disk, so that a second start does not compile again, and the CPU's options."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
    """Keep compiled programs in $JAX_COMPILATION_CACHE_DIR, by default ~/.cache/crucible/jax."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "crucible" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def training_options() -> dict[str, str | int]:
    """XLA's options for programs that train on this platform; for `jax.jit(compiler_options=...)`.

    On CPU, matrix products go to Eigen instead of YNNPACK, which is slower there, and vectors are as wide as registers.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": "", "xla_cpu_prefer_vector_width": 512}

"""Frozen models of a run are recorded by content, so that a run that goes on cannot silently have others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from configs import ConfigError, atomic_write
from model.function import Params


def check_frozen(
    workdir: Path, sources: Mapping[str, str], params: Mapping[str, Params], begun: bool = True
) -> None:
    """Record the frozen models in `frozen.json`; a run that goes on must have the same ones.

    Args:
      sources: where each comes from, for messages.
      begun: whether the run has done anything with them; what is recorded of one that has not is replaced.

    Raises:
      ConfigError: a source holds another model than at the run's start.
    """
    if not params:
        return
    path = workdir / "frozen.json"
    found = {name: {"source": sources[name], "fingerprint": fingerprint(params[name])} for name in params}
    noted = json.loads(path.read_text(encoding="utf-8")) if begun and path.exists() else {}
    for name, now in found.items():
        then = noted.get(name, now)
        if then["fingerprint"] != now["fingerprint"]:
            raise ConfigError(
                f"{now['source']} is not the {name} that this run began with ({then['source']}, fingerprint "
                f"{then['fingerprint']}; now {now['fingerprint']}). Give the old model, or start a new run in another "
                "--workdir."
            )
    if noted.keys() != found.keys() and jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(noted | found, indent=1) + "\n")


def fingerprint(params: Params) -> str:
    """A hash of all names, shapes and bits; the same on any mesh."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get(jax.jit(lambda leaves: [_weighed_bits(x) for x in leaves])([x for _, x in leaves]))
    parts = [
        (jax.tree_util.keystr(path), str(x.dtype), x.shape, int(found))
        for (path, x), found in zip(leaves, sums, strict=True)
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _weighed_bits(x: jax.Array) -> jax.Array:
    """uint32: the sum of all bit patterns modulo 2^32, each times an odd number that depends on its index."""
    if x.dtype.itemsize == 1 and not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.int8)
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    place = jnp.full(x.shape, 0x9E3779B9, jnp.uint32)
    for axis in range(x.ndim):
        place = (place ^ jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)) * jnp.uint32(0x85EBCA6B)
        place ^= place >> 13
    return jnp.sum(bits.astype(jnp.uint32) * (place | 1), dtype=jnp.uint32)

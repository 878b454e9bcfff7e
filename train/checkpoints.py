"""Saves train states, and restores them onto the current mesh."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import model
from configs import ConfigError, atomic_write
from configs.paths import complete_steps
from data import Tokenizer
from model import ModelConfig, ShardingRules
from model.formats.checkpoint import Checkpoints
from model.function import Params
from train.config import CheckpointSpec
from train.mesh import param_shardings, state_shardings
from train.step import TrainState, new_state


class TrainCheckpoints:
    """The `checkpoints/` of a training run; each also holds the model config and the tokenizer."""

    def __init__(
        self,
        workdir: Path,
        spec: CheckpointSpec,
        cfg: ModelConfig,
        tokenizer: Tokenizer,
        mesh: Mesh,
        rules: ShardingRules,
    ):
        self._checkpoints = Checkpoints(workdir / "checkpoints", keep=spec.keep, keep_every=spec.keep_every)
        self._cfg, self._mesh, self._rules = cfg, mesh, rules
        self._tokenizer_files = tokenizer_files(tokenizer)

    def restore_or_init(
        self, initial_params: Callable[[], Params], optimizer: optax.GradientTransformation, seed: int = 0
    ) -> tuple[TrainState, dict[str, Any]]:
        """(state, progress) of the newest checkpoint, or (a new state, {})."""
        step = self._checkpoints.latest_step()
        params = initial_params() if step is None else model.param_shapes(self._cfg)
        abstract = jax.eval_shape(lambda p: new_state(p, optimizer, seed), params)
        layout = param_shardings(self._cfg, self._mesh, self._rules)
        shardings = state_shardings(abstract, layout, self._mesh)
        if step is None:
            return jax.jit(lambda p: new_state(p, optimizer, seed), out_shardings=shardings)(params), {}
        wanted = jax.tree.map(
            lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), abstract, shardings
        )
        saved = self._checkpoints.names_beside_params(step)
        beside = {name: value for name, value in _all_but_params(wanted).items() if name in saved}
        params, rest, progress = self._checkpoints.restore(step, wanted.params, beside)
        if "rng" not in saved:  # checkpoints of earlier versions have none
            rest["rng"] = jax.device_put(jax.random.key_data(jax.random.key(seed)), wanted.rng.sharding)
        return TrainState(params=params, **rest), progress

    def save(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
        """Start writing; `progress` (JSON) is what else a resumed run needs."""
        rest = _all_but_params(state)
        self._checkpoints.save(
            step, self._cfg, state.params, rest, {"step": step} | progress, self._tokenizer_files
        )

    def close(self) -> None:
        self._checkpoints.close()


def has_checkpoint(workdir: Path) -> bool:
    """Whether this folder has a complete checkpoint to resume from."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and bool(complete_steps(folder))


def check_reference(workdir: Path, source: str, params: Params) -> None:
    """Record the reference model of a run; a resumed run must have the same one.

    Raises:
      ConfigError: `source` holds another model than at the run's start.
    """
    path, found = workdir / "reference.json", fingerprint(params)
    if not path.exists():
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps({"source": source, "fingerprint": found}, indent=1) + "\n")
        return
    noted = json.loads(path.read_text(encoding="utf-8"))
    if noted["fingerprint"] != found:
        raise ConfigError(
            f"{source} is not the reference that this run began with ({noted['source']}, fingerprint "
            f"{noted['fingerprint']}; now {found}). Give config.init_from the old model, or start a new run in "
            "another --workdir."
        )


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
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    place = jnp.full(x.shape, 0x9E3779B9, jnp.uint32)
    for axis in range(x.ndim):
        place = (place ^ jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)) * jnp.uint32(0x85EBCA6B)
        place ^= place >> 13
    return jnp.sum(bits.astype(jnp.uint32) * (place | 1), dtype=jnp.uint32)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files that `tokenizer.save` writes, by relative path."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        root = Path(folder)
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _all_but_params(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "step": state.step, "skipped": state.skipped, "rng": state.rng}

"""A train state on disk: restored onto whatever mesh there is now, or made new."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

import model
from data import Tokenizer
from model import ModelConfig, ShardingRules
from model.checkpoint import Checkpoints
from model.function import Params
from train.config import CheckpointSpec
from train.mesh import param_shardings, state_shardings
from train.step import TrainState, new_state


class StateStore:
    """The `checkpoints/` of a run that trains; each also holds the model's config and the tokenizer."""

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
        self, initial_params: Callable[[], Params], optimizer: optax.GradientTransformation
    ) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint's state and what was saved beside it, or a new state and {}."""
        step = self._checkpoints.latest_step()
        params = initial_params() if step is None else model.param_shapes(self._cfg)
        abstract = jax.eval_shape(lambda p: new_state(p, optimizer), params)
        layout = param_shardings(self._cfg, self._mesh, self._rules)
        shardings = state_shardings(abstract, layout, self._mesh)
        if step is None:
            return jax.jit(lambda p: new_state(p, optimizer), out_shardings=shardings)(params), {}
        wanted = jax.tree.map(
            lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), abstract, shardings
        )
        params, rest, progress = self._checkpoints.restore(step, wanted.params, _all_but_params(wanted))
        return TrainState(params=params, **rest), progress

    def save(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
        """Start writing; `progress` (JSON-able) is what else a resumed run must know."""
        rest = _all_but_params(state)
        self._checkpoints.save(
            step, self._cfg, state.params, rest, {"step": step} | progress, self._tokenizer_files
        )

    def close(self) -> None:
        self._checkpoints.close()


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """What `tokenizer.save` writes, by relative name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        root = Path(folder)
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _all_but_params(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "step": state.step, "skipped": state.skipped}

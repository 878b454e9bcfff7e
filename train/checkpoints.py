"""Saves the states of a run, and restores them onto the current mesh."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from configs import ConfigError
from configs.paths import complete_steps
from data import Tokenizer
from model import ModelConfig
from model.formats.checkpoint import Checkpoints, shapes_by_path, stored_shapes
from model.function import Params
from train.config import CheckpointSpec
from train.mesh import state_shardings
from train.step import State

Shapes = Mapping[tuple[str, ...], tuple[int, ...]]


class TrainCheckpoints:
    """The `checkpoints/` of a training run; each also holds the policy's config and the tokenizer."""

    def __init__(
        self,
        workdir: Path,
        spec: CheckpointSpec,
        cfgs: Mapping[str, ModelConfig],
        tokenizer: Tokenizer,
        mesh: Mesh,
    ):
        self._folder = workdir / "checkpoints"
        self._checkpoints = Checkpoints(self._folder, keep=spec.keep, keep_every=spec.keep_every)
        self._cfgs, self._mesh = cfgs, mesh
        self._tokenizer_files = tokenizer_files(tokenizer)

    def restore_or_init(
        self,
        initial_params: Callable[[], dict[str, Params]],
        make_state: Callable[[dict[str, Params]], State],
        layouts: Mapping[str, Params],
        others: Mapping[str, Params],
    ) -> tuple[State, dict[str, Any]]:
        """(state, progress) of the newest checkpoint, or (a new state, {}).

        Args:
          layouts: the shardings of each trained role's parameters.
          others: the parameters of trained roles beside the policy, as ShapeDtypeStructs.
        """
        step = self._checkpoints.latest_step()
        if step is None:
            params = initial_params()
            shardings = state_shardings(jax.eval_shape(make_state, params), layouts, self._mesh)
            return jax.jit(make_state, out_shardings=shardings)(params), {}
        saved = self._checkpoints.shapes_beside_params(step)
        if "extra" not in {path[0] for path in saved}:
            raise ConfigError(
                f"{self._folder}/{step} was written by an earlier version; this one does not read its optimizer "
                f"state. Start a new run with config.init_from={self._folder.parent}."
            )
        shapes = {"policy": stored_shapes(self._folder / str(step))} | dict(others)
        abstract = jax.eval_shape(make_state, shapes)
        shardings = state_shardings(abstract, layouts, self._mesh)
        wanted = jax.tree.map(
            lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), abstract, shardings
        )
        beside = _beside_policy(wanted)
        self._check_same_state(step, saved, shapes_by_path(beside))
        policy, rest, progress = self._checkpoints.restore(step, wanted.params["policy"], beside)
        params = {"policy": policy} | rest.pop("roles", {})
        return State(params=params, **rest), progress

    def _check_same_state(self, step: int, saved: Shapes, wanted: Shapes) -> None:
        """Refuses a state of another optimizer, or of other trained models, than the config makes."""
        of_optimizers = lambda shapes: {path: s for path, s in shapes.items() if path[0] == "opt_state"}
        saved, wanted = of_optimizers(saved), of_optimizers(wanted)
        if saved == wanted:
            return
        found, asked = (_first_beyond(a, b) for a, b in ((saved, wanted), (wanted, saved)))
        raise ConfigError(
            f"{self._folder}/{step} holds the state of another optimizer, or of other models, than the config makes: "
            f"it has {found}, and the config {asked}. Give the old config.optimizer and config.algorithm, or start a "
            f"new run in another --workdir with config.init_from={self._folder.parent}."
        )

    def progress(self) -> dict[str, Any]:
        """What the newest checkpoint says beside the state; {} without one."""
        step = self._checkpoints.latest_step()
        return {} if step is None else self._checkpoints.progress(step)

    def save(self, step: int, state: State, progress: dict[str, Any]) -> None:
        """Start writing; `progress` (JSON) is what else a resumed run needs."""
        self._checkpoints.save(
            step,
            self._cfgs["policy"],
            state.params["policy"],
            _beside_policy(state),
            {"step": step} | progress,
            self._tokenizer_files,
        )

    def close(self) -> None:
        self._checkpoints.close()


def _first_beyond(shapes: Shapes, others: Shapes) -> str:
    """The first array that the others have not, or not in this shape."""
    first = next((path for path, shape in shapes.items() if others.get(path) != shape), None)
    return "nothing else" if first is None else f"{'/'.join(first[1:])} {list(shapes[first])}"


def has_checkpoint(workdir: Path) -> bool:
    """Whether this folder has a complete checkpoint to resume from."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and bool(complete_steps(folder))


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files that `tokenizer.save` writes, by relative path."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        root = Path(folder)
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _beside_policy(state: State) -> dict[str, Any]:
    rest = {"opt_state": state.opt_state, "step": state.step, "rng": state.rng, "extra": state.extra}
    others = {name: params for name, params in state.params.items() if name != "policy"}
    return rest | ({"roles": others} if others else {})

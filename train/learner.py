"""The models of a run by role, their state, and the jitted functions over them. train/ and rl/ drive the same."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from configs import ConfigError, to_dict
from data import Tokenizer
from model import ModelConfig, param_shapes
from model.adapters import join, split_trained
from model.compilation import training_options
from model.function import Params
from train.algorithms.algorithm import Algorithm, Metrics
from train.checkpoints import TrainCheckpoints
from train.config import LearnerConfig
from train.models import Batch, Model, Role, bind
from train.optimizers import make_optimizer
from train.references import check_frozen
from train.rounding import with_masters
from train.start import PolicyStart, RoleStart, in_dtype, role_start
from train.step import State, make_train_step, new_state


@dataclasses.dataclass
class Plan:
    """The models of a run before any of them is in memory."""

    algorithm: Algorithm
    mesh: Mesh
    roles: dict[str, Role]
    starts: dict[str, RoleStart]  # of each role that has parameters
    optimizers: dict[str, optax.GradientTransformation]  # of each trained role

    @property
    def cfgs(self) -> dict[str, ModelConfig]:
        return {name: start.cfg for name, start in self.starts.items()}


def make_plan(
    config: LearnerConfig, algorithm: Algorithm, policy: PolicyStart, mesh: Mesh, updates_per_step: int = 1
) -> Plan:
    """Resolves the algorithm's roles; reads configs and no weights.

    Args:
      updates_per_step: optimizer steps in each of `config.steps`; the schedule spans all of them.

    Raises:
      ConfigError: a role's source is missing, lacks its head, or has another vocabulary than the policy.
    """
    roles, starts = {}, {}
    for name, role in algorithm.roles().items():
        role = _resolved(role, policy) if name != "policy" else role
        roles[name] = role
        if not role.without_adapters:
            starts[name] = role_start(config, name, role, policy, mesh)
    algorithm.check_models({name: start.cfg for name, start in starts.items()})
    optimizers = {}
    for name, role in roles.items():
        if role.trained:
            steps = config.steps * updates_per_step
            made = make_optimizer(config.optimizer, config.schedule, steps, starts[name].cfg, role.lr_scale)
            optimizers[name] = with_masters(made) if config.precision.masters else made
    return Plan(algorithm, mesh, roles, starts, optimizers)


def _resolved(role: Role, policy: PolicyStart) -> Role:
    """A frozen role that is the policy's start takes no memory for what the policy's adapters leave as it is."""
    if role.trained or role.source is not None or policy.cfg.adapters is None:
        return role
    if policy.new_adapters is not None:
        return dataclasses.replace(role, without_adapters=True)
    return dataclasses.replace(role, shares_base=True)


class Learner:
    """Models by role, and their state.

    Attributes:
      state: of the trained roles; `step` and `save` read it, `step` replaces it.
      frozen: the parameters of the other roles.
      progress: what the checkpoint said beside the state; {} for a new run.
    """

    def __init__(self, config: LearnerConfig, plan: Plan, tokenizer: Tokenizer, workdir: Path | None = None):
        self.plan, self.config = plan, config
        self.algorithm, self.cfgs, self.mesh = plan.algorithm, plan.cfgs, plan.mesh
        rules = config.sharding
        self.checkpoints = None
        if workdir is not None:
            self.checkpoints = TrainCheckpoints(workdir, config.checkpoint, plan.cfgs, tokenizer, plan.mesh)
        self.state, self.progress = _restore_or_init(self.checkpoints, config, plan)
        self.frozen = {
            name: _frozen_params(start, plan.roles[name])
            for name, start in plan.starts.items()
            if not plan.roles[name].trained
        }
        if workdir is not None:
            sources = {name: plan.starts[name].source for name in self.frozen}
            check_frozen(workdir, sources, self.frozen, begun=bool(self.progress))
        rounding = "nearest" if config.precision.rounding == "masters" else config.precision.rounding
        step = make_train_step(
            plan.algorithm,
            plan.cfgs,
            plan.optimizers,
            config.microbatches,
            rules,
            roles=plan.roles,
            rounding=rounding,
            average_decay=config.average_decay,
        )
        layout = jax.tree.map(lambda x: x.sharding, self.state)
        options = training_options()
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(layout, None), compiler_options=options)
        self._prepare = jax.jit(
            functools.partial(self._prepared, parts=config.microbatches), compiler_options=options
        )
        self._measure = jax.jit(self._measured, compiler_options=options)
        self._does_prepare = type(plan.algorithm).prepare is not Algorithm.prepare

    @property
    def cfg(self) -> ModelConfig:
        """The policy's config."""
        return self.cfgs["policy"]

    @property
    def params(self) -> Params:
        """The policy's parameters; a call of `step` donates them."""
        return self.state.params["policy"]

    def averaged_params(self) -> Params | None:
        """The policy with the moving average of its trained parameters, in their dtype; None: the run has none."""
        if "average" not in self.state.extra:
            return None
        trained, rest = split_trained(self.params)
        return join(jax.tree.map(lambda a, p: a.astype(p.dtype), self.state.extra["average"], trained), rest)

    def prepare(self, batch: Batch) -> Batch:
        """What the algorithm adds to a batch, with the current parameters and without gradient."""
        return self._prepare(self.state.params, self.frozen, batch) if self._does_prepare else batch

    def step(self, batch: Batch) -> Metrics:
        """One optimizer step on a prepared batch; returns before the device has finished."""
        self.state, metrics = self._step(self.state, self.frozen, batch)
        return metrics

    def measure(self, batch: Batch, policy: Params | None = None) -> Metrics:
        """Loss and metrics of a batch, which need not be prepared, without a step.

        Args:
          policy: parameters in place of the policy's.
        """
        params = self.state.params if policy is None else self.state.params | {"policy": policy}
        return self._measure(params, self.frozen, batch)

    def save(self, step: int, progress: dict[str, Any]) -> None:
        """Start writing; `progress` (JSON) is what else a resumed run needs."""
        assert self.checkpoints is not None
        how = {"precision": to_dict(self.config.precision), "average": self.config.average_decay > 0}
        self.checkpoints.save(step, self.state, progress | how)

    def close(self) -> None:
        """Wait for the last save."""
        if self.checkpoints is not None:
            self.checkpoints.close()

    def _models(
        self, params: Mapping[str, Params], frozen: Mapping[str, Params], parts: int
    ) -> dict[str, Model]:
        return bind(self.cfgs, self.plan.roles, dict(params) | dict(frozen), self.config.sharding, parts)

    def _prepared(self, params, frozen, batch: Batch, parts: int) -> Batch:
        return self.algorithm.prepare(self._models(params, frozen, parts), batch)

    def _measured(self, params, frozen, batch: Batch) -> Metrics:
        models = self._models(params, frozen, self.config.microbatches)
        batch = self.algorithm.prepare(models, batch) | {"row": jax.numpy.arange(len(batch["tokens"]))}
        loss, metrics = self.algorithm.loss(models, batch, None)
        return metrics | {"loss": loss}


def _restore_or_init(
    checkpoints: TrainCheckpoints | None, config: LearnerConfig, plan: Plan
) -> tuple[State, dict[str, Any]]:
    trained = {name: start for name, start in plan.starts.items() if plan.roles[name].trained}
    make = lambda params: _rounded(
        new_state(params, plan.optimizers, config.seed, config.average_decay > 0), config, plan
    )
    initial = lambda: {name: start.load() for name, start in trained.items()}
    if checkpoints is None:
        return jax.jit(make)(initial()), {}
    layouts = {name: start.shardings for name, start in trained.items()}
    dtype = config.precision.params
    others = {
        name: jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), param_shapes(start.cfg))
        for name, start in trained.items()
        if name != "policy"
    }
    _check_precision(config, checkpoints.progress())
    return checkpoints.restore_or_init(initial, make, layouts, others)


def _rounded(state: State, config: LearnerConfig, plan: Plan) -> State:
    """A new state whose trained parameters are in their dtype; masters and averages are made before."""
    params = {}
    for name, own in state.params.items():
        trained, rest = split_trained(own)
        trained = in_dtype(plan.starts[name].cfg, trained, config.precision.params)
        params[name] = join(trained, rest) if rest else trained
    return dataclasses.replace(state, params=params)


def _check_precision(config: LearnerConfig, progress: dict[str, Any]) -> None:
    precision = to_dict(config.precision)
    if progress.get("precision", precision) != precision:
        raise ConfigError(
            f"this run keeps its parameters by config.precision={progress['precision']}, and the config says "
            f"{precision}. Give the old values, or start a new run in another --workdir."
        )
    if (progress.get("average", False) != (config.average_decay > 0)) and progress:
        raise ConfigError(
            f"config.average_decay={config.average_decay:g}, and this run began "
            f"{'with' if progress.get('average') else 'without'} a moving average of its weights. Give the old value, "
            "or start a new run in another --workdir."
        )


def _frozen_params(start: RoleStart, role: Role) -> Params:
    params = start.load()
    return split_trained(params)[0] if role.shares_base else params

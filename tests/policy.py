"""Shorthands of tests for a run with one model, the policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import optax

from model import ModelConfig
from train.algorithms import LanguageModelling, objective_of
from train.algorithms.algorithm import Algorithm
from train.models import Role, bind
from train.optimizers import AdamW, make_optimizer
from train.schedules import Constant, Schedule
from train.step import State, make_train_step, new_state

__all__ = ["adamw", "language_modelling", "objective_of", "policy_state", "policy_step", "prepared"]


def language_modelling(cfg: ModelConfig, rules=None, **options):
    """`objective(params, batch)` of next-token prediction."""
    return objective_of(LanguageModelling(**options), cfg, rules)


def adamw(cfg: ModelConfig, steps: int = 10, schedule: Schedule = Constant(0), **options):
    return make_optimizer(AdamW(**options), schedule, steps, cfg)


def policy_step(
    cfg: ModelConfig,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm = LanguageModelling(),
    microbatches: int = 1,
    rules=None,
) -> Callable:
    """`step(state, batch)`."""
    step = make_train_step(algorithm, {"policy": cfg}, {"policy": optimizer}, microbatches, rules)
    return lambda state, batch: step(state, {}, batch)


def policy_state(params, optimizer: optax.GradientTransformation) -> State:
    return new_state({"policy": params}, {"policy": optimizer})


def prepared(algorithm: Algorithm, cfg: ModelConfig, frozen: dict, batch: dict, parts: int = 1) -> dict:
    """The batch as `algorithm` prepares it with these frozen models, all of the policy's architecture."""
    roles = {name: dataclasses.replace(role, source=None) for name, role in algorithm.roles().items()}
    models = bind(dict.fromkeys(roles, cfg), roles | {"policy": Role(trained=True)}, frozen, parts=parts)
    return algorithm.prepare(models, batch)

"""Rewards of sampled answers: the verifiers' and, where there is one, a reward model's."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import model
from configs import ConfigError
from rl.rollout import Rollout
from rl.trajectory import batch_of
from train.algorithms.rewards import REWARD, at_end
from train.config import Execution
from train.models import Model


class RewardScorer:
    """Scores groups of answers; `reward_model` None: what the verifiers gave.

    Raises:
      ConfigError: the model has no reward head.
    """

    def __init__(self, reward_model: str | None, run: Execution, seq_len: int):
        self._seq_len, self._score = seq_len, None
        if reward_model is None:
            return
        cfg = run.apply_to(model.load_config(reward_model))
        if REWARD not in cfg.heads:
            raise ConfigError(
                f"{reward_model} has no head 'reward'. Give a run that was trained with the algorithm RewardModel."
            )
        _, self._params = model.load(reward_model, cfg=cfg)
        self._score = jax.jit(
            lambda params, batch: at_end(Model(cfg, params, train=False).read_head(batch, REWARD.name), batch)
        )

    def rewards(self, group: Sequence[Rollout]) -> np.ndarray:
        """[G] float64."""
        rewards = np.array([rollout.trajectory.rewards["total"] for rollout in group])
        if self._score is None:
            return rewards
        trajectories = [rollout.trajectory for rollout in group]
        rows = batch_of(trajectories, np.zeros(len(group), np.float32), self._seq_len, len(group))
        batch = {name: jnp.asarray(x) for name, x in rows.items()}
        return rewards + np.asarray(self._score(self._params, batch), np.float64)

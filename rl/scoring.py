"""What a reward model gives to sampled answers."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import model
from configs import ConfigError
from data.shards import hash_of
from model import ModelConfig
from model.function import Params
from rl.trajectory import Trajectory, batch_of
from train.algorithms.rewards import REWARD, at_end
from train.config import Execution
from train.models import Model
from train.references import fingerprint

_ROWS = 16  # that are scored at once


class RewardScorer:
    """Reads a reward model at the ends of answers; `seq_len`: of prompt and answer together."""

    def __init__(self, cfg: ModelConfig, params: Params, seq_len: int):
        self._params, self._seq_len = params, seq_len
        self._score = jax.jit(
            lambda params, batch: at_end(Model(cfg, params, train=False).read_head(batch, REWARD.name), batch)
        )

    @classmethod
    def load(cls, source: str, run: Execution, seq_len: int) -> RewardScorer:
        """Raises ConfigError if the model has no reward head."""
        cfg = run.apply_to(model.load_config(source))
        if REWARD not in cfg.heads:
            raise ConfigError(
                f"{source} has no head 'reward'. Give a run that was trained with the algorithm RewardModel."
            )
        return cls(cfg, model.load(source, cfg=cfg)[1], seq_len)

    @functools.cached_property
    def key(self) -> str:
        """A hash of the parameters' bits."""
        return hash_of("reward", fingerprint(self._params))

    def scores(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        """[N] float64."""
        found: list[np.ndarray] = []
        for start in range(0, len(trajectories), _ROWS):
            some = list(trajectories[start : start + _ROWS])
            rows = batch_of(some, np.zeros(len(some), np.float32), self._seq_len, _ROWS)
            batch = {name: jnp.asarray(x) for name, x in rows.items()}
            found.append(np.asarray(self._score(self._params, batch), np.float64)[: len(some)])
        return np.concatenate(found) if found else np.zeros(0)

"""Reinforcement learning: rollouts on the engine, rewards from verifiers, updates by the trainer's step."""

from rl.advantages import group_advantages
from rl.config import RLConfig
from rl.trajectory import Trajectory, batch_of

__all__ = ["RLConfig", "Trajectory", "batch_of", "group_advantages"]

"""Advantages relative to a group of answers to one prompt."""

# P prompts, G answers a prompt

from __future__ import annotations

import numpy as np


def group_advantages(rewards_PG: np.ndarray, *, normalise_std: bool = True, eps: float = 1e-6) -> np.ndarray:
    """(reward - group mean) / (group standard deviation + eps), ddof 1; without the division it is Dr. GRPO's.

    A group whose rewards are all equal, or of one answer, gets zeros: it says nothing.

    Returns:
      [P, G] float32. Shao et al. 2024, arXiv:2402.03300; Liu et al. 2025, arXiv:2503.20783.
    """
    rewards_PG = np.asarray(rewards_PG, np.float64)
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    if normalise_std and rewards_PG.shape[1] > 1:
        centred_PG = centred_PG / (rewards_PG.std(axis=1, ddof=1, keepdims=True) + eps)
    return np.where(has_signal(rewards_PG)[:, None], centred_PG, 0.0).astype(np.float32)


def has_signal(rewards_PG: np.ndarray) -> np.ndarray:
    """[P] bool: groups with at least two different rewards."""
    return np.ptp(rewards_PG, axis=1) > 1e-9

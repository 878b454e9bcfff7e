"""A trajectory is token ids, never text: what was said, by whom, how likely it was, and what it earned."""

# B rows, T tokens

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One sampled answer.

    Attributes:
      tokens: prompt and answer, ids.
      logprobs: of each token, nats at the sampling temperature, by the sampler; 0 where it did not choose.
      mask: True where the policy wrote the token.
      rewards: by name; "total" is what the policy is trained on.
      version: of the policy's parameters that sampled it.
      stop_reason: "stop" or "length".
    """

    tokens: np.ndarray  # [n] int32
    logprobs: np.ndarray  # [n] float32
    mask: np.ndarray  # [n] bool
    rewards: dict[str, float]
    version: int
    stop_reason: str


def batch_of(
    trajectories: list[Trajectory], advantages: np.ndarray, seq_len: int, rows: int
) -> dict[str, np.ndarray]:
    """One trajectory a row, padded to [rows, seq_len]; rows beyond the last trajectory weigh nothing.

    The last token is in the row, too, though nothing follows it: a reward model reads there.

    Args:
      advantages: [len(trajectories)] float32, the same for every token of an answer.

    Raises:
      ValueError: a trajectory of more than seq_len tokens, or more of them than rows.
    """
    if len(trajectories) > rows:
        raise ValueError(f"{len(trajectories)} trajectories do not fit into {rows} rows.")
    ints = {
        key: np.zeros((rows, seq_len), np.int32) for key in ("tokens", "targets", "segment_ids", "positions")
    }
    floats = {
        key: np.zeros((rows, seq_len), np.float32)
        for key in ("loss_weights", "sampler_logprobs", "advantages")
    }
    for row, (trajectory, advantage) in enumerate(zip(trajectories, advantages, strict=True)):
        n = len(trajectory.tokens)
        if n > seq_len:
            raise ValueError(f"a trajectory has {n} tokens, more than rollout.seq_len={seq_len}.")
        ints["tokens"][row, :n] = trajectory.tokens
        ints["targets"][row, : n - 1] = trajectory.tokens[1:]
        ints["segment_ids"][row, :n] = 1
        ints["positions"][row, :n] = np.arange(n)
        floats["loss_weights"][row, : n - 1] = trajectory.mask[1:]
        floats["sampler_logprobs"][row, : n - 1] = trajectory.logprobs[1:]
        floats["advantages"][row, : n - 1] = advantage * trajectory.mask[1:]
    return ints | floats

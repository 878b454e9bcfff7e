"""A preference model from AI preferences, as the reward of `python -m rl` or of best of n."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "algorithm": {"kind": "RewardModel"},
            "init_from": "runs/chat",
            "steps": 100,
            "data": {"mixture": {"runs/judged/preferences": 1.0}, "seq_len": 1024, "batch_size": 16},
            "optimizer": {"peak_lr": 1e-5},
            "schedule": {"warmup_steps": 10},
        }
    )

"""A reward model from pairs of answers: give config.init_from (a fine-tuned run)."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "algorithm": {"kind": "RewardModel"},
            "init_from": "runs/chat",
            "steps": 100,
            "data": {
                "mixture": {"runs/dialogues/preferences/train": 1.0},
                "validation": {"runs/dialogues/preferences/validation": 1.0},
                "seq_len": 128,
                "batch_size": 32,
            },
            "optimizer": {"peak_lr": 1e-4},
            "schedule": {"warmup_steps": 10},
        }
    )

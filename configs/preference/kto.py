"""KTO on answers that are labelled good or bad: give config.init_from (a fine-tuned run)."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "algorithm": {"kind": "KTO"},
            "init_from": "runs/chat",
            "steps": 100,
            "data": {
                "mixture": {"runs/answers/labelled/train": 1.0},
                "validation": {"runs/answers/labelled/validation": 1.0},
                "seq_len": 128,
                "batch_size": 32,
            },
            "optimizer": {"peak_lr": 5e-5},
            "schedule": {"warmup_steps": 10},
        }
    )

"""Fine-tuning on dialogues: give config.init_from (a pretrained run) and a dataset written in its tokenizer."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "init_from": "runs/stdlib",
            "steps": 600,
            "data": {
                "mixture": {"runs/dialogues/chat/train": 1.0},
                "validation": {"runs/dialogues/chat/validation": 1.0},
                "seq_len": 256,
                "batch_size": 8,
            },
            "optimizer": {"peak_lr": 1e-3},
            "schedule": {"warmup_steps": 30},
        }
    )

"""Fine-tuning on the last revisions, with a quarter of ordinary dialogues so that the rest stays as it was."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "init_from": "runs/chat",
            "steps": 200,
            "data": {
                "mixture": {"runs/revised/chat": 3.0, "runs/chats/chat/train": 1.0},
                "validation": {"runs/chats/chat/validation": 1.0},
                "seq_len": 1024,
                "batch_size": 16,
            },
            "optimizer": {"peak_lr": 2e-5},
            "schedule": {"warmup_steps": 10},
        }
    )

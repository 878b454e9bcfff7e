"""Fine-tuning on reasoned answers without the policy's text, with as many ordinary dialogues."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "init_from": "runs/chat",
            "steps": 200,
            "data": {
                "mixture": {"runs/deliberated/chat": 1.0, "runs/chats/chat/train": 1.0},
                "validation": {"runs/chats/chat/validation": 1.0},
                "seq_len": 1024,
                "batch_size": 16,
            },
            "optimizer": {"peak_lr": 2e-5},
            "schedule": {"warmup_steps": 10},
        }
    )

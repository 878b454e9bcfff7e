"""DPO on AI preferences; the loss on chosen answers keeps them likely."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "algorithm": {"kind": "DPO", "nll_weight": 0.2},
            "init_from": "runs/constitutional",
            "steps": 100,
            "data": {"mixture": {"runs/judged/preferences": 1.0}, "seq_len": 1024, "batch_size": 16},
            "optimizer": {"peak_lr": 5e-6},
            "schedule": {"warmup_steps": 10},
            "forgetting": {"mixture": {"runs/chats/chat/validation": 1.0}},
        }
    )

"""Reasoning about a policy, for `python -m rl.alignment.deliberate`: give config.policy and prompts for it."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "init_from": "runs/chat",
            "prompts": "runs/chats/prompts/train",
            "policy": "configs/alignment/policy.md",
            "samples": 4,
            "keep": 1,
            "min_probability": 0.7,
            "sampling": {"max_new_tokens": 1024, "seq_len": 8192, "rows": 32},
        }
    )

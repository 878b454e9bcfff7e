"""Answers revised by a constitution, for `python -m rl.alignment.revise`: give config.init_from and config.prompts."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "init_from": "runs/chat",
            "prompts": "runs/chats/prompts/train",
            "constitution": "configs/alignment/constitution.md",
            "rounds": 2,
            "sampling": {"max_new_tokens": 512, "seq_len": 4096, "rows": 32},
        }
    )

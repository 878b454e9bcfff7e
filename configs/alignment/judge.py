"""AI preferences between the answers of a revised model, for `python -m rl.alignment.judge`: the first model judges."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "init_from": "runs/constitutional",
            "judge": "runs/chat",
            "prompts": "runs/chats/prompts/train",
            "constitution": "configs/alignment/constitution.md",
            "min_margin": 0.5,
            "sampling": {"max_new_tokens": 512, "seq_len": 4096, "rows": 32},
        }
    )

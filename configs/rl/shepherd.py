"""Labels of steps from rollouts, for a process reward model: config.init_from is a model that reasons line by line."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "init_from": "runs/chat",
            "tasks": ({"name": "chain_sum", "config": {"min_terms": 3, "max_terms": 4}},),
            "problems": 500,
            "completions": 8,
            "rollout": {"group": 4, "max_new_tokens": 128, "seq_len": 256},
        }
    )

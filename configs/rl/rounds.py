"""Rejection sampling on sums: give config.init_from (a model that answers in the asked format).

Iterative DPO: --config.learn_from=pairs --config.train.algorithm.kind=DPO --config.train.optimizer.peak_lr=2e-5
"""

from ml_collections import ConfigDict


def get_config():
    task = {"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}
    return ConfigDict(
        {
            "init_from": "runs/chat",
            "tasks": (task,),
            "rounds": 3,
            "problems": 1000,
            "rollout": {"prompts": 32, "group": 16, "max_new_tokens": 16, "seq_len": 128},
            "train": {
                "steps": 100,
                "data": {"seq_len": 128, "batch_size": 32},
                "optimizer": {"peak_lr": 2e-4, "weight_decay": 0.0},
                "schedule": {"warmup_steps": 10},
            },
        }
    )

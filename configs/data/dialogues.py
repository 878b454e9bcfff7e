"""Sums as dialogues and preferences, for `python -m data.dialogues --workdir=runs/dialogues`."""

from ml_collections import ConfigDict


def get_config():
    task = {"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}
    return ConfigDict({"tokenizer": "runs/corpus", "tasks": (task,), "dialogues": 5000, "pairs": 2000})

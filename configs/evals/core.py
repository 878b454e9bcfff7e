"""Exact match on held-out generated tasks, and bits per byte of the texts that are named.

python -m evals --config=configs/evals/core.py --config.model=runs/1b-math
python -m evals --config=configs/evals/core.py:runs/corpus/text/test --config.model=runs/1b
"""

from ml_collections import ConfigDict


def get_config(text: str = ""):
    config = ConfigDict()
    config.texts = {"held-out text": text} if text else {}
    config.tasks = (
        {"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}},
        {"name": "spell_backward", "config": {"min_word_len": 3, "max_word_len": 5}},
    )
    return config

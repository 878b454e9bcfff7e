"""Your own dialogues, preferences or prompts, for `python -m data.conversations`: --config=FILE.py:PATH."""

from ml_collections import ConfigDict


def get_config(path: str = ""):
    files = tuple(filter(None, path.split(",")))
    return ConfigDict({"files": files, "tokenizer": "runs/corpus", "validation": 0.02})

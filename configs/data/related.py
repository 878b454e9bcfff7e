"""Groups of related documents beside a token dataset, for `python -m data.related`."""

from ml_collections import ConfigDict


def get_config():
    corpus = "runs/corpus"
    return ConfigDict({"text": f"{corpus}/text/train", "tokens": f"{corpus}/tokens/train", "field": "group"})

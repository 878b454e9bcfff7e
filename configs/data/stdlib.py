"""A corpus from what lies on every Python machine: the standard library's sources, docstrings and topics."""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.curation = ConfigDict(
        {"sources": ({"kind": "PythonStdlib"},), "validation_fraction": 0.02, "test_fraction": 0.02}
    )
    config.tokenizer = ConfigDict({"kind": "bpe", "vocab_size": 8192, "digits": 2})
    return config

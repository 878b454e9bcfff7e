"""A corpus from your own folder: text, Markdown, JSONL, Parquet and Python files, also .gz and .zst.

python -m data --config=configs/data/folder.py:path/to/folder --workdir=runs/corpus
"""

from ml_collections import ConfigDict


def get_config(folder: str = "text"):
    config = ConfigDict()
    config.curation = ConfigDict(
        {"sources": ({"kind": "Folder", "path": folder, "glob": "**/*", "licence": "unknown"},)}
    )
    config.tokenizer = ConfigDict({"kind": "bpe", "vocab_size": 8192})
    return config

"""A corpus from web archives: WARC and WET files to text, language, quality, privacy, deduplication, tokens.

python -m data --config=configs/data/web.py:path/to/warcs --workdir=runs/web

The order and thresholds are FineWeb's (Penedo et al. 2024, arXiv:2406.17557): English by fastText, Gopher's
repetition and quality, C4 without its rule of end marks, FineWeb's own filters, then privacy, then MinHash over all.
"""

from ml_collections import ConfigDict


def get_config(folder: str = "warc"):
    config = ConfigDict()
    config.curation = ConfigDict(
        {
            "sources": ({"kind": "Warc", "path": folder},),
            "stages": (
                {"kind": "Extract", "engine": "trafilatura"},
                {"kind": "Normalise"},
                {"kind": "Language", "languages": ("en",), "min_score": 0.65},
                {"kind": "GopherRepetition"},
                {"kind": "GopherQuality"},
                {
                    "kind": "C4Lines",
                    "end_marks": ("",),  # FineWeb leaves this rule out: it took 30% of all words
                    "min_words": 0,  # as it does this one
                    "drop_curly_bracket": False,  # formulas and code have them
                    "keep_fenced": True,
                },
                {"kind": "FineWebQuality"},
                {"kind": "Privacy"},
                {"kind": "ExactDedup"},
                {"kind": "MinHashDedup"},
            ),
            "tags_in_metadata": ("Language",),
            "validation_fraction": 0.01,
            "test_fraction": 0.01,
        }
    )
    config.tokenizer = ConfigDict({"kind": "bpe", "vocab_size": 32768})
    return config

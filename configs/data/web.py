"""A corpus from web archives: WARC and WET files to text, language, quality, privacy, deduplication, tokens.

python -m data --config=configs/data/web.py:path/to/warcs --workdir=runs/web

Order and thresholds are FineWeb's (Penedo et al. 2024, arXiv:2406.17557; datatrove's examples/fineweb.py), and so are
the decisions of each filter, but for what is named here:

- Addresses: FineWeb drops those in UT1's lists of adult sites, which are not ours to ship. Name such lists with
  {"kind": "UrlList", "domains": (FILE, ...)} as the first stage.
- Extraction: formulas become LaTeX and code stays fenced. trafilatura's `deduplicate` is off: it remembers earlier
  pages, so that the text of a page would depend on those before it.
- Language: the compressed lid.176 that a package carries; FineWeb's is the whole one.
- Words: "tokens" are nearly spaCy's. Of 462 real pages the repetition filter decides otherwise on 1 and the quality
  filter on 6, most with code or formulas; FineWeb's own filter on none. words="spacy" takes spaCy itself.
- Sentences of C4's rule end at a mark before white space, spaCy's also know abbreviations: 2 of 462 pages.
- Curly brackets: FineWeb drops pages with a "{", which is most pages with code or formulas. They stay here.
- MinHash: 18 bands of 6 and a look at the true similarity of 0.8; FineWeb takes what 14 bands of 8 find without one.
- Privacy: more kinds than its mail and IP addresses, before the deduplication and not after it.
"""

from ml_collections import ConfigDict


def get_config(folder: str = "warc"):
    config = ConfigDict()
    config.curation = ConfigDict(
        {
            "sources": ({"kind": "Warc", "path": folder},),
            "stages": (
                {"kind": "Extract", "engine": "trafilatura", "precision": True},
                {"kind": "Normalise"},
                {"kind": "Language", "languages": ("en",), "min_score": 0.65},
                {
                    "kind": "GopherRepetition",
                    "definition": "datatrove",
                    "language": "en",
                    "words": "tokens",
                },
                {
                    "kind": "GopherQuality",
                    "definition": "datatrove",
                    "language": "en",
                    "words": "tokens",
                    "bullets": ("\u2022", "-"),
                },
                {
                    "kind": "C4Lines",
                    "language": "en",
                    "end_marks": (),  # FineWeb leaves this rule out: it took 30% of all words
                    "count_citations": True,
                    "drop_curly_bracket": False,
                    "keep_fenced": True,
                },
                {"kind": "FineWebQuality", "language": "en", "words": "tokens"},
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

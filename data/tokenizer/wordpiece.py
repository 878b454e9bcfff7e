"""WordPiece as BERT has it: the longest piece first, `##` before a piece that goes on a word (Devlin et al. 2018,
arXiv:1810.04805, and google-research/bert, tokenization.py). White space, and accents in lower case, are lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

PREFIX, UNKNOWN = "##", "[UNK]"
BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def backend_of(tokens: list[str], lowercase: bool) -> tokenizers.Tokenizer:
    """The `tokenizers` tokenizer of a vocabulary in the order of its ids. Raises ValueError without [UNK]."""
    if UNKNOWN not in tokens:
        raise ValueError(f"the vocabulary of {len(tokens)} tokens has no {UNKNOWN}, so it is no WordPiece")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizer(lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=PREFIX, cleanup=False)
    return backend


def normalizer(lowercase: bool) -> normalizers.Normalizer:
    return normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=lowercase, lowercase=lowercase
    )


def read_vocabulary(file: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a vocab.txt, a token a line, as its tokenizer_config.json wants it."""
    tokens = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    backend = backend_of([token.rstrip("\r") for token in tokens], bool(config.get("do_lower_case", True)))
    backend.add_special_tokens([name for name in BERT_SPECIAL_TOKENS if name in tokens])
    return backend

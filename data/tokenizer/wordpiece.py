"""WordPiece as BERT has it: the longest piece first, `##` before a piece that goes on a word (Devlin et al. 2018,
arXiv:1810.04805, and google-research/bert, tokenization.py). White space, and accents in lower case, are lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

PREFIX, UNKNOWN = "##", "[UNK]"
BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def backend_of(
    tokens: list[str],
    lowercase: bool,
    strip_accents: bool | None = None,
    chinese_characters: bool = True,
) -> tokenizers.Tokenizer:
    """The `tokenizers` tokenizer of a vocabulary in the order of its ids. Raises ValueError without [UNK]."""
    if UNKNOWN not in tokens:
        raise ValueError(f"the vocabulary of {len(tokens)} tokens has no {UNKNOWN}, so it is no WordPiece")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizer(lowercase, strip_accents, chinese_characters)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=PREFIX, cleanup=False)
    return backend


def normalizer(
    lowercase: bool, strip_accents: bool | None = None, chinese_characters: bool = True
) -> normalizers.Normalizer:
    """`strip_accents`: None as the case goes; `chinese_characters`: each is a word of its own."""
    return normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=chinese_characters,
        strip_accents=strip_accents,
        lowercase=lowercase,
    )


def read_vocabulary(file: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a vocab.txt, a token a line, as its tokenizer_config.json wants it."""
    tokens = [token.rstrip("\r") for token in file.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    backend = backend_of(tokens, lowercase=True)
    as_configured(backend, config)
    backend.add_special_tokens([name for name in BERT_SPECIAL_TOKENS if name in tokens])
    return backend


def as_configured(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Sets what BertTokenizer of transformers sets from tokenizer_config.json, whatever tokenizer.json says. Raises
    ValueError for a setting that is no truth value."""

    def flag(key: str, default: bool | None) -> bool | None:
        value = config.get(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"tokenizer_config.json: {key} is {value!r}; wanted true or false")
        return default if value is None else value

    backend.normalizer = normalizer(
        bool(flag("do_lower_case", True)),
        flag("strip_accents", None),
        bool(flag("tokenize_chinese_chars", True)),
    )
    backend.decoder = decoders.WordPiece(prefix=PREFIX)  # moves punctuation to the word before it

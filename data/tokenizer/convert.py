"""From one tokenizer format to another; ids stay as they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from configs.files import atomic_write
from data.tokenizer.gguf import save_gguf
from data.tokenizer.interface import Tokenizer
from data.tokenizer.tiktoken_files import save_tiktoken


def convert(tokenizer: Tokenizer, path: str | os.PathLike, format: str) -> None:
    """Writes `tokenizer` in one of `FORMATS`. Raises ValueError where a format can't say what the tokenizer does."""
    if format not in FORMATS:
        raise ValueError(f"format={format!r}; known are {', '.join(FORMATS)}")
    FORMATS[format](tokenizer, path)


def save_huggingface(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """A Hugging Face folder with tokenizer.json, which SentencePiece is turned into. Raises ValueError."""
    from data.tokenizer.sentencepiece import SentencePieceTokenizer

    if isinstance(tokenizer, SentencePieceTokenizer):
        from data.tokenizer.sentencepiece_json import huggingface_tokenizer

        tokenizer = huggingface_tokenizer(tokenizer)
    tokenizer.save(path)


def save_sentencepiece(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """A SentencePiece .model; the first stop token and no chat template are what it can hold. Raises ValueError."""
    from data.tokenizer.sentencepiece import SentencePieceTokenizer, parse_model

    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise ValueError(f"a SentencePiece model can't hold a {type(tokenizer).__name__}")
    proto = parse_model(tokenizer.model)
    words = {word.id: (name.replace(" ", "\u2581"), word) for name, word in tokenizer.words.items()}
    if stripping := [name for name, word in words.values() if word[1:] != (False, False, False)]:
        raise ValueError(
            f"a SentencePiece model can't say that {stripping[0]!r} takes the white space beside it"
        )
    added = {i: (name, proto.SentencePiece.CONTROL) for name, i in tokenizer.added_tokens.items()}
    added |= {i: (name, proto.SentencePiece.USER_DEFINED) for i, (name, _) in words.items()}
    for i, (name, kind) in sorted(added.items()):
        if i < len(proto.pieces) and proto.pieces[i].piece in (name, name.replace("\u2581", " ")):
            proto.pieces[i].piece, proto.pieces[i].type = name, kind
        elif i == len(proto.pieces):
            proto.pieces.add(piece=name, score=0.0, type=kind)
        else:
            raise ValueError(
                f"the added token {name!r} has the id {i}, which does not follow the model's pieces"
            )
    proto.trainer_spec.vocab_size = len(proto.pieces)
    roles = {"bos": tokenizer.bos_id, "eos": next(iter(tokenizer.eos_ids), None), "pad": tokenizer.pad_id}
    for role, i in roles.items():
        name = tokenizer.special_name(i)
        if name is not None:
            setattr(proto.trainer_spec, f"{role}_id", i)
            setattr(proto.trainer_spec, f"{role}_piece", name)
    atomic_write(Path(path), proto.SerializeToString())


FORMATS: dict[str, Callable[[Tokenizer, str | os.PathLike], None]] = {
    "huggingface": save_huggingface,
    "tiktoken": save_tiktoken,
    "sentencepiece": save_sentencepiece,
    "gguf": save_gguf,
}

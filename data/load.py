"""`load_tokenizer`: the tokenizer of a run folder, a checkpoint, a Hugging Face folder, or a file of any format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer, read_json


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer that belongs to a path.

    `path`: a run folder (`tokenizer/`, or that of its newest checkpoint), a checkpoint folder, a Hugging Face
    folder (tokenizer.json; tokenizer.model or spiece.model; vocab.json with merges.txt; or WordPiece's vocab.txt; with
    tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json and chat_template.jinja
    where present), or a file: .gguf, .tiktoken, SentencePiece's .model, or a tokenizer.json by itself.

    Raises FileNotFoundError when nothing is there, ValueError for files that are damaged or of an unknown
    kind.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        from data.tokenizer.gguf import load_gguf_tokenizer

        return load_gguf_tokenizer(path)
    if path.is_file() and path.suffix == ".tiktoken":
        from data.tokenizer.tiktoken_files import load_tiktoken

        return load_tiktoken(path)
    if path.is_file() and path.suffix == ".model":
        return _from_model_file(path)
    if path.is_file() and path.name == "tokenizer.json":
        return _load_folder(path.parent)
    for folder in (path, path / "tokenizer"):
        if _has_tokenizer(folder):
            return _load_folder(folder)
    return _of_model(path)


def _of_model(path: Path) -> Tokenizer:
    from configs.paths import resolve_model
    from data.tokenizer.layouts import missing

    try:
        resolved = resolve_model(path)
    except ValueError as error:
        if not path.is_dir():
            raise
        raise FileNotFoundError(f"{path}: {missing(path)}") from error
    if resolved.tokenizer is None:
        raise FileNotFoundError(f"{path}: {missing(path)}")
    if resolved.tokenizer.suffix == ".gguf":
        return load_tokenizer(resolved.tokenizer)
    return _load_folder(resolved.tokenizer)


def _has_tokenizer(folder: Path) -> bool:
    from data.tokenizer.layouts import LAYOUTS

    return any(all((folder / name).is_file() for name in names) for names in LAYOUTS)


def _load_folder(folder: Path) -> Tokenizer:
    from data.tokenizer.folder import read_description
    from data.tokenizer.layouts import find_layout, missing

    about = read_description(folder)
    if "byte_offset" in about.config:
        tokenizer = _from_bytes(about)
    else:
        found = find_layout(folder)
        if found is None:
            raise FileNotFoundError(f"{folder}: {missing(folder)}")
        file, build = found
        try:
            tokenizer = build(file, about)
        except ValueError as error:
            text = str(error)
            raise ValueError(text if str(folder) in text else f"{file}: {text}") from error
    tokenizer.eos_ids = tuple(dict.fromkeys([*tokenizer.eos_ids, *_stop_ids(folder, tokenizer)]))
    tokenizer.tool_template = about.chat_templates.get("tool_use")
    # BPE spells its spaces; transformers too leaves them alone.
    tokenizer._cleans_up = bool(about.flag("clean_up_tokenization_spaces", False)) and not tokenizer.is_bpe
    if "pad_token" not in tokenizer.roles and tokenizer.eos_ids:
        tokenizer.pad_id = tokenizer.eos_ids[0]
    return tokenizer


def _from_model_file(file: Path) -> Tokenizer:
    """A SentencePiece model by itself, which names the tokens of each role but has no chat template."""
    from data.tokenizer.sentencepiece import SentencePieceTokenizer, parse_model

    try:
        model = file.read_bytes()
        proto = parse_model(model)
        spec, control = proto.trainer_spec, {p.piece for p in proto.pieces if p.type == p.CONTROL}
        bos, eos, pad = (
            name if name in control else None for name in (spec.bos_piece, spec.eos_piece, spec.pad_piece)
        )
        return SentencePieceTokenizer(model, bos=bos, eos=[eos] if eos else [], pad=pad)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _from_bytes(about: Any) -> Tokenizer:
    from data.tokenizer.folder import LARGEST_ID
    from data.tokenizer.raw_bytes import ByteTokenizer

    roles, offset = about.roles, about.config["byte_offset"]
    if not isinstance(offset, int) or not 0 <= offset < LARGEST_ID:
        raise ValueError(f"{about.folder}: byte_offset is {offset!r:.80}; wanted 0 to {LARGEST_ID - 1}")
    return ByteTokenizer(
        [token.content for token in about.added],
        offset=offset,
        bos=roles.get("bos_token"),
        eos=[roles["eos_token"]] if "eos_token" in roles else [],
        pad=roles.get("pad_token"),
        chat_template=about.chat_template,
    )


def _stop_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        ids = (read_json(folder / name) or {}).get("eos_token_id")
        if ids is not None:
            ids = [ids] if isinstance(ids, int) else list(ids)
            return [int(i) for i in ids if 0 <= int(i) < tokenizer.vocab_size]
    return []

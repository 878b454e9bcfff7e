"""`load_tokenizer`: the tokenizer of a run folder, a checkpoint, a Hugging Face folder, or a file of any format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer, read_json

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt")


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer that belongs to a path.

    `path`: a run folder (`tokenizer/`, or that of its newest checkpoint), a checkpoint folder, a Hugging Face
    folder (tokenizer.json, tokenizer.model or WordPiece's vocab.txt, with tokenizer_config.json,
    special_tokens_map.json, generation_config.json and chat_template.jinja where present), or a file: .gguf,
    .tiktoken, SentencePiece's .model, or a tokenizer.json by itself.

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
        if any((folder / name).is_file() for name in _VOCABULARY_FILES):
            return _load_folder(folder)
    from configs.paths import resolve_model

    resolved = resolve_model(path)
    if resolved.tokenizer is None:
        raise FileNotFoundError(
            f"{path}: looked for {' or '.join(_VOCABULARY_FILES)} there and in tokenizer/, found none"
        )
    if resolved.tokenizer.suffix == ".gguf":
        return load_tokenizer(resolved.tokenizer)
    return _load_folder(resolved.tokenizer)


def _load_folder(folder: Path) -> Tokenizer:
    config = read_json(folder / "tokenizer_config.json") or {}
    special_map = read_json(folder / "special_tokens_map.json") or {}
    names = {role: _content(config.get(role)) or _content(special_map.get(role)) for role in _ROLES}
    extra = config.get("additional_special_tokens") or special_map.get("additional_special_tokens") or []
    declared = {_content(token) for token in extra} | set(names.values())
    decoder = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    declared |= {token["content"] for token in decoder.values() if token.get("special")}
    if "byte_offset" in config:
        return _from_bytes(config, names, decoder, _chat_template(folder, config), folder)
    build = next(build for name, build in _BUILDERS.items() if (folder / name).is_file())
    tokenizer = build(
        folder, names, {name for name in declared if name}, decoder, _chat_template(folder, config)
    )
    _add_stop_ids(tokenizer, folder)
    if names["pad_token"] is None and tokenizer.eos_ids:
        tokenizer.pad_id = tokenizer.eos_ids[0]
    return tokenizer


def _add_stop_ids(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.eos_ids = tuple(dict.fromkeys([*tokenizer.eos_ids, *_stop_ids(folder, tokenizer)]))


_ROLES = ("bos_token", "eos_token", "pad_token")


def _content(token: Any) -> str | None:
    """A token in a config is a string or {"content": ...}."""
    return token.get("content") if isinstance(token, dict) else token


def _from_json(
    folder: Path, names: dict, special: set[str], decoder: dict, template: str | None
) -> Tokenizer:
    import tokenizers

    file = folder / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: not a tokenizer that `tokenizers` can read: {error}") from error
    return _from_backend(backend, folder, names, special, template)


def _from_vocabulary(
    folder: Path, names: dict, special: set[str], decoder: dict, template: str | None
) -> Tokenizer:
    from data.tokenizer.wordpiece import read_vocabulary

    config = read_json(folder / "tokenizer_config.json") or {}
    try:
        backend = read_vocabulary(folder / "vocab.txt", config)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'vocab.txt'}: {error}") from error
    return _from_backend(backend, folder, names, special, template)


def _from_backend(
    backend: Any, folder: Path, names: dict, special: set[str], template: str | None
) -> Tokenizer:
    from data.tokenizer.huggingface import HuggingFaceTokenizer

    special = {name for name in special if backend.token_to_id(name) is not None}
    try:
        return HuggingFaceTokenizer(
            backend,
            special_tokens=sorted(special, key=backend.token_to_id),
            bos=names["bos_token"],
            eos=[names["eos_token"]] if names["eos_token"] else [],
            pad=names["pad_token"],
            chat_template=template,
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _from_model(
    folder: Path, names: dict, special: set[str], decoder: dict, template: str | None
) -> Tokenizer:
    from data.tokenizer.sentencepiece import SentencePieceTokenizer

    added = {token["content"]: i for i, token in decoder.items() if token["content"] in special}
    strips = {t["content"]: (bool(t.get("lstrip")), bool(t.get("rstrip"))) for t in decoder.values()}
    try:
        return SentencePieceTokenizer(
            (folder / "tokenizer.model").read_bytes(),
            added_tokens=added,
            bos=names["bos_token"],
            eos=[names["eos_token"]] if names["eos_token"] else [],
            pad=names["pad_token"],
            chat_template=template,
            strips={name: sides for name, sides in strips.items() if any(sides)},
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


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


def _from_bytes(
    config: dict[str, Any], names: dict, decoder: dict, template: str | None, folder: Path
) -> Tokenizer:
    from data.tokenizer.raw_bytes import ByteTokenizer

    tokenizer = ByteTokenizer(
        [token["content"] for _, token in sorted(decoder.items())],
        offset=config["byte_offset"],
        bos=names["bos_token"],
        eos=[names["eos_token"]] if names["eos_token"] else [],
        pad=names["pad_token"],
        chat_template=template,
    )
    _add_stop_ids(tokenizer, folder)
    return tokenizer


_BUILDERS = {"tokenizer.json": _from_json, "tokenizer.model": _from_model, "vocab.txt": _from_vocabulary}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = (read_json(folder / "chat_template.json") or config).get("chat_template")
    if isinstance(template, list):  # several named templates: transformers takes "default"
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ValueError(f"{folder}: chat_template has {sorted(named)}, none of them named 'default'")
        return named["default"]
    return template


def _stop_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        ids = (read_json(folder / name) or {}).get("eos_token_id")
        if ids is not None:
            ids = [ids] if isinstance(ids, int) else list(ids)
            return [int(i) for i in ids if 0 <= int(i) < tokenizer.vocab_size]
    return []

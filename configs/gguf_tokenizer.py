"""The tokenizer of a Hugging Face folder as GGUF metadata, so that a GGUF file stands alone.

Keys as in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. GGUF stores no pre-tokenizer, only the
name of one that llama.cpp knows (src/llama-vocab.cpp), so a byte-level BPE with another one is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    f"{_BEFORE}{_UPPER}*{_LOWER}+{_AFTER}|{_BEFORE}{_UPPER}+{_LOWER}*{_AFTER}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORD_START = "\u2581"  # llama.cpp marks the piece that begins a word, BERT those that go on

# (regular expressions in turn, ignore_merges, NFC) -> llama.cpp's name
PRETOKENIZERS = {
    ((_GPT2,), False, False): "gpt-2",
    ((r"\p{N}", _GPT2), False, False): "smollm",
    ((_LLAMA3,), True, False): "llama-bpe",
    ((_LLAMA3,), False, False): "dbrx",
    ((_QWEN2,), False, True): "qwen2",
    ((_QWEN2,), False, False): "stablelm2",
    ((_O200K,), False, False): "gpt-4o",
}


def tokenizer_metadata(files: Mapping[str, bytes], vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a model with `vocab_size` embedding rows.

    Args:
      files: by name, of a Hugging Face tokenizer folder: tokenizer.json or tokenizer.model,
        tokenizer_config.json, generation_config.json, chat_template.jinja where present.

    Raises:
      ValueError: a tokenizer that GGUF can't say.
    """
    if "tokenizer.json" in files:
        saved = _json(files, "tokenizer.json")
        kind = (saved.get("model") or {}).get("type")
        if kind not in _WRITERS:
            raise ValueError(
                f"tokenizer.json holds a {kind}; GGUF files are written for {' and '.join(_WRITERS)}."
            )
        metadata = _WRITERS[kind](saved, vocab_size)
    elif "tokenizer.model" in files:
        metadata = _sentencepiece(files["tokenizer.model"], _json(files, "tokenizer_config.json"), vocab_size)
    else:
        raise ValueError(f"no tokenizer.json or tokenizer.model among {', '.join(sorted(files))}.")
    return metadata | _special_ids(files, metadata["tokenizer.ggml.tokens"]) | _chat_template(files)


def _byte_level_bpe(saved: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    model = saved["model"]
    style = (
        _patterns(saved.get("pre_tokenizer")),
        bool(model.get("ignore_merges")),
        _is_nfc(saved.get("normalizer")),
    )
    if style not in PRETOKENIZERS:
        raise ValueError(
            f"GGUF has no name for this tokenizer's pre-tokenizer {style}, so its ids would come out wrong. Known: "
            f"{', '.join(PRETOKENIZERS.values())}. Save in another format, or train the tokenizer "
            "with digits=1 or 3."
        )
    vocabulary = dict(model["vocab"])
    kinds = dict.fromkeys(vocabulary, NORMAL)
    for token in saved.get("added_tokens", ()):
        vocabulary[token["content"]] = token["id"]
        kinds[token["content"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRETOKENIZERS[style],
        **_vocabulary({i: (token, kinds[token]) for token, i in vocabulary.items()}, vocab_size),
        "tokenizer.ggml.merges": merges,
    }


def _wordpiece(saved: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    model, normalizer = saved["model"], saved.get("normalizer") or {}
    if normalizer.get("type") != "BertNormalizer" or model["continuing_subword_prefix"] != "##":
        raise ValueError(
            "tokenizer.json is WordPiece, but not as BERT has it, which is all that GGUF can say."
        )
    lowercase = bool(normalizer["lowercase"])
    strip_accents = normalizer.get("strip_accents")
    special = {token["content"] for token in saved.get("added_tokens", ()) if token["special"]}

    def spelled(token: str) -> str:
        if len(token) > 2 and token[0] == "[" and token[-1] == "]":  # [unused1]
            return token
        return token.removeprefix("##") if token.startswith("##") and token != "##" else _WORD_START + token

    rows = {
        i: (token, CONTROL) if token in special else (spelled(token), NORMAL)
        for token, i in model["vocab"].items()
    }
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        **_vocabulary(rows, vocab_size),
        "tokenizer.ggml.unknown_token_id": int(model["vocab"][model["unk_token"]]),
        "tokenizer.ggml.normalizer.lowercase": lowercase,
        "tokenizer.ggml.normalizer.strip_accents": lowercase
        if strip_accents is None
        else bool(strip_accents),
    }


_WRITERS = {"BPE": _byte_level_bpe, "WordPiece": _wordpiece}


def _sentencepiece(content: bytes, config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    from sentencepiece import sentencepiece_model_pb2 as pb

    proto = pb.ModelProto.FromString(content)  # type: ignore[attr-defined]
    if proto.trainer_spec.model_type != pb.TrainerSpec.BPE:  # type: ignore[attr-defined]
        raise ValueError("tokenizer.model is no BPE; GGUF's 'llama' tokenizer is. Save in another format.")
    if proto.normalizer_spec.name != "identity" or proto.denormalizer_spec.precompiled_charsmap:
        raise ValueError(
            f"tokenizer.model normalises text ({proto.normalizer_spec.name}), which GGUF can't say. Save in "
            "another format."
        )
    pieces = {i: (piece.piece, int(piece.type)) for i, piece in enumerate(proto.pieces)}
    for i, token in config.get("added_tokens_decoder", {}).items():
        pieces.setdefault(int(i), (token["content"], CONTROL if token.get("special") else USER_DEFINED))
    scores = np.zeros(vocab_size, np.float32)
    scores[: len(proto.pieces)] = [piece.score for piece in proto.pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        **_vocabulary(pieces, vocab_size),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.unknown_token_id": proto.trainer_spec.unk_id,
        "tokenizer.ggml.add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": proto.normalizer_spec.remove_extra_whitespaces,
    }


def _vocabulary(tokens: dict[int, tuple[str, int]], vocab_size: int) -> dict[str, Any]:
    """A token and its type for every embedding row; rows without one are named and marked as unused."""
    if tokens and max(tokens) >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {max(tokens)}, but the model only {vocab_size} embedding rows."
        )
    rows = [tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(vocab_size)]
    return {
        "tokenizer.ggml.tokens": [token for token, _ in rows],
        "tokenizer.ggml.token_type": np.array([kind for _, kind in rows], np.int32),
    }


def _patterns(node: dict[str, Any] | None) -> tuple[str, ...]:
    """The regular expressions that a pre-tokenizer applies in turn; any other part gives its name in
    brackets.
    """
    if node is None:
        return ()
    if node["type"] == "Sequence":
        return tuple(pattern for child in node["pretokenizers"] for pattern in _patterns(child))
    if node["type"] == "Split" and node["behavior"] == "Isolated" and not node["invert"]:
        return (node["pattern"].get("Regex", f"<{node['pattern']}>"),)
    if node["type"] == "ByteLevel" and not node["add_prefix_space"]:
        return (_GPT2,) if node["use_regex"] else ()
    if node["type"] == "Digits" and node["individual_digits"]:
        return (r"\p{N}",)
    return (f"<{json.dumps(node)}>",)


def _is_nfc(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None:
        return False
    if normalizer["type"] != "NFC":
        raise ValueError(f"tokenizer.json normalises text ({normalizer['type']}), which GGUF can't say.")
    return True


def _special_ids(files: Mapping[str, bytes], tokens: list[str]) -> dict[str, Any]:
    generation, config = _json(files, "generation_config.json"), _json(files, "tokenizer_config.json")
    found: dict[str, Any] = {}
    for key, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        ids = generation.get(f"{key}_token_id")
        ids = list(ids) if isinstance(ids, list) else [] if ids is None else [ids]
        name = config.get(f"{key}_token")
        name = name.get("content") if isinstance(name, dict) else name
        if name in tokens and tokens.index(name) not in ids:
            ids.append(tokens.index(name))
        if ids:
            found[f"tokenizer.ggml.{theirs}_token_id"] = int(ids[0])
        if key == "eos" and len(ids) > 1:
            found["tokenizer.ggml.eot_token_id"] = int(ids[1])
    added = {"add_bos_token": config.get("add_bos_token"), "add_eos_token": config.get("add_eos_token")}
    return found | {f"tokenizer.ggml.{key}": bool(value) for key, value in added.items() if value is not None}


def _chat_template(files: Mapping[str, bytes]) -> dict[str, str]:
    if "chat_template.jinja" in files:
        return {"tokenizer.chat_template": files["chat_template.jinja"].decode("utf-8")}
    template = _json(files, "tokenizer_config.json").get("chat_template")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        saved = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{name}: not JSON: {error}") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{name}: is a JSON {type(saved).__name__}; wanted an object.")
    return saved

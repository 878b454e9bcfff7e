"""The tokenizer of a Hugging Face folder as GGUF metadata, so that a GGUF file stands alone.

Keys as in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. GGUF stores no pre-tokenizer, only the
name of one that llama.cpp knows (src/llama-vocab.cpp), so a byte-level BPE with another one is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

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

# transformers' class over a vocab.json with merges.txt -> how it cuts words
_CLASSES = {
    "GPT2Tokenizer": (None, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}),
    "Qwen2Tokenizer": (
        {"type": "NFC"},
        {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False},
    ),
}
_METASPACE = {"type": "Metaspace", "replacement": _WORD_START, "split": False}
_BERT_ROLES = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_THEIRS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # the spelling is GGUF's


def tokenizer_metadata(files: Mapping[str, bytes], vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a model with `vocab_size` embedding rows.

    Args:
      files: by name, of a Hugging Face tokenizer folder: tokenizer.json, tokenizer.model or spiece.model, vocab.json
        with merges.txt, or vocab.txt; tokenizer_config.json, special_tokens_map.json, added_tokens.json,
        generation_config.json, config.json and chat_template.jinja where present.

    Raises:
      ValueError: a tokenizer that GGUF can't say.
    """
    saved = _tokenizer_json(files)
    kind = (saved.get("model") or {}).get("type") if saved else None
    model = next((files[name] for name in ("tokenizer.model", "spiece.model") if name in files), None)
    if model is not None and (saved is None or _is_sentencepiece(saved)):
        metadata = _sentencepiece(model, files, vocab_size)
    elif saved is None:
        raise ValueError(
            "no tokenizer.json, tokenizer.model, spiece.model, vocab.json with merges.txt, or vocab.txt among "
            f"{', '.join(sorted(files))}."
        )
    elif kind in _WRITERS:
        writer = _merged_pieces if _is_sentencepiece(saved) else _WRITERS[kind]
        metadata = writer(saved, files, vocab_size)
    else:
        raise ValueError(
            f"tokenizer.json holds a {kind}; GGUF files are written for {' and '.join(_WRITERS)}."
        )
    return metadata | _special_ids(files, saved, metadata["tokenizer.ggml.tokens"]) | _chat_template(files)


def _tokenizer_json(files: Mapping[str, bytes]) -> dict[str, Any] | None:
    """tokenizer.json, or what the older files of a vocabulary say in its form."""
    config = _json(files, "tokenizer_config.json")
    if "tokenizer.json" in files:
        return _as_its_class(_json(files, "tokenizer.json"), config)
    if "vocab.json" in files and "merges.txt" in files:
        lines = files["merges.txt"].decode("utf-8").split("\n")
        merges = [line for line in lines if line.strip() and not line.startswith("#version:")]
        model = _json(files, "config.json")
        name = config.get("tokenizer_class") or model.get("tokenizer_class")
        if name is None:
            name = "Qwen2Tokenizer" if str(model.get("model_type")).startswith("qwen") else "GPT2Tokenizer"
        if name.removesuffix("Fast") not in _CLASSES:
            raise ValueError(
                f"vocab.json and merges.txt don't say how {name} cuts text into words. Known: {', '.join(_CLASSES)}."
            )
        normalizer, steps = _CLASSES[name.removesuffix("Fast")]
        spec = {"type": "BPE", "vocab": _json(files, "vocab.json"), "merges": merges}
        end = "<|endoftext|>"
        added = [{"content": end, "id": spec["vocab"][end], "special": True}] if end in spec["vocab"] else []
        made = {"model": spec, "normalizer": normalizer, "pre_tokenizer": steps, "added_tokens": added}
        roles = ("eos_token",) if name.startswith("Qwen2") else ("bos_token", "eos_token")
        return _as_its_class(made | {"roles": dict.fromkeys(roles, end) if added else {}}, config)
    if "vocab.txt" in files and not {"tokenizer.model", "spiece.model"} & files.keys():
        words = files["vocab.txt"].decode("utf-8").removesuffix("\n").split("\n")
        vocabulary = {word.rstrip("\r"): i for i, word in enumerate(words)}
        model = {
            "type": "WordPiece",
            "vocab": vocabulary,
            "continuing_subword_prefix": "##",
            "unk_token": "[UNK]",
        }
        normalizer = {"type": "BertNormalizer", "lowercase": config.get("do_lower_case", True)}
        normalizer |= {"strip_accents": config.get("strip_accents")}
        normalizer |= {"handle_chinese_chars": config.get("tokenize_chinese_chars", True)}
        special = [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name in vocabulary]
        added = [{"content": name, "id": vocabulary[name], "special": True} for name in special]
        return {"model": model, "normalizer": normalizer, "added_tokens": added}
    return None


def _as_its_class(saved: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What transformers' class sets from tokenizer_config.json, whatever tokenizer.json says."""
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    steps, prefix = saved.get("pre_tokenizer") or {}, config.get("add_prefix_space")
    if name == "BertTokenizer" and (saved.get("normalizer") or {}).get("type") == "BertNormalizer":
        chosen = {
            "lowercase": config.get("do_lower_case", True),
            "strip_accents": config.get("strip_accents"),
        }
        chosen["handle_chinese_chars"] = config.get("tokenize_chinese_chars", True)
        return saved | {"normalizer": saved["normalizer"] | chosen}
    if name == "LlamaTokenizer" and _is_sentencepiece(saved):
        scheme = "never" if prefix is False else "first"
        return saved | {"normalizer": None, "pre_tokenizer": _METASPACE | {"prepend_scheme": scheme}}
    if name in ("GPT2Tokenizer", "GPTNeoXTokenizer") and steps.get("type") == "ByteLevel":
        return saved | {"pre_tokenizer": steps | {"add_prefix_space": bool(prefix)}}
    return saved


def _is_sentencepiece(saved: dict[str, Any]) -> bool:
    """Whether it is a SentencePiece model in the form of tokenizer.json: spaces are marks, bytes are pieces."""
    steps = json.dumps([saved.get("pre_tokenizer"), saved.get("normalizer"), saved.get("decoder")])
    return saved["model"]["type"] in ("BPE", "Unigram") and "ByteLevel" not in steps and "\\u2581" in steps


def _added(
    files: Mapping[str, bytes], saved: dict[str, Any] | None, vocabulary: dict[str, int]
) -> dict[int, tuple]:
    """Added tokens of all files, id to (token, type); those without an id follow the vocabulary, as in transformers."""
    config, older = _json(files, "tokenizer_config.json"), _json(files, "special_tokens_map.json")
    special = list(_named(config, older).values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(key) or older.get(key) or []
        special += [_content(token) for token in value] if isinstance(value, list) else []
    tokens: dict[str, list] = {}
    for token in (saved or {}).get("added_tokens", ()):
        tokens[token["content"]] = [int(token["id"]), bool(token["special"])]
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        tokens[token["content"]] = [int(i), bool(token.get("special"))]
    for name, i in _json(files, "added_tokens.json").items():
        tokens.setdefault(name, [int(i), False])
    known = vocabulary | {name: i for name, (i, _) in tokens.items()}
    following = max(known.values(), default=-1) + 1
    for name in dict.fromkeys(special):
        if name not in known:
            known[name], following = following, following + 1
        tokens[name] = [known[name], True]
    return {i: (name, CONTROL if is_special else USER_DEFINED) for name, (i, is_special) in tokens.items()}


def _byte_level_bpe(saved: dict[str, Any], files: Mapping[str, bytes], vocab_size: int) -> dict[str, Any]:
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
    rows = {i: (token, NORMAL) for token, i in model["vocab"].items()}
    rows |= _added(files, saved, model["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRETOKENIZERS[style],
        **_vocabulary(rows, vocab_size),
        "tokenizer.ggml.merges": merges,
    }


def _wordpiece(saved: dict[str, Any], files: Mapping[str, bytes], vocab_size: int) -> dict[str, Any]:
    model, normalizer = saved["model"], saved.get("normalizer") or {}
    if not normalizer.get("handle_chinese_chars", True):
        raise ValueError(
            "tokenizer.json leaves Chinese characters together (tokenize_chinese_chars=false); GGUF's 'bert' tokenizer "
            "cuts each from the other. Save in another format."
        )
    if normalizer.get("type") != "BertNormalizer" or model["continuing_subword_prefix"] != "##":
        raise ValueError(
            "tokenizer.json is WordPiece, but not as BERT has it, which is all that GGUF can say."
        )
    lowercase = bool(normalizer["lowercase"])
    strip_accents = normalizer.get("strip_accents")
    added = _added(files, saved, model["vocab"])
    special = {name for name, kind in added.values() if kind == CONTROL}

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


def _sentencepiece(content: bytes, files: Mapping[str, bytes], vocab_size: int) -> dict[str, Any]:
    from sentencepiece import sentencepiece_model_pb2 as pb

    proto = pb.ModelProto.FromString(content)  # type: ignore[attr-defined]
    if proto.trainer_spec.model_type != pb.TrainerSpec.BPE:  # type: ignore[attr-defined]
        raise ValueError("tokenizer.model is no BPE; GGUF's 'llama' tokenizer is. Save in another format.")
    if proto.normalizer_spec.name != "identity" or proto.denormalizer_spec.precompiled_charsmap:
        raise ValueError(
            f"tokenizer.model normalises text ({proto.normalizer_spec.name}), which GGUF can't say. Save in "
            "another format."
        )
    config = _json(files, "tokenizer_config.json")
    pieces = {i: (piece.piece, int(piece.type)) for i, piece in enumerate(proto.pieces)}
    scores = np.zeros(vocab_size, np.float32)
    scores[: len(proto.pieces)] = [piece.score for piece in proto.pieces]
    prefix = config.get("add_prefix_space")
    return _pieces(
        pieces,
        scores,
        _added(files, None, {piece: i for i, (piece, _) in pieces.items()}),
        proto.trainer_spec.unk_id,
        proto.normalizer_spec.add_dummy_prefix if prefix is None else bool(prefix),
        proto.normalizer_spec.remove_extra_whitespaces,
    )


def _merged_pieces(saved: dict[str, Any], files: Mapping[str, bytes], vocab_size: int) -> dict[str, Any]:
    """A SentencePiece BPE model out of a tokenizer.json: a piece's score is the place of the first merge that makes it.

    SentencePiece merges whatever makes a piece, so every way to cut a piece in two has to be among the merges.
    """
    model = saved["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise ValueError(
            f"tokenizer.json holds a SentencePiece {model['type']}, byte_fallback={model.get('byte_fallback')}; GGUF's "
            "'llama' tokenizer is BPE with byte_fallback. Save in another format."
        )
    vocabulary, unknown = model["vocab"], model.get("unk_token")
    added = _added(files, saved, vocabulary)
    names = {name for name, _ in added.values()}
    ordinary = {t for t in vocabulary if t not in names and t != unknown and not _is_byte(t)}
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    rank: dict[str, int] = {}
    for place, pair in enumerate(merges):
        rank.setdefault("".join(pair), place)
    cuts = {
        (t[:i], t[i:]) for t in ordinary for i in range(1, len(t)) if t[:i] in ordinary and t[i:] in ordinary
    }
    if missing := cuts - set(merges):
        raise ValueError(
            f"tokenizer.json's merges leave out {len(missing)} ways to make pieces ({' '.join(min(missing))!r}), so "
            "they are no SentencePiece model's, which GGUF's 'llama' tokenizer is. Save in another format."
        )
    kinds = {t: BYTE if _is_byte(t) else UNKNOWN if t == unknown else NORMAL for t in vocabulary}
    scores = np.zeros(vocab_size, np.float32)
    for token, i in vocabulary.items():
        scores[i] = -float(rank.get(token, len(merges)))
    prefix = json.dumps([saved.get("pre_tokenizer"), saved.get("normalizer")])
    return _pieces(
        {i: (token, kinds[token]) for token, i in vocabulary.items()},
        scores,
        added,
        vocabulary.get(unknown, 0),
        "Prepend" in prefix
        or '"prepend_scheme": "first"' in prefix
        or '"prepend_scheme": "always"' in prefix,
        False,
    )


def _is_byte(token: str) -> bool:
    return re.fullmatch("<0x[0-9A-F]{2}>", token) is not None


def _pieces(
    pieces: dict[int, tuple[str, int]],
    scores: np.ndarray,
    added: dict[int, tuple[str, int]],
    unknown: int,
    prefix: bool,
    remove_spaces: bool,
) -> dict[str, Any]:
    kept = {i for i, (_, kind) in pieces.items() if kind in (UNKNOWN, BYTE)}
    pieces = pieces | {i: token for i, token in added.items() if i not in kept}
    # llama.cpp looks for these in the text itself, before spaces become marks.
    written = {
        i: (token.replace(_WORD_START, " ") if kind == USER_DEFINED else token, kind)
        for i, (token, kind) in pieces.items()
    }
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        **_vocabulary(written, len(scores)),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.unknown_token_id": unknown,
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.remove_extra_whitespaces": remove_spaces,
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


def _special_ids(
    files: Mapping[str, bytes], saved: dict[str, Any] | None, tokens: list[str]
) -> dict[str, Any]:
    """The ids of roles and whether they stand around a text, from all that says so: the files of settings, and the
    post-processor of tokenizer.json, which may be the only one."""
    generation, config = _json(files, "generation_config.json"), _json(files, "tokenizer_config.json")
    kind = ((saved or {}).get("model") or {}).get("type")
    implied = _BERT_ROLES if kind == "WordPiece" else (saved or {}).get("roles", {})
    names: dict[str, Any] = implied | _named(config, _json(files, "special_tokens_map.json"))
    says, before, after = _around(saved)
    names.setdefault("bos_token", before or names.get("cls_token"))
    names.setdefault("eos_token", after or names.get("sep_token"))
    places = {token: i for i, token in reversed(list(enumerate(tokens)))}
    found: dict[str, Any] = {}
    for key in _ROLES:
        ids = generation.get(f"{key}_token_id")
        ids = list(ids) if isinstance(ids, list) else [] if ids is None else [ids]
        name = names.get(f"{key}_token")
        if name in places and places[name] not in ids:
            ids.append(places[name])
        if ids:
            found[f"tokenizer.ggml.{_THEIRS.get(key, key)}_token_id"] = int(ids[0])
        if key == "eos" and len(ids) > 1:
            found["tokenizer.ggml.eot_token_id"] = int(ids[1])
    stated = {key: config.get(f"add_{key}_token") for key in ("bos", "eos")}
    if says:  # a processor that adds nothing says so too
        stated = {key: bool(value) for key, value in stated.items()}
    if before is not None and before in (names["bos_token"], names.get("cls_token")):
        stated["bos"] = True
    if after is not None and after in places:
        stated["eos"] = True
        if (last := places[after]) != found.get(
            "tokenizer.ggml.eos_token_id"
        ):  # what ends a text is not what ends a turn
            found["tokenizer.ggml.eot_token_id"] = found["tokenizer.ggml.eos_token_id"]
            found["tokenizer.ggml.eos_token_id"] = last
    return found | {
        f"tokenizer.ggml.add_{key}_token": bool(on) for key, on in stated.items() if on is not None
    }


def _around(saved: dict[str, Any] | None) -> tuple[bool, str | None, str | None]:
    """Whether the post-processor of a tokenizer.json has a say in what stands around a text, and the special tokens
    that it puts before and after."""
    node = (saved or {}).get("post_processor") or {}
    says, before, after = False, None, None
    for step in node.get("processors", [node]):
        if step.get("type") == "TemplateProcessing":
            says, single = True, step["single"]
            before = (single[0].get("SpecialToken") or {}).get("id") or before
            after = (single[-1].get("SpecialToken") or {}).get("id") or after
        elif step.get("type") in ("BertProcessing", "RobertaProcessing"):
            says, before, after = True, step["cls"][0], step["sep"][0]
    return says, before, after


def _named(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    """Role to token, also the roles that a model names itself."""
    found: dict[str, Any] = dict.fromkeys(f"{role}_token" for role in _ROLES)  # these come first
    for source in (older, config):
        found |= {key: value for key, value in source.items() if key.endswith("_token")}
        extra = source.get("extra_special_tokens")
        found |= extra if isinstance(extra, dict) else {}
    return {key: name for key, value in found.items() if isinstance(name := _content(value), str)}


def _content(token: Any) -> Any:
    """A token in a file is a string or {"content": ...}."""
    return token.get("content") if isinstance(token, dict) else token


def _chat_template(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The chat template, and others of theirs by name."""
    if "chat_template.jinja" in files:
        return {"tokenizer.chat_template": files["chat_template.jinja"].decode("utf-8")}
    template = _json(files, "chat_template.json").get("chat_template")
    template = template or _json(files, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if not isinstance(template, dict):
        return {"tokenizer.chat_template": template} if isinstance(template, str) else {}
    named = {f"tokenizer.chat_template.{name}": text for name, text in template.items() if name != "default"}
    named |= {"tokenizer.chat_templates": [name for name in template if name != "default"]} if named else {}
    return named | ({"tokenizer.chat_template": template["default"]} if "default" in template else {})


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        saved = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{name}: not JSON: {error}") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{name}: is a JSON {type(saved).__name__}; wanted an object.")
    return saved

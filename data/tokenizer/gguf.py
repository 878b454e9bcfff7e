"""The tokenizer inside a GGUF file (ggml-org/ggml, docs/gguf.md): byte-level BPE ("gpt2"), SentencePiece
("llama") or WordPiece ("bert"). `save_gguf` writes one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.tokenizer.interface import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Files often give one stop token where the model was taught several; these names stop in every model that has
# them.
_STOP_NAMES = {
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|endoftext|>",
    "<|end_of_text|>", "<EOT>", "_<EOT>", "<|return|>", "<|call|>", "<|END_OF_TURN_TOKEN|>", "</s>",
    "<｜end▁of▁sentence｜>",
}  # fmt: skip


class GGUFTokenizerError(ValueError):
    """The file's tokenizer is missing, damaged, or of a kind that is not known."""


def load_gguf_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer in a GGUF file, with its chat template and stop tokens. Raises GGUFTokenizerError."""
    from model.formats.gguf import container

    return from_metadata(container.read(path).metadata, str(path))


def save_gguf(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """Writes a GGUF file that holds a vocabulary and no model.

    Raises ValueError for a tokenizer that GGUF can't say: it names pre-tokenizers, and has no unigram model.
    """
    from model.formats.gguf.container_writer import write
    from model.formats.gguf.tokenizer import tokenizer_metadata

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    metadata = tokenizer_metadata(files, tokenizer.vocab_size)
    write(
        Path(path),
        {"general.architecture": _ARCHITECTURES[metadata["tokenizer.ggml.model"]], **metadata},
        {},
        _none,
    )


_ARCHITECTURES = {"gpt2": "llama", "llama": "llama", "bert": "bert"}  # a file has to name one


def _none(name: str) -> Any:
    raise KeyError(f"a vocabulary has no tensor {name!r}")


def from_metadata(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer that GGUF `metadata` describes; `where` names the file in errors."""
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece, "bert": _wordpiece}
    model = metadata.get("tokenizer.ggml.model")
    if model not in builders:
        raise GGUFTokenizerError(
            f"{where}: tokenizer.ggml.model is {model!r}. Known are 'gpt2' (byte-level BPE), 'llama' "
            "(SentencePiece) and 'bert' (WordPiece)."
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens", where)
    types = [int(t) for t in metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))]
    if len(types) != len(tokens):
        raise GGUFTokenizerError(f"{where}: {len(tokens)} tokens but {len(types)} token types")

    def id_of(key: str) -> int | None:
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is None:
            return None
        if not 0 <= int(token_id) < len(tokens):
            raise GGUFTokenizerError(
                f"{where}: {key}_token_id {token_id} is outside the {len(tokens)} tokens"
            )
        return int(token_id)

    def name_of(key: str) -> str | None:
        return None if (i := id_of(key)) is None else tokens[i]

    bos, pad = name_of("bos"), name_of("padding")
    stops = [name for name in (name_of("eos"), name_of("eot"), name_of("eom")) if name is not None]
    for name in [bos, pad, *stops]:
        if name is not None:
            types[tokens.index(name)] = CONTROL  # older files type these as normal tokens
    stops += sorted(t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL and t in _STOP_NAMES)
    names = {"bos": bos, "eos": stops, "pad": pad, "chat_template": metadata.get("tokenizer.chat_template")}
    found = {role: name_of(key) for role, key in _ROLES.items()}
    names["roles"] = {role: name for role, name in found.items() if name is not None}
    names["around"] = _around(
        metadata, str(model), {key: id_of(key) for key in ("bos", "eos", "cls", "seperator")}
    )
    try:
        tokenizer = builders[model](metadata, tokens, types, where, names)
        tokenizer.tool_template = metadata.get("tokenizer.chat_template.tool_use")
        return tokenizer
    except GGUFTokenizerError:
        raise
    except Exception as error:  # the backends raise bare Exception
        raise GGUFTokenizerError(f"{where}: the tokenizer can't be built: {error}") from error


# The roles as chat templates name them; GGUF spells one of them so.
_ROLES = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "sep_token": "seperator", "pad_token": "padding",
    "cls_token": "cls", "mask_token": "mask",
}  # fmt: skip


def _around(
    metadata: Mapping[str, Any], model: str, ids: Mapping[str, int | None]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """What stands around a text: as the file says, else as llama.cpp has it for the kind. None where a byte-level BPE
    says nothing: there it depends on more than the kind."""
    stated = {end: metadata.get(f"tokenizer.ggml.add_{end}_token") for end in ("bos", "eos", "sep")}
    if model == "gpt2" and not any(value is not None for value in stated.values()):
        return None
    defaults = {"bos": model != "gpt2", "eos": False, "sep": model == "bert"}
    wanted = {end: defaults[end] if value is None else bool(value) for end, value in stated.items()}
    first = ids["bos"] if ids["bos"] is not None else ids["cls"]
    before = (first,) if wanted["bos"] and first is not None else ()
    last = ids["seperator"] if wanted["sep"] else None
    if last is None and (wanted["eos"] or wanted["sep"]):
        last = ids["eos"]
    return before, (last,) if last is not None else ()


def _strings(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    values = metadata.get(key)
    if values is None or isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
        raise GGUFTokenizerError(f"{where}: {key} is missing or empty, so the file has no vocabulary")
    return [str(value) for value in values]


def _byte_level_bpe(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str, names: dict[str, Any]
) -> Tokenizer:
    import tokenizers
    from tokenizers import AddedToken, decoders, models

    from data.tokenizer.huggingface import HuggingFaceTokenizer
    from data.tokenizer.pretokenizers import GGUF_PRETOKENIZERS

    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in GGUF_PRETOKENIZERS:
        raise GGUFTokenizerError(
            f"{where}: the pre-tokenizer tokenizer.ggml.pre={pre!r} is not known, so its ids would be wrong. "
            f"Known: {', '.join(sorted(GGUF_PRETOKENIZERS))}."
        )
    parts = (merge.partition(" ") for merge in _strings(metadata, "tokenizer.ggml.merges", where))
    merges = [(left, right) for left, _, right in parts]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise GGUFTokenizerError(
            f"{where}: {len(tokens) - len(vocabulary)} tokens occur twice in the vocabulary"
        )
    unknown = next(
        (m for m in merges if not all(m) or any(p not in vocabulary for p in (*m, "".join(m)))), None
    )
    if unknown is not None:
        raise GGUFTokenizerError(
            f"{where}: the merge {' '.join(unknown)!r} is not made of tokens of the vocabulary"
        )
    style = GGUF_PRETOKENIZERS[pre]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=style.ignore_merges)
    )
    backend.pre_tokenizer, backend.decoder = style.build(), decoders.ByteLevel()
    if style.nfc:
        backend.normalizer = style.normalizer()
    by_kind = {kind: [t for t, own in zip(tokens, types, strict=True) if own == kind] for kind in set(types)}
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in by_kind.get(CONTROL, [])]
    )
    backend.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in by_kind.get(USER_DEFINED, [])]
    )
    return HuggingFaceTokenizer(backend, **names)


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str, names: dict[str, Any]
) -> Tokenizer:
    from sentencepiece import sentencepiece_model_pb2

    from data.tokenizer.sentencepiece import SentencePieceTokenizer, Word

    scores = [float(s) for s in metadata.get("tokenizer.ggml.scores", ())]
    if len(scores) != len(tokens):
        raise GGUFTokenizerError(f"{where}: {len(tokens)} tokens but {len(scores)} scores")
    first = types.index(UNKNOWN) if UNKNOWN in types else 0
    unknown = int(metadata.get("tokenizer.ggml.unknown_token_id", first))
    if not 0 <= unknown < len(tokens):
        raise GGUFTokenizerError(f"{where}: unknown_token_id {unknown} is outside the {len(tokens)} tokens")
    types = [UNUSED if kind == UNKNOWN else kind for kind in types]  # SentencePiece wants exactly one unknown
    types[unknown] = UNKNOWN
    pb: Any = sentencepiece_model_pb2  # makes its classes when it is imported
    proto = pb.ModelProto()
    proto.trainer_spec.model_type = pb.TrainerSpec.BPE
    proto.trainer_spec.vocab_size = len(tokens)
    proto.trainer_spec.byte_fallback = BYTE in types
    proto.trainer_spec.unk_id = unknown
    proto.trainer_spec.unk_piece = tokens[unknown]
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    proto.normalizer_spec.remove_extra_whitespaces = bool(
        metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)
    )
    # llama.cpp finds user-defined tokens in the text itself, where a space is no mark, and the longest first; to
    # SentencePiece they are pieces like others.
    words = {token: Word(i) for i, token in enumerate(tokens) if types[i] == USER_DEFINED and token}
    types = [NORMAL if kind == USER_DEFINED else kind for kind in types]
    for token, score, kind in zip(tokens, scores, types, strict=True):
        proto.pieces.add(piece=token, score=score, type=kind)
    return SentencePieceTokenizer(
        proto.SerializeToString(), words=words, longest_first=True, prefix_after_special=True, **names
    )


def _wordpiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str, names: dict[str, Any]
) -> Tokenizer:
    from data.tokenizer.huggingface import HuggingFaceTokenizer
    from data.tokenizer.wordpiece import BERT_SPECIAL_TOKENS, PREFIX, backend_of

    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    control = {token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)}
    control |= {tokens[int(unknown)]} if unknown is not None else set()

    def spelled(token: str) -> str:
        if token in control or (len(token) > 2 and token[0] == "[" and token[-1] == "]"):
            return token
        return token[1:] if token.startswith("\u2581") else PREFIX + token

    lowercase = bool(metadata.get("tokenizer.ggml.normalizer.lowercase", True))
    accents = bool(metadata.get("tokenizer.ggml.normalizer.strip_accents", lowercase))
    backend = backend_of([spelled(token) for token in tokens], lowercase, accents)
    special = [token for token in tokens if token in control or token in BERT_SPECIAL_TOKENS]
    return HuggingFaceTokenizer(backend, special_tokens=special, **names)

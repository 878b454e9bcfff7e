"""Tokenizers that the `tokenizers` library runs: our byte-level BPE and WordPiece, and whatever a tokenizer.json
holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from configs.files import atomic_write
from data.tokenizer.decoders import read_decoder
from data.tokenizer.interface import Tokenizer
from data.tokenizer.limits import check_limits, panics_as_errors


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` behind our interface.

    Tokens that the file marks as special are control tokens; its other added tokens (runs of spaces,
    `<think>`) are text like any other, as in transformers.
    """

    @panics_as_errors()
    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Iterable[str] = (),
        bos: str | None = None,
        eos: Iterable[str] = (),
        pad: str | None = None,
        chat_template: str | None = None,
        roles: Mapping[str, str] | None = None,
        around: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    ):
        """`special_tokens`: more names to treat as special than the backend marks itself. `roles` and `around` as the
        interface has them; what the backend's own post-processor puts around a text goes over `around`.

        Raises ValueError for a name that the vocabulary lacks, a decoder that does not give back bytes, or steps that
        make a text endless.
        """
        check_limits(json.loads(backend.to_str()), "tokenizer")
        missing = [name for name in special_tokens if backend.token_to_id(name) is None]
        if missing:
            raise ValueError(f"special tokens {missing} are not in the vocabulary")
        mark_special(backend, special_tokens)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # text that spells a special token stays text
        self._backend = backend
        spec = json.loads(backend.to_str())
        self._decoder = read_decoder(spec["decoder"])
        self.prefix_after_special = _prefixes_every_part(spec)
        added = backend.get_added_tokens_decoder()
        special = {token.content: i for i, token in sorted(added.items()) if token.special}
        unknown = _unknown_token(backend, spec)  # what text becomes, so no control token
        if unknown is not None:
            special.pop(unknown, None)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1

        def id_of(name: str | None) -> int | None:
            if name is not None and name not in vocabulary:
                raise ValueError(f"token {name!r} is not in the vocabulary")
            return None if name is None else vocabulary[name]

        self._set_specials(
            special,
            id_of(bos),
            [i for name in eos if (i := id_of(name)) is not None],
            id_of(pad),
            chat_template,
            {t.content: (t.lstrip, t.rstrip) for t in added.values() if t.special and (t.lstrip or t.rstrip)},
            roles,
            _around(backend, spec["post_processor"]) or around,
        )
        if bos is None and self.around is not None and len(self.around[0]) == 1:
            first = self.around[0][0]  # stated by the post-processor alone
            named = {vocabulary[name] for name in (roles or {}).values() if name in vocabulary}
            self.bos_id = first if first not in named and first in self._special_ids else None
        self._single_words = frozenset(t.content for t in added.values() if t.special and t.single_word)
        self._strip_leading_space = self._decoder.strips
        self._late_replacements = self._decoder.late
        self._bytes = {i: self._decoder.spell(token) for token, i in vocabulary.items() if i not in added}
        for i, token in added.items():
            self._bytes[i] = b"" if token.special else self._decoder.spell_added(token.content)
        if unknown is not None:
            self._bytes[vocabulary[unknown]] = self._decoder.unknown
        self._continuation = _without_prefix_space(backend, spec)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """What the library runs, for conversion to other formats; not to be changed."""
        return self._backend

    @property
    def is_bpe(self) -> bool:  # type: ignore[override]
        return isinstance(self._backend.model, tokenizers.models.BPE)

    def _encode(self, texts: list[str], continuation: bool) -> list[list[int]]:
        for text in texts:
            text.encode("utf-8")
        backend = self._continuation if continuation else self._backend
        try:
            with panics_as_errors():
                return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # the library raises bare Exception
            if "unk_id" not in str(error):
                raise
            raise ValueError(
                "the text has a character that no token spells, and the unigram model names no unknown token "
                "(unk_id is null in tokenizer.json). Give it one, or byte_fallback with the 256 byte tokens."
            ) from error

    def _first_piece(self, piece: bytes) -> bytes:
        return self._decoder.first(piece)

    def token_of(self, token_id: int) -> str:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        token = self._backend.id_to_token(token_id)
        return f"<unused {token_id}>" if token is None else token

    def bytes_of(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self._bytes.get(token_id, b"")

    def _save_vocabulary(self, folder: Path) -> dict[str, Any]:
        atomic_write(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        return {"tokenizer_class": "PreTrainedTokenizerFast"}


def _unknown_token(backend: tokenizers.Tokenizer, spec: dict[str, Any]) -> str | None:
    """The token that stands for what no token spells; None for a kind that spells all text."""
    model = spec["model"]
    if model["type"] == "Unigram":
        name = None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    elif model["type"] == "BPE" and (model["byte_fallback"] or "ByteLevel" in _kinds(spec["pre_tokenizer"])):
        name = None
    else:
        name = model.get("unk_token")
    return name if name is not None and backend.token_to_id(name) is not None else None


def mark_special(backend: tokenizers.Tokenizer, names: Iterable[str]) -> None:
    """Marks tokens of the vocabulary as special; how they take white space stays as it is."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for name in names:
        token = added.get(name)
        if token is None:
            backend.add_special_tokens([name])
        elif not token.special:
            flags = {flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "single_word", "normalized")}
            backend.add_special_tokens([tokenizers.AddedToken(name, special=True, **flags)])


def _around(
    backend: tokenizers.Tokenizer, post_processor: Any
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The ids that the post-processor puts around a text; None where it has no say in it."""
    if not _kinds(post_processor) & {"TemplateProcessing", "BertProcessing", "RobertaProcessing"}:
        return None
    ids, word = [], ""
    for word in ("a", "the", "0", "\n"):
        try:
            ids = backend.encode(word, add_special_tokens=False).ids
        except Exception:  # a unigram model that can't spell the word
            continue
        if ids:
            break
    if not ids:
        return None
    whole = backend.encode(word).ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(ids)] == ids), None)
    return None if at is None else (tuple(whole[:at]), tuple(whole[at + len(ids) :]))


def _kinds(node: Any) -> set[str]:
    """The type of every {"type": ...} object in a section of tokenizer.json."""
    found = {node["type"]} if isinstance(node, dict) and "type" in node else set()
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return found.union(*map(_kinds, children))


def _prefix_steps(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a tokenizer.json that put a space before a text. A step that follows another one that cuts text puts
    it before every word, which is no prefix."""
    steps = []
    normalizer = spec["normalizer"] or {}
    for step in normalizer.get("normalizers", [normalizer]):
        if step.get("type") == "Prepend" and step.get("prepend"):
            steps.append(step)
    pretokenizer = spec["pre_tokenizer"] or {}
    first = next(iter(pretokenizer.get("pretokenizers", [pretokenizer])), {})
    if first.get("type") == "Metaspace" and first.get("prepend_scheme", "always") != "never":
        steps.append(first)
    elif first.get("type") == "ByteLevel" and first.get("add_prefix_space"):
        steps.append(first)
    return steps


def _prefixes_every_part(spec: dict[str, Any]) -> bool:
    """Whether a space goes before the text after a special token too; Metaspace's scheme "first" has one at the start
    alone."""
    steps = _prefix_steps(spec)
    return any(step["type"] != "Metaspace" or step.get("prepend_scheme") != "first" for step in steps)


def _without_prefix_space(backend: tokenizers.Tokenizer, spec: dict[str, Any]) -> tokenizers.Tokenizer:
    """The same tokenizer for text that goes on after other text: adds no space in front. `spec`, which is changed, is
    the backend as tokenizer.json has it."""
    steps = _prefix_steps(spec)
    if not steps:
        return backend
    for step in steps:
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        else:
            step.clear()
    spec["normalizer"] = _without_empty(spec["normalizer"])
    copy = tokenizers.Tokenizer.from_str(json.dumps(spec))
    copy.encode_special_tokens = True
    return copy


def _without_empty(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if not normalizer:
        return None
    if normalizer["type"] == "Sequence":
        return normalizer | {"normalizers": [step for step in normalizer["normalizers"] if step]}
    return normalizer

"""The one interface of every tokenizer: text to ids and back without loss, special tokens that text can't
forge.
"""

from __future__ import annotations

import abc
import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.files import atomic_write


class Tokenizer(abc.ABC):
    """Token ids from text, text from token ids.

    Attributes:
        special_tokens: control tokens, string to id. They mark structure; no text encodes to one of them.
        vocab_size: the largest id plus one.
        bos_id: what a document begins with, or None when the vocabulary has no such token or the tokenizer's files
            say that nothing is put before a text (add_bos_token).
        eos_ids: every id at which generation stops; `eos_ids[0]` ends a document. May be empty.
        pad_id: what fills a row: the pad token, else `eos_ids[0]`, else 0. Padding has loss weight 0 and
            segment 0.
        chat_template: Jinja source, or None for a tokenizer without one.
        tool_template: another one for dialogues with tools, where the model has one.
        strips: special token to (left, right): whether it swallows the white space beside it in a rendered
            chat.
        roles: "bos_token", "unk_token" and the like to the token, as chat templates know them.
        around: the special ids that the tokenizer's files put before and after a text by itself ([CLS] and [SEP], a
            bos, an eos), which `encode` leaves out; None when they don't say.
        prefix_after_special: a tokenizer that begins a text with a space mark puts one after every special token too
            (SentencePiece's older way), not only at the start.
    """

    special_tokens: dict[str, int]
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int
    chat_template: str | None
    tool_template: str | None = None
    strips: dict[str, tuple[bool, bool]]
    roles: dict[str, str]
    around: tuple[tuple[int, ...], tuple[int, ...]] | None
    prefix_after_special: bool = False
    is_bpe: bool = True
    _strip_leading_space = False
    _late_replacements: tuple[tuple[str, str], ...] = ()  # of characters that byte tokens may have made
    _cleans_up = False  # whether decoding takes the spaces before punctuation away
    _single_words: frozenset[str] = frozenset()  # special tokens that count only where no word touches them

    def _set_specials(
        self,
        special_tokens: Mapping[str, int],
        bos_id: int | None,
        eos_ids: Iterable[int],
        pad_id: int | None,
        chat_template: str | None,
        strips: Mapping[str, tuple[bool, bool]] | None = None,
        roles: Mapping[str, str] | None = None,
        around: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    ) -> None:
        self.special_tokens = dict(special_tokens)
        self.around = around
        self.bos_id = bos_id if around is None or bos_id in around[0] else None
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.pad_id = pad_id if pad_id is not None else (self.eos_ids[0] if self.eos_ids else 0)
        self.chat_template = chat_template
        self.strips = dict(strips or {})
        self._special_ids = frozenset(self.special_tokens.values())
        if roles is None:
            end = self.eos_ids[0] if self.eos_ids else None
            ids = {"bos_token": bos_id, "eos_token": end, "pad_token": pad_id}
            roles = {role: name for role, i in ids.items() if (name := self.special_name(i))}
        self.roles = dict(roles)

    @abc.abstractmethod
    def _encode(self, texts: list[str], continuation: bool) -> list[list[int]]:
        """Ids of each text. `continuation`: the text goes on after other text, so no prefix space is
        added.
        """

    @abc.abstractmethod
    def token_of(self, token_id: int) -> str:
        """The vocabulary's own spelling of an id, such as 'Ġthe', '▁the' or '<|im_end|>'."""

    @abc.abstractmethod
    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that an id stands for; b"" for a special token, which is structure and not text."""

    @abc.abstractmethod
    def _save_vocabulary(self, folder: Path) -> dict[str, Any]:
        """Writes the vocabulary files; returns its part of tokenizer_config.json."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Adds no bos; never yields a special id, whatever the text spells."""
        return self.encode_batch([text])[0]

    def id_of(self, token: str) -> int | None:
        """The id of a special token, or of a text that is one token; None if it is neither."""
        if token in self.special_tokens:
            return self.special_tokens[token]
        ids = self.encode(token)
        return ids[0] if len(ids) == 1 else None

    def encode_batch(self, texts: Sequence[str], continuation: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores where the backend can.

        Raises ValueError for a text with lone surrogates, which no UTF-8 can carry.
        """
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"encode wants str, was given {type(text).__name__}")
        try:
            rows = self._encode(list(texts), continuation)
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not valid Unicode (lone surrogate): {error}") from error
        return [self._without_specials(ids, text) for ids, text in zip(rows, texts, strict=True)]

    def _without_specials(self, ids: list[int], text: str) -> list[int]:
        # Unigram vocabularies often hold "</s>" as an ordinary piece: spell such a piece out, cut after its
        # first character, so that the text stays and the control token does not.
        if self._special_ids.isdisjoint(ids):
            return ids
        names = sorted(self.special_tokens, key=len, reverse=True)
        cuts = [match.start() + 1 for match in re.finditer("|".join(map(re.escape, names)), text)]
        pieces: list[int] = []
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            part = self._encode([text[start:stop]], start > 0)[0]
            if not self._special_ids.isdisjoint(part):
                raise ValueError(f"the vocabulary can't spell {text[start:stop]!r} without a special token")
            pieces += part
        return pieces

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Special tokens are left out, or spelled if
        asked.
        """
        decoder = StreamDecoder(self, keep_special)
        return "".join([decoder.push(int(i)) for i in ids]) + decoder.finish()

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_variables: Any,
    ) -> tuple[list[int], list[int]]:
        """Token ids of a dialogue and its loss mask.

        The mask is 1 on what the assistant wrote, with its end-of-turn token. A prompt
        (`add_generation_prompt=True`) is nothing to train on: its mask is 0 throughout.

        Raises ChatTemplateError: no template, malformed messages, a template that refuses, runs away or
        (when the mask is wanted) is not prefix-stable.
        """
        from data import chat

        return chat.apply(self, messages, tools, add_generation_prompt, template_variables)

    def _first_piece(self, piece: bytes) -> bytes:
        """The bytes of a text's first token without the space that was put before the text."""
        return piece.removeprefix(b" ")

    def special_name(self, token_id: int | None) -> str | None:
        """The string of a special id, None when there is none."""
        return next((name for name, i in self.special_tokens.items() if i == token_id), None)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a Hugging Face tokenizer folder: the vocabulary, tokenizer_config.json,
        special_tokens_map.json, generation_config.json (stop ids; other keys of an existing file are kept)
        and chat_template.jinja."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self._save_vocabulary(folder)
        names = dict(self.roles)
        pad = self.special_name(self.pad_id)
        if pad is not None and self.pad_id != (self.eos_ids[0] if self.eos_ids else 0):
            names.setdefault("pad_token", pad)
        added = {
            str(i): {"content": name, "special": True}
            | dict(zip(("lstrip", "rstrip"), self.strips.get(name, (False, False)), strict=True))
            | {"normalized": False, "single_word": name in self._single_words}
            for name, i in sorted(self.special_tokens.items(), key=lambda item: item[1])
        }
        config |= {"added_tokens_decoder": added | config.get("added_tokens_decoder", {})} | names
        end = self.eos_ids[0] if self.eos_ids else None
        ends = self.around is not None and end in self.around[1]
        config |= {"clean_up_tokenization_spaces": self._cleans_up, "add_bos_token": self.bos_id is not None}
        config |= {"add_eos_token": ends}
        if self.chat_template is not None and self.tool_template is not None:
            named = {"default": self.chat_template, "tool_use": self.tool_template}
            config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
            (folder / "chat_template.jinja").unlink(missing_ok=True)  # which would go over both
        elif self.chat_template is not None:
            config["chat_template"] = self.chat_template
            atomic_write(folder / "chat_template.jinja", self.chat_template)
        generation = read_json(folder / "generation_config.json") or {}
        generation |= {
            "bos_token_id": self.special_tokens.get(names.get("bos_token", "")),
            "eos_token_id": list(self.eos_ids),
            "pad_token_id": self.pad_id,
        }
        atomic_write(folder / "generation_config.json", to_json(generation))
        atomic_write(folder / "special_tokens_map.json", to_json(names))
        atomic_write(folder / "tokenizer_config.json", to_json(config))


class StreamDecoder:
    """Text from ids as they come: a character is held back until all its bytes are there.

    What `push` and `finish` return adds up to `tokenizer.decode(ids)`.
    """

    def __init__(self, tokenizer: Tokenizer, keep_special: bool = False, continuation: bool = False):
        """`continuation`: ids go on after other text, so a SentencePiece prefix space is kept."""
        self._tokenizer, self._keep_special = tokenizer, keep_special
        self._held = ""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer._strip_leading_space and not continuation

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is incomplete."""
        if token_id in self._tokenizer._special_ids:
            if not self._keep_special:
                return ""
            self._at_start = False
            return self._text(self._utf8.decode(b"", final=True) + self._tokenizer.token_of(token_id))
        piece = self._tokenizer.bytes_of(token_id)
        if self._at_start and piece:
            piece, self._at_start = self._tokenizer._first_piece(piece), False
        return self._text(self._utf8.decode(piece))

    def start_of(self, token_id: int) -> int:
        """Where the text of a token that is not pushed yet will begin: so many characters after all that was returned.
        A character that began in an earlier token begins there.
        """
        piece = self._tokenizer.bytes_of(token_id)
        if self._at_start:
            piece = self._tokenizer._first_piece(piece)
        held, _ = self._utf8.getstate()
        first = codecs.getincrementaldecoder("utf-8")("replace")
        text = first.decode(held + piece[:1])  # may end with the character of the first byte, or before it
        ends = bool(piece) and not first.getstate()[0]
        for old, new in self._tokenizer._late_replacements:
            text = text.replace(old, new)
        if self._tokenizer._cleans_up:
            text = cleaned_up(self._held + text)
        return max(len(text) - ends, 0)

    def finish(self) -> str:
        """What is still held back: an incomplete character as U+FFFD."""
        return self._text(self._utf8.decode(b"", final=True), last=True)

    def _text(self, text: str, last: bool = False) -> str:
        for old, new in self._tokenizer._late_replacements:
            text = text.replace(old, new)
        if not self._tokenizer._cleans_up:
            return text
        # Each pattern begins with a space; only that of a lone apostrophe has another one, and may make an " n't".
        text = self._held + text
        cut = len(text)
        while not last and (cut := text.rfind(" ", 0, cut)) > 0 and text[:cut].endswith(("'", " n")):
            pass
        cut = max(cut, 0)
        self._held = text[cut:]
        return cleaned_up(text[:cut])


def cleaned_up(text: str) -> str:
    """Text without the spaces before punctuation, as `clean_up_tokenization_spaces` of transformers has it."""
    for mark in (".", "?", "!", ","):
        text = text.replace(" " + mark, mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(" " + ending, ending)
    return text


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when the file is absent; ValueError naming the file when it is not
    one.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: wanted a JSON object, found {type(value).__name__}")
    return value


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n"

"""From text, dialogues and preferences to token datasets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.shards import Dataset, TokenRecord, hash_of, is_current, open_dataset, write_dataset
from data.tokenize_pieces import Piece, Pieces
from data.tokenizer import Tokenizer

_CODE_VERSION = 1  # raise it when the records change for the same input
Messages = Sequence[Mapping[str, Any]]


def tokenize_dataset(
    text_folder: str | os.PathLike,
    tokenizer: Tokenizer,
    out_folder: str | os.PathLike,
    split: str | None = None,
    *,
    processes: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Tokenises a text dataset (or its sub-folder `split`) for pretraining: bos, text, end token, where the
    vocabulary has them. The manifest says tokens and bytes of text. Done already with the same input and
    tokenizer: returned.

    Pieces of the dataset are done by `processes` at a time (0: one for each core), and kept beside `out_folder` until
    all are there: the same call again goes on where an earlier one was stopped. `log` takes lines of progress.
    Raises DatasetError when the folder is no text dataset.
    """
    text = open_dataset(Path(text_folder) / split if split else text_folder)
    if text.kind != "text":
        raise ValueError(f"{text.folder} is a dataset of kind {text.kind!r}; tokenize_dataset wants 'text'")
    key = hash_of("tokens", _CODE_VERSION, text.manifest["sha256"], fingerprint(tokenizer))
    if is_current(out_folder, key):
        return open_dataset(out_folder)
    count = TokenCount()
    inherited = {
        name: text.manifest[name] for name in ("sources", "stages", "dropped") if name in text.manifest
    }
    facts = {"key": key, **describe(tokenizer), "input": text.manifest["sha256"], **inherited}
    with Pieces(text, tokenizer, Path(out_folder), key, processes, log) as pieces:
        records = _document_records(pieces, count)
        return write_dataset(out_folder, records, "tokens", lambda: count | facts)


class TokenCount(dict):
    """tokens and bytes seen so far."""

    def __init__(self) -> None:
        super().__init__(tokens=0, trained_tokens=0, bytes=0)

    def add(self, tokens: int, trained: int, size: int = 0) -> None:
        self["tokens"] += tokens
        self["trained_tokens"] += trained
        self["bytes"] += size

    def add_record(self, record: TokenRecord) -> None:
        trained = len(record.tokens) - 1 if record.mask is None else int(record.mask[1:].sum())
        self.add(len(record.tokens), trained)


def _document_records(pieces: Iterable[Piece], count: TokenCount) -> Iterator[TokenRecord]:
    for piece in pieces:
        for tokens, size in piece.documents():
            count.add(len(tokens), max(len(tokens) - 1, 0), size)
            yield TokenRecord(tokens)


def write_chat_dataset(
    conversations: Iterable[Messages | Mapping[str, Any]],
    tokenizer: Tokenizer,
    out_folder: str | os.PathLike,
    manifest: Mapping[str, Any] | None = None,
) -> Dataset:
    """Dialogues through the tokenizer's chat template; trained on what the assistant wrote.

    A conversation is a list of messages, or {"messages": [...], "tools": [...]}. `manifest`: more keys, e.g.
    sources. Raises ChatTemplateError, naming the conversation's number.
    """
    count = TokenCount()

    def records() -> Iterator[TokenRecord]:
        for i, conversation in enumerate(conversations):
            record = chat_record(conversation, tokenizer, f"conversation {i}")
            count.add_record(record)
            yield record

    return write_dataset(
        out_folder, records(), "chat", lambda: count | describe(tokenizer) | dict(manifest or {})
    )


def write_preference_dataset(
    pairs: Iterable[tuple[Messages, str | Mapping[str, Any], str | Mapping[str, Any]]],
    tokenizer: Tokenizer,
    out_folder: str | os.PathLike,
    manifest: Mapping[str, Any] | None = None,
) -> Dataset:
    """Pairs of (prompt messages, chosen, rejected); an answer is text or an assistant message.

    Only the answer is trained on, also when earlier assistant messages are in the prompt.
    Raises ChatTemplateError, naming the pair's number.
    """
    count = TokenCount()

    def answer(i: int, prompt: Messages, reply: str | Mapping[str, Any]) -> TokenRecord:
        record = answer_record(prompt, reply, None, tokenizer, f"pair {i}")
        count.add_record(record)
        return record

    def records() -> Iterator[tuple[TokenRecord, TokenRecord]]:
        for i, (prompt, chosen, rejected) in enumerate(pairs):
            yield answer(i, prompt, chosen), answer(i, prompt, rejected)

    facts = describe(tokenizer) | dict(manifest or {})
    return write_dataset(out_folder, records(), "preference", lambda: count | facts)


def chat_record(
    conversation: Messages | Mapping[str, Any],
    tokenizer: Tokenizer,
    where: str,
    untrained: Sequence[int] = (),
) -> TokenRecord:
    """A dialogue's ids, and a mask on what the assistant wrote but in its messages numbered `untrained`, from 0.

    Raises ChatTemplateError that begins with `where`.
    """
    from data.template_messages import with_reasoning_in_content
    from data.templates import ChatTemplateError

    whole = conversation if isinstance(conversation, Mapping) else {"messages": conversation}
    messages, tools = (
        with_reasoning_in_content(whole["messages"], tokenizer.chat_template),
        whole.get("tools"),
    )
    try:
        ids, wrote = tokenizer.apply_chat_template(messages, tools, add_generation_prompt=False)
    except ChatTemplateError as error:
        raise ChatTemplateError(f"{where}: {error}") from error
    mask = np.asarray(wrote, bool)
    answers, said = _answers(mask), sum(message["role"] == "assistant" for message in messages)
    if untrained and len(answers) != said:
        raise ChatTemplateError(
            f"{where}: the chat template shows {len(answers)} of {said} answers, so those that have no weight can't "
            "be found"
        )
    for i in untrained:
        mask[slice(*answers[i])] = False
    return TokenRecord(np.asarray(ids, np.int32), mask)


def answer_record(
    prompt: Messages,
    reply: str | Mapping[str, Any],
    tools: Sequence[Any] | None,
    tokenizer: Tokenizer,
    where: str,
) -> TokenRecord:
    """A prompt and its answer; only the answer is trained on, also when the prompt has earlier ones."""
    message = {"role": "assistant", "content": reply} if isinstance(reply, str) else dict(reply)
    record = chat_record({"messages": [*prompt, message], "tools": tools}, tokenizer, where)
    assert record.mask is not None
    answers = _answers(record.mask)
    record.mask[: answers[-1][0] if answers else 0] = False
    return record


def _answers(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of each stretch of the mask."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def fingerprint(tokenizer: Tokenizer) -> str:
    """A short hash of what a tokenizer does: vocabulary, special tokens, template, and the ids of a probe
    text.
    """
    probe = "It's 1234567 o'clock:\n\n\tdef f(x): return x  # \u00e9\u4e2d\u6587\U0001f600 don't"
    digest = hashlib.sha256()
    for i in range(tokenizer.vocab_size):
        digest.update(tokenizer.token_of(i).encode("utf-8", "surrogatepass") + b"\0")
    roles = [tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id]
    known = [tokenizer.special_tokens, roles, tokenizer.chat_template, tokenizer.encode(probe)]
    prefixes = (
        tokenizer.encode_batch([probe], continuation=True)[0] != known[-1]
    )  # where chats put space marks
    more = [tokenizer.prefix_after_special] if prefixes else []
    more += [tokenizer.tool_template] if tokenizer.tool_template else []
    return hash_of(digest.hexdigest(), *known, *more)


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a manifest says of the tokenizer."""
    return {"tokenizer": fingerprint(tokenizer), "vocab_size": tokenizer.vocab_size}

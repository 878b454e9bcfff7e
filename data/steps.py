"""Answers in steps: which tokens end a step, for reward models of the process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.shards import TokenRecord
from data.templates import ChatTemplateError
from data.tokenize import answer_record
from data.tokenizer import Tokenizer

SEPARATOR = "\n"  # between two steps of an answer


def steps_record(
    prompt: Sequence[Mapping[str, Any]],
    steps: Sequence[str],
    tokenizer: Tokenizer,
    where: str,
    tools: Sequence[Any] | None = None,
) -> TokenRecord:
    """A dialogue with the steps as its answer, one a line; the mask is on the last token of each step.

    A step ends with the token that has the last byte of its text, which may have a separator's byte, too.

    Raises ChatTemplateError that begins with `where`, if the template writes the answer otherwise or a token holds the
    ends of two steps.
    """
    answer = SEPARATOR.join(step.strip() for step in steps)
    record = answer_record(list(prompt), answer, tools, tokenizer, where)
    assert record.mask is not None
    places = np.flatnonzero(record.mask)
    pieces = [tokenizer.bytes_of(int(record.tokens[i])) for i in places]
    written, said = b"".join(pieces), answer.encode("utf-8")
    begin = written.find(said)
    if begin < 0:
        raise ChatTemplateError(
            f"{where}: the chat template or the tokenizer does not write the answer as it is."
        )
    ends = np.cumsum([len(piece) for piece in pieces])
    mask, last = np.zeros(len(record.tokens), bool), begin
    for step in steps:
        last += len(step.strip().encode("utf-8"))
        token = int(places[int(np.searchsorted(ends, last))])
        if mask[token]:
            raise ChatTemplateError(
                f"{where}: one token of the tokenizer holds the ends of two steps: {step[:40]!r}."
            )
        mask[token] = True
        last += len(SEPARATOR)
    return TokenRecord(record.tokens, mask)

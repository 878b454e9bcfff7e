"""A model that writes: dialogues in, texts out, on the serving engine. What it writes is untrusted text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from configs.typed import check_at_least
from data import Tokenizer
from rl.loaded import LoadedModel, Messages
from serve import Engine, Output, Request, SamplingParams

OPEN, CLOSE = "<think>", "</think>"  # around reasoning


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """How a model writes."""

    max_new_tokens: int = 512  # a text that goes on after so many is dropped
    seq_len: int = 4096  # longest dialogue and text together, tokens
    rows: int = 32  # texts that are written at once
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        check_at_least(1, max_new_tokens=self.max_new_tokens, rows=self.rows)
        check_at_least(2, seq_len=self.seq_len)


@dataclasses.dataclass(frozen=True)
class Written:
    """A text, and why it can't be used, or None."""

    text: str
    fault: str | None = None


class Writer:
    """Asks a model. The same dialogues and seeds get the same texts.

    Args:
      reasoning: texts begin with the model's reasoning, if it reasons; otherwise they are what follows </think>.
    """

    def __init__(self, loaded: LoadedModel, spec: SamplingSpec, reasoning: bool = False):
        self._loaded, self._spec, self._reasoning = loaded, spec, reasoning
        self._engine = Engine(
            loaded.cfg, loaded.params, loaded.tokenizer, max_rows=spec.rows, max_length=spec.seq_len
        )

    def write(self, dialogues: Sequence[Messages], seeds: Sequence[int]) -> list[Written]:
        """One text for each dialogue, stripped; an empty, endless or impossible one has its fault."""
        spec, requests = self._spec, {}
        for i, (dialogue, seed) in enumerate(zip(dialogues, seeds, strict=True)):
            ids = self._loaded.prompt(dialogue)
            if len(ids) + spec.max_new_tokens <= spec.seq_len:
                sampling = SamplingParams(
                    max_tokens=spec.max_new_tokens,
                    temperature=spec.temperature,
                    top_p=spec.top_p,
                    seed=seed,
                )
                requests[i] = Request(ids, sampling)
        outputs = dict(zip(requests, self._engine.generate(list(requests.values())), strict=True))
        too_long = Written("", fault="has no room in sampling.seq_len")
        return [self._written(outputs[i]) if i in outputs else too_long for i in range(len(dialogues))]

    def _written(self, output: Output) -> Written:
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"the engine ended a text with {output.finish_reason}: {output.error}")
        text = text_of(self._loaded.tokenizer, output.tokens)
        if not self._reasoning:
            text = text.rpartition(CLOSE)[2].strip()
        fault = "never stops" if output.finish_reason == "length" else None if text else "is empty"
        return Written(text, fault)


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of an answer, stripped. Special tokens are left out, but for the marks of reasoning."""
    marks = {tokenizer.special_tokens.get(mark): mark for mark in (OPEN, CLOSE)}
    text, start = "", 0
    for i, token in enumerate(ids):
        if token in marks:
            text += tokenizer.decode(ids[start:i]) + marks[token]
            start = i + 1
    return (text + tokenizer.decode(ids[start:])).strip()

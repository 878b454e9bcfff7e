"""Constrained output: which tokens may come next, so that the text matches a schema, an expression or a grammar.

llguidance (github.com/guidance-ai/llguidance) parses the text and makes the masks.
"""

from __future__ import annotations

import collections
import json
import threading
from collections.abc import Sequence

import llguidance
import numpy as np

from data import Tokenizer
from serve.logits import all_allowed
from serve.request import Grammar, RequestError
from serve.schemas import with_exclusive_branches

MAX_SOURCE = 256 * 1024  # characters
_KEPT = 64  # compiled grammars


class Matcher:
    """Where one output is in its grammar."""

    free_steps = 0  # tokens that need no mask

    def __init__(self, state: llguidance.LLMatcher, stop_ids: frozenset[int], words: int):
        self._state, self._stop_ids, self._words = state, stop_ids, words

    def mask(self, after: Sequence[int] = ()) -> np.ndarray:
        """uint32 [W], a bit for each token that may come after the output and `after`; see serve.logits."""
        consumed = self._state.try_consume_tokens(list(after))
        # llguidance keeps a place for one token more, and with it perhaps a word
        mask_W = np.frombuffer(self._state.compute_bitmask(), np.uint32)[: self._words].copy()
        if consumed:
            self._state.rollback(consumed)
        return mask_W

    def valid(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first on, may follow the output."""
        return self._state.validate_tokens(list(tokens)) if tokens else 0

    def accept(self, tokens: Sequence[int]) -> None:
        """Add tokens to the output. A token that ends it is not told: a grammar that is complete takes none."""
        self._state.consume_tokens([token for token in tokens if token not in self._stop_ids])

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._state.is_accepting()

    @property
    def error(self) -> str | None:
        """Why no text can follow: a token outside the grammar, or a limit of time or memory."""
        return self._state.get_error() if self._state.is_error() else None


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """`vocab_size`: of the model, which may have more tokens than the tokenizer."""
        self._vocabulary = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer)),
            n_vocab=vocab_size,
            eos_token=list(tokenizer.eos_ids),
        )
        self._stop_ids = frozenset(tokenizer.eos_ids)
        self._words = all_allowed(vocab_size=vocab_size).shape[-1]
        # Bounds of time and memory: a grammar, or a text, that needs more is an error.
        self._limits = llguidance.LLParserLimits(
            max_items_in_row=2000,
            initial_lexer_fuel=1_000_000,
            step_lexer_fuel=200_000,
            step_max_items=50_000,
            max_lexer_states=50_000,
            max_grammar_size=500_000,
        )
        self._lock = threading.Lock()
        self._compiled: collections.OrderedDict[Grammar, llguidance.LLMatcher] = collections.OrderedDict()

    def compile(self, grammar: Grammar) -> Matcher:
        """The start of a grammar. Takes up to about a second the first time, and then microseconds.

        Raises:
          RequestError: the grammar is wrong, or too large.
        """
        with self._lock:
            known = self._compiled.get(grammar)
            if known is not None:
                self._compiled.move_to_end(grammar)
                return Matcher(known.deep_copy(), self._stop_ids, self._words)
        made = self._made(grammar)
        with self._lock:
            self._compiled[grammar] = made
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return Matcher(made.deep_copy(), self._stop_ids, self._words)

    def _made(self, grammar: Grammar) -> llguidance.LLMatcher:
        length = len(grammar.source) if isinstance(grammar.source, str) else sum(map(len, grammar.source))
        if length > MAX_SOURCE:
            raise RequestError(
                "grammar", f"the grammar has {length} characters; at most {MAX_SOURCE} are taken."
            )
        try:
            source = _SOURCES[grammar.kind](grammar.source)
            made = llguidance.LLMatcher(self._vocabulary, source, log_level=0, limits=self._limits)
            error = made.get_error() if made.is_error() else None
        except ValueError as raised:
            error = str(raised)
        if error is not None:
            raise RequestError("grammar", f"the {grammar.kind} can't be compiled: {error:.1000}")
        return made


def _choice(texts: Sequence[str]) -> str:
    return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))


def _json_schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(with_exclusive_branches(schema)))


_SOURCES = {
    "json_schema": _json_schema,
    "regex": llguidance.LLMatcher.grammar_from_regex,
    "lark": llguidance.LLMatcher.grammar_from_lark,
    "choice": _choice,
}


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = tokenizer.eos_ids[0]
        special = set(tokenizer.special_tokens.values())
        self.special_token_ids = sorted(special)
        self.tokens = [
            tokenizer.token_of(id).encode("utf-8") if id in special else tokenizer.bytes_of(id)
            for id in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

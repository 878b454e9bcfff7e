"""Texts to nats per byte, or to log-probabilities: what `data` asks for by name, "evals.text_scorer:scorer"."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from data import load_tokenizer
from evals.bits import score_texts
from evals.scoring import Scorer, Span
from model import load

_CONTEXT = 2048  # tokens of a window at most


def scorer(model: str) -> Callable[[Sequence[str]], list[float]]:
    """A function from texts to -log p in nats over the bytes of each, by the model at that path; 0 for an empty one."""
    cfg, params = load(model)
    tokenizer = load_tokenizer(model)
    context = min(_CONTEXT, cfg.max_length)
    scoring = Scorer(cfg, params, tokenizer.vocab_size, context=context)

    def nats_per_byte(texts: Sequence[str]) -> list[float]:
        filled = [text for text in texts if text]
        scores = score_texts(scoring, tokenizer, filled) if filled else []
        found = iter([score.nats / score.bytes for score in scores])
        return [next(found) if text else 0.0 for text in texts]

    return nats_per_byte


def token_scorer(model: str) -> Callable[[Sequence[str]], list[np.ndarray]]:
    """A function from texts to the log-probabilities of their tokens in nats, as many as fit in the model's context."""
    cfg, params = load(model)
    tokenizer = load_tokenizer(model)
    context = min(_CONTEXT, cfg.max_length)
    scoring = Scorer(cfg, params, tokenizer.vocab_size, context=context)
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None else list(tokenizer.eos_ids[:1])

    def logprobs(texts: Sequence[str]) -> list[np.ndarray]:
        ids = [[*start, *tokenizer.encode(text)][: context + 1] for text in texts]
        scored = iter(scoring.score([Span(each) for each in ids if len(each) > 1]))
        return [next(scored).logprobs if len(each) > 1 else np.zeros(0, np.float32) for each in ids]

    return logprobs

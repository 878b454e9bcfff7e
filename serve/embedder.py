"""Texts to unit vectors with a model's own tokenizer: what `data` asks for by name, "serve.embedder:embedder"."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from data import load_tokenizer
from model import load
from model.embed import embed

_LONGEST = 256  # tokens of a text; sentence encoders were trained with no more
_STEP = 32  # lengths and rows are rounded up, so few programs are compiled


def embedder(model: str) -> Callable[[Sequence[str]], np.ndarray]:
    """A function from texts to unit vectors, float32 [N, D], by the model at that path.

    An encoder's text stands between its first and its separating token; the mean of the tokens' states is taken.
    """
    cfg, params = load(model)
    tokenizer = load_tokenizer(model)
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    after = list(tokenizer.eos_ids[:1])

    def vectors(texts: Sequence[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, cfg.width), np.float32)
        room = _LONGEST - len(before) - len(after)
        ids = [[*before, *tokenizer.encode(text)[:room], *after] for text in texts]
        rows = -(-len(ids) // _STEP) * _STEP
        columns = -(-max(map(len, ids)) // _STEP) * _STEP
        tokens = np.full((rows, columns), tokenizer.pad_id or 0, np.int32)
        mask = np.zeros((rows, columns), np.int32)
        mask[:, 0] = 1
        for row, each in enumerate(ids):
            tokens[row, : len(each)], mask[row, : len(each)] = each, 1
        return np.asarray(embed(cfg, params, tokens, mask))[: len(texts)]

    return vectors

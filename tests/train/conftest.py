"""A corpus of counting sequences, and a tiny model that a run has taught to count."""

import jax
import numpy as np
import pytest

import configs
import data
import model
from data.shards import TokenRecord, write_dataset
from train.config import TrainConfig
from train.trainer import train

TEXTS = ["the cat sat on the mat and the dog sat on the log", "a dog and a cat sat on a mat"] * 20


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A tokenizer and counting sequences: after n comes n + 1, or n - 1, or pairs of which the first counts up.

    Those of validation ("unseen_...") begin where none of the others does.
    """
    root = tmp_path_factory.mktemp("corpus")
    tokenizer = data.train_tokenizer("bpe", TEXTS, 264)
    tokenizer.save(root / "tokenizer")
    unseen = np.arange(7, 60, 6)
    seen = np.setdiff1d(np.arange(5, 60), unseen)
    for prefix, starts in (("", np.random.default_rng(0).choice(seen, 200)), ("unseen_", unseen.repeat(4))):
        up = [np.arange(s, s + 12, dtype=np.int32) for s in starts]
        down = [np.arange(s + 12, s, -1, dtype=np.int32) for s in starts]
        write_dataset(root / f"{prefix}tokens", map(TokenRecord, up), "tokens")
        write_dataset(root / f"{prefix}down", map(TokenRecord, down), "tokens")
        pairs = [
            tuple(TokenRecord(tokens[:8], np.arange(8) >= 4) for tokens in (rising, falling[4:]))
            for rising, falling in zip(up, down, strict=True)
        ]
        write_dataset(root / f"{prefix}pairs", pairs, "preference")
    return root


def make_config(corpus, **changes):
    base = {
        "tokenizer": str(corpus / "tokenizer"),
        "steps": 30,
        "log_every": 5,
        "model": {
            "width": 32,
            "layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 16,
            "ffn_width": 48,
        },
        "data": {
            "mixture": {str(corpus / "tokens"): 1.0},
            "validation": {str(corpus / "unseen_tokens"): 1.0},
            "seq_len": 24,
            "batch_size": 8,
            "validation_batches": 2,
        },
        "optimizer": {"peak_lr": 2e-2},
        "schedule": {"warmup_steps": 5},
        "checkpoint": {"every": 10, "keep": 2},
        "mesh": {"data": 1, "fsdp": 8},
        "sharding": {"embed": [], "vocab": ["fsdp"]},
    }
    for key, value in changes.items():
        base[key] = base.get(key, {}) | value if isinstance(value, dict) else value
    return configs.build(TrainConfig, configs.overlay(TrainConfig, base))


def leaves(path):
    return [np.asarray(x) for x in jax.tree.leaves(model.load(path)[1])]


@pytest.fixture(scope="session")
def uninterrupted(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(make_config(corpus), workdir)

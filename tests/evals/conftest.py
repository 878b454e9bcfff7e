"""A tiny model with a chat template, in memory and as a folder on disk, that the tests share."""

import jax
import numpy as np
import pytest

SENTENCES = [
    "The quick brown fox jumps over the lazy dog; the dog does not mind.",
    "What is the capital of France? Paris. What is two plus two? Four.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "Größe, naïve, 東京, 🙂 and other characters take several bytes.",
    "End with the final answer as <answer>...</answer>.",
] * 3


@pytest.fixture(scope="session")
def tokenizer():
    from data import train_tokenizer

    return train_tokenizer("bpe", SENTENCES, 320)


@pytest.fixture(scope="session")
def cfg(tokenizer):
    from model import decoder

    return decoder(tokenizer.vocab_size + 4, 32, 2, 4, 2, 8, 48, max_length=256, tied_head=False)


@pytest.fixture(scope="session")
def params(cfg):
    """With a sharper head than a fresh one, so that no two tokens are equally likely."""
    from model import init

    fresh = init(cfg, jax.random.key(0))
    return fresh | {"head": 3 * fresh["head"]}


@pytest.fixture(scope="session")
def model_folder(cfg, params, tokenizer, tmp_path_factory):
    """The model as a native save."""
    import model

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer.save(folder.with_name("tokenizer"))
    files = {p.name: p.read_bytes() for p in folder.with_name("tokenizer").iterdir()}
    model.save(folder, cfg, params, tokenizer=files)
    return folder


@pytest.fixture(scope="session")
def brute_force(cfg, params):
    """(log p of each token after the first, whether it is the likeliest) by one unbatched forward pass in float64."""
    from model import apply

    forward = jax.jit(lambda tokens: apply(cfg, params, tokens).logits)
    width = 512

    def run(tokens, vocab_size):
        padded = np.zeros((1, width), np.int32)  # after the tokens, which the causal mask hides from them
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(forward(padded), np.float64)[0, : len(tokens) - 1]
        top = logits.max(-1, keepdims=True)
        logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        targets = np.asarray(tokens[1:])
        return logprobs[np.arange(len(targets)), targets], logits[:, :vocab_size].argmax(-1) == targets

    return run


@pytest.fixture(scope="session")
def scorer(cfg, params, tokenizer):
    from evals.scoring import Scorer

    return Scorer(cfg, params, tokenizer.vocab_size, context=64, batch_tokens=256)


@pytest.fixture(scope="session")
def engine(cfg, params, tokenizer):
    from serve import Engine

    buckets = {"row_buckets": (4,), "chunk_buckets": (64,), "context_buckets": (256,)}
    return Engine(cfg, params, tokenizer, max_rows=4, prefill_chunk=64, **buckets)

"""Tokenizers trained once on the interpreter's own sources."""

import argparse
import inspect
import textwrap

import pytest

from data import train_tokenizer

KINDS = ("bpe", "sentencepiece_bpe", "sentencepiece_unigram")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [inspect.getsource(argparse), inspect.getsource(textwrap), "naïve café 中文 1234567890\n"]


@pytest.fixture(scope="session")
def tokenizers(texts):
    return {kind: train_tokenizer(kind, texts, 600) for kind in KINDS}


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture(scope="session")
def bpe(tokenizers):
    return tokenizers["bpe"]

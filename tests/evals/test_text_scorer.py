"""The scorer that curation asks for by name."""

import math

import pytest

from data.quality import CruciblePerplexity
from evals.bits import score_texts
from evals.scoring import Scorer
from evals.text_scorer import scorer, token_scorer
from tests.evals.conftest import SENTENCES


def test_nats_per_byte_are_those_of_the_evaluation(model_folder, cfg, params, tokenizer):
    direct = score_texts(
        Scorer(cfg, params, tokenizer.vocab_size, context=cfg.max_length), tokenizer, SENTENCES[:3]
    )
    wanted = [score.nats / score.bytes for score in direct]
    found = scorer(str(model_folder))([SENTENCES[0], "", *SENTENCES[1:3]])
    assert found[1] == 0
    assert [found[0], *found[2:]] == pytest.approx(wanted, rel=1e-5)


def test_the_filter_finds_it_by_its_name(model_folder):
    stage = CruciblePerplexity(model=str(model_folder), max_bits_per_byte=0.5)
    signals = stage.signals(SENTENCES[0])
    assert signals["bits_per_byte"] == pytest.approx(signals["nats_per_byte"] / math.log(2))
    assert stage.reason(signals) == "perplexity: too unlikely"


def test_the_tokens_log_probabilities_add_up_to_those_of_the_text(model_folder, cfg, tokenizer):
    (tokens,) = token_scorer(str(model_folder))([SENTENCES[0]])
    start = 0 if tokenizer.bos_id is not None or tokenizer.eos_ids else math.log(tokenizer.vocab_size)
    nats = scorer(str(model_folder))([SENTENCES[0]])[0] * len(SENTENCES[0].encode())
    assert start - tokens.sum() == pytest.approx(nats, rel=1e-5)

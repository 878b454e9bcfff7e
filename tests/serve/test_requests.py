"""A request that can't be served is refused with the field, what was given and what was wanted."""

import dataclasses

import numpy as np
import pytest

from model.config import Encoder
from serve import EngineConfig, Request, RequestError, SamplingParams

BAD_PARAMS = [
    ("max_tokens", 0),
    ("max_tokens", True),
    ("max_tokens", 3.0),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", 1e-9),
    ("top_k", -1),
    ("top_k", 2.5),
    ("top_k", False),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", float("nan")),
    ("min_p", -0.5),
    ("min_p", 2),
    ("seed", -1),
    ("seed", 2**64),
    ("seed", True),
    ("stop", [""]),
    ("stop", ["x"] * 17),
    ("stop", "x" * 257),
    ("stop", [1]),
    ("stop", {"a": 1}),
    ("stop_token_ids", [True]),
    ("stop_token_ids", "12"),
    ("stop_token_ids", list(range(17))),
    ("ignore_eos", 1),
    ("logprobs", 21),
    ("logprobs", True),
]


@pytest.mark.parametrize("field,value", BAD_PARAMS)
def test_a_bad_sampling_parameter_is_refused_by_name(field, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert field in str(caught.value) or "stop string" in str(caught.value)


@pytest.mark.parametrize("prompt", [[], "text", [1.5], [True], [[1]], None, [None]])
def test_a_prompt_that_is_no_list_of_tokens_is_refused(prompt):
    with pytest.raises(RequestError, match="prompt") as caught:
        Request(prompt)
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    "request_,field,words",
    [
        (Request([1, -1]), "prompt", "-1 is outside the vocabulary"),
        (Request([320]), "prompt", "320 is outside the vocabulary, 0 to 319"),
        (Request([2**40]), "prompt", "outside the vocabulary"),
        (Request([1] * 64), "prompt", "64 tokens; .* 63"),
        (Request([1] * 60, SamplingParams(max_tokens=5)), "max_tokens", "at most 4"),
        (Request([1], SamplingParams(stop_token_ids=[320])), "stop_token_ids", "0 to 319"),
        (Request([1], SamplingParams(stop_token_ids=list(range(10, 26)))), "stop_token_ids", "at most 16"),
    ],
)
def test_a_request_beyond_the_engines_limits_is_refused(engine, request_, field, words):
    with pytest.raises(RequestError, match=words) as caught:
        engine.submit(request_)
    assert caught.value.field == field
    assert not engine.has_work


def test_an_id_in_use_is_refused_and_free_again_afterwards(engine):
    one = Request([5], SamplingParams(max_tokens=1), id="mine")
    assert engine.submit(one) == "mine"
    with pytest.raises(RequestError, match="being served"):
        engine.submit(one)
    while engine.has_work:
        engine.step()
    [out] = engine.generate([one])
    assert out.id == "mine"


def test_numpy_prompts_are_taken():
    assert Request(np.array([3, 4], np.int32)).prompt == Request([np.int64(3), np.uint8(4)]).prompt == (3, 4)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"max_rows": 0}, "max_rows=0"),
        ({"max_length": 1}, "max_length=1"),
        ({"num_pages": 3}, "num_pages=3 .* give num_pages >= 16|num_pages=3 .* Give num_pages >= 16"),
        ({"row_buckets": (0,)}, "row_buckets=0"),
        ({"decode_steps": True}, "decode_steps=True"),
    ],
)
def test_sizes_that_can_not_be_are_refused(cfg, options, words):
    with pytest.raises(ValueError, match=words):
        EngineConfig(**({"page_size": 4} | options)).resolve(cfg)


def test_a_model_with_an_encoder_is_refused(cfg):
    block = cfg.blocks[0]
    seeing_ahead = dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, causal=False))
    for other in (cfg.replace(encoder=Encoder((seeing_ahead,))), cfg.replace(blocks=(seeing_ahead,))):
        with pytest.raises(ValueError, match="this model has an encoder"):
            EngineConfig().resolve(other)


def test_default_buckets_end_at_the_limits(cfg):
    config = EngineConfig(max_rows=100, max_length=3000, prefill_chunk=512, page_size=16).resolve(cfg)
    assert config.row_buckets == (1, 2, 4, 8, 16, 32, 64, 100)
    assert config.chunk_buckets == (32, 256, 512)
    assert config.context_buckets == (256, 1024, 3000) and config.page_buckets == (16, 64, 188)
    assert config.prefill_rows(512) == (1, 4) and config.prefill_rows(32) == (1, 4, 16, 64)

"""Bits per byte against brute force, closed forms and the compressors' own output sizes."""

import dataclasses
import gzip
import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.bits import bits_per_byte, compressor_rows, score_texts
from evals.results import Row, average_row, mean_row, proportion_row, ratio_row, value_text
from evals.scoring import Scorer, Span, _score, windows
from evals.texts import read_texts
from model import decoder
from tests.evals.conftest import SENTENCES
from tests.meshes import assert_divided, compiled


def rows_by_metric(result):
    return {row.metric: row for row in result.rows}


def test_spans_score_as_one_unbatched_forward_pass_each(scorer, brute_force, tokenizer):
    rng = np.random.default_rng(0)
    spans = []
    for length in (2, 3, 17, 33, 34, 64, 65, 65, 20, 50, 7):
        tokens = rng.integers(0, tokenizer.vocab_size, length).tolist()
        spans.append(Span(tokens, int(rng.integers(1, length))))
    for span, scored in zip(spans, scorer.score(spans), strict=True):
        logprobs, greedy = brute_force(span.tokens, tokenizer.vocab_size)
        np.testing.assert_allclose(scored.logprobs, logprobs[span.start - 1 :], atol=2e-5)
        assert scored.greedy.tolist() == greedy[span.start - 1 :].tolist()


def test_greedy_tokens_are_marked_as_the_likeliest(scorer, brute_force, tokenizer, cfg, params):
    from model.generate import generate

    prompt = tokenizer.encode("The quick brown")
    answer = generate(cfg, params, [prompt], 6)[0]
    answer = answer[: next((i for i, t in enumerate(answer) if t >= tokenizer.vocab_size), 6)]
    assert answer
    scored = scorer.score([Span(prompt + answer, len(prompt))])[0]
    assert scored.greedy.all() and len(scored.greedy) == len(answer)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_windows_score_every_token_once_with_a_full_context_where_there_is_one(length, context, stride):
    stride = min(stride, context)
    scored = []
    for first, start, stop in windows(length, context, stride):
        assert 0 <= first < start < stop <= length
        assert stop - 1 - first == min(context, stop - 1)
        scored += range(start, stop)
    assert scored == list(range(1, length))


def test_windows_without_overlap_are_those_that_lm_eval_documents():
    # LM.loglikelihood_rolling of lm-eval 0.4.13: tokens 0 to 9 after a prefix, context 4.
    sequence = ["BOS", *range(10)]
    cuts = [(sequence[first : stop - 1], sequence[start:stop]) for first, start, stop in windows(11, 4, 4)]
    assert cuts == [
        (["BOS", 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [8, 9]),
    ]


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_bits_per_byte_is_the_brute_force_sum_over_all_bytes(scorer, brute_force, tokenizer, overlap):
    texts = [SENTENCES[0], "x", " ".join(SENTENCES[:5]), SENTENCES[3]]
    stride, nats = 64 - int(overlap * 64), 0.0
    for text in texts:
        sequence = [tokenizer.bos_id, *tokenizer.encode(text)]
        for token in range(1, len(sequence)):
            # where this token's window ends, by counting
            stop = 65
            while stop <= token:
                stop += stride
            stop = min(stop, len(sequence))
            first = max(0, stop - 65)
            nats -= brute_force(sequence[first : token + 1], tokenizer.vocab_size)[0][-1]
    wanted = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    row = rows_by_metric(bits_per_byte("t", scorer, tokenizer, texts, overlap=overlap))["bits per byte"]
    assert row.value == pytest.approx(wanted, rel=1e-5)
    assert row.n == 4


def test_a_uniform_model_pays_log2_of_the_vocabulary_for_each_token(cfg, params, tokenizer):
    uniform = params | {"head": params["head"] * 0}
    scorer = Scorer(cfg, uniform, tokenizer.vocab_size, context=32, batch_tokens=128)
    tokens = sum(len(tokenizer.encode(text)) for text in SENTENCES)
    size = sum(len(text.encode()) for text in SENTENCES)
    rows = rows_by_metric(bits_per_byte("t", scorer, tokenizer, SENTENCES))
    assert rows["bits per byte"].value == pytest.approx(math.log2(cfg.vocab_size) * tokens / size, rel=1e-6)
    assert rows["bytes per token"].value == pytest.approx(size / tokens)


def test_without_bos_and_end_token_the_first_token_is_charged_as_uniform(scorer, brute_force, tokenizer):
    class Bare:
        bos_id, eos_ids, vocab_size = None, (), tokenizer.vocab_size
        encode_batch, decode = staticmethod(tokenizer.encode_batch), staticmethod(tokenizer.decode)

    ids = tokenizer.encode("two words")
    score = score_texts(scorer, Bare(), ["two words", "x"])
    wanted = math.log(tokenizer.vocab_size) - brute_force(ids, tokenizer.vocab_size)[0].sum()
    assert score[0].nats == pytest.approx(wanted, rel=1e-5)
    assert score[1].nats == pytest.approx(math.log(tokenizer.vocab_size))


def test_what_a_tokenizer_changes_is_counted_beside_the_score(scorer, tokenizer):
    class Lossy:
        bos_id, eos_ids, vocab_size = tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size
        decode = staticmethod(tokenizer.decode)

        def encode_batch(self, texts):
            return tokenizer.encode_batch([text.lower() for text in texts])

    rows = rows_by_metric(bits_per_byte("t", scorer, Lossy(), ["Upper", "lower", "ABC"]))
    assert rows["documents changed by the tokenizer"].value == 2
    assert "documents changed by the tokenizer" not in rows_by_metric(
        bits_per_byte("t", scorer, tokenizer, ["Upper", "lower", "ABC"])
    )


def test_compressors_take_one_stream_and_each_document_alone():
    texts = ["abcabcabc" * 20, "größer", "abcabcabc" * 20]
    rows = {row.metric: row for row in compressor_rows("t", texts)}
    data = [text.encode() for text in texts]
    size = sum(map(len, data))
    assert rows["gzip -9 bits per byte"].value == 8 * len(gzip.compress(b"".join(data), 9)) / size
    alone = rows["gzip -9 bits per byte, each document alone"]
    assert alone.value == 8 * sum(len(gzip.compress(d, 9)) for d in data) / size
    for name in ("gzip -9", "bzip2 -9", "xz -9"):
        assert rows[f"{name} bits per byte"].value < rows[f"{name} bits per byte, each document alone"].value


def test_the_ratio_standard_error_is_what_repeated_samples_show():
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(400):
        sizes = rng.integers(50, 500, 60)
        rates = rng.normal(2.0, 0.5, 60)
        row = ratio_row("t", "m", rates * sizes, sizes)
        values.append(row.value)
        errors.append(row.stderr)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)
    assert ratio_row("t", "m", [2.0], [1.0]).stderr is None


def test_the_mean_of_right_and_wrong_has_the_binomial_standard_error():
    row = mean_row("t", "accuracy", [1.0] * 30 + [0.0] * 70)
    assert row.value == pytest.approx(0.3)
    assert row.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    other = dataclasses.replace(row, value=0.5, stderr=0.03)
    both = average_row("all", [row, other], [3.0, 1.0])
    assert both.value == pytest.approx(0.35)
    assert both.stderr == pytest.approx(math.hypot(0.75 * row.stderr, 0.25 * 0.03))


def test_the_interval_of_a_proportion_is_wilsons_also_where_all_are_wrong():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611)}
    published[1, 29] = (0.0061, 0.1718)
    for (right, n), interval in published.items():
        row = proportion_row("t", "accuracy", [True] * right + [False] * (n - right))
        assert row.interval == pytest.approx(interval, abs=5e-5)
        assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_values_are_shown_with_as_many_decimals_as_their_error_has():
    assert value_text(1.93421, 0.0123) == "1.934 +- 0.012"
    assert value_text(0.3, None) == "0.3"
    assert value_text(1.0, 0.0) == "1 +- 0"
    assert value_text(None, None) == "not finite"


def test_texts_are_read_from_datasets_files_and_folders_and_what_is_none_is_named(tmp_path):
    from configs import ConfigError
    from data import write_dataset

    texts = ["one", "two", "three", "four"]
    write_dataset(tmp_path / "text" / "test", [{"id": t, "text": t} for t in texts])
    lines = "".join(json.dumps({"body": t}) + "\n" for t in [*texts, ""])
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "whole.txt").write_text("one\ntwo\n")
    assert read_texts(tmp_path / "text" / "test") == texts
    assert read_texts(tmp_path / "rows.jsonl", "body") == texts
    assert read_texts(tmp_path / "whole.txt") == ["one\ntwo\n"]
    few = read_texts(tmp_path / "rows.jsonl", "body", limit=2)
    assert len(few) == 2 and set(few) < set(read_texts(tmp_path / "rows.jsonl", "body", limit=3))
    with pytest.raises(ConfigError, match="test"):
        read_texts(tmp_path / "text")  # its parent: the error names the dataset inside
    with pytest.raises(ConfigError, match="no such"):
        read_texts(tmp_path / "absent")
    with pytest.raises(ConfigError, match="bad line"):
        read_texts(tmp_path / "rows.jsonl", "text")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match="holds no text"):
        read_texts(tmp_path / "empty.txt")


def test_a_model_split_over_devices_scores_the_same(cfg, params, tokenizer, scorer):
    from model import ShardingRules
    from train.config import MeshSpec
    from train.mesh import make_mesh, param_shardings

    mesh = make_mesh(MeshSpec(data=1, tensor=2), jax.devices()[:2])
    rules = ShardingRules(vocab=())
    placed = jax.device_put(params, param_shardings(cfg, mesh, rules))
    split = Scorer(cfg, placed, tokenizer.vocab_size, context=64, batch_tokens=256)
    spans = [Span(tokenizer.encode(text)[:60]) for text in SENTENCES[:4]]
    for one, other in zip(scorer.score(spans), split.score(spans), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)
    arrays = [np.zeros((4, 64), dtype) for dtype in (np.int32, np.int32, bool)]
    programs = [compiled(_score, cfg, tokenizer.vocab_size, p, *arrays) for p in (params, placed)]
    assert_divided(*programs, 0.7, 0.8)  # the head is whole


def test_batches_are_as_large_as_asked_whatever_the_vocabulary():
    """Logits of 128k entries are not in memory, so they bound no batch."""
    cfg = decoder(128_256, 16, 1, 2, 1, 8, 16, max_length=2048)
    scorer = Scorer(cfg, None, 128_256, context=2048, batch_tokens=8192)
    (batch,) = scorer._batches([Span(range(1025))] * 8)
    assert batch == (1024, list(range(8)))

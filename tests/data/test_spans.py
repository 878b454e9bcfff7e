"""Hidden spans: nothing is lost, shares and lengths are the papers', and a model learns to fill them in."""

from __future__ import annotations

import numpy as np
import pytest

import data
from configs import ConfigError
from data.batches import Reading, make_batches
from data.shards import TokenRecord, open_dataset, write_dataset
from data.spans import UL2, Denoiser, SpanCorrupted, SpanCorruption, corrupt
from data.tokenizer.training import DEFAULT_SPECIAL_TOKENS, SpecialTokens

SENTINELS = tuple(range(1000, 1100))
SPANS = SpanCorruption(sentinel_ids=SENTINELS, mode_ids=(-1,))
ALL_OF_UL2 = SpanCorruption(UL2, sentinel_ids=SENTINELS, mode_ids=tuple(range(2000, 2007)))


def restored(record: TokenRecord, mode: bool) -> np.ndarray:
    """The text: each sentinel of the first half replaced by what follows it in the second."""
    first, second = record.tokens[~record.mask].tolist(), record.tokens[record.mask].tolist()
    filled: dict[int, list[int]] = {}
    for token in second:
        if token >= 1000:
            filled[sentinel := token] = []
        else:
            filled[sentinel].append(token)
    return np.array([t for token in first[mode:] for t in (filled[token] if token >= 1000 else [token])])


@pytest.mark.parametrize("denoiser", [Denoiser(), *UL2], ids=lambda d: f"{d.mode}{d.rate}-{d.mean_length}")
@pytest.mark.parametrize("n", [2, 3, 17, 200])
def test_the_text_is_shown_and_hidden_once_in_the_lengths_that_are_promised(denoiser, n):
    text = np.arange(n, dtype=np.int32)
    mode = [2000] if denoiser.mode else []
    record = corrupt(text, denoiser, np.array(SENTINELS, np.int32), mode, (0, 5))
    np.testing.assert_array_equal(restored(record, bool(mode)), text)
    assert len(record.tokens) == denoiser.length(n)
    hidden, spans = denoiser.counts(n)
    assert record.mask.sum() == hidden + spans
    assert hidden == pytest.approx(denoiser.rate * n, abs=1) or n < 4
    if denoiser.mean_length and n == 200:
        assert hidden / spans == pytest.approx(denoiser.mean_length, rel=0.3) or spans == 1
    if not denoiser.mean_length:  # a prefix language model: the end is hidden
        assert record.tokens[record.mask][-1] == n - 1 and spans == 1


def test_every_way_of_cutting_is_as_likely_and_another_text_is_cut_otherwise():
    from collections import Counter

    from data.spans import _random_parts

    found = Counter(tuple(_random_parts(5, 3, 0, i)) for i in range(6000))
    assert len(found) == 6  # the ways to write 5 as three numbers of at least 1
    assert all(abs(count - 1000) < 150 for count in found.values())


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spans") / "tokens"
    rng = np.random.default_rng(0)
    write_dataset(
        folder,
        [TokenRecord(np.arange(n, dtype=np.int32)) for n in [1, 2, 500, *rng.integers(3, 90, 60)]],
        "tokens",
    )
    return folder


@pytest.mark.parametrize("spans", [SPANS, ALL_OF_UL2])
def test_parts_fit_a_row_and_hold_every_token_of_the_dataset_once(texts, spans):
    dataset = open_dataset(texts)
    corrupted = SpanCorrupted(dataset, spans, 64, seed=3)
    records = corrupted.read(range(len(corrupted)))
    assert [len(record.tokens) for record in records] == corrupted.lengths.tolist()
    assert corrupted.lengths.max() <= 64
    modes = [bool(spans.denoisers[w].mode) for w in corrupted._denoiser]
    parts = [restored(record, mode) for record, mode in zip(records, modes, strict=True)]
    for document, wanted in enumerate(dataset):
        own = [part for part, d in zip(parts, corrupted._document, strict=True) if d == document]
        if len(wanted.tokens) > 1:
            np.testing.assert_array_equal(np.concatenate(own), wanted.tokens)
    later = corrupted.read(range(len(corrupted)), epoch=1)  # other spans of the same lengths
    assert [len(record.tokens) for record in later] == corrupted.lengths.tolist()
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(records, later, strict=True))
    other = SpanCorrupted(dataset, spans, 64, seed=4)
    assert any(
        not np.array_equal(a.tokens, b.tokens)
        for a, b in zip(records, other.read(range(len(other))), strict=False)
    )


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_rows_count_what_is_hidden_and_batches_go_on_where_they_were(texts, packing):
    reading = Reading(packing=packing, spans=SPANS)
    batches = [
        batch for batch, _ in zip(make_batches({texts: 1.0}, 4, 64, 0, reading), range(4), strict=False)
    ]
    for batch in batches:
        counted = batch["loss_weights"] > 0
        assert counted.any() and (batch["tokens"][0] >= 1000).any()
        # the first token that counts in a document is the first sentinel
        starts = counted & ~np.roll(counted, 1, axis=1)
        assert set(batch["targets"][starts].tolist()) == {1000}
    again = next(make_batches({texts: 1.0}, 4, 64, 0, reading, start=8))
    np.testing.assert_array_equal(again["tokens"], batches[2]["tokens"])


def test_tokens_are_the_tokenizers_or_missed_by_name(texts):
    words = ["hide a span of text"] * 8
    names = ["[R]", "[S]", "[X]", *(f"<extra_id_{i}>" for i in range(6))]
    special = SpecialTokens([*DEFAULT_SPECIAL_TOKENS, *names])
    tokenizer = data.train_tokenizer("bpe", words, 280, special=special)
    found = SpanCorruption(UL2).with_tokenizer(tokenizer)
    assert found.sentinel_ids == tuple(tokenizer.special_tokens[f"<extra_id_{i}>"] for i in range(6))
    assert found.mode_ids[2] == tokenizer.special_tokens["[S]"]
    plain = data.train_tokenizer("bpe", words, 270)
    with pytest.raises(ConfigError, match=r"has no token '<extra_id_0>'"):
        SpanCorruption().with_tokenizer(plain)
    with pytest.raises(ConfigError, match=r"the mode '\[R\]' is no token"):
        SpanCorruption(UL2, sentinel_ids=SENTINELS).with_tokenizer(plain)
    with pytest.raises(ConfigError, match=r"up to 9 spans in a row of 200 tokens, and there are 6"):
        make_batches({texts: 1.0}, 4, 200, 0, Reading(spans=SpanCorruption(sentinel_ids=SENTINELS[:6])))
    with pytest.raises(ConfigError, match="no curriculum"):
        make_batches({texts: 1.0}, 4, 64, 0, Reading(packing="related", spans=SPANS))

"""Batches: nothing lost, nothing twice, the same on any number of hosts, and resumed exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DatasetError, make_batches, write_dataset
from data.batches import Reading
from data.packing import ConcatAndSplit, FirstFit, Piece, shuffled
from data.rows import make_row
from data.shards import TokenRecord

T = 16


def numbered(n, seed=0, low=1, high=40, masked=False):
    """Documents whose tokens are all different, so that every token can be followed."""
    rng, start, records = np.random.default_rng(seed), 0, []
    for size in rng.integers(low, high, n):
        tokens = np.arange(start, start + size, dtype=np.int32)
        records.append(TokenRecord(tokens, rng.random(size) < 0.5 if masked else None))
        start += size
    return records


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    chat = numbered(30, 1, high=24, masked=True)
    write_dataset(folder / "tokens", numbered(40), "tokens")
    write_dataset(folder / "more", numbered(20, 2), "tokens")
    write_dataset(folder / "chat", chat, "chat")
    write_dataset(folder / "pairs", list(zip(chat[::2], chat[1::2])), "preference")
    return folder


def take(n, *args, **kwargs):
    batches = make_batches(*args, **kwargs)
    return [next(batches) for _ in range(n)]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(sum),
    seq_len=st.integers(2, 20),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
)
def test_an_epoch_has_every_token_once(lengths, seq_len, seed, shuffle):
    packing = ConcatAndSplit(np.array(lengths), seq_len, seed, shuffle)
    for epoch in (0, 3):
        rows = [packing.row(epoch * packing.rows_per_epoch + i) for i in range(packing.rows_per_epoch)]
        seen = [(p.document, t) for row in rows for p in row for t in range(p.start, p.stop)]
        assert sorted(seen) == [(d, t) for d, size in enumerate(lengths) for t in range(size)]
        sizes = sorted((sum(p.stop - p.start for p in row) for row in rows), reverse=True)
        assert all(size == seq_len for size in sizes[:-1]) and 0 < sizes[-1] <= seq_len


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=200),
    seq_len=st.integers(2, 25),
    seed=st.integers(0, 99),
    too_long=st.sampled_from(["drop", "truncate"]),
)
def test_first_fit_keeps_dialogues_whole(lengths, seq_len, seed, too_long):
    packing = FirstFit(np.array(lengths), seq_len, seed, True, too_long)
    rows = [packing.row(i) for i in range(packing.rows_per_epoch)]
    assert all(0 < sum(p.stop - p.start for p in row) <= seq_len for row in rows)
    got = sorted((p.document, p.start, p.stop) for row in rows for p in row)
    fits = [
        (d, 0, min(n, seq_len))
        for d, n in enumerate(lengths)
        if n and (n <= seq_len or too_long == "truncate")
    ]
    assert got == fits
    assert packing.dropped + packing.truncated == sum(n > seq_len for n in lengths)


def test_the_shuffle_is_a_permutation_that_differs_between_seeds_and_epochs():
    orders = [tuple(shuffled(50, seed, epoch)) for seed in (0, 1, 2**63) for epoch in (0, 1)]
    assert len(set(orders)) == 6 and all(sorted(order) == list(range(50)) for order in orders)
    places = np.stack([shuffled(4, seed) for seed in range(2000)])
    for column in places.T:  # each element at each place a quarter of the time
        assert np.abs(np.bincount(column, minlength=4) / 2000 - 0.25).max() < 0.05


def test_the_order_of_the_shuffle_is_fixed_for_ever():
    assert shuffled(8, 0, 1).tolist() == [4, 6, 3, 1, 5, 7, 2, 0]


def test_a_row_by_hand():
    records = [TokenRecord(np.arange(10, 15)), TokenRecord(np.arange(20, 23), np.array([0, 0, 1], bool))]
    row = make_row([Piece(0, 1, 4), Piece(1, 0, 3)], records, 8, pad_id=9)
    assert row["tokens"].tolist() == [11, 12, 13, 20, 21, 22, 9, 9]
    assert row["targets"].tolist() == [12, 13, 14, 21, 22, 9, 9, 9]
    assert row["loss_weights"].tolist() == [1, 1, 1, 0, 1, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 2, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 2, 0, 0]


def test_every_target_of_an_epoch_is_trained_on_once(folders):
    batches = list(make_batches({folders / "tokens": 1}, 4, T, 0, Reading(num_epochs=1)))
    pairs = [
        (int(t), int(y))
        for b in batches
        for t, y, w in zip(b["tokens"].ravel(), b["targets"].ravel(), b["loss_weights"].ravel())
        if w
    ]
    wanted = [(int(a), int(b)) for r in numbered(40) for a, b in zip(r.tokens, r.tokens[1:])]
    assert sorted(pairs) == sorted(wanted)
    shapes = {"tokens": np.int32, "targets": np.int32, "loss_weights": np.float32}
    for key, dtype in (shapes | {"segment_ids": np.int32, "positions": np.int32}).items():
        assert all(b[key].shape == (4, T) and b[key].dtype == dtype for b in batches)


@pytest.mark.parametrize("kind, names", [("lm", ["tokens", "more", "chat"]), ("preference", ["pairs"])])
def test_the_global_batch_is_the_same_on_any_number_of_hosts(folders, kind, names):
    mixture = {folders / name: i + 1 for i, name in enumerate(names)}
    whole = take(6, mixture, 8, T, 3, Reading(kind))
    for count in (2, 4):
        hosts = [
            take(6, mixture, 8, T, 3, Reading(kind), process_index=p, process_count=count)
            for p in range(count)
        ]
        for step, parts in enumerate(zip(*hosts)):
            assert_equal({k: np.concatenate([part[k] for part in parts]) for k in parts[0]}, whole[step])


@pytest.mark.parametrize("kind, names", [("lm", ["tokens", "chat"]), ("preference", ["pairs"])])
def test_a_resumed_run_goes_on_exactly_also_on_other_hosts(folders, kind, names):
    mixture = {folders / name: 1 for name in names}
    batches = make_batches(mixture, 8, T, 5, Reading(kind))
    first = [next(batches) for _ in range(7)]
    assert batches.position == 56
    for at in (0, 1, 4):
        resumed = take(7 - at, mixture, 8, T, 5, Reading(kind), start=8 * at)
        for a, b in zip(resumed, first[at:], strict=True):
            assert_equal(a, b)
    halves = [
        take(3, mixture, 8, T, 5, Reading(kind), start=32, process_index=p, process_count=2) for p in (0, 1)
    ]
    for step, parts in enumerate(zip(*halves)):
        assert_equal({k: np.concatenate([part[k] for part in parts]) for k in parts[0]}, first[4 + step])


def test_a_position_far_away_is_found_at_once(folders):
    far = 10**13
    batches = make_batches({folders / "tokens": 1, folders / "more": 2}, 8, T, 0, start=far)
    assert batches.position == far and next(batches)["tokens"].shape == (8, T)


def test_batch_size_may_change_at_a_position(folders):
    mixture = {folders / "tokens": 1, folders / "chat": 1}
    rows = np.concatenate([b["tokens"] for b in take(6, mixture, 4, T, 0)])
    again = np.concatenate([b["tokens"] for b in take(2, mixture, 8, T, 0, start=8)])
    np.testing.assert_array_equal(again, rows[8:])


def test_threads_do_not_change_the_order(folders):
    mixture = {folders / "tokens": 0.3, folders / "more": 0.7}
    for a, b in zip(
        take(10, mixture, 4, T, 0, Reading(num_threads=0)), take(10, mixture, 4, T, 0, Reading(num_threads=8))
    ):
        assert_equal(a, b)


def test_a_mixture_keeps_to_its_weights(tmp_path):
    for i, name in enumerate("abc"):
        records = [TokenRecord(np.full(T, i, np.int32)) for _ in range(7 + i)]
        write_dataset(tmp_path / name, records, "tokens")
    mixture = {tmp_path / "a": 0.5, tmp_path / "b": 0.3, tmp_path / "c": 0.2, tmp_path / "unused": 0.0}
    drawn = np.concatenate([b["tokens"][:, 0] for b in take(100, mixture, 10, T, 0)])
    for n in (100, 1000):
        np.testing.assert_allclose(np.bincount(drawn[:n], minlength=3) / n, [0.5, 0.3, 0.2], atol=2 / n)


def test_epochs_are_shuffled_differently_unless_told_not_to(folders):
    rows = next(iter(make_batches({folders / "tokens": 1}, 4, T, 0).report.values()))["rows_per_epoch"]
    two = np.concatenate([b["tokens"] for b in take(2, {folders / "tokens": 1}, rows, T, 0)])
    assert not np.array_equal(two[:rows], two[rows:])
    assert sorted(two[:rows].ravel())[-600:] == sorted(two[rows:].ravel())[-600:]
    plain = np.concatenate(
        [b["tokens"] for b in take(2, {folders / "tokens": 1}, rows, T, 0, Reading(shuffle=False))]
    )
    np.testing.assert_array_equal(plain[:rows], plain[rows:])
    np.testing.assert_array_equal(plain.ravel()[: (rows - 1) * T], np.arange((rows - 1) * T))


def test_the_last_batch_is_filled_up_with_rows_of_no_weight(folders):
    batches = list(make_batches({folders / "pairs": 1}, 8, 32, 0, Reading("preference", num_epochs=1)))
    assert len(batches) == 4 and all(b["tokens"].shape == (8, 32) for b in batches)
    assert batches[-1]["segment_ids"].any(axis=1).sum() == 6 and not batches[-1]["loss_weights"][6:].any()


def test_preference_rows_are_chosen_then_rejected(folders):
    chat = numbered(30, 1, high=24, masked=True)
    pairs = {int(a.tokens[0]): (a, b) for a, b in zip(chat[::2], chat[1::2])}
    for batch in make_batches({folders / "pairs": 1}, 4, 32, 0, Reading("preference", num_epochs=1)):
        for i in range(0, 4, 2):
            if not batch["segment_ids"][i].any():
                continue
            for row, record in enumerate(pairs[int(batch["tokens"][i, 0])]):
                n = len(record.tokens)
                np.testing.assert_array_equal(batch["tokens"][i + row, :n], record.tokens)
                np.testing.assert_array_equal(batch["loss_weights"][i + row, : n - 1], record.mask[1:])
                assert not batch["segment_ids"][i + row, n:].any()


def test_dialogues_that_are_too_long_are_counted(folders):
    long = sum(len(r.tokens) > 8 for r in numbered(30, 1, high=24))
    for too_long in ("drop", "truncate"):
        report = make_batches({folders / "chat": 1}, 2, 8, 0, Reading(too_long=too_long)).report[
            str(folders / "chat")
        ]
        assert (report["dropped"], report["truncated"]) == ((long, 0) if too_long == "drop" else (0, long))


def test_grains_own_checkpoint_check_passes(folders):
    import grain

    batches = make_batches(
        {folders / "tokens": 1, folders / "chat": 2}, 4, T, 0,
        Reading(num_epochs=1, num_threads=1, prefetch=2), start=4, process_index=1, process_count=2,
    )  # fmt: skip
    grain.experimental.assert_equal_output_after_checkpoint(batches.dataset)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"batch_size": 3, "process_count": 2}, "multiple of 2"),
        ({"seq_len": 1}, "seq_len"),
        ({"process_index": 2, "process_count": 2}, "process_index"),
        ({"start": -1}, "start"),
        ({"reading": Reading("vision")}, "known are"),
        ({"reading": Reading("preference")}, "preference"),
    ],
)
def test_sizes_and_kinds_that_do_not_fit_are_errors(folders, change, reason):
    arguments = {"batch_size": 4, "seq_len": T, "seed": 0} | change
    with pytest.raises(ValueError, match=reason):
        make_batches({folders / "tokens": 1}, **arguments)


def test_a_mixture_that_makes_no_sense_is_an_error(folders, tmp_path):
    for weights in (
        {},
        {folders / "tokens": 0.0},
        {folders / "tokens": -1.0},
        {folders / "tokens": float("nan")},
    ):
        with pytest.raises(ValueError, match="weights"):
            make_batches(weights, 4, T, 0)
    with pytest.raises(DatasetError, match="no dataset"):
        make_batches({tmp_path: 1}, 4, T, 0)
    write_dataset(tmp_path / "text", [{"id": "a", "text": "b"}], "text")
    with pytest.raises(DatasetError, match="tokenize_dataset"):
        make_batches({tmp_path / "text": 1}, 4, T, 0)
    write_dataset(tmp_path / "long", [TokenRecord(np.arange(99), np.ones(99, bool))], "chat")
    with pytest.raises(DatasetError, match="Raise seq_len"):
        make_batches({tmp_path / "long": 1}, 4, T, 0)

"""Best fit, related documents and curricula: nothing lost, documents whole, little waste."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.typed import ConfigError
from data import Curriculum, DatasetError, Reading, make_batches, write_dataset
from data.best_fit import BestFit
from data.curriculum import curriculum_order
from data.packing import ConcatAndSplit, FirstFit, PairOrder, Piece
from data.related import RelatedRows, write_groups, write_order
from data.rows import make_row
from data.shards import TokenRecord


def best_fit_decreasing(sizes, seq_len):
    """Rooms left, by the definition: each piece into the row with the least room that is enough."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(seq_len - size)
    return sorted(rooms)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=120).filter(any),
    seq_len=st.integers(2, 30),
    seed=st.integers(0, 99),
    too_long=st.sampled_from(["cut", "drop", "truncate"]),
)
def test_best_fit_is_the_packing_of_the_definition(lengths, seq_len, seed, too_long):
    packing = BestFit(np.array(lengths), seq_len, seed, True, too_long)
    for epoch in (0, 2):
        first = epoch * packing.rows_per_epoch
        rows = [packing.row(first + i) for i in range(packing.rows_per_epoch)]
        got = sorted((p.document, p.start, p.stop) for row in rows for p in row)
        wanted = []
        for d, n in enumerate(lengths):
            if n > seq_len and too_long != "cut":
                n = 0 if too_long == "drop" else seq_len
            wanted += [(d, at, min(at + seq_len, n)) for at in range(0, n, seq_len)]
        assert got == wanted
        rooms = sorted(seq_len - sum(p.stop - p.start for p in row) for row in rows)
        assert rooms == best_fit_decreasing([stop - start for _, start, stop in wanted], seq_len)
        waste = packing.waste()
        assert waste.padding == pytest.approx(sum(rooms) / max(len(rooms) * seq_len, 1))
        assert waste.needless == 0 and packing.dropped + packing.truncated == (
            sum(n > seq_len for n in lengths) if too_long != "cut" else 0
        )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(sum),
    seq_len=st.integers(2, 20),
    seed=st.integers(0, 99),
)
def test_the_waste_of_concatenation_is_counted_right(lengths, seq_len, seed):
    packing = ConcatAndSplit(np.array(lengths), seq_len, seed, True)
    rows = [packing.row(i) for i in range(packing.rows_per_epoch)]
    where = {}
    for i, row in enumerate(rows):
        for piece in row:
            where.setdefault(piece.document, set()).add(i)
    cut = [d for d, places in where.items() if len(places) > 1]
    waste = packing.waste()
    assert waste.cut == pytest.approx(len(cut) / len(where))
    assert waste.needless == pytest.approx(sum(lengths[d] <= seq_len for d in cut) / len(where))
    assert waste.padding == pytest.approx(1 - sum(lengths) / (len(rows) * seq_len))


def test_the_waste_of_dialogues_is_counted_right():
    assert FirstFit(np.array([6, 5, 3, 9]), 8, 0, False).waste() == (pytest.approx(1 - 14 / 16), 0, 0)
    assert FirstFit(np.array([6, 9]), 8, 0, False, "truncate").waste() == (pytest.approx(2 / 16), 0.5, 0)
    assert PairOrder(np.array([[4, 2], [9, 1]]), 8, 0, True).waste().padding == pytest.approx(10 / 16)


def test_best_fit_wastes_little_where_concatenation_cuts_much():
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(np.int64) + 1
    best, concat = BestFit(lengths, 1024, 0, True).waste(), ConcatAndSplit(lengths, 1024, 0, True).waste()
    assert best.padding < 1e-3 and best.needless == 0 and concat.needless > 0.1
    assert best.cut == (lengths > 1024).mean()


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(sum),
    seq_len=st.integers(2, 40),
    seed=st.integers(0, 99),
    count=st.integers(1, 5),
    shuffle=st.booleans(),
)
def test_documents_of_a_group_follow_each_other(lengths, seq_len, seed, count, shuffle):
    rng = np.random.default_rng(seed)
    groups, order = rng.integers(0, count, len(lengths)), rng.permutation(len(lengths))
    packing = RelatedRows(np.array(lengths), seq_len, seed, shuffle, groups, order)
    place = np.argsort(order)
    for epoch in (0, 1):
        rows = [packing.row(epoch * packing.rows_per_epoch + i) for i in range(packing.rows_per_epoch)]
        seen = sorted((p.document, t) for row in rows for p in row for t in range(p.start, p.stop))
        assert seen == [(d, t) for d, n in enumerate(lengths) for t in range(n)]
        for row in rows:
            for a, b in zip(row, row[1:]):
                same = groups[a.document] == groups[b.document]
                assert b.joined == same
                between = [
                    d
                    for d in range(len(lengths))
                    if same and lengths[d] and groups[d] == groups[a.document]
                    and place[a.document] < place[d] < place[b.document]
                ]  # fmt: skip
                assert not between and (not same or place[a.document] < place[b.document])


def test_a_joined_row_by_hand():
    records = [TokenRecord(np.arange(10, 13)), TokenRecord(np.arange(20, 23)), TokenRecord(np.arange(30, 32))]
    pieces = [Piece(0, 1, 3), Piece(1, 0, 3, joined=True), Piece(2, 0, 2)]
    row = make_row(pieces, records, 8, pad_id=9)
    assert row["tokens"].tolist() == [11, 12, 20, 21, 22, 30, 31, 9]
    assert row["targets"].tolist() == [12, 20, 21, 22, 9, 31, 9, 9]
    assert row["loss_weights"].tolist() == [1, 1, 1, 1, 0, 1, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 1, 2, 2, 0]
    assert row["positions"].tolist() == [0, 1, 2, 3, 4, 0, 1, 0]


@pytest.fixture
def repository(tmp_path):
    """Ten documents of two repositories by turns, with stars as scores, and one that belongs to none."""
    texts = [
        {"id": str(i), "text": "x", "metadata": {"group": "ab"[i % 2], "stars": 9 - i}} for i in range(10)
    ] + [{"id": "10", "text": "x", "metadata": {}}]
    text = write_dataset(tmp_path / "text", texts)
    records = [TokenRecord(np.full(4, i)) for i in range(11)]
    write_dataset(tmp_path / "tokens", records, "tokens", {"input": text.manifest["sha256"]})
    return tmp_path


def test_groups_come_from_the_metadata_of_the_text(repository):
    tokens = repository / "tokens"
    with pytest.raises(DatasetError, match="data.related"):
        make_batches({tokens: 1}, 1, 20, 0, Reading(packing="related"))
    with pytest.raises(DatasetError, match="no document has"):
        write_groups(repository / "text", tokens, "repo")
    counts = write_groups(repository / "text", tokens, "group", "stars")
    assert counts == {"documents": 11, "groups": 3, "alone": 1, "without_score": 1}
    reading = Reading(packing="related", shuffle=False, num_epochs=1)
    rows = list(make_batches({tokens: 1}, 1, 20, 0, reading))
    assert rows[0]["tokens"][0].tolist() == [d for d in (0, 2, 4, 6, 8) for _ in range(4)]
    assert set(rows[0]["segment_ids"][0]) == {1} and set(rows[1]["segment_ids"][0]) == {1}
    apart = next(make_batches({tokens: 1}, 1, 20, 0, Reading(packing="related", join_related=False)))
    assert len(set(apart["segment_ids"][0].tolist())) > 1


def test_an_order_given_as_an_array_is_walked_along(repository):
    tokens, order = repository / "tokens", np.array([3, 1, 4, 10, 5, 9, 2, 6, 8, 7, 0])
    with pytest.raises(DatasetError, match="permutation"):
        write_order(tokens, np.zeros(11))
    write_order(tokens, order)
    reading = Reading(packing="related", shuffle=False, num_epochs=1)
    tokens_read = np.concatenate([b["tokens"][0] for b in make_batches({tokens: 1}, 1, 22, 0, reading)])
    assert tokens_read[::4].tolist() == order.tolist()


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    buckets=st.integers(1, 8),
    blend=st.sampled_from([0.0, 0.3, 5.0]),
    descending=st.booleans(),
)
def test_a_curriculum_keeps_to_its_buckets_as_far_as_it_blends(keys, buckets, blend, descending):
    keys = np.array(keys)
    order = curriculum_order(keys, Curriculum("score", buckets, blend, descending), 3)
    n = len(keys)
    assert sorted(order.tolist()) == list(range(n))
    if blend == 0:  # bucket by bucket: each holds the keys that a sort puts there
        ranked = np.sort(keys)[::-1] if descending else np.sort(keys)
        edges = [-(-b * n // buckets) for b in range(buckets + 1)]
        for low, high in zip(edges, edges[1:]):
            assert sorted(keys[order[low:high]]) == sorted(ranked[low:high])


def test_a_curriculum_orders_the_first_epoch_alone(repository):
    tokens = repository / "tokens"
    reading = Reading(curriculum=Curriculum("score", buckets=11))
    with pytest.raises(DatasetError, match="scores.npy"):
        make_batches({tokens: 1}, 1, 4, 0, reading)
    write_groups(repository / "text", tokens, "", "stars")
    batches = make_batches({tokens: 1}, 1, 4, 0, reading)
    drawn = [int(next(batches)["tokens"][0, 0]) for _ in range(33)]
    assert drawn[:9] in ([9, 10, 8, 7, 6, 5, 4, 3, 2], [10, 9, 8, 7, 6, 5, 4, 3, 2])
    assert sorted(drawn[11:22]) == list(range(11)) and drawn[11:22] != drawn[:11] != drawn[22:]
    with pytest.raises(ConfigError, match='packing="concat"'):
        make_batches({tokens: 1}, 1, 4, 0, Reading(packing="best_fit", curriculum=Curriculum()))


def test_labelled_rows_bring_their_labels(tmp_path):
    records = [(TokenRecord(np.arange(i + 2), np.ones(i + 2, bool)), i % 3 == 0) for i in range(9)]
    dataset = write_dataset(tmp_path / "kto", records, "labelled")
    assert [label for _, label in dataset] == [1, 0, 0] * 3 and dataset.lengths.tolist() == list(range(2, 11))
    batches = list(make_batches({tmp_path / "kto": 1}, 4, 8, 0, Reading("labelled", num_epochs=1)))
    rows = [
        (int(s.astype(bool).sum()), int(y)) for b in batches for s, y in zip(b["segment_ids"], b["labels"])
    ]
    assert sorted(r for r in rows if r[0]) == [(i + 2, int(i % 3 == 0)) for i in range(7)]
    assert batches[0]["labels"].shape == (4,)


def test_dialogues_come_from_short_to_long_in_the_first_epoch(tmp_path):
    sizes = np.random.default_rng(0).permutation(np.arange(2, 60))
    records = [TokenRecord(np.full(n, n), np.ones(n, bool)) for n in sizes]
    write_dataset(tmp_path / "chat", records, "chat")
    reading = Reading(curriculum=Curriculum("length", buckets=58), num_epochs=2)
    rows = [batch["tokens"][0] for batch in make_batches({tmp_path / "chat": 1}, 1, 64, 0, reading)]
    longest = [int(row.max()) for row in rows]
    first, second = longest[: len(rows) // 2], longest[len(rows) // 2 :]
    assert first == sorted(first) and second != first and sorted(second) == first


@pytest.mark.slow
def test_ten_million_documents_are_packed_in_bounded_time_and_memory():
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1.2, 10_000_000), 200_000).astype(np.int64) + 1
    tracemalloc.start()
    began = time.monotonic()
    packing = BestFit(lengths, 8192, 0, True)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.monotonic() - began < 120  # 8 s alone on a core
    assert kept < 20 * len(lengths) and peak < 100 * len(lengths)  # bytes
    waste = packing.waste()
    assert waste.padding < 1e-4 and waste.needless == 0

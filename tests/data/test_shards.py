"""Dataset folders: written whole, read at random, and honest about damage."""

import json
import pickle

import numpy as np
import pytest

from data import DatasetError, open_dataset, write_dataset
from data.shards import TokenRecord, is_current, read_manifest


def documents(n):
    rng = np.random.default_rng(n)
    return [TokenRecord(rng.integers(0, 1 << 20, rng.integers(1, 50)).astype(np.int32)) for _ in range(n)]


def test_records_come_back_in_any_order_from_many_shards(tmp_path):
    records = documents(50)
    dataset = write_dataset(tmp_path / "d", records, "tokens", {"sources": ["x"]}, shard_bytes=500)
    assert len(dataset.manifest["shards"]) > 3 and len(dataset) == 50
    for i in np.random.default_rng(0).permutation(50).tolist():
        np.testing.assert_array_equal(dataset[i].tokens, records[i].tokens)
        assert dataset[i].mask is None and dataset[i].tokens.dtype == np.int32
    np.testing.assert_array_equal(dataset[-1].tokens, records[-1].tokens)
    np.testing.assert_array_equal(dataset.lengths, [len(r.tokens) for r in records])
    assert [len(r.tokens) for r in dataset] == [len(r.tokens) for r in records]
    assert [len(r.tokens) for r in dataset[3:7]] == [len(r.tokens) for r in records[3:7]]
    assert dataset.manifest["sources"] == ["x"]


def test_text_masks_and_pairs_come_back(tmp_path):
    text = [{"id": "a", "text": "é\n\U0001f600", "metadata": {}}]
    assert list(write_dataset(tmp_path / "t", text, "text")) == text
    masked = [TokenRecord(r.tokens, np.arange(len(r.tokens)) % 3 == 0) for r in documents(9)]
    for got, wanted in zip(write_dataset(tmp_path / "c", masked, "chat"), masked, strict=True):
        np.testing.assert_array_equal(got.mask, wanted.mask)
    pairs = list(zip(masked, masked[::-1]))
    dataset = write_dataset(tmp_path / "p", pairs, "preference")
    assert dataset.lengths.shape == (9, 2)
    for got, wanted in zip(dataset, pairs, strict=True):
        for a, b in zip(got, wanted):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.mask, b.mask)


def test_a_dataset_survives_pickling(tmp_path):
    dataset = write_dataset(tmp_path / "d", documents(3), "tokens")
    dataset.read([0])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset))[2].tokens, dataset[2].tokens)


def test_an_empty_dataset_is_a_dataset(tmp_path):
    for kind in ("text", "tokens", "preference"):
        dataset = write_dataset(tmp_path / kind, [], kind)
        assert len(dataset) == 0 and list(dataset) == []
        with pytest.raises(IndexError):
            dataset[0]


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    write_dataset(tmp_path / "d", documents(5), "tokens", {"key": "old"})

    def broken():
        yield from documents(3)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_dataset(tmp_path / "d", broken(), "tokens", {"key": "new"})
    assert len(open_dataset(tmp_path / "d")) == 5 and is_current(tmp_path / "d", "old")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    write_dataset(tmp_path / "d", documents(7), "tokens", {"key": "new"})
    assert len(open_dataset(tmp_path / "d")) == 7 and not is_current(tmp_path / "d", "old")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_equal_records_have_equal_hashes_however_they_are_sharded(tmp_path):
    a = write_dataset(tmp_path / "a", documents(20), "tokens", shard_bytes=200).manifest
    b = write_dataset(tmp_path / "b", documents(20), "tokens").manifest
    assert a["sha256"] == b["sha256"] and len(a["shards"]) != len(b["shards"])


def damage_truncate(folder):
    shard = folder / "shard-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-100])


def damage_manifest(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    "damage, reason",
    [
        (damage_truncate, "truncated"),
        (lambda f: (f / "shard-00000.array_record").unlink(), "missing"),
        (lambda f: (f / "lengths.npy").unlink(), "lengths.npy is missing"),
        (lambda f: (f / "manifest.json").unlink(), "no dataset"),
        (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "not the manifest"),
        (lambda f: damage_manifest(f, version=9), "version 9"),
        (lambda f: damage_manifest(f, records=4), "add up"),
    ],
)
def test_damage_is_named(tmp_path, damage, reason):
    folder = tmp_path / "d"
    write_dataset(folder, documents(5), "tokens")
    damage(folder)
    with pytest.raises(DatasetError, match=reason):
        open_dataset(folder)


def test_damage_inside_a_shard_is_an_error_and_not_wrong_tokens(tmp_path):
    write_dataset(tmp_path / "d", documents(5), "tokens")
    shard = tmp_path / "d" / "shard-00000.array_record"
    raw = bytearray(shard.read_bytes())
    raw[100:140] = bytes(40)
    shard.write_bytes(raw)
    with pytest.raises(DatasetError, match="can't be read"):
        open_dataset(tmp_path / "d").read(range(5))


def test_the_parent_of_datasets_names_them(tmp_path):
    write_dataset(tmp_path / "tokens" / "train", documents(2), "tokens")
    with pytest.raises(DatasetError, match="datasets train"):
        open_dataset(tmp_path / "tokens")


def test_a_folder_that_is_no_dataset_names_those_near_it(tmp_path):
    for name in ("chat/train", "chat/validation"):
        write_dataset(tmp_path / name, [TokenRecord(np.arange(3, dtype=np.int32))], "tokens")
    for wrong, said in (
        ("", "It holds the datasets chat/train, chat/validation: name one"),
        ("chat", "It holds the datasets train, validation: name one"),
        ("chat/test", f"{tmp_path / 'chat'} holds the datasets train, validation: name one"),
        ("none/at/all", r"there is no manifest.json\.$"),
    ):
        with pytest.raises(DatasetError, match=said):
            read_manifest(tmp_path / wrong)

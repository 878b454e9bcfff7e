"""Sources: files of all kinds, compressed and far away, read alike."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from configs import ConfigError
from data import storage
from data.sources import Folder, Jsonl, Parquet, Rejected, TextFile, parts_of

ROWS = [{"text": "one", "url": "https://a.org"}, {"text": "two", "url": "https://b.org"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
COMPRESS |= {".zst": lambda raw: zstandard.compress(raw[:20]) + zstandard.compress(raw[20:])}  # two frames


@pytest.fixture
def folder(tmp_path):
    for ending, compress in COMPRESS.items():
        (tmp_path / f"rows.jsonl{ending}").write_bytes(compress(LINES))
    (tmp_path / "array.json").write_text("\n " + json.dumps(ROWS))
    pq.write_table(
        pa.table({"text": ["one", "two"], "url": ["https://a.org", "https://b.org"]}), tmp_path / "t.parquet"
    )
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "note.md").write_text("# A note")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


@pytest.mark.parametrize("address", ["{}", "file://{}"])
def test_rows_are_the_same_however_a_file_is_packed_and_where_it_lies(folder, address):
    for name in [*(f"rows.jsonl{ending}" for ending in COMPRESS), "array.json"]:
        path = address.format(folder / name)
        found = list(Jsonl(path, metadata_fields=("url",), name="n").documents())
        assert [d["text"] for d in found] == ["one", "two"], name
        assert [d["metadata"]["url"] for d in found] == ["https://a.org", "https://b.org"]
    table = Parquet(address.format(folder / "t.parquet"), metadata_fields=("url",))
    assert [d["text"] for d in table.documents()] == ["one", "two"]
    assert [d["metadata"]["url"] for d in table.documents()] == ["https://a.org", "https://b.org"]


@pytest.mark.parametrize("address", ["{}", "file://{}"])
def test_a_folder_is_the_same_here_and_at_an_address(folder, address):
    source = Folder(address.format(folder), name="f")
    within = sorted(source.within(path) for path in source.files())
    assert within == sorted(
        ["array.json", "deep/note.md", "t.parquet", *(f"rows.jsonl{e}" for e in COMPRESS)]
    )
    notes = list(Folder(address.format(folder), glob="**/*.md", name="f").documents())
    assert [(d["id"], d["text"]) for d in notes] == [("f/deep/note.md/0", "# A note")]
    flat = Folder(address.format(folder), glob="*.parquet")
    assert [flat.within(path) for path in flat.files()] == ["t.parquet"]


def test_a_missing_file_or_an_unknown_scheme_is_an_error_with_the_mend(tmp_path):
    for path in (tmp_path / "none.txt", f"file://{tmp_path}/none.txt"):
        with pytest.raises(ConfigError, match="does not exist"):
            TextFile(str(path)).files()
    with pytest.raises(ConfigError, match="gs:// and s3://"):
        storage.check_exists("ftpx://a/b")
    with pytest.raises(ConfigError, match="no column 'body'; it has text"):
        pq.write_table(pa.table({"text": ["one"]}), tmp_path / "t.parquet")
        list(Parquet(str(tmp_path / "t.parquet"), text_field="body").documents())


def test_a_file_that_ends_too_soon_gives_what_is_whole_and_says_where_it_broke(tmp_path):
    lines = b"".join(json.dumps({"text": f"{i} " * 200}).encode() + b"\n" for i in range(2000))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-200])
    found = list(Jsonl(str(tmp_path / "cut.jsonl.gz")).documents())
    assert isinstance(found[-1], Rejected) and "unreadable from here on" in found[-1].reason
    assert len(found) > 1000 and not any(isinstance(item, Rejected) for item in found[:-1])


def test_small_files_are_read_together_and_large_ones_alone(tmp_path):
    for i, size in enumerate((10, 10, 500, 10, 60, 60)):
        (tmp_path / f"{i}.txt").write_text("x" * size)
    source = Folder(str(tmp_path))
    parts = [[source.within(path) for (path,) in part] for part in parts_of(source, 100)]
    assert parts == [["0.txt", "1.txt"], ["2.txt"], ["3.txt", "4.txt"], ["5.txt"]]

"""Sources: files of all kinds, compressed and far away, read alike."""

import bz2
import gzip
import json
import lzma
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from configs import ConfigError
from data import build_corpus, curate, open_dataset, storage, write_dataset
from data.corpus import CorpusConfig
from data.curation import CurationConfig
from data.decontaminate.__main__ import main as decontaminate_main
from data.dedup import MinHashDedup
from data.row_files import RowError, files_of, read_rows
from data.sources import Folder, Jsonl, Parquet, Rejected, TextFile, parts_of
from data.sources.files import BadLine, json_rows
from data.tokenizer.__main__ import main as tokenizer_main

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
        ["array.json", "deep/note.md", "picture.png", "t.parquet", *(f"rows.jsonl{e}" for e in COMPRESS)]
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


@pytest.mark.parametrize("address", ["{}", "file://{}"])
def test_both_readers_of_rows_give_the_same(folder, address):
    """That of sources and that of conversations, of files here and at an address."""
    for name in [*(f"rows.jsonl{ending}" for ending in COMPRESS), "array.json", "t.parquet"]:
        path = address.format(folder / name)
        assert [row.value for row in read_rows(path)] == ROWS, name
    assert len(files_of((address.format(folder),))) == len(COMPRESS) + 2
    (folder / "odd.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "\xff"}\n{broken\n[1]\n')
    by_row = [(row.where, isinstance(row.value, RowError)) for row in read_rows(folder / "odd.jsonl")]
    assert by_row == [("line 1", False), ("line 3", True), ("line 4", True), ("line 5", False)]
    found = [(i, isinstance(row, BadLine)) for i, row in json_rows(str(folder / "odd.jsonl"))]
    assert found == [(int(where.split()[1]) - 1, bad) for where, bad in by_row]


def test_what_is_written_lies_in_a_file_system(tmp_path, monkeypatch):
    """An address would become a folder called "gs:"."""
    monkeypatch.chdir(tmp_path)
    address = "gs://bucket/run"
    config = CurationConfig((Jsonl("x.jsonl"),), ())
    for write in (
        lambda: curate(config, address),
        lambda: build_corpus(CorpusConfig(config), address),
        lambda: write_dataset(address, []),
        lambda: open_dataset(address),
        lambda: MinHashDedup(save_index=address),
        lambda: MinHashDedup(index=(address,)),
    ):
        with pytest.raises(ConfigError, match="gs://bucket/run.*Mount the bucket"):
            write()
    for command in (
        [tokenizer_main, "train", "x.txt", f"--out={address}"],
        [decontaminate_main, "report", "--corpus", "x", "--benchmarks", "y", f"--out={address}"],
    ):
        assert command[0](command[1:]) == 2
    assert list(tmp_path.iterdir()) == []


def test_small_files_are_read_together_and_large_ones_alone(tmp_path):
    for i, size in enumerate((10, 10, 500, 10, 60, 60)):
        (tmp_path / f"{i}.txt").write_text("x" * size)
    source = Folder(str(tmp_path))
    parts = [[source.within(path) for (path,) in part] for part in parts_of(source, 100)]
    assert parts == [["0.txt", "1.txt"], ["2.txt"], ["3.txt", "4.txt"], ["5.txt"]]


def read(path, **more):
    """{id: text, or why it is none} of a folder."""
    items = list(Folder(str(path), name="f", **more).documents())
    gone = {item.id: f"! {item.reason}" for item in items if isinstance(item, Rejected)}
    return gone | {item["id"]: item["text"] for item in items if not isinstance(item, Rejected)}


def test_every_file_of_a_folder_is_read_or_counted_with_its_reason(tmp_path):
    page = b"<html><p>A page.</p></html>"
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page
    head = b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:1>\r\nContent-Type: application/http\r\n"
    files = {
        "rows.ndjson": LINES,
        "table.csv": b'url,text\nhttps://a.org,"one, ""two""\nthree"\nhttps://b.org,four\n',
        "table.tsv.gz": gzip.compress(b"text\tn\nfive\t5\n"),
        "other.csv": b"a,b\n1,2\n",
        "torn.csv": b'text\nsix\n"seven\n',
        "server.log": b"10:00 started",
        "README": b"No suffix.",
        "binary": bytes(range(256)),
        "dump.xml": b"<a>x</a>",
        "page.html": page,
        "crawl.warc": head + b"Content-Length: %d\r\n\r\n%s\r\n\r\n" % (len(http), http),
        "old.arc": b"filedesc://old.arc 0.0.0.0 20000101000000 text/plain 9\n1 0 X\n\n",
        ".hidden.txt": b"secret",
        ".git/config": b"secret",
        "broken.pdf": b"%PDF-1.4 junk",
    }
    for name, raw in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    found = read(tmp_path)
    by_file = {}
    for name, text in found.items():
        by_file.setdefault(name.removeprefix("f/").rsplit("/", 1)[0], []).append(text)
    assert by_file.keys() == files.keys()
    assert by_file == by_file | {
        "rows.ndjson": ["one", "two"],
        "table.csv": ['one, "two"\nthree', "four"],
        "table.tsv.gz": ["five"],
        "server.log": ["10:00 started"],
        "README": ["No suffix."],
        "dump.xml": ["! type: .xml is not read"],
        "page.html": [page.decode()],
        "crawl.warc": [page.decode()],
        "old.arc": ["! type: ARC; convert it to WARC (warcio recompress)"],
        ".hidden.txt": ["! type: hidden"],
        ".git/config": ["! type: hidden"],
    }
    assert by_file["torn.csv"] == ["! unreadable from here on: unexpected end of data", "six"]
    assert "has no column 'text'; it has a, b" in by_file["other.csv"][0]
    assert by_file["binary"][0].startswith("! unreadable: no text") and "broken" in by_file["broken.pdf"][0]


def test_a_folder_without_a_readable_file_says_what_there_is(tmp_path):
    for name in ("a.png", "b.png", "c.xml"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="there are: 2 .png, 1 .xml"):
        Folder(str(tmp_path)).files()


ENCODINGS = {
    "ces": ("iso8859-2", "cp1250"), "pol": ("iso8859-2", "cp1250"), "hun": ("iso8859-2",), "fra": ("latin-1",),
    "spa": ("latin-1", "utf-16", "utf-16-le", "utf-16-be"), "por_PT": ("latin-1", "cp1252"), "fin": ("latin-1",),
    "rus": ("koi8-r", "cp1251", "iso8859-5", "utf-16"), "ell_monotonic": ("iso8859-7",), "tur": ("iso8859-9",),
    "jpn": ("shift_jis", "euc-jp", "utf-16"), "cmn_hans": ("gb18030",), "kor": ("euc-kr",), "heb": ("cp1255",),
    "arb": ("cp1256",), "tha": ("tis-620",), "eng": ("utf-8", "utf-16", "utf-16-le"),
}  # fmt: skip


def test_texts_in_the_encodings_of_their_languages_are_read_as_they_are(tmp_path, shared):
    read_as = {}
    with zipfile.ZipFile(shared / "data" / "pretrain-text" / "nltk_udhr2.zip") as archive:
        for language, encodings in ENCODINGS.items():
            text = archive.read(f"udhr2/{language}.txt").decode()
            for encoding in encodings:
                raw = text.encode(encoding, "ignore")
                (tmp_path / f"{language}-{encoding}.txt").write_bytes(raw)
                read_as[f"f/{language}-{encoding}.txt/0"] = raw.decode(encoding)
    found = read(tmp_path)
    assert [name for name, text in read_as.items() if found[name] != text] == []


def test_books_in_latin_1_are_read_with_their_accents(tmp_path, shared):
    books = sorted((shared / "data" / "pretrain-text" / "gutenberg").glob("*.gz"))
    wrong, old = [], 0
    for book in books:
        raw = gzip.decompress(book.read_bytes())
        try:
            wanted = raw.decode().removeprefix("\ufeff")
        except UnicodeDecodeError:
            wanted, old = raw.decode("latin-1"), old + 1
        (document,) = TextFile(str(book)).documents()
        wrong += [book.name] * (document["text"] != wanted)
    assert wrong == [] and old >= 7


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_damage_in_the_middle_of_a_packed_file_is_a_reason(tmp_path, ending):
    lines = b"".join(json.dumps({"text": f"{i * 7919} " * 99}).encode() + b"\n" for i in range(2000))
    raw = bytearray(COMPRESS[ending](lines))
    raw[len(raw) // 2 : len(raw) // 2 + 99] = b"\xff" * 99
    (tmp_path / f"a.jsonl{ending}").write_bytes(raw)
    found = list(Jsonl(str(tmp_path / f"a.jsonl{ending}")).documents())
    assert isinstance(found[-1], Rejected) and "unreadable from here on" in found[-1].reason
    (tmp_path / f"a.txt{ending}").write_bytes(raw)
    (only,) = TextFile(str(tmp_path / f"a.txt{ending}")).documents()
    assert isinstance(only, Rejected) and only.reason.startswith("unreadable: ")

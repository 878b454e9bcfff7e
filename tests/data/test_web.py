"""The way of a web page: archives, encodings, extraction, language; and the other sources of text."""

import bz2
import gzip
import shutil
import zipfile
from pathlib import Path

import brotli
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import make_document
from data.extract import Extract
from data.extract.encoding import decode
from data.extract.page import ENGINES
from data.extract.wikitext import plain_text
from data.filters import C4Lines, Language, LanguageParagraphs
from data.sources import Folder, Pdf, Rejected, Repositories, Warc, Wikipedia
from data.sources.pdf import joined

PAGE = b"<html><head><title>T</title></head><body><p>" + b"A page of words. " * 20 + b"</p></body></html>"


def record(body, headers=b"", number=1, kind=b"response", status=b"200 OK", mime=b"text/html"):
    http = b"HTTP/1.1 " + status + b"\r\nContent-Type: " + mime + b"\r\n" + headers + b"\r\n" + body
    head = b"WARC/1.0\r\nWARC-Type: %s\r\nWARC-Record-ID: <urn:uuid:%d>\r\nWARC-Target-URI: https://a%d.org/x\r\n"
    head += b"Content-Type: application/http; msgtype=response\r\nContent-Length: %d\r\n\r\n"
    return head % (kind, number, number, len(http)) + http + b"\r\n\r\n"


def read(path):
    return [
        item.reason if isinstance(item, Rejected) else item["metadata"]["record"]
        for item in Warc(str(path)).documents()
    ]


def ids(*numbers):
    return [f"urn:uuid:{n}" for n in numbers]


@pytest.mark.parametrize(
    "headers, body",
    [
        (b"", PAGE),
        (b"Content-Encoding: gzip\r\n", gzip.compress(PAGE, mtime=0)),
        (b"Content-Encoding: br\r\n", brotli.compress(PAGE)),
        (b"Content-Encoding: gzip\r\n", PAGE),  # named and not done
        (b"Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(PAGE), PAGE)),
        (b"Transfer-Encoding: chunked\r\n", PAGE),
    ],
)
def test_a_page_is_the_same_under_every_encoding(tmp_path, headers, body):
    (tmp_path / "a.warc").write_bytes(record(body, headers))
    (found,) = Warc(str(tmp_path)).documents()
    assert found["text"] == PAGE.decode()
    assert (
        found["metadata"] | {"url": "https://a1.org/x", "status": 200, "group": "a1.org"} == found["metadata"]
    )


def test_what_is_no_page_is_counted_with_its_reason(tmp_path):
    records = [
        record(PAGE, status=b"404 Not Found"),
        record(PAGE, mime=b"image/png"),
        record(PAGE, kind=b"revisit"),
    ]
    (tmp_path / "a.warc.gz").write_bytes(b"".join(map(gzip.compress, records)))
    assert read(tmp_path / "a.warc.gz") == ["status: 404", "type: image/png", "record: revisit"]


def test_reading_goes_on_behind_a_broken_record(tmp_path):
    records = [record(PAGE, number=n) for n in range(4)]
    members = [gzip.compress(r, mtime=0) for r in records]
    plain, packed = tmp_path / "a.warc", tmp_path / "a.warc.gz"
    broken = bytearray(members[1])
    broken[40] ^= 0xFF
    packed.write_bytes(b"".join([members[0], bytes(broken), members[2], members[3]]))
    found = read(packed)
    assert [f for f in found if f.startswith("urn")] == ids(0, 2, 3) and len(found) == 4
    packed.write_bytes(b"".join([members[0], members[1][:-60], members[2]]))
    assert ids(0, 2) == [f for f in read(packed) if f.startswith("urn")]
    plain.write_bytes(records[0] + records[1][:-100] + records[2] + records[3])
    assert ids(0, 3) == [f for f in read(plain) if f.startswith("urn")]  # the third is in the second's length
    plain.write_bytes(records[0] + b"junk\r\n" + records[1])
    assert ids(0, 1) == [f for f in read(plain) if f.startswith("urn")]
    plain.write_bytes(records[0] + records[1][:-100])
    assert read(plain) == [*ids(0), "truncated"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1500), st.binary(min_size=1, max_size=30))
def test_overwritten_bytes_of_an_archive_never_raise(tmp_path_factory, at, junk):
    raw = bytearray(b"".join(gzip.compress(record(PAGE, number=n)) for n in range(4)))
    raw[at : at + len(junk)] = junk
    path = tmp_path_factory.mktemp("w") / "a.warc.gz"
    path.write_bytes(raw)
    assert len(read(path)) < 20


def test_real_archives_give_the_pages_that_are_in_them(shared):
    folder = shared / "data" / "web" / "warc"
    items = list(Warc(str(folder)).documents())
    pages = [item for item in items if not isinstance(item, Rejected)]
    assert [sum(p["metadata"]["type"] == kind for p in pages) for kind in ("html", "prose")] == [30, 3]
    assert all("\ufffd" not in p["text"][:1000] for p in pages)


@pytest.mark.parametrize("encoding", ["utf-8", "windows-1251", "shift_jis", "euc-kr", "utf-16"])
def test_a_declared_encoding_is_read_and_a_wrong_one_survived(encoding):
    text = {"windows-1251": "Привет, мир", "shift_jis": "こんにちは世界", "euc-kr": "안녕하세요"}.get(
        encoding, "naïve €"
    )
    page = f'<meta charset="{encoding}"><p>{text * 5}</p>'
    assert text in decode(page.encode(encoding), None)[0]
    assert text in decode(page.replace(encoding, "x").encode("utf-8"), encoding)[0]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([None, "utf-16", "base64", "nonsense", "iso-2022-jp"]))
def test_decoding_never_raises(raw, declared):
    decode(raw, declared)[0].encode("utf-8")


PROSE = "<p>This is a long enough paragraph about things that matter, with commas, and it ends here. {}</p>"
CODE = "def f(x):\n    if x < 1:\n        return 1\n\n\n    return 2"
RICH = f"""<html><head><title>A &amp; B</title></head><body><article><h1>Title</h1>{PROSE.format("<i>x</i>") * 3}
<pre><code class="language-python">{CODE.replace("<", "&lt;")}</code></pre>{PROSE.format("")}
<p>Mass <math><msup><mi>c</mi><mn>2</mn></msup></math>, <span class="katex"><math><mi>a</mi>
<annotation encoding="application/x-tex">a \\leq b</annotation></math><span>a b</span></span> and
<script type="math/tex">\\frac{{1}}{{2}}</script> and <img class="tex" alt="x_i^2" src="a.png"> as is well known.</p>
</article></body></html>"""


@pytest.mark.parametrize("engine", ENGINES)
def test_code_keeps_its_white_space_and_formulas_become_latex(engine):
    document, reason = Extract(engine=engine).edit(make_document("a", RICH, "s", "", {"type": "html"}))
    assert reason is None and document["metadata"] == {"type": "prose", "title": "A & B"}
    assert f"```python\n{CODE}\n```" in document["text"]
    for formula in ("$c^{2}$", "$a \\leq b$", "$\\frac{1}{2}$", "$x_i^2$"):
        assert formula in document["text"]
    assert "codeblockmark" not in document["text"]


@pytest.mark.parametrize("engine", ENGINES)
def test_without_code_and_formulas_the_library_sees_the_page_as_it_is(engine):
    page = f"<html><body>{PROSE.format('') * 4}<table><tr><td>1</td></tr></table></body></html>"
    assert Extract(engine=engine).apply(page)[0] == ENGINES[engine](page, Extract()).strip()


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=80, deadline=None)
@given(at=st.integers(0, len(RICH)), junk=st.text(max_size=20), cut=st.integers(0, 200))
def test_broken_pages_survive(engine, at, junk, cut):
    text, reason = Extract(engine=engine).apply(RICH[:at] + junk + RICH[at + cut :])
    assert reason is None or reason.startswith("extract: ")
    text.encode("utf-8", "surrogatepass")


def test_pages_that_would_take_for_ever_go_with_their_reason():
    assert Extract().apply("<div>" * 5000)[1] == "extract: nested too deep"
    assert Extract(max_characters=10).apply("x" * 11)[1] == "extract: too large"
    assert Extract().apply("<p>")[1] == "extract: no text"


ENGLISH = "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience."
GERMAN = "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt."


def test_documents_and_paragraphs_of_other_languages_go():
    assert Language().apply(ENGLISH)[1] is None and Language().apply(GERMAN)[1] == "language: de"
    assert Language(languages=()).apply(GERMAN)[1] is None
    signals = Language().signals(f"{ENGLISH}\n{GERMAN}")
    assert signals["languages"] == 2 and 0.45 < signals["target_share"] < 0.55
    assert LanguageParagraphs().apply(f"{ENGLISH}\n{GERMAN}\nShort.") == (f"{ENGLISH}\nShort.", None)
    assert Language().apply("1234 5678")[1] == "language: und"


def test_the_languages_of_the_declaration_of_human_rights_are_told_apart(shared):
    names = dict(
        zip(
            "eng deu_1996 fra spa ita por_PT nld rus pol ces".split(), "en de fr es it pt nl ru pl cs".split()
        )
    )
    right = total = 0
    with zipfile.ZipFile(shared / "data" / "pretrain-text" / "nltk_udhr2.zip") as archive:
        for name, code in names.items():
            if f"udhr2/{name}.txt" in archive.namelist():
                lines = archive.read(f"udhr2/{name}.txt").decode().split("\n")
                for line in (line for line in lines if len(line) > 100):
                    total += 1
                    right += Language().signals(line)["language"] == code
    print(f"{right} of {total} paragraphs")
    assert total > 200 and right / total > 0.97


def test_an_article_of_a_dump_is_its_text(tmp_path):
    markup = "{{Box|a={{b}}}}'''Euler''' was [[Swiss|a Swiss]].&lt;ref&gt;x&lt;/ref&gt; &lt;math&gt;e^x&lt;/math&gt;"
    markup += "\n{|\n| t\n|}\n== See also ==\n* y"
    page = "<page><title>{0}</title><ns>{1}</ns><id>{2}</id>{3}<revision><id>9</id><text>{4}</text></revision></page>"
    pages = (
        page.format("Euler", 0, 1, "", markup)
        + page.format("R", 0, 2, '<redirect title="x"/>', "#")
        + page.format("T:x", 10, 3, "", "t")
    )
    siteinfo = "<siteinfo><base>https://en.wikipedia.org/wiki/Main</base></siteinfo>"
    (tmp_path / "d.xml.bz2").write_bytes(bz2.compress(f"<mediawiki>{siteinfo}{pages}</mediawiki>".encode()))
    article, *rest = Wikipedia(str(tmp_path / "d.xml.bz2")).documents()
    assert article["text"] == "Euler\n\nEuler was a Swiss. $e^x$"
    assert article["metadata"]["url"] == "https://en.wikipedia.org/wiki/Euler"
    assert [item.reason for item in rest] == ["redirect", "namespace: 10"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(["{{", "}}", "[[", "]]", "{|", "|}", "\n", "|", "<ref>", "</ref>", "a", "''", "<!--"])
    )
)
def test_wiki_markup_left_open_or_crossed_never_raises(pieces):
    assert "{{" not in plain_text("".join(pieces))


def test_a_repository_lies_together_with_its_licence(tmp_path):
    files = {
        "a/z.py": "x = 1\n",
        "a/README.md": "# A",
        "a/LICENSE": "Permission is hereby granted, free of charge, to any person obtaining a copy",
        "a/gpl.py": "# SPDX-License-Identifier: GPL-3.0-or-later\nx = 2\n",
        "a/node_modules/m.js": "x",
        "a/yarn.lock": "x",
        "a/p_pb2.py": "x",
        "a/m.js": "a=1;" * 2000,
        "b/y.py": "y = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    items = list(Repositories(str(tmp_path), many=True, name="r").documents())
    kept = [(d["id"], d["licence"]) for d in items if not isinstance(d, Rejected)]
    assert kept == [
        ("r/a/README.md", "MIT"),
        ("r/a/gpl.py", "GPL-3.0"),
        ("r/a/z.py", "MIT"),
        ("r/b/y.py", "unknown"),
    ]
    gone = {item.id: item.reason for item in items if isinstance(item, Rejected)}
    assert gone["r/a/node_modules/m.js"] == "vendored" and gone["r/a/m.js"] == "minified"
    assert gone["r/a/p_pb2.py"] == "generated"
    only = Repositories(str(tmp_path), many=True, name="r", permissive_only=True).documents()
    assert [d["id"] for d in only if not isinstance(d, Rejected)] == ["r/a/README.md", "r/a/z.py"]


@pytest.mark.parametrize("kind", ["zip", "gztar", "bztar", "xztar", "tar"])
def test_an_archived_repository_gives_the_documents_of_its_folder(tmp_path, kind):
    folder = tmp_path / "r-1.0"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "z.py").write_text("x = 1\n")
    (folder / "README.md").write_text("# A")
    (folder / "LICENSE").write_text("SPDX-License-Identifier: Apache-2.0\n")
    (folder / "image.png").write_bytes(b"\x89PNG\0")
    archive = shutil.make_archive(str(tmp_path / "r"), kind, root_dir=tmp_path, base_dir="r-1.0")
    packed, plain = (list(Repositories(str(path), name="r").documents()) for path in (archive, folder))
    assert sorted(packed, key=_id) == sorted(plain, key=_id)
    assert [_id(d) for d in packed if not isinstance(d, Rejected)] == ["r/README.md", "r/src/z.py"]


def _id(item):
    return item.id if isinstance(item, Rejected) else item["id"]


def test_what_stands_before_the_damage_of_an_archive_is_read(tmp_path):
    folder, rng = tmp_path / "r", np.random.default_rng(0)
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(rng.bytes(2000).hex("\n", 20))
    archive = Path(shutil.make_archive(str(tmp_path / "a"), "gztar", root_dir=tmp_path, base_dir="r"))
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    items = list(Repositories(str(archive), name="r").documents())
    assert [item.reason.split(":")[0] for item in items if isinstance(item, Rejected)] == [
        "unreadable from here on"
    ]
    assert 5 < len(items) - 1 < 15


def test_pages_of_a_pdf_are_joined_without_headers_and_hyphens():
    body = "The {} line goes on to the edge and is bro-\nken there, where it ends.\nSecond {} text.\nThird {}.\nEnd {}."
    names = ("alpha", "beta", "gamma", "delta")
    pages = [f"A Journal\nEdge {n}\n{body.format(*[n] * 4)}\nPage {i}" for i, n in enumerate(names)]
    text = joined(pages)
    assert "A Journal" not in text and "Page" not in text
    assert all(f"The {n} line goes on to the edge and is broken there" in text for n in names)


def test_a_broken_pdf_is_rejected(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4 junk")
    (found,) = Pdf(str(tmp_path)).documents()
    assert found.reason == "broken: no PDF"


def test_html_and_code_files_of_a_folder_have_their_type(tmp_path):
    (tmp_path / "a.html").write_bytes("<p>é</p>".encode("latin-1"))
    (tmp_path / "b.rs").write_text("fn main() {}")
    assert [d["metadata"]["type"] for d in Folder(str(tmp_path)).documents()] == ["html", "code"]


def test_code_blocks_pass_the_rules_of_lines_untouched():
    text = f"{ENGLISH}\nno mark here\n```python\n{CODE}\n```\n{ENGLISH}"
    stage = C4Lines(min_sentences=1, keep_fenced=True)
    assert stage.apply(text) == (text.replace("no mark here\n", ""), None)

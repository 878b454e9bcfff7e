"""Curation end to end on made folders: counts add up, nothing vanishes, nothing is redone."""

import dataclasses
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from configs import ConfigError, build, to_dict
from configs.files import temporary_beside
from data import build_corpus, curate, load_tokenizer, make_batches, open_dataset
from data.card.page import write_card
from data.corpus import CorpusConfig, TokenizerConfig
from data.curation import CurationConfig, Workers, split_of
from data.dedup import ExactDedup, MinHashDedup
from data.filters import GopherQuality, GopherRepetition, Normalise
from data.sources import Folder, Jsonl, Parquet, PythonStdlib, Rejected, TextFile
from data.stage import Filter, Named
from tests.data.made_stages import FragileFilter


def article(seed, words=120):
    rng = np.random.default_rng(seed)
    vocabulary = ["the", "of", "that", "and", "with"] * 20
    vocabulary += [f"w{chr(97 + i)}{chr(97 + j)}ord" for i in range(26) for j in range(20)]
    return " ".join(rng.choice(vocabulary, words))


@pytest.fixture
def folder(tmp_path):
    """Twelve good articles in every format, twins, near twins, short ones, and broken files."""
    root = tmp_path / "raw"
    (root / "deep").mkdir(parents=True)
    (root / "a.txt").write_text(article(0))
    (root / "deep" / "b.md.gz").write_bytes(gzip.compress(article(1).encode()))
    rows = [{"text": article(i)} for i in (2, 3, 4)] + [{"text": article(0)}]
    lines = [json.dumps(row) for row in rows] + [
        "{broken",
        '{"no_text": 1}',
        '{"text": 5}',
        '{"text": "\\ud800 lone"}',
        "",
    ]
    (root / "c.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines).encode()))
    pq.write_table(pa.table({"text": [article(5), None, article(6), "too short"]}), root / "d.parquet")
    (root / "e.txt").write_bytes(b"\xff\xfe broken")
    (root / "f.txt.gz").write_bytes(gzip.compress(b"cut short " * 99)[:20])
    (root / "g.txt").write_text(article(1).replace("the", "a", 1))
    for i in range(7, 12):
        (root / f"h{i}.txt").write_text(article(i))
    return root


STAGES = (Normalise(), GopherQuality(), ExactDedup(), MinHashDedup())


def config(folder, **changes):
    values = {
        "sources": (Folder(str(folder), licence="CC0"),),
        "stages": STAGES,
        "validation_fraction": 0.3,
        "test_fraction": 0.0,
    }
    return CurationConfig(**(values | changes))


def all_documents(workdir):
    return [d for split in sorted((workdir / "text").iterdir()) for d in open_dataset(split)]


def test_every_document_is_kept_or_dropped_with_its_reason(folder, tmp_path):
    curate(config(folder), tmp_path / "w", log=lambda line: None)
    kept = all_documents(tmp_path / "w")
    texts = sorted(d["text"] for d in kept)
    twin = article(1).replace("the", "a", 1)
    assert texts == sorted([article(0), *map(article, range(2, 12)), twin if twin in texts else article(1)])
    assert all(d["licence"] == "CC0" and d["source"] == "raw" for d in kept)
    dropped = {}
    for file in sorted((tmp_path / "w" / "dropped").glob("*.parquet")):
        dropped |= {row["id"]: row["reason"] for row in pq.read_table(file).to_pylist()}
    reasons = Counter(reason.split(" of ")[0].split(": ", 2)[1] for reason in dropped.values())
    assert sum(reasons.pop(name, 0) for name in ("unreadable", "unreadable from here on")) == 2
    once = dict.fromkeys(("bad row", "lone surrogates", "too few words"), 1)
    assert reasons == {**once, "bad line": 3, "duplicate": 2}
    manifest = json.loads((tmp_path / "w" / "manifest.json").read_text())
    assert manifest["stages"][0]["documents_in"] == len(kept) + len(dropped)
    for before, after in zip(manifest["stages"], manifest["stages"][1:]):
        assert after["documents_in"] == before["documents_out"]
        assert after["documents_in"] - after["documents_out"] == sum(after["dropped"].values())
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(kept)


def written(workdir):
    """Every file with its bytes, but for how long the work took."""
    files = (p for p in workdir.rglob("*") if p.is_file() and p.name != "timings.json")
    return {p.relative_to(workdir).as_posix(): _without_seconds(p) for p in files}


def _without_seconds(path):
    return (
        re.sub(rb'"seconds": [0-9.e-]+', b"", path.read_bytes())
        if path.suffix == ".json"
        else path.read_bytes()
    )


def stages_written_after(workdir, moment):
    files = [p for p in (workdir / "stages").rglob("*") if p.is_file()]
    return sorted(
        {p.relative_to(workdir / "stages").parts[0] for p in files if p.stat().st_mtime_ns > moment}
    )


def test_a_second_run_redoes_nothing_and_a_changed_stage_only_what_follows(folder, tmp_path):
    work, quiet = tmp_path / "w", {"log": lambda line: None}
    first = curate(config(folder), work, **quiet)
    assert stages_written_after(work, 0) == [
        "00-sources",
        "01-Normalise",
        "02-GopherQuality",
        "03-ExactDedup",
        "04-MinHashDedup",
    ]
    before = written(work)
    moment = time.time_ns()
    again = curate(config(folder), work, **quiet)
    assert stages_written_after(work, moment) == [] and written(work) == before
    assert again["train"].manifest == first["train"].manifest
    changed = (Normalise(), GopherQuality(min_words=1, min_stop_words=0), ExactDedup(), MinHashDedup())
    curate(config(folder, stages=changed), work, **quiet)
    assert stages_written_after(work, moment) == ["02-GopherQuality", "03-ExactDedup", "04-MinHashDedup"]
    assert len(all_documents(work)) == sum(map(len, first.values())) + 1
    (folder / "new.txt").write_text(article(99))
    curate(config(folder, stages=changed), work, **quiet)
    assert article(99) in [d["text"] for d in all_documents(work)]


def test_an_index_that_was_deleted_or_cut_is_written_again(folder, tmp_path):
    index, lines = tmp_path / "index", []
    made = config(folder, stages=(MinHashDedup(save_index=str(index)),))
    curate(made, tmp_path / "w", log=lines.append)
    wanted = {path.name: path.read_bytes() for path in index.iterdir()}
    for spoil in (lambda path: path.unlink(), lambda path: path.write_bytes(b"cut")):
        for name in wanted:
            spoil(index / name)
            del lines[:]
            curate(made, tmp_path / "w", log=lines.append)
            assert {path.name: path.read_bytes() for path in index.iterdir()} == wanted
            assert any(name in line and "written again" in line for line in lines)
    moment = time.time_ns()
    curate(made, tmp_path / "w", log=lines.append)
    assert all(path.stat().st_mtime_ns < moment for path in index.iterdir())


def test_a_changed_threshold_measures_nothing_anew(folder, tmp_path, monkeypatch):
    work, quiet = tmp_path / "w", {"log": lambda line: None}
    stages = (Normalise(), GopherQuality(), GopherRepetition(), MinHashDedup())
    strict = (Normalise(), GopherQuality(min_words=100), GopherRepetition(), MinHashDedup())
    loose = (Normalise(), GopherQuality(min_words=1, min_stop_words=0), GopherRepetition(), MinHashDedup())
    wanted = {}
    for name, these in (("strict", strict), ("loose", loose)):
        wanted[name] = sorted(d["id"] for d in _curated(folder, these, tmp_path / name))
    curate(config(folder, stages=stages), work, **quiet)

    def measured_again(self, text):
        raise AssertionError("this was measured before")

    for kind in (GopherQuality, GopherRepetition):
        monkeypatch.setattr(kind, "signals", measured_again)
    for name, these in (("strict", strict), ("loose", loose)):
        assert sorted(d["id"] for d in _curated(folder, these, work)) == wanted[name]


def _curated(folder, stages, work):
    curate(config(folder, stages=stages), work, log=lambda line: None)
    return all_documents(work)


def test_signals_can_go_with_the_documents(folder, tmp_path):
    stages = (GopherQuality(), Normalise(), MinHashDedup())
    made = config(folder, stages=stages, tags_in_metadata=("GopherQuality",))
    curate(made, tmp_path / "w", log=lambda line: None)
    for document in all_documents(tmp_path / "w"):
        assert document["metadata"]["tags"]["GopherQuality"]["words"] == len(document["text"].split())


def in_shards(folder):
    """The files of `folder` as eight sources, so that there are eight shards, or more."""
    globs = ("a*", "**/b*", "c*", "d*", "e*", "f*", "g*", "h*")
    return tuple(Folder(str(folder), glob=glob, name=f"raw {glob[-2]}") for glob in globs)


def seen_by(tmp_path, monkeypatch, name):
    """A folder in which each process leaves its number that sees a document in a FragileFilter."""
    folder = tmp_path / f"seen-{name}"
    folder.mkdir()
    monkeypatch.setenv("SEEN", str(folder))
    return folder


def test_the_result_is_the_same_to_the_byte_for_any_number_of_processes(folder, tmp_path, monkeypatch):
    made, stages = {}, (FragileFilter(), *STAGES)
    for processes in (1, 2, 4):
        seen = seen_by(tmp_path, monkeypatch, processes)
        workers = Workers(processes=processes, min_megabytes=0)
        curate(
            config(folder, sources=in_shards(folder), stages=stages, workers=workers),
            tmp_path / str(processes),
            log=print,
        )
        made[processes] = written(tmp_path / str(processes))
        assert min(processes, 2) <= len(list(seen.iterdir())) <= processes
        assert (seen / str(os.getpid())).exists() == (processes == 1)
    assert made[1] == made[2] == made[4]
    assert sum(name.startswith("stages/00-sources/documents.parquet") for name in made[1]) >= 8


@pytest.mark.slow
def test_the_result_is_the_same_to_the_byte_on_a_ray_cluster(folder, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    for runner in ("local", "ray"):
        seen = seen_by(tmp_path, monkeypatch, runner)
        workers = Workers(runner=runner, processes=2, min_megabytes=0)
        program = f"""
from pathlib import Path
from data.curation import *
from tests.data.test_curation import *
curate(config(Path({str(folder)!r}), sources=in_shards(Path({str(folder)!r})), stages=(FragileFilter(), *STAGES),
              workers={workers!r}), {str(tmp_path / runner)!r})
"""
        subprocess.run([sys.executable, "-c", program], check=True, timeout=280)
        assert len(list(seen.iterdir())) >= 2
    assert written(tmp_path / "ray") == written(tmp_path / "local")


def test_a_run_that_was_killed_between_two_files_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch):
    quiet = {"log": lambda line: None}
    curate(config(folder), tmp_path / "whole", **quiet)
    wanted = written(tmp_path / "whole")
    replace, left = os.replace, [0]

    def dying(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    for left[0] in (3, 10, 20, 30, 40, 10**9):
        try:
            curate(config(folder), tmp_path / "w", **quiet)
        except KeyboardInterrupt:
            continue
    assert written(tmp_path / "w") == wanted


def test_what_killed_writes_leave_is_gone_after_the_next_run(folder, tmp_path):
    quiet = {"log": lambda line: None}
    corpus = CorpusConfig(config(folder), TokenizerConfig(vocab_size=300))
    build_corpus(corpus, tmp_path / "w", **quiet)
    wanted = written(tmp_path / "w")
    paths = [path for path in (tmp_path / "w").rglob("*") if path.is_file() or path.name == "train"]
    for path in [*paths, tmp_path / "w"]:
        left = temporary_beside(path)
        if path.is_dir():
            left.mkdir()
            left /= "half.tmp"
        left.write_text("half of")
    os.rename(tmp_path / "w" / "text" / "train", temporary_beside(tmp_path / "w" / "text" / "train", "old"))
    build_corpus(corpus, tmp_path / "w", **quiet)
    assert written(tmp_path / "w") == wanted
    assert sorted(os.listdir(tmp_path)) == ["raw", "w"]


def test_a_kill_while_a_file_is_written_leaves_nothing_after_the_next_run(folder, tmp_path):
    program = f"""
import os, sys
from data.curation import *; from data.sources import *
rename = os.replace
def dying(source, target):
    if os.path.basename(target) == sys.argv[1]:
        os.kill(os.getpid(), 9)
    rename(source, target)
os.replace = dying
curate(CurationConfig(sources=(Folder({str(folder)!r}),), stages=(), test_fraction=0.0, validation_fraction=0.3,
                      workers=Workers(processes=1)), sys.argv[2])
"""
    command = [sys.executable, "-c", program]
    for name in ("timings.json", "manifest.json"):
        killed = subprocess.run([*command, name, str(tmp_path / "w")], capture_output=True)
        assert killed.returncode == -signal.SIGKILL
        assert len([path for path in (tmp_path / "w").rglob(".*") if name in path.name]) == 1
    subprocess.run([*command, "none", str(tmp_path / "w")], check=True, capture_output=True)
    assert list((tmp_path / "w").rglob(".*")) == []


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_byte(folder, tmp_path, monkeypatch):
    program = f"""
import sys
from pathlib import Path
from tests.data.test_curation import *
curation = config(Path({str(folder)!r}), sources=in_shards(Path({str(folder)!r})), stages=(FragileFilter(), *STAGES),
                  workers=Workers(processes=2, min_megabytes=0))
build_corpus(CorpusConfig(curation, TokenizerConfig(vocab_size=500)), sys.argv[1])
"""
    command = [sys.executable, "-c", program]
    seen, whole = seen_by(tmp_path, monkeypatch, "whole"), tmp_path / "whole" / "corpus"
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    assert len(list(seen.iterdir())) == 2
    killed, half = tmp_path / "killed" / "corpus", 0
    for files in sorted(np.random.default_rng(0).integers(1, len(written(whole)), 10).tolist()):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*command, str(killed)], **quiet)
        while process.poll() is None and len(list(killed.rglob("*.*"))) < files:
            time.sleep(0.005)
        half += process.poll() is None
        process.kill()
        process.wait()
    assert half >= 5
    subprocess.run([*command, str(killed)], check=True, capture_output=True)
    a, b = written(whole), written(killed)
    assert a.keys() == b.keys() and [name for name in a if a[name] != b[name]] == []


def test_a_filter_that_fails_on_a_document_drops_it_and_goes_on(folder, tmp_path, monkeypatch):
    real = GopherQuality.signals

    def fragile(self, text):
        if text == article(7):
            raise ZeroDivisionError("by this text")
        return real(self, text)

    monkeypatch.setattr(GopherQuality, "signals", fragile)
    curate(config(folder), tmp_path / "w", log=lambda line: None)
    rows = pq.read_table(tmp_path / "w" / "dropped" / "02-GopherQuality.parquet").to_pylist()
    assert [r["reason"] for r in rows if r["text"] == article(7)] == [
        "error: ZeroDivisionError: by this text"
    ]
    assert len(all_documents(tmp_path / "w")) == 11


def test_pages_are_extracted_whatever_the_config_names(folder, tmp_path):
    """And only pages are: text that speaks of tags stays as it is."""
    pages, plain = tmp_path / "pages", "A tag such as <b> begins what </b> ends. " * 40
    pages.mkdir()
    body = "".join(f"<p>{article(seed)}</p>" for seed in (91, 92))
    (pages / "page.html").write_text(f"<html><head><meta charset=utf-8></head><body>{body}</body></html>")
    (pages / "plain.txt").write_text(plain)
    for seed in range(30):
        (pages / f"more_{seed}.txt").write_text(article(200 + seed))
    splits = {"validation_fraction": 0.2, "test_fraction": 0.2}
    curate(CurationConfig((Folder(str(pages)),), (Normalise(),), **splits), tmp_path / "out")
    texts = [document["text"] for document in all_documents(tmp_path / "out")]
    assert len(texts) == 32 and sum("<b> begins" in text for text in texts) == 1
    (page,) = (text for text in texts if article(91)[:40] in text)
    assert "<" not in page and article(92)[:40] in page


def test_addresses_that_are_none_end_no_run(tmp_path):
    """Neither the stages that read addresses nor the card that counts hosts."""
    rows = [{"id": f"{i}", "text": article(i), "url": url} for i, url in enumerate(BAD_URLS * 3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row | {"text": article(i)}) + "\n" for i, row in enumerate(rows)))
    source = Jsonl(str(path), metadata_fields=("url",))
    splits = {"validation_fraction": 0.2, "test_fraction": 0.2}
    curate(CurationConfig((source,), (ExactDedup(by="url"),), **splits), tmp_path / "out")
    found = [document["metadata"]["url"] for document in all_documents(tmp_path / "out")]
    assert {"http://[foo/bar", "http://[::1", "http://b.org/x"} <= set(found) and found.count("") == 3
    write_card(tmp_path / "out")
    assert "b.org" in (tmp_path / "out" / "card.json").read_text()


BAD_URLS = ("http://[foo/bar", "http://a.org:port/", "http://[::1", "//", "http://b.org/x", "\u2100.org", "")


def test_the_result_does_not_depend_on_the_order_of_sources(folder, tmp_path):
    files = sorted(folder.glob("h*.txt"))
    sources = tuple(TextFile(str(f), name=f.stem) for f in files)
    hashes = set()
    for i, order in enumerate((sources, sources[::-1])):
        made = curate(config(folder, sources=order), tmp_path / str(i), log=lambda line: None)
        hashes.add(json.dumps({k: d.manifest["sha256"] for k, d in made.items()}))
    assert len(hashes) == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_a_row_added_at_the_head_moves_no_document_into_another_split(tmp_path, kind):
    """And copies of one text are in one split."""
    texts = [article(seed, words=20) for seed in range(300)] + [article(7, words=20)] * 3

    def split_by_text(texts, folder):
        folder.mkdir()
        if kind == "jsonl":
            (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            source = Jsonl(str(folder / "a.jsonl"))
        elif kind == "parquet":
            pq.write_table(pa.table({"text": texts}), folder / "a.parquet")
            source = Parquet(str(folder / "a.parquet"))
        else:
            (folder / "a.txt").write_text("\n###\n".join(texts))
            source = TextFile(str(folder / "a.txt"), separator="###")
        curate(CurationConfig((source,), (), validation_fraction=0.3, test_fraction=0.3), folder / "out")
        found = {}
        for split, document in by_split(folder / "out"):
            assert found.setdefault(document["text"].strip(), split) == split
        return found

    before, after = (
        split_by_text(rows, tmp_path / name) for name, rows in (("a", texts), ("b", ["New."] + texts))
    )
    assert len(before) == 300 and all(after[text] == split for text, split in before.items())


def by_split(workdir):
    return [(split.name, d) for split in sorted((workdir / "text").iterdir()) for d in open_dataset(split)]


@dataclasses.dataclass(frozen=True)
class Shouting(Filter):
    """Drops texts with a word."""

    word: str = ""
    applies_to: str = "any"

    def signals(self, text):
        return {"shouts": self.word in text}

    def reason(self, signals):
        return "shouting" if signals["shouts"] else None


def test_a_stage_of_ones_own_is_named_in_a_config(folder, tmp_path):
    named = Named("tests.data.test_curation:Shouting", {"word": article(7)[:20]})
    made = config(folder, stages=(named,), tags_in_metadata=("Shouting",))
    assert build(CurationConfig, to_dict(made)) == made
    curate(made, tmp_path / "w", log=lambda line: None)
    assert article(7) not in [d["text"] for d in all_documents(tmp_path / "w")]
    manifest = json.loads((tmp_path / "w" / "manifest.json").read_text())
    assert manifest["stages"][1]["name"] == "01-Shouting" and manifest["stages"][1]["dropped"] == {
        "shouting": 1
    }
    for wrong, why in (
        ("json:loads", "missing 1"),
        ("no.such:Thing", "No module"),
        ("builtins:dict", "gives dict"),
    ):
        with pytest.raises(ConfigError, match=why):
            config(folder, stages=(Named(wrong),))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_limit_reads_so_many_documents_of_each_source(tmp_path, processes):
    for name, counts in (("a", (3, 4, 90)), ("b", (2,))):
        (tmp_path / name).mkdir()
        for i, count in enumerate(counts):
            rows = [{"text": article(1000 * i + row, words=20) + name} for row in range(count)]
            (tmp_path / name / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = tuple(Jsonl(str(path), name=path.parent.name + path.stem) for path in tmp_path.glob("?/*"))
    folders = (Folder(str(tmp_path / "a")), Folder(str(tmp_path / "b")))
    workers = Workers(processes=processes, min_megabytes=0)
    quiet = {"log": lambda line: None}
    curate(config("", sources=folders, stages=(), limit=9, workers=workers), tmp_path / "w", **quiet)
    assert Counter(d["source"] for d in all_documents(tmp_path / "w")) == {"a": 9, "b": 2}
    curate(config("", sources=sources, stages=(), limit=3, workers=workers), tmp_path / "v", **quiet)
    counts = Counter(d["source"] for d in all_documents(tmp_path / "v"))
    assert counts == {"a0": 3, "a1": 3, "a2": 3, "b0": 2}
    before = written(tmp_path / "v")
    curate(config("", sources=sources, stages=(), limit=3, workers=workers), tmp_path / "v", **quiet)
    assert written(tmp_path / "v") == before


def test_a_group_falls_into_one_split():
    for i in range(300):
        group = {"group": f"module{i}"}
        assert len({split_of({"id": f"{i}/{j}", "metadata": group}, 0.3, 0.3) for j in range(5)}) == 1
    splits = [split_of({"id": str(i), "metadata": {}}, 0.2, 0.1) for i in range(4000)]
    assert (
        abs(splits.count("validation") / 4000 - 0.2) < 0.03 and abs(splits.count("test") / 4000 - 0.1) < 0.03
    )


def points(workdir):
    """{id: where its hash lies between 0 and 1}, as sha256 says."""
    digests = {d["id"]: hashlib.sha256(d["id"].encode()).digest() for d in all_documents(workdir)}
    return {name: int.from_bytes(digest[:8], "big") / 2**64 for name, digest in digests.items()}


def test_a_corpus_too_small_for_its_fractions_still_has_a_validation_split(folder, tmp_path):
    lines, work = [], tmp_path / "w"
    made = config(folder, stages=(), validation_fraction=1e-9, test_fraction=1e-9)
    curate(made, work, log=lines.append)
    nearest = sorted(points(work), key=points(work).get)
    split = {document["id"]: name for name, document in by_split(work)}
    assert [split.pop(name) for name in nearest[:2]] == ["validation", "test"] and set(split.values()) == {
        "train"
    }
    assert any("validation: no document fell into its share" in line and nearest[0] in line for line in lines)
    before = written(work)
    curate(made, work, log=lines.append)
    assert written(work) == before


def test_one_document_is_for_training_and_the_log_says_what_is_missing(tmp_path):
    (tmp_path / "a.txt").write_text(article(1))
    lines = []
    made = curate(
        config(tmp_path, sources=(TextFile(str(tmp_path / "a.txt")),)), tmp_path / "w", log=lines.append
    )
    assert set(made) == {"train"} and any(line.startswith("validation: no document of 1") for line in lines)


@pytest.mark.slow
def test_the_crawl_samples_become_a_corpus_with_card_and_tokens(tmp_path, shared):
    command = [sys.executable, "-m", "data", f"--config=configs/data/web.py:{shared / 'data' / 'web'}"]
    command += [f"--workdir={tmp_path}", "--config.tokenizer.vocab_size=500"]
    subprocess.run(command, check=True, capture_output=True)
    for split in ("train", "validation", "test"):
        assert open_dataset(tmp_path / "tokens" / split).manifest["tokens"] > 100
    assert "kyleclo.com" in (tmp_path / "card.html").read_text()


def test_what_nothing_is_left_of_has_a_card_that_says_why(folder, tmp_path, capsys):
    from data.__main__ import main

    strict = config(folder, stages=(GopherQuality(min_words=10_000),))
    with pytest.raises(ConfigError, match="no document is left for train"):
        main(CorpusConfig(strict), tmp_path / "w")
    assert "too few words" in (tmp_path / "w" / "card.html").read_text()
    assert "card.html" in capsys.readouterr().err


def test_books_pass_the_default_stages(tmp_path, shared):
    books = shared / "data" / "pretrain-text" / "gutenberg"
    names = ("don-quijote", "dracula", "die-verwandlung", "the-war-of-the-worlds")
    sources = tuple(TextFile(str(books / f"{name}.txt.gz"), name=name) for name in names)
    curate(CurationConfig(sources, validation_fraction=0.0, test_fraction=0.0), tmp_path, log=print)
    assert {document["source"] for document in all_documents(tmp_path)} == set(names)


def test_sources_that_are_missing_or_empty_are_errors_with_the_mend(folder, tmp_path):
    for source in (
        TextFile("no/such.txt"),
        Jsonl("no/such.jsonl"),
        Folder("no/such"),
        Folder(str(folder), glob="*.xyz"),
    ):
        with pytest.raises(ConfigError, match="no/such|no file matches"):
            curate(config(folder, sources=(source,)), tmp_path / "w", log=lambda line: None)
    with pytest.raises(ConfigError, match="dropped"):
        strict = (GopherQuality(min_words=10_000),)
        curate(config(folder, stages=strict), tmp_path / "w", log=lambda line: None)


def test_text_files_are_cut_at_their_separator(tmp_path):
    (tmp_path / "t.txt").write_text("one\n%\ntwo\nlines\n%\n")
    parts = list(TextFile(str(tmp_path / "t.txt"), separator="%", type="code").documents())
    assert [p["text"] for p in parts] == ["one\n", "two\nlines\n"] and parts[0]["metadata"]["type"] == "code"


def test_the_standard_library_gives_code_docstrings_and_topics():
    items = list(PythonStdlib(max_bytes=300_000).documents())
    good = [item for item in items if not isinstance(item, Rejected)]
    kinds = {d["metadata"]["type"]: d for d in good}
    assert kinds.keys() == {"code", "prose"} and all(d["licence"] == "PSF-2.0" for d in good)
    assert not any("/test/" in d["id"] or "site-packages" in d["id"] for d in good)
    topic = next(d for d in good if d["id"].endswith("topics/assert"))
    assert "assert" in topic["text"]
    modules = {d["metadata"]["group"]: d for d in good if d["metadata"]["type"] == "code"}
    docs = [d for d in good if d["id"].endswith("#docstrings")]
    assert docs and all(d["metadata"]["group"] in modules for d in docs)
    assert sum(len(d["text"]) for d in modules.values()) <= 300_000


def test_the_whole_command_makes_data_that_trains(tmp_path, capsys):
    from data.__main__ import DESCRIPTION, main

    curation = CurationConfig(
        sources=(PythonStdlib(max_bytes=400_000, topics=False),), validation_fraction=0.2
    )
    config = CorpusConfig(dataclasses.replace(curation, test_fraction=0.0), TokenizerConfig(vocab_size=500))
    assert build(CorpusConfig, to_dict(config)) == config
    assert main(config, tmp_path) == 0
    out = capsys.readouterr()
    assert "tokens/train" in out.out and "06-MinHashDedup" in out.out and "/s" in out.err and DESCRIPTION
    tokenizer = load_tokenizer(tmp_path)
    text, tokens = open_dataset(tmp_path / "text" / "train"), open_dataset(tmp_path / "tokens" / "train")
    assert len(text) == len(tokens) and tokens.manifest["tokens"] == tokens.lengths.sum()
    assert tokens.manifest["bytes"] == sum(len(d["text"].encode()) for d in text)
    assert tokens.manifest["sources"][0]["licence"] == "PSF-2.0"
    for document, record in list(zip(text, tokens))[:5]:
        assert tokenizer.decode(record.tokens) == document["text"]
        assert (record.tokens[0], record.tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_ids[0])
    batch = next(make_batches({tmp_path / "tokens" / "train": 1.0}, 4, 64, 0))
    assert batch["tokens"].max() < tokenizer.vocab_size and batch["loss_weights"].mean() > 0.9
    before = (tmp_path / "tokens" / "train" / "manifest.json").stat().st_mtime_ns
    assert main(config, tmp_path) == 0
    assert (tmp_path / "tokens" / "train" / "manifest.json").stat().st_mtime_ns == before
    smaller = dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=400))
    assert build_corpus(smaller, tmp_path, log=lambda line: None).tokenizer.vocab_size == 400

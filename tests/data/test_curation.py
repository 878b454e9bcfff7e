"""Curation end to end on made folders: counts add up, nothing vanishes, nothing is redone."""

import dataclasses
import gzip
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import data.stages
from configs import ConfigError, build, to_dict
from data import build_corpus, curate, load_tokenizer, make_batches, open_dataset
from data.corpus import CorpusConfig, TokenizerConfig
from data.curation import CurationConfig, split_of
from data.dedup import ExactDedup, MinHashDedup
from data.filters import GopherQuality, Normalise
from data.sources import Folder, Jsonl, PythonStdlib, Rejected, TextFile


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


def test_a_second_run_redoes_nothing_and_a_changed_stage_only_what_follows(folder, tmp_path, monkeypatch):
    ran = []
    run_stage = data.stages.run_stage
    monkeypatch.setattr(
        "data.curation.run_stage", lambda stage, *a: ran.append(type(stage).__name__) or run_stage(stage, *a)
    )
    quiet = {"log": lambda line: None}
    first = curate(config(folder), tmp_path / "w", **quiet)
    assert ran == ["Normalise", "GopherQuality", "ExactDedup", "MinHashDedup"]
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "w" / "text").rglob("*.array_record")}
    ran.clear()
    again = curate(config(folder), tmp_path / "w", **quiet)
    assert ran == [] and times == {
        p: p.stat().st_mtime_ns for p in (tmp_path / "w" / "text").rglob("*.array_record")
    }
    assert again["train"].manifest == first["train"].manifest
    changed = (Normalise(), GopherQuality(min_words=1, min_stop_words=0), ExactDedup(), MinHashDedup())
    curate(config(folder, stages=changed), tmp_path / "w", **quiet)
    assert ran == ["GopherQuality", "ExactDedup", "MinHashDedup"]
    assert len(all_documents(tmp_path / "w")) == sum(map(len, first.values())) + 1
    ran.clear()
    (folder / "new.txt").write_text(article(99))
    curate(config(folder, stages=changed), tmp_path / "w", **quiet)
    assert len(ran) == 4 and article(99) in [d["text"] for d in all_documents(tmp_path / "w")]


def test_a_run_that_was_killed_in_a_stage_goes_on_to_the_same_result(folder, tmp_path, monkeypatch):
    quiet = {"log": lambda line: None}
    wanted = curate(config(folder), tmp_path / "whole", **quiet)
    close = data.stages.StageOutput.close

    def killed(output):
        if output._target.name == "02-GopherQuality":  # all is written, nothing is in its place
            raise KeyboardInterrupt
        return close(output)

    monkeypatch.setattr(data.stages.StageOutput, "close", killed)
    with pytest.raises(KeyboardInterrupt):
        curate(config(folder), tmp_path / "w", **quiet)
    monkeypatch.setattr(data.stages.StageOutput, "close", close)
    done = curate(config(folder), tmp_path / "w", **quiet)
    assert {k: d.manifest["sha256"] for k, d in done.items()} == {
        k: d.manifest["sha256"] for k, d in wanted.items()
    }
    assert not [p for p in (tmp_path / "w" / "stages").iterdir() if p.name.startswith(".")]


def test_a_filter_that_fails_on_a_document_drops_it_and_goes_on(folder, tmp_path, monkeypatch):
    real = GopherQuality.apply

    def fragile(self, text):
        if text == article(7):
            raise ZeroDivisionError("by this text")
        return real(self, text)

    monkeypatch.setattr(GopherQuality, "apply", fragile)
    curate(config(folder), tmp_path / "w", log=lambda line: None)
    rows = pq.read_table(tmp_path / "w" / "dropped" / "02-GopherQuality.parquet").to_pylist()
    assert [r["reason"] for r in rows if r["text"] == article(7)] == [
        "error: ZeroDivisionError: by this text"
    ]
    assert len(all_documents(tmp_path / "w")) == 11


def test_the_result_does_not_depend_on_the_order_of_sources(folder, tmp_path):
    files = sorted(folder.glob("h*.txt"))
    sources = tuple(TextFile(str(f), name=f.stem) for f in files)
    hashes = set()
    for i, order in enumerate((sources, sources[::-1])):
        made = curate(config(folder, sources=order), tmp_path / str(i), log=lambda line: None)
        hashes.add(json.dumps({k: d.manifest["sha256"] for k, d in made.items()}))
    assert len(hashes) == 1


def test_a_group_falls_into_one_split():
    for i in range(300):
        group = {"group": f"module{i}"}
        assert len({split_of({"id": f"{i}/{j}", "metadata": group}, 0.3, 0.3) for j in range(5)}) == 1
    splits = [split_of({"id": str(i), "metadata": {}}, 0.2, 0.1) for i in range(4000)]
    assert (
        abs(splits.count("validation") / 4000 - 0.2) < 0.03 and abs(splits.count("test") / 4000 - 0.1) < 0.03
    )


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

"""Documents that kill or break a worker go with their reason, all others pass, and several workers do the work."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import ConfigError
from data import curate, open_dataset
from data.card.page import write_card
from data.curation import CurationConfig, Workers
from data.curation.workers import map_items
from data.documents import read_parquet
from data.filters import Normalise
from data.sources import Folder, Jsonl, Parquet
from tests.data.made_stages import FragileDedup, FragileFiles, FragileFilter, FragileTransform
from tests.data.test_curation import article, written

ALONE, TWO = Workers(processes=1), Workers(processes=2, min_megabytes=0)
STAGES = (FragileTransform(), FragileFilter(), FragileDedup(), Normalise())
PLACES = {
    "signals": "02-FragileFilter",
    "reason": "02-FragileFilter",
    "transform": "01-FragileTransform",
    "features": "03-FragileDedup",
}


def rows_file(path, texts):
    path.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    return Jsonl(str(path), id_field="id", name=path.stem)


def curated(sources, workdir, workers=TWO, stages=STAGES, log=None):
    """{text: why it went, or None}, with the stage of each that went."""
    config = CurationConfig(
        tuple(sources), stages, validation_fraction=0.0, test_fraction=0.0, workers=workers
    )
    curate(config, workdir, log or (lambda line: None))
    found = {document["text"]: None for document in open_dataset(workdir / "text" / "train")}
    for folder in sorted((workdir / "dropped").iterdir()):
        for file in sorted(folder.iterdir()):
            for row in read_parquet(file).to_pylist():
                found[row["text"] or row["id"]] = (folder.stem, row["reason"])
    return found


@pytest.mark.parametrize("harm", ["die", "raise"])
def test_documents_that_break_a_stage_go_with_their_reason_and_all_others_pass(tmp_path, harm):
    good = [article(seed, words=30) for seed in range(40)]
    bad = {f"{harm}: {place}\nNumber {i}.": stage for i, (place, stage) in enumerate(PLACES.items())}
    texts = [*good[:7], *list(bad)[:2], *good[7:30], *list(bad)[2:], *good[30:]]
    sources = [
        rows_file(tmp_path / f"{name}.jsonl", some) for name, some in zip("ab", (texts[:20], texts[20:]))
    ]
    found = curated(sources, tmp_path / "w")
    why = "error: killed its worker (signal 9)" if harm == "die" else "error: ZeroDivisionError: by this text"
    assert found == dict.fromkeys(good) | {text: (stage, why) for text, stage in bad.items()}
    before = written(tmp_path / "w")
    assert curated(sources, tmp_path / "w", workers=ALONE) == found and written(tmp_path / "w") == before
    write_card(tmp_path / "w")
    assert why.split(":")[1].strip() in (tmp_path / "w" / "card.html").read_text()


def test_a_shard_whose_worker_dies_once_is_done_again_to_the_same_bytes(tmp_path):
    """As one that an operator killed, or a machine without memory."""
    texts = [article(seed, words=30) for seed in range(40)] + [f"die in: {tmp_path}"]
    sources = [
        rows_file(tmp_path / f"{name}.jsonl", some) for name, some in zip("ab", (texts[:9], texts[9:]))
    ]
    assert curated(sources, tmp_path / "died") == dict.fromkeys(texts) and (tmp_path / "died").exists()
    again = curated(sources, tmp_path / "not", workers=ALONE)
    assert again == dict.fromkeys(texts) and written(tmp_path / "not") == written(tmp_path / "died")


@pytest.mark.parametrize("harm", ["die", "raise"])
def test_what_a_file_holds_up_to_where_it_breaks_its_reader_passes_and_the_next_file_too(tmp_path, harm):
    lines = [article(seed, words=30) for seed in range(9)]
    for name, some in (("a", lines[:2]), ("b", [lines[2], harm, "lost"]), ("c", lines[3:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(some))
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": "One more."}))
    sources = [FragileFiles(str(tmp_path)), Jsonl(str(tmp_path / "more.jsonl"))]
    why = "killed its worker (signal 9)" if harm == "die" else "ZeroDivisionError: by this line"
    end = ("00-sources", f"source: unreadable from here on: {why}")
    found = curated(sources, tmp_path / "w")
    assert found == dict.fromkeys([*lines, "One more."]) | {"files/b.txt/end": end}


def test_a_death_that_no_document_is_guilty_of_names_its_item(tmp_path):
    source = rows_file(tmp_path / "a.jsonl", [article(1)])
    with pytest.raises(ConfigError, match="03-FragileDedup.*died again and again .signal 9."):
        curated([source], tmp_path / "w", stages=(*STAGES[:2], FragileDedup(dies=True)))


def test_a_run_that_was_killed_by_a_document_gives_it_to_another_process_in_the_next(tmp_path):
    good = [article(seed, words=30) for seed in range(4)]
    rows_file(tmp_path / "a.jsonl", [*good, "die: transform"])
    program = f"""
from pathlib import Path
from tests.data.test_workers import *
print(curated([Jsonl({str(tmp_path / "a.jsonl")!r}, id_field="id")], Path({str(tmp_path / "w")!r}), workers=ALONE))
"""
    ends = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(2)]
    assert [end.returncode for end in ends] == [-9, 0]
    assert "killed its worker" in ends[1].stdout and all(text in ends[1].stdout for text in good)
    assert list((tmp_path / "w").glob("running*")) == []


def pid_of(item):
    time.sleep(0.2)
    return item, os.getpid()


def fails(item):
    raise KeyError(item)


@dataclasses.dataclass(frozen=True)
class Item:
    label: str


def test_items_are_done_by_so_many_processes_and_come_in_their_order():
    for processes in (2, 3):
        results = list(map_items(Workers(processes=processes, min_megabytes=0), pid_of, list(range(9)), 1))
        assert [item for item, _ in results] == list(range(9))
        pids = {pid for _, pid in results}
        assert len(pids) == processes and os.getpid() not in pids


def test_what_a_function_raises_names_the_item_and_shows_where():
    with pytest.raises(RuntimeError, match="(?s)shard 7 failed.*in fails.*KeyError"):
        list(map_items(TWO, fails, [Item("shard 7"), Item("shard 8")], 1))


def test_one_table_without_texts_and_values_that_are_no_json_end_no_run(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    pq.write_table(pa.table({"words": ["a"]}), folder / "without.parquet")
    pq.write_table(pa.table({"text": [article(1)]}), folder / "with.parquet")
    found = curated([Folder(str(folder))], tmp_path / "w", workers=ALONE)
    (why,) = (why for text, why in found.items() if text != article(1))
    assert found[article(1)] is None and "has no column 'text'; it has words" in why[1]
    when = pa.array([0, 10**9], pa.timestamp("s"))
    odd = {"text": [article(1), article(2)], "when": when, "raw": [b"\xff", b"x"], "group": [[1], [2]]}
    pq.write_table(pa.table(odd), tmp_path / "odd.parquet")
    source = Parquet(str(tmp_path / "odd.parquet"), metadata_fields=("when", "raw", "group"))
    curated([source], tmp_path / "odd", workers=ALONE)
    metadata = [document["metadata"] for document in open_dataset(tmp_path / "odd" / "text" / "train")]
    assert {m["when"] for m in metadata} == {"1970-01-01 00:00:00", "2001-09-09 01:46:40"}
    assert {m["raw"] for m in metadata} == {"\ufffd", "x"}

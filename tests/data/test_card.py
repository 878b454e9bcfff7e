"""The data card: its figures are the manifest's and the files', and it says the same each time."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from configs import ConfigError
from configs.files import save
from data import thresholds
from data.card import write_card
from data.corpus import CorpusConfig
from data.curation import CurationConfig, curate
from data.dedup import MinHashDedup
from data.filters import GopherQuality, Language, Normalise
from data.sources import Jsonl


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    root = tmp_path_factory.mktemp("card")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["the", "of", "and", "that", "river", "stone"], 90)) for _ in range(40)]
    texts += [texts[0]] * 3 + ["<script>alert(1)</script>"]
    rows = [{"text": t, "url": f"https://www.{'ab'[i % 2]}.org/{i}"} for i, t in enumerate(texts)]
    (root / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Jsonl(str(root / "in.jsonl"), licence="CC0", metadata_fields=("url",))
    stages = (Normalise(), GopherQuality(), MinHashDedup())
    curate(CurationConfig((source,), stages, 0.2, 0.0), root / "w", log=lambda line: None)
    return root / "w"


def test_the_card_counts_what_the_manifest_counts(workdir):
    page = write_card(workdir)
    facts = json.loads((workdir / "card.json").read_text())
    manifest = json.loads((workdir / "manifest.json").read_text())
    for stage, wanted in zip(facts["stages"], manifest["stages"], strict=True):
        assert {key: stage[key] for key in wanted} == wanted
    documents = manifest["stages"][0]["documents_in"]
    left = manifest["stages"][-1]["documents_out"]
    assert (sum(facts["lengths"]["kept"]), sum(facts["lengths"]["dropped"])) == (left, documents - left)
    words = next(signal for signal in facts["signals"] if signal["name"] == "words")
    assert (sum(words["kept"]), sum(words["dropped"])) == (documents - 1, 1)
    assert {name for name, _ in facts["domains"]} == {"a.org", "b.org"}
    assert sum(share for _, share in facts["domains"]) == pytest.approx(1)
    assert facts["licences"] == [["CC0", 1.0]]
    assert [(c["size"], len(c["gone"])) for c in facts["clusters"]] == [(4, 3)]
    reasons = {row["reason"]: row["count"] for row in facts["dropped"]}
    assert reasons == {"gopher: too few words": 1, "minhash: duplicate": 3}
    text = page.read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text


def test_the_same_corpus_has_the_same_card(workdir):
    first = write_card(workdir).read_bytes()
    assert write_card(workdir).read_bytes() == first


def test_other_thresholds_are_tried_on_stored_signals_and_equal_a_run_with_them(tmp_path, monkeypatch):
    rng, work = np.random.default_rng(0), tmp_path / "w"
    rows = [
        {"text": "the of and " + "word " * int(n), "url": f"http://s{n % 3}.org/"}
        for n in rng.integers(20, 99, 60)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(least):
        source = Jsonl(str(tmp_path / "a.jsonl"), metadata_fields=("url",))
        stages = (Normalise(), GopherQuality(min_words=least), Language(languages=()))
        empty = Jsonl(str(tmp_path / "b.jsonl"))  # its shard has no document
        return CorpusConfig(
            CurationConfig((source, empty), stages, validation_fraction=0.0, test_fraction=0.0)
        )

    def dropped(workdir):
        stages = json.loads((workdir / "manifest.json").read_text())["stages"]
        return {stage["name"]: stage["documents_in"] - stage["documents_out"] for stage in stages}

    (tmp_path / "b.jsonl").write_text("")
    curate(config(40).curation, work, log=lambda line: None)
    curate(config(70).curation, tmp_path / "other", log=lambda line: None)
    save(config(40), work / "config.json")
    save(config(70), tmp_path / "new.json")
    monkeypatch.setattr(GopherQuality, "signals", None)  # nothing is measured
    assert thresholds.main(config(70), work) == 0
    quality, language = json.loads((work / "thresholds.json").read_text())
    name = "02-GopherQuality"
    assert (quality["filter"], quality["measured"], quality["now"], quality["then"]) == (
        name, 60, dropped(work)[name], dropped(tmp_path / "other")[name],
    )  # fmt: skip
    assert quality["changed"] == {"would go": quality["then"] - quality["now"]} and language["changed"] == {}
    short = [row for row in rows if len(row["text"].split()) < 70]
    by_host = Counter(row["url"].split("/")[2] for row in short)
    assert dict(quality["then domain"]) == by_host and len(quality["samples"]["would go"]) == 5
    assert "more would go" in (work / "thresholds.html").read_text()
    with pytest.raises(ConfigError, match="has to be measured"):
        other = dataclasses.replace(
            config(70).curation, stages=(Normalise(), GopherQuality(words="tokens"), Language())
        )
        thresholds.main(CorpusConfig(other), work)
    with pytest.raises(ConfigError, match="give a config with the same ones"):
        thresholds.main(CorpusConfig(dataclasses.replace(config(70).curation, stages=())), work)

"""The data card: its figures are the manifest's and the files', and it says the same each time."""

import json

import numpy as np
import pytest

from data.card import write_card
from data.curation import CurationConfig, curate
from data.dedup import MinHashDedup
from data.filters import GopherQuality, Normalise
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

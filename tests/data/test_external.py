"""Documents from TFDS (without TensorFlow), seqio where it is installed, and folders as the hub has them."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from configs.typed import ConfigError
from data.sources import HuggingFaceDataset, Rejected, SeqioTask, TensorFlowDataset


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        __module__ = "tiny"  # of no package, whose files TFDS would look for
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            features = {"text": text, "meta": tfds.features.FeaturesDict({"title": text})}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(20), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"text": f"document {i} é", "meta": {"title": f"title {i}"}}

    builder = Tiny(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder


def test_a_tfds_builder_gives_its_documents_without_tensorflow(builder):
    source = TensorFlowDataset(str(builder.data_dir), licence="CC0-1.0")
    documents = list(source.documents())
    assert sorted(d["text"] for d in documents) == sorted(f"document {i} é" for i in range(20))
    assert documents == list(source.documents()) and len({d["id"] for d in documents}) == 20
    assert documents[0]["licence"] == "CC0-1.0" and documents[0]["metadata"]["type"] == "prose"
    assert all(Path(path).is_file() for path in source.files())
    by_name = TensorFlowDataset("tiny", data_dir=str(Path(builder.data_dir).parents[1]))
    assert [d["text"] for d in by_name.documents()] == [d["text"] for d in documents]
    part = TensorFlowDataset(str(builder.data_dir), "test[:2]", text_field="meta/title")
    assert all(d["text"].startswith("title") for d in part.documents()) and len(list(part.documents())) == 2
    assert len(part.files()) == 1 and "tensorflow" not in sys.modules
    missing = list(TensorFlowDataset(str(builder.data_dir), text_field="body").documents())
    assert len(missing) == 20 and all(
        isinstance(d, Rejected) and "text, " in d.reason or "meta" in d.reason for d in missing
    )


def test_a_tfds_name_or_split_that_is_not_there_is_an_error(builder, tmp_path):
    with pytest.raises(ConfigError, match="there are .*train"):
        list(TensorFlowDataset(str(builder.data_dir), "dev").documents())
    with pytest.raises(ConfigError, match="no dataset 'no_such_dataset'"):
        list(TensorFlowDataset("no_such_dataset", data_dir=str(tmp_path)).documents())


def test_seqio_that_is_absent_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "seqio", None)
    with pytest.raises(ConfigError, match=r'pip install "crucible-lm\[seqio\]"'):
        list(SeqioTask("c4").documents())


def test_seqio_tasks_and_mixtures_give_their_documents():
    seqio = pytest.importorskip("seqio", reason="seqio is an extra and not installed")
    import tensorflow as tf

    def rows(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices(
            {"inputs": [f"question {i}" for i in range(5)], "targets": [f"answer {i} é" for i in range(5)]}
        )

    features = {name: seqio.Feature(seqio.ByteVocabulary(), add_eos=True) for name in ("inputs", "targets")}
    for name in ("crucible_a", "crucible_b"):
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(rows, splits=["train"]),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features=features,
        )
    seqio.MixtureRegistry.add("crucible_ab", ["crucible_a", "crucible_b"], default_rate=1.0)
    documents = list(SeqioTask("crucible_a").documents())
    assert [d["text"] for d in documents] == [f"question {i}\n\nanswer {i} é" for i in range(5)]
    mixed = SeqioTask("crucible_ab", text_fields=("targets_pretokenized",))
    texts = [d["text"] for d in mixed.documents()]
    assert set(texts) == {f"answer {i} é" for i in range(5)} and texts == [
        d["text"] for d in mixed.documents()
    ]
    with pytest.raises(ConfigError, match="no split 'test'"):
        list(SeqioTask("crucible_a", split="test").documents())
    with pytest.raises(ConfigError, match="Tokenised fields are no text|none of text_fields"):
        list(SeqioTask("crucible_a", text_fields=("text",)).documents())
    with pytest.raises(ConfigError, match="set module"):
        list(SeqioTask("crucible_unknown").documents())


@pytest.fixture
def hub_folder(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    for i in range(2):
        rows = pa.table({"text": [f"train {i} {j}" for j in range(3)], "url": ["u"] * 3})
        pq.write_table(rows, tmp_path / "data" / f"train-{i:05d}-of-00002.parquet")
    pq.write_table(
        pa.table({"text": ["test"], "url": ["u"]}), tmp_path / "data" / "test-00000-of-00001.parquet"
    )
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("a card")
    return tmp_path


def test_a_folder_of_the_hub_is_read_by_split(hub_folder):
    source = HuggingFaceDataset(str(hub_folder))
    assert [Path(path).name for path in source.files()] == [
        f"train-{i:05d}-of-00002.parquet" for i in range(2)
    ]
    documents = list(source.documents())
    assert [d["text"] for d in documents] == [f"train {i} {j}" for i in range(2) for j in range(3)]
    assert len({d["id"] for d in documents}) == 6
    assert [d["text"] for d in HuggingFaceDataset(str(hub_folder), "test").documents()] == ["test"]
    with pytest.raises(ConfigError, match="no split 'validation': there are test, train"):
        HuggingFaceDataset(str(hub_folder), "validation").files()


def test_files_without_the_name_of_a_split_are_for_training(tmp_path):
    lines = [json.dumps({"content": "a"}), "oh", json.dumps({"text": "b"})]
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "part-1.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    items = list(HuggingFaceDataset(str(tmp_path), subset="en", text_field="content").documents())
    assert items[0]["text"] == "a" and [isinstance(item, Rejected) for item in items] == [False, True, True]
    assert "not valid JSON" in items[1].reason and "no field 'content'" in items[2].reason


def test_a_name_of_the_hub_without_the_package_says_how_to_go_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets. Or: hf download owner/name"):
        list(HuggingFaceDataset("owner/name").documents())

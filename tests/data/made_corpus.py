"""Runs a Global stage over texts in memory, as a curation would over its shards."""

import functools
import tempfile
from pathlib import Path

from data.documents import make_document, read_table, write_documents, write_table
from data.stage import Corpus, cut_text


def resolve(stage, texts, shards=3, metadata=None):
    """{id: Decision} of a stage for {id: text}, dealt out to shards in their order."""
    documents = [
        make_document(name, text, "made", "CC0", {"type": "prose", **(metadata or {}).get(name, {})})
        for name, text in texts.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = tuple(f"s{i:03d}" for i in range(shards))
        place = {}
        for i, shard in enumerate(names):
            mine = documents[i * len(documents) // shards : (i + 1) * len(documents) // shards]
            place |= {(shard, row): d["id"] for row, d in enumerate(mine)}
            write_documents(root / "d" / f"{shard}.parquet", mine)
            table = stage.features(list(enumerate(mine)))
            write_table(root / "f" / f"{shard}.parquet", {n: table.column(n) for n in table.column_names})
        assert read_table(root / "f" / f"{names[0]}.parquet") is not None
        (root / "scratch").mkdir()
        paths = functools.partial(_path, root)
        corpus = Corpus(
            names,
            functools.partial(paths, "f"),
            functools.partial(paths, "d"),
            root / "scratch",
            lambda function, items, megabytes: map(function, items),
            lambda line: None,
        )
        return {place[shard, d.row]: d for shard, ds in stage.resolve(corpus) for d in ds}


def _path(root, kind, shard):
    return root / kind / f"{shard}.parquet"


def duplicates(stage, texts, **more):
    """{id of what goes: id of what stays}."""
    return {name: d.reason.split(" duplicate of ")[1] for name, d in resolve(stage, texts, **more).items()}


def left(stage, texts, **more):
    """{id: what is left of the text} of a stage that cuts."""
    found = resolve(stage, texts, **more)
    return {
        name: cut_text(text, found[name].cut) if name in found else text
        for name, text in texts.items()
        if name not in found or found[name].reason is None
    }

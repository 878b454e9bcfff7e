"""Documents as every curation stage sees them, and tables of them as Parquet files.

The same documents give the same bytes: no times, no compression that depends on threads, rows in their order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from configs.files import temporary_beside

COPY_MARK = "~~"  # before the number of a further document with the same id
COLUMNS = ("id", "text", "source", "licence", "metadata")  # metadata is JSON
DocumentType = Literal["any", "prose", "code", "html"]


class Document(TypedDict):
    """One text. `metadata["type"]` is "prose", "code" or "html" and decides which stages look at it; documents
    of one `metadata["group"]` (default: the id) fall into the same split."""

    id: str
    text: str
    source: str
    licence: str
    metadata: dict[str, Any]


class Rejected(NamedTuple):
    """Something that is no document, and why."""

    id: str
    reason: str
    source: str


def make_document(name: str, text: str, source: str, licence: str, metadata: dict[str, Any]) -> Document:
    return {"id": name, "text": text, "source": source, "licence": licence, "metadata": metadata}


def content_key(text: str) -> str:
    """An id for a text that has no name of its own: it stays the same wherever the text is in its file."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()


def type_of(document: Document) -> str:
    return document["metadata"].get("type", "prose")


def write_documents(path: Path, documents: Sequence[Document], reasons: Sequence[str] | None = None) -> None:
    """A Parquet file of documents, with a column `reason` where these were dropped."""
    columns: dict[str, list[str]] = {name: [d[name] for d in documents] for name in COLUMNS[:-1]}
    columns["metadata"] = [json.dumps(d["metadata"], ensure_ascii=False) for d in documents]
    if reasons is not None:
        columns["reason"] = list(reasons)
    write_table(path, {name: _strings(values) for name, values in columns.items()})


def read_documents(path: str | os.PathLike, rows: Iterable[int] | None = None) -> list[Document]:
    """The documents of a file that `write_documents` made, or those of the given rows, in their order."""
    import pyarrow as pa

    table = read_parquet(path, COLUMNS)
    if rows is not None:
        table = table.take(pa.array(list(rows), pa.int64()))
    documents = table.to_pylist()
    for document in documents:
        document["metadata"] = json.loads(document["metadata"])
    return documents


def write_table(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Columns (lists or Arrow arrays) as a Parquet file that is there whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        pq.write_table(table, temporary, compression="zstd", row_group_size=4096)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_table(path: str | os.PathLike) -> Any:
    """The Arrow table in a Parquet file, or None where there is none."""
    return read_parquet(path) if os.path.exists(path) else None


def read_parquet(path: str | os.PathLike, columns: Sequence[str] | None = None) -> Any:
    """The Arrow table in a Parquet file. A folder of its path that is called a=b gives it no column."""
    import pyarrow.parquet as pq

    options: dict[str, Any] = {"partitioning": None}
    return pq.read_table(path, columns=None if columns is None else list(columns), **options)


def _strings(values: list[str]) -> Any:
    import pyarrow as pa

    return pa.array(values, pa.large_string())

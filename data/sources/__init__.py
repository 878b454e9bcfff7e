"""Where documents come from: files of many formats, on this machine or at gs:// and s3://, and the Python library."""

from data.documents import Document, Rejected
from data.sources.base import SourceBase, file_state, parts_of
from data.sources.files import Folder, Jsonl, Parquet, TextFile
from data.sources.repository import Repositories
from data.sources.stdlib import PythonStdlib
from data.sources.warc import Warc

Source = TextFile | Jsonl | Parquet | Folder | PythonStdlib | Warc | Repositories

__all__ = [
    "Document",
    "Folder",
    "Jsonl",
    "Parquet",
    "PythonStdlib",
    "Rejected",
    "Repositories",
    "Source",
    "SourceBase",
    "TextFile",
    "Warc",
    "file_state",
    "parts_of",
]

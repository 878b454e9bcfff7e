"""Where documents come from: files of many formats, on this machine or at gs:// and s3://, and the Python library."""

from data.documents import Document, Rejected
from data.sources.base import SourceBase, file_state, parts_of
from data.sources.files import Folder, Jsonl, Parquet, TextFile
from data.sources.pdf import Pdf
from data.sources.repository import Repositories
from data.sources.stdlib import PythonStdlib
from data.sources.warc import Warc
from data.sources.wikipedia import Wikipedia

Source = TextFile | Jsonl | Parquet | Folder | PythonStdlib | Warc | Wikipedia | Repositories | Pdf

__all__ = [
    "Document",
    "Folder",
    "Jsonl",
    "Parquet",
    "Pdf",
    "PythonStdlib",
    "Rejected",
    "Repositories",
    "Source",
    "SourceBase",
    "TextFile",
    "Warc",
    "Wikipedia",
    "file_state",
    "parts_of",
]

"""Where documents come from: files of many formats, on this machine or at gs:// and s3://, and the Python library."""

from data.documents import Document, Rejected
from data.sources.base import SourceBase, file_state, parts_of
from data.sources.external import HuggingFaceDataset, SeqioTask, TensorFlowDataset
from data.sources.files import Csv, Jsonl, Parquet, TextFile
from data.sources.folder import Folder
from data.sources.pdf import Pdf
from data.sources.repository import Repositories
from data.sources.stdlib import PythonStdlib
from data.sources.warc import Warc
from data.sources.wikipedia import Wikipedia

Source = (
    TextFile
    | Jsonl
    | Parquet
    | Csv
    | Folder
    | Warc
    | Wikipedia
    | Repositories
    | Pdf
    | PythonStdlib
    | TensorFlowDataset
    | SeqioTask
    | HuggingFaceDataset
)

__all__ = [
    "Csv",
    "Document",
    "Folder",
    "HuggingFaceDataset",
    "Jsonl",
    "Parquet",
    "Pdf",
    "PythonStdlib",
    "Rejected",
    "Repositories",
    "SeqioTask",
    "Source",
    "SourceBase",
    "TensorFlowDataset",
    "TextFile",
    "Warc",
    "Wikipedia",
    "file_state",
    "parts_of",
]

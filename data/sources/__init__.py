"""Where documents come from: files of many formats, on this machine or at gs:// and s3://, and the Python library."""

from data.documents import Document, Rejected
from data.sources.base import SourceBase, file_state, parts_of
from data.sources.external import HuggingFaceDataset, SeqioTask, TensorFlowDataset
from data.sources.files import Folder, Jsonl, Parquet, TextFile
from data.sources.stdlib import PythonStdlib

Source = (
    TextFile | Jsonl | Parquet | Folder | PythonStdlib | TensorFlowDataset | SeqioTask | HuggingFaceDataset
)

__all__ = [
    "Document",
    "Folder",
    "HuggingFaceDataset",
    "Jsonl",
    "Parquet",
    "PythonStdlib",
    "Rejected",
    "SeqioTask",
    "Source",
    "SourceBase",
    "TensorFlowDataset",
    "TextFile",
    "file_state",
    "parts_of",
]

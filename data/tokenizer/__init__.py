"""Tokenizers: one interface, every common kind and file format, training, and comparison.

`data.load_tokenizer(path)` reads one; `python -m data.tokenizer train|compare|show|convert` is the command.
"""

from data.tokenizer.interface import StreamDecoder, Tokenizer, read_json, to_json

__all__ = ["StreamDecoder", "Tokenizer", "read_json", "to_json"]

"""Text out of web pages: encodings, main text, mathematics and code."""

from data.extract.page import Extract

__all__ = ["Extract"]

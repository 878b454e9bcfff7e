"""Addresses of documents, which may be anything: what can't be read is no address, and no error."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit


def split_url(url: object) -> SplitResult | None:
    """The parts of an address; None for one that can't be split, such as "http://[foo/bar"."""
    try:
        return urlsplit(str(url or ""))
    except ValueError:
        return None


def host_of(url: object) -> str:
    """The host, in small letters, without "www." and port; "" where there is none."""
    parts = split_url(url)
    return "" if parts is None else parts.netloc.lower().removeprefix("www.").split(":")[0]

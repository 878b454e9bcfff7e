"""The chat page: one document, put together from the files of this folder, that loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

_FOLDER = Path(__file__).parent


def chat_page() -> tuple[bytes, str]:
    """The page, and the policy that lets it run its own scripts and style and nothing else (CSP, level 3)."""

    def content(name: re.Match[str]) -> str:
        return "\n" + (_FOLDER / name[1]).read_text(encoding="utf-8")

    page = re.sub(r"\{(\w+\.(?:css|js))\}", content, (_FOLDER / "page.html").read_text(encoding="utf-8"))

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(part.encode("utf-8")).digest()).decode() for part in parts]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    sources = f"script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:"
    closed = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return page.encode("utf-8"), f"default-src 'none'; {sources}; {closed}"

"""Makes filters.json: what datatrove's filters decide on tests/data/made_texts.py, words by white space.

    .venvs/datatrove/bin/python tests/goldens/make_filters.py

The environment is made by `python -m benchmarks.filters`. C4's sentences are not counted: both sides split differently.
"""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "data"), str(ROOT / "benchmarks" / "peers")]

from datatrove.data import Document  # noqa: E402
from datatrove_filters import filters  # noqa: E402
from made_texts import made_texts  # noqa: E402


def main() -> None:
    rows = []
    for text in made_texts():
        row = {}
        for name, each in filters("white_space").items():
            document = Document(text=text, id="x")
            verdict = each.filter(document)
            row[name] = None if verdict is True else verdict[1]
            if name == "C4Lines":
                row["c4_text"] = hashlib.sha256(document.text.encode()).hexdigest()[:16]
        rows.append(row)
    lines = ",\n".join(json.dumps(row) for row in rows)
    Path(__file__).with_name("filters.json").write_text(f"[\n{lines}\n]\n")


main()

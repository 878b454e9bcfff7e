"""Makes web_filters.json: what datatrove's filters decide on real pages with FineWeb's settings and spaCy's words.

    .venvs/datatrove/bin/python tests/goldens/make_web_filters.py path/to/shared/data

The environment is made by `python -m benchmarks.filters`.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "data"), str(ROOT / "benchmarks" / "peers")]

from datatrove.data import Document  # noqa: E402
from datatrove_filters import filters  # noqa: E402
from made_texts import real_pages  # noqa: E402


def main() -> None:
    rows = {}
    chain = filters("tokens", fineweb_settings=True)
    for name, text in real_pages(Path(sys.argv[1])).items():
        verdicts = {kind: each.filter(Document(text=text, id=name)) for kind, each in chain.items()}
        rows[name] = {kind: None if verdict is True else verdict[1] for kind, verdict in verdicts.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    Path(__file__).with_name("web_filters.json").write_text("{\n" + lines + "\n}\n")


main()

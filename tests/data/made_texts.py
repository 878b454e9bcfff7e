"""Texts that fall on either side of every heuristic rule. Only the standard library: the script that asks
datatrove uses it too."""

import gzip
import json
import random

WORDS = (
    "the be to of and that have with river stone light walking seven 12 #tag e.g. it's x1 (so) — …".split()
)
LINES = (
    "This line is a sentence of the usual length, and it ends as sentences do.",
    "Please enable JavaScript to see this page in your browser.",
    "By using this site you accept our cookie policy and terms of use.",
    "short one",
    "Read more...",
    "- a point of a list",
    "\u2022 another point",
    "Wikipedia says so [citation needed] and it may be right [3].",
    'He said: "it is well."',
    "A page of lorem ipsum is no page.",
    "function f() { return 1; }.",
    "word" * 300 + " ends.",
    "Does it? It does! And then some more follows here.",
    "12 likes",
    "MENU AND HEADINGS",
)


def made_texts(count: int = 600) -> list[str]:
    rng = random.Random(0)
    return [_text(rng) for _ in range(count)]


def _text(rng: random.Random) -> str:
    parts = []
    kinds = rng.sample(range(4), rng.randint(1, 3))
    vocabulary = rng.sample(WORDS, rng.randint(6, len(WORDS)))
    for _ in range(rng.randint(1, 14)):
        kind = rng.choice(kinds)
        if kind == 0:
            parts.append(
                " ".join(rng.choice(vocabulary) for _ in range(rng.randint(3, 60))) + rng.choice(".?, ")
            )
        elif kind == 1:
            parts.append(rng.choice(LINES[:9] if rng.random() < 0.9 else LINES))
        elif kind == 2:
            parts.append(
                f"Item {rng.randrange(10**6)} of {rng.randrange(10**6)} was seen near {rng.random():.9f}."
            )
        elif parts:
            parts.append(rng.choice(parts))
    return rng.choice(["\n", "\n\n"]).join(parts) or "empty"


def real_pages(folder):
    """{id: text} of real web pages beside the project: C4's and Dolma's."""
    pages = {}
    with open(folder / "pretrain-text" / "c4_demo.jsonl", encoding="utf-8") as file:
        pages |= {f"c4/{i}": json.loads(line)["text"] for i, line in enumerate(file)}
    for path in sorted((folder / "web" / "dolma").glob("*.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            pages |= {f"{path.name}/{i}": json.loads(line)["text"] for i, line in enumerate(file)}
    return pages

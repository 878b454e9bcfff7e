"""The folders of tests/goldens/tokenizers/cases.json, and what others make of them."""

import base64
import json
from pathlib import Path

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "tokenizers" / "cases.json").read_text())
CASES = {case["name"]: case for case in GOLDENS["cases"]}
LAID_OUT = [
    name
    for name in CASES
    if not name.startswith(("byte_level ", "word_piece ", "unigram by", "unigram clean"))
]
for _case in GOLDENS["harmless"]:  # settings that change nothing in what transformers gives
    _alone = CASES[f"{_case['vocabulary']} by itself"]
    CASES[_case["name"]] = _alone | _case
TEXTS, MESSAGES = GOLDENS["texts"], GOLDENS["messages"]


def write_folder(folder, case):
    vocabulary, layout = GOLDENS["vocabularies"][case["vocabulary"]], case["layout"]
    files = {name: json.dumps(content).encode() for name, content in case["files"].items()}
    if layout == "json":
        files["tokenizer.json"] = json.dumps(vocabulary | case["changes"]).encode()
    elif layout == "merges":
        files["vocab.json"] = json.dumps(vocabulary["model"]["vocab"]).encode()
        merges = [" ".join(pair) for pair in vocabulary["model"]["merges"]]
        files["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""]).encode()
    elif layout == "vocab":
        ids = vocabulary["model"]["vocab"]
        files["vocab.txt"] = "".join(f"{word}\n" for word in sorted(ids, key=ids.__getitem__)).encode()
    else:
        files[layout] = base64.b64decode(vocabulary)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder

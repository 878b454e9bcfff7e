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


def sentence_pieces(**changes):
    """The metadata of a GGUF file with user-defined tokens of spaces and words."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581",
        "a",
        "b",
        "\u2581a",
        "ab",
    ]
    pieces += ["  ", "    ", "hello", "\n\n"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 5, *[4] * 4]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0] + [0.0] * 4,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **changes,
    }

"""Makes smollm2.json: greedy answers of SmolLM2-135M-Instruct to three chats, by a reader that shares nothing
with us.

    .venv/bin/python tests/goldens/make_smollm2.py ../shared/data/check_smollm2.py
    path/to/SmolLM2-135M-Instruct.Q4_1.gguf

The reader is one file of plain numpy (GGUF, tokenizer and forward pass of its own); it is imported by its
path.
"""

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea, then count: 1, 2, 3.",
    "Écris « bonjour » in Python's print() & explain it in 12 words.",
]


def main(reader_path: str, model_path: str) -> None:
    spec = importlib.util.spec_from_file_location("reader", reader_path)
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    seen = {}
    encode, decode = reader.Tok.enc, reader.Tok.dec

    def watched_encode(tokenizer, text):
        seen["prompt_ids"] = encode(tokenizer, text)
        return seen["prompt_ids"]

    def watched_decode(tokenizer, ids):
        seen["new_ids"] = [int(i) for i in ids]
        seen["text"] = decode(tokenizer, ids)
        return seen["text"]

    reader.Tok.enc, reader.Tok.dec = watched_encode, watched_decode
    chats = []
    for question in QUESTIONS:
        with contextlib.redirect_stdout(io.StringIO()):
            reader.main(model_path, question)
        stopped = len(seen["new_ids"]) < 60  # the reader stops there, and does not give the stop token
        chats.append({"question": question, **seen, "stopped": stopped})
        print(json.dumps(chats[-1], ensure_ascii=False), flush=True)
    content = json.dumps({"model": Path(model_path).name, "chats": chats}, ensure_ascii=False, indent=1)
    (Path(__file__).parent / "smollm2.json").write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

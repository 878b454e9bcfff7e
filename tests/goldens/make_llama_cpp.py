"""Writes tokenizers/llama_cpp.json: the ids that llama.cpp itself gives for small GGUF vocabularies.

    cmake -B BUILD -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF SOURCE
    cmake --build BUILD --target llama
    PYTHONPATH=. .venv/bin/python tests/goldens/make_llama_cpp.py SOURCE BUILD

SOURCE is llama.cpp's source tree, of the package llama-cpp-python 0.3.36 (vendor/llama.cpp).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from model.formats.gguf.container_writer import write
from model.formats.gguf.tokenizer import tokenizer_metadata
from tests.data.tokenizer_cases import CASES, LAID_OUT, TEXTS, sentence_pieces, write_folder

OUT = Path(__file__).parent / "tokenizers" / "llama_cpp.json"
MORE = [
    "a b",
    "  a",
    "a      b",
    "ahellob",
    "ab\n\n",
    " a",
    "hello hello",
    "    ",
    "a  hello  b",
    "\n\n\na",
    "hello",
]
PROGRAM = r"""
#include "llama.h"
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>
int main(int argc, char ** argv) {  // a GGUF file; texts with \x1e between them
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    auto params = llama_model_default_params();
    params.vocab_only = true;
    auto model = llama_model_load_from_file(argv[1], params);
    if (!model) return 1;
    auto vocab = llama_model_get_vocab(model);
    std::ifstream file(argv[2], std::ios::binary);
    std::string all((std::istreambuf_iterator<char>(file)), {});
    for (size_t at = 0; at <= all.size();) {
        size_t end = std::min(all.find('\x1e', at), all.size());
        std::string text = all.substr(at, end - at);
        at = end + 1;
        for (bool add : {false, true}) {
            std::vector<llama_token> ids(text.size() + 16);
            int n = llama_tokenize(vocab, text.c_str(), text.size(), ids.data(), ids.size(), add, false);
            for (int i = 0; i < n; i++) printf("%d ", ids[i]);
            printf("\n");
        }
    }
}
"""


def main(source: Path, build: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "tokenize"
        (Path(folder) / "tokenize.cpp").write_text(PROGRAM)
        command = [
            "g++",
            "-std=c++17",
            f"{folder}/tokenize.cpp",
            f"-I{source}/include",
            f"-I{source}/ggml/include",
        ]
        command += [
            f"-L{build}/bin",
            "-lllama",
            "-lggml",
            "-lggml-base",
            f"-Wl,-rpath,{build}/bin",
            "-o",
            program,
        ]
        subprocess.run(command, check=True)
        found = {"made": ask(program, sentence_pieces(), MORE)}
        found |= {name: ask(program, metadata, TEXTS) for name in LAID_OUT if (metadata := written(name))}
    OUT.write_text(json.dumps({"texts": MORE, "answers": found}, separators=(",", ":")) + "\n")
    print(len(found), "vocabularies,", OUT.stat().st_size, "bytes")


def written(name: str) -> dict | None:
    """The metadata of a folder, None where GGUF can't say it."""
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), CASES[name])
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    try:
        return tokenizer_metadata(files, CASES[name]["wanted"]["size"])
    except ValueError:
        return None


def ask(program: Path, metadata: dict, texts: list[str]) -> dict:
    arrays = {"tokenizer.ggml.scores": np.float32, "tokenizer.ggml.token_type": np.int32}
    metadata = {
        key: np.array(value, arrays[key]) if key in arrays else value for key, value in metadata.items()
    }
    architecture = "bert" if metadata["tokenizer.ggml.model"] == "bert" else "llama"
    with tempfile.TemporaryDirectory() as folder:
        write(
            Path(folder) / "made.gguf", {"general.architecture": architecture, **metadata}, {}, {}.__getitem__
        )
        (Path(folder) / "texts").write_bytes("\x1e".join(texts).encode())
        command = [program, f"{folder}/made.gguf", f"{folder}/texts"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[:-1]
    rows = [[int(i) for i in line.split()] for line in lines]
    return {"plain": rows[::2], "whole": rows[1::2]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

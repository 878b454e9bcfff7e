"""Tokenizers in GGUF files: written from every folder that GGUF can say, with the special tokens that llama.cpp's own
converter finds (tests/goldens/make_tokenizers.py), and read as llama.cpp reads them."""

import json
from pathlib import Path

import numpy as np
import pytest

from data import load_tokenizer
from data.tokenizer.gguf import from_metadata
from model.formats.gguf.tokenizer import tokenizer_metadata
from tests.data.tokenizer_cases import CASES, LAID_OUT, TEXTS, sentence_pieces, write_folder

GOLDENS = Path(__file__).parents[1] / "goldens" / "tokenizers"
LLAMA_CPP = json.loads((GOLDENS / "llama_cpp.json").read_text())  # tests/goldens/make_llama_cpp.py

# What GGUF can't say: a prefix space of byte-level BPE, GPT-NeoX's normaliser, unigram models, Chinese words.
REFUSED = {
    "GPT2Tokenizer prefix=True": "no name for this tokenizer's pre-tokenizer",
    "byte level with a prefix space in the file": "no name for this tokenizer's pre-tokenizer",
    "vocab.json and merges.txt, GPTNeoXTokenizer": "don't say how GPTNeoXTokenizer cuts text",
    "vocab.json and merges.txt, a prefix": "no name for this tokenizer's pre-tokenizer",
    "t5": "holds a Unigram",
    "unigram as it is": "holds a Unigram",
    "spiece.model, T5Tokenizer": "no BPE",
    "spiece.model of t5": "no BPE",
    **{
        name: "Chinese characters"
        for name in CASES
        if name.startswith("bert") and name.endswith("chinese=False")
    },
}
WORDS = ("<tool>", "<one>", "<left>", "<right>", "hello")  # added tokens of the cases that are text


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", LAID_OUT)
def test_a_folder_becomes_gguf_with_its_ids_or_is_refused(name, tmp_path):
    case = CASES[name]
    folder = write_folder(tmp_path, case)
    tokenizer = load_tokenizer(folder)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            tokenizer_metadata(files_of(folder), tokenizer.vocab_size)
        return
    again = from_metadata(tokenizer_metadata(files_of(folder), tokenizer.vocab_size), "again.gguf")
    for text in TEXTS:
        if (
            any(word in text for word in WORDS)
            and "added" in name
            or text.startswith(" ")
            or "\u2581" in text
        ):
            continue  # what is beside added tokens and before a text each runtime has its own way
        if "Llama" in name or "metaspace" in name and "<unk>" in text:
            text = text.replace("<unk>", "")
        assert again.encode(text) == tokenizer.encode(text), text
    unknown = {"<unk>", "[UNK]"}
    assert {k: i for k, i in again.special_tokens.items() if k not in unknown} == {
        k: i for k, i in tokenizer.special_tokens.items() if k not in unknown
    }


@pytest.mark.parametrize("name", [name for name in LAID_OUT if name not in REFUSED])
def test_special_tokens_in_gguf_are_those_that_llama_cpp_finds(name, tmp_path):
    folder, wanted = write_folder(tmp_path, CASES[name]), CASES[name]["wanted"]["gguf"]
    metadata = tokenizer_metadata(files_of(folder), load_tokenizer(folder).vocab_size)
    keys = {"unk": "unknown", "pad": "padding", "sep": "seperator"}
    for role, i in wanted["ids"].items():
        assert metadata[f"tokenizer.ggml.{keys.get(role, role)}_token_id"] == i, role
    for role, on in wanted["add"].items():
        if role in ("bos", "eos"):
            assert metadata[f"tokenizer.ggml.add_{role}_token"] is on, role


def test_a_llama_2_folder_with_both_files_becomes_gguf(tmp_path):
    """tokenizer.json beside tokenizer.model: the model has the scores."""
    case = CASES["tokenizer.model with added tokens, {}"]
    (tmp_path / "both").mkdir()
    folder = write_folder(tmp_path / "both", case)
    alone = tokenizer_metadata(files_of(folder), 400)
    (folder / "tokenizer.json").write_bytes((write_json(tmp_path / "json") / "tokenizer.json").read_bytes())
    both = tokenizer_metadata(files_of(folder), 400)
    assert both.keys() == alone.keys()
    assert all(np.array_equal(both[key], alone[key]) for key in both)


def write_json(folder):
    folder.mkdir()
    return write_folder(folder, CASES["LlamaTokenizer legacy=True prefix=True"])


def test_merges_that_are_no_sentencepiece_models_are_refused(tmp_path):
    folder = write_json(tmp_path / "json")
    saved = json.loads((folder / "tokenizer.json").read_text())
    del saved["model"]["merges"][-1]
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="leave out 1 ways to make pieces"):
        tokenizer_metadata(files_of(folder), 400)


@pytest.mark.parametrize("name", LLAMA_CPP["answers"])
def test_llama_cpp_itself_gives_these_ids(name, tmp_path):
    """Of files that are written here, read by llama.cpp and by us."""
    if name == "made":
        metadata, texts = sentence_pieces(), LLAMA_CPP["texts"]
    else:
        folder = write_folder(tmp_path, CASES[name])
        metadata, texts = tokenizer_metadata(files_of(folder), CASES[name]["wanted"]["size"]), TEXTS
    tokenizer, answers = from_metadata(metadata, "written.gguf"), LLAMA_CPP["answers"][name]
    for text, plain, whole in zip(texts, answers["plain"], answers["whole"], strict=True):
        if "\u2581" in text or "Qwen2" in name and "\u0301" in text:
            continue  # the mark for a space stays what it is here, and published Qwen2 composes characters
        ids = tokenizer.encode(text)
        assert ids == plain, text
        if tokenizer.around is not None:
            assert [*tokenizer.around[0], *ids, *tokenizer.around[1]] == whole


def test_user_defined_tokens_of_spaces_and_words_stand_for_them():
    tokenizer = from_metadata(sentence_pieces(), "made.gguf")
    for text in LLAMA_CPP["texts"]:
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.bytes_of, ids)).replace(b" ", b"") == text.replace(" ", "").encode()
    spell = {name: i for i, name in enumerate(sentence_pieces()["tokenizer.ggml.tokens"])}
    assert tokenizer.encode("ahellob")[1] == spell["hello"] and tokenizer.encode("  a")[0] == spell["  "]
    assert tokenizer.bytes_of(spell["hello"]) == b"hello" and tokenizer.bytes_of(spell["  "]) == b"  "


@pytest.mark.parametrize(
    "changes, around, bos",
    [
        ({}, ((1,), ()), 1),
        ({"tokenizer.ggml.add_bos_token": False}, ((), ()), None),
        ({"tokenizer.ggml.add_eos_token": True}, ((1,), (2,)), 1),
    ],
)
def test_what_a_gguf_file_puts_around_a_text_is_known(changes, around, bos):
    tokenizer = from_metadata(sentence_pieces(**changes), "made.gguf")
    assert (tokenizer.around, tokenizer.bos_id) == (around, bos)
    assert tokenizer.roles["bos_token"] == "<s>"  # chat templates have it all the same

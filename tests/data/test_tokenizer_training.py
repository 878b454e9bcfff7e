"""Training: what another trainer learns from the same text, the same file every time, and memory that is bounded."""

import inspect
import json
import os
import random
import re
import subprocess
import sys
import textwrap
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import SpecialTokens, load_tokenizer, train_tokenizer
from data.tokenizer.byte_pairs import learn_merges
from data.tokenizer.pretokenizers import PATTERNS, pattern
from data.tokenizer.word_counts import SPACE_WITHIN_TEXT, count_words

RUNS = "aaaaaaa aaaa aaa ==== =======\nab abab ababab   \n\n x\t y"  # pairs that overlap themselves
ALL_KINDS = ("bpe", "sentencepiece_bpe", "sentencepiece_unigram", "wordpiece", "bytes")


def merged_by_recounting(words: dict[bytes, int], size: int) -> list[tuple[int, int]]:
    """Byte-pair encoding as the paper has it: count every pair again after every merge."""
    spellings = [bytes([i]) for i in range(256)]
    cut, merges = {word: list(word) for word in words}, []
    while len(spellings) < size:
        pairs = Counter()
        for word, ids in cut.items():
            for pair in zip(ids, ids[1:]):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        whole = spellings[best[0]] + spellings[best[1]]
        if whole not in spellings:
            spellings.append(whole)
        for ids in cut.values():
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i : i + 2] = [spellings.index(whole)]
                i += 1
        merges.append(best)
    return merges


@settings(max_examples=60, deadline=None)
@given(
    words=st.dictionaries(
        st.text("abc", min_size=1, max_size=14).map(str.encode), st.integers(1, 9), min_size=1, max_size=12
    )
)
def test_merges_equal_those_of_counting_every_pair_again(words):
    symbols = np.frombuffer(b"".join(words), np.uint8)
    lengths, counts = np.array([len(w) for w in words]), np.array(list(words.values()))
    spellings = [bytes([i]) for i in range(256)]
    merges = learn_merges(symbols, lengths, counts, spellings, lambda a, b: a + b, 280)
    assert merges == merged_by_recounting(words, 280)


def test_counts_beyond_32_bits_do_not_overflow():
    spellings = [bytes([i]) for i in range(256)]
    symbols, lengths = np.frombuffer(b"abcdcd", np.uint8), np.array([2, 4])
    merges = learn_merges(symbols, lengths, np.array([5 << 40, 1 << 40]), spellings, lambda a, b: a + b, 257)
    assert merges == [(ord("a"), ord("b"))]


@pytest.mark.parametrize("name", PATTERNS)
def test_vocabulary_and_merges_equal_those_of_the_tokenizers_trainer(name, texts):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [*texts, RUNS]
    ours = train_tokenizer("bpe", texts, 1200, pattern=name)
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pattern(name).build()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        min_frequency=2,
        special_tokens=list(ours.special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    theirs.train_from_iterator(texts, trainer)
    model = json.loads(theirs.to_str())["model"]
    mine = json.loads(ours.backend.to_str())["model"]
    assert (mine["vocab"], mine["merges"]) == (model["vocab"], model["merges"])


SPACED = st.lists(
    st.sampled_from(
        [" ", " ", "  ", "\n", "\t", "\r\n", "\u3000", "\x1c", "\x85", "a", "It's", "é", "中", "7", "42"]
    )
    | st.characters(exclude_categories=["Cs"]),
    max_size=40,
).map("".join)


@settings(max_examples=100, deadline=None)
@given(text=SPACED, name=st.sampled_from(sorted(PATTERNS)))
def test_words_between_spaces_are_counted_as_in_the_whole_text(text, name):
    import regex

    words = pattern(name).patterns[0]
    assert count_words([text, text], words).words == Counter(regex.findall(words, text) * 2)


@settings(max_examples=100, deadline=None)
@given(text=SPACED)
def test_words_of_sentencepiece_are_counted_as_in_the_whole_text(text):
    words = r" *[^ \n\t]+| +"
    assert count_words([text], words, SPACE_WITHIN_TEXT).words == Counter(re.findall(words, text))


def test_a_long_text_is_counted_in_pieces_and_by_many_processes_as_in_one(texts, monkeypatch):
    words = pattern("ours").patterns[0]
    whole = count_words(texts, words)
    monkeypatch.setattr("data.tokenizer.word_counts._BATCH", 20_000)
    orders = [list(count_words(texts * 2, words, workers=n).words.items()) for n in (1, 2, 3)]
    assert orders[0] == orders[1] == orders[2]
    for name in ("_PIECE", "_TOGETHER", "_BATCH"):
        monkeypatch.setattr(f"data.tokenizer.word_counts.{name}", 50)
    assert count_words(texts, words, workers=1).words == whole.words


def test_a_worker_that_dies_is_an_error_and_leaves_no_process(texts, monkeypatch):
    import psutil

    monkeypatch.setattr("data.tokenizer.word_counts._BATCH", 20_000)
    with pytest.raises(RuntimeError, match="ended"):
        count_words(texts, "(", workers=2)
    assert not [p for p in psutil.Process().children() if "word_counts" in " ".join(p.cmdline())]


def test_memory_is_bounded_by_the_number_of_different_words_and_frequent_ones_stay(monkeypatch):
    chance = random.Random(0)
    texts = [
        " ".join(["", "often"] + [f"w{chance.randrange(10**9)}x" for _ in range(50)]) for _ in range(200)
    ]
    monkeypatch.setattr("data.tokenizer.word_counts._BATCH", 5000)
    counts = count_words(texts, r"\S+", max_words=1000, workers=1)
    assert len(counts.words) <= 1000 and counts.rare > 8000
    assert counts.words["often"] == 200


def test_texts_that_no_utf8_can_carry_are_left_out_and_counted(texts, caplog):
    tokenizer = train_tokenizer("bpe", [*texts, "\ud800"], 600)
    assert "1 texts left out" in caplog.text
    assert tokenizer.encode("parser") == train_tokenizer("bpe", texts, 600).encode("parser")


def test_sentencepiece_learns_the_same_from_counted_words_as_from_lines(texts):
    import io

    import sentencepiece

    ours = train_tokenizer("sentencepiece_bpe", texts, 600)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line.strip()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        control_symbols=list(ours.special_tokens),
        user_defined_symbols=["\n", "\t"],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        max_sentence_length=1 << 20,
        minloglevel=2,
        unk_id=0,
        **dict.fromkeys(("bos_id", "eos_id", "pad_id"), -1),
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert [theirs.id_to_piece(i) for i in range(600)] == [ours.token_of(i) for i in range(600)]


TRAIN = """
import inspect, argparse, sys
from data import train_tokenizer
for kind in ("bpe", "sentencepiece_unigram", "wordpiece"):
    train_tokenizer(kind, [inspect.getsource(argparse)], 700).save(f"{sys.argv[1]}/{kind}")
"""


def test_the_same_texts_give_the_same_files_in_any_process(tmp_path, texts):
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path)], check=True, env=environment)
    for kind in ("bpe", "sentencepiece_unigram", "wordpiece"):
        train_tokenizer(kind, [texts[0]], 700).save(tmp_path / "here")
        for file in (tmp_path / kind).iterdir():
            assert file.read_bytes() == (tmp_path / "here" / file.name).read_bytes(), file


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_special_and_reserved_tokens_are_there_and_text_cannot_forge_them(kind, texts, tmp_path):
    tokenizer = train_tokenizer(kind, texts, 700, SpecialTokens(reserved=3))
    assert list(tokenizer.special_tokens)[-3:] == [f"<|reserved_{i}|>" for i in range(3)]
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.special_tokens == tokenizer.special_tokens and loaded.vocab_size == tokenizer.vocab_size
    text = "".join(tokenizer.special_tokens) + " and [UNK] and [CLS]"
    for one in (tokenizer, loaded):
        assert not set(one.encode(text)) & set(one.special_tokens.values())
    assert loaded.encode(texts[0]) == tokenizer.encode(texts[0])
    assert (loaded.bos_id, loaded.eos_ids, loaded.pad_id) == (
        tokenizer.bos_id,
        tokenizer.eos_ids,
        tokenizer.pad_id,
    )


LOSSLESS = [
    *(("bpe", name, digits) for name in PATTERNS for digits in (None, 1, 2, 3)),
    *(
        (kind, "ours", digits)
        for kind in ("sentencepiece_bpe", "sentencepiece_unigram")
        for digits in (None, 1)
    ),
    ("bytes", "ours", None),
]
PLANES = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)


@pytest.mark.parametrize("kind, name, digits", [row for row in LOSSLESS if row[2] is None])
def test_characters_of_every_plane_and_random_bytes_come_back(kind, name, digits, texts):
    tokenizer = train_tokenizer(kind, texts, 600, pattern=name, digits=digits)
    for text in (PLANES[::101], np.random.default_rng(0).bytes(4000).decode("latin-1")):
        parts = [text[i : i + 1000] for i in range(0, len(text), 1000)]
        for part, ids in zip(parts, tokenizer.encode_batch(parts), strict=True):
            assert tokenizer.decode(ids) == part
            assert b"".join(map(tokenizer.bytes_of, ids)) == part.encode()


@pytest.mark.slow
@pytest.mark.parametrize("kind, name, digits", LOSSLESS)
def test_every_code_point_comes_back(kind, name, digits, texts):
    tokenizer = train_tokenizer(kind, texts, 600, pattern=name, digits=digits)
    parts = [PLANES[i : i + 1000] for i in range(0, len(PLANES), 1000)]
    for part, ids in zip(parts, tokenizer.encode_batch(parts), strict=True):
        assert b"".join(map(tokenizer.bytes_of, ids)) == part.encode()


def test_random_bytes_come_back_from_the_ids_of_their_bytes(texts):
    for kind in ("bpe", "bytes"):
        tokenizer = train_tokenizer(kind, texts, 600)
        of_byte = {tokenizer.bytes_of(i): i for i in range(tokenizer.vocab_size)}
        raw = np.random.default_rng(1).bytes(3000)
        ids = [of_byte[bytes([b])] for b in raw]
        assert tokenizer.decode(ids) == raw.decode("utf-8", "replace")


def test_raw_bytes_follow_four_special_tokens_as_in_the_byte_latent_transformer(texts):
    tokenizer = train_tokenizer("bytes", [], 0)
    assert tokenizer.vocab_size == 260 and tokenizer.encode("aé") == [4 + b for b in "aé".encode()]


def test_wordpiece_takes_the_longest_piece_first(texts):
    tokenizer = train_tokenizer("wordpiece", texts, 700)
    vocabulary = {tokenizer.token_of(i) for i in range(700)}

    def longest_first(word: str) -> list[str]:
        pieces, start = [], 0
        while start < len(word):
            ends = range(len(word), start, -1)
            found = ((("##" if start else "") + word[start:end], end) for end in ends)
            piece, start = next((p for p in found if p[0] in vocabulary), ("[UNK]", len(word) + 1))
            pieces.append(piece)
        return ["[UNK]"] if "[UNK]" in pieces else pieces

    for word in re.findall(r"[a-z]+", texts[1].lower()) + ["中x", "\u0416"]:
        ids = tokenizer.encode(word)
        expected = [p for part in re.findall(r"[a-z]+|[^a-z]", word.lower()) for p in longest_first(part)]
        assert [tokenizer.token_of(i) for i in ids] == expected
    assert tokenizer.decode(tokenizer.encode("Wrap THE text")) == "wrap the text"


def test_mistakes_are_met_with_what_is_wanted(texts):
    for options, reason in [
        ({"pattern": "gpt5"}, "known are ours, gpt2"),
        ({"digits": 4}, "1, 2 or 3"),
        ({"special": SpecialTokens(("<|endoftext|>",) * 2)}, "twice"),
    ]:
        with pytest.raises(ValueError, match=reason):
            train_tokenizer("bpe", texts, 600, **options)
    with pytest.raises(ValueError, match="single digits"):
        train_tokenizer("sentencepiece_bpe", texts, 600, digits=2)
    with pytest.raises(ValueError, match="different characters"):
        train_tokenizer("wordpiece", texts, 20)


def test_max_bytes_stops_before_the_text_that_goes_beyond():
    counts = count_words(iter(["aaaa", "bbbb", "cccc"]), r"\S+", max_bytes=9)
    assert set(counts.words) == {"aaaa", "bbbb"} and (counts.bytes, counts.texts) == (8, 2)


def test_the_command_trains_from_files_and_folders_and_shows_and_converts(tmp_path, capsys):
    from data.tokenizer.__main__ import main

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text(inspect.getsource(inspect))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": inspect.getsource(textwrap)}) + "\nnot json\n")
    out = tmp_path / "tokenizer"
    where = [str(tmp_path / "folder"), str(tmp_path / "b.jsonl")]
    assert (
        main(["train", *where, f"--out={out}", "--vocab_size=700", "--pattern=cl100k", "--reserved=2"]) == 0
    )
    said = capsys.readouterr().out
    assert "700 ids (bpe)" in said and "left out: 1 with 'bad line: not valid JSON'" in said
    assert load_tokenizer(out).vocab_size == 700
    assert main(["show", str(out), "--text=x = 1234"]) == 0
    shown = capsys.readouterr().out
    assert "<|reserved_1|>" in shown and "bytes a token" in shown
    assert main(["convert", str(out), str(tmp_path / "t.gguf"), "--format=gguf"]) == 0
    assert load_tokenizer(tmp_path / "t.gguf").encode("x = 1234") == load_tokenizer(out).encode("x = 1234")
    assert main(["train", str(tmp_path / "nothing"), f"--out={out}"]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_texts_are_read_in_their_encoding_and_what_is_none_is_counted(tmp_path):
    from data.tokenizer.texts import read_texts

    line, folder, unread = (
        "Los ni\u00f1os de la escuela cantaron una canci\u00f3n. \u00bfQui\u00e9n?\n",
        tmp_path / "f",
        Counter(),
    )
    folder.mkdir()
    ascii_first = "plain words only\n" * 70_000  # more than a megabyte
    (folder / "large.txt").write_bytes((ascii_first + line * 20_000).encode("latin-1"))
    (folder / "small.txt").write_bytes((line * 20).encode("utf-16"))
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / "binary").write_bytes(bytes(range(256)) * 9000)
    (folder / "rows.jsonl").write_text('{"text": "a row"}\n{broken\n{"other": 1}\n')
    pq.write_table(pa.table({"words": ["a"]}), folder / "without.parquet")
    texts = list(read_texts([folder], unread=unread))
    assert "".join(texts) == ascii_first + line * 20_000 + "a row" + line * 20
    reasons = {reason[:24]: count for reason, count in unread.items()}
    assert reasons == {
        "type: .png is not read": 1, "unreadable: no text": 1, "bad line: not valid JSON": 1, "bad line: KeyError": 1,
        f"unreadable: {folder}"[:24]: 1,
    }  # fmt: skip

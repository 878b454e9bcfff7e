"""Tokenizers beside each other, and the patches of a byte-latent model."""

import json
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import load_tokenizer, tokenize_dataset, train_tokenizer, write_dataset
from data.tokenizer.__main__ import main
from data.tokenizer.compare import compare, number_shapes
from data.tokenizer.patches import (
    BLT_THRESHOLD,
    bpe_rule,
    byte_documents,
    entropy_rule,
    patch_lengths,
    patch_statistics,
    space_rule,
    static_rule,
)

WORLDS = {"english": ["hello world"], "german": ["hallo schöne welt"]}


def test_bytes_have_one_byte_a_token_and_parity_is_the_ratio_of_bytes(texts):
    result = compare({"bytes": train_tokenizer("bytes", [], 0)}, WORLDS, "english")["bytes"]
    german = result.groups["german"]
    assert german.bytes_per_token == 1 and german.tokens == german.bytes == 18
    assert german.parity == 18 / 11 and german.tokens_per_word == 6
    assert result.groups["english"].parity == 1 and german.lossless == 1


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_numbers_are_cut_as_the_digit_groups_say(digits, texts):
    numbers = [" ".join(str(i) for i in range(10000))] * 6
    tokenizer = train_tokenizer("bpe", texts + numbers, 1700, digits=digits)
    expected = {1: "1+1+1+1", 2: "2+2", 3: "3+1"}[digits]
    assert list(number_shapes(tokenizer, 4)) == [expected]


def test_words_that_wordpiece_lacks_are_counted_as_unknown(texts):
    tokenizer = train_tokenizer("wordpiece", texts, 700)
    group = compare({"w": tokenizer}, {"thai": ["\u0e01\u0e02 the \u0e03"]})["w"].groups["thai"]
    assert (group.tokens, group.unknown, group.lossless) == (3, 2, 0)


def test_the_command_compares_languages_of_a_zip_and_writes_numbers_and_a_picture(
    tokenizers, tmp_path, capsys
):
    with zipfile.ZipFile(tmp_path / "languages.zip", "w") as archive:
        archive.writestr("all/eng.txt", "hello world")
        archive.writestr("all/deu.txt", "hallo schöne welt")
        archive.writestr("all/xyz.txt", "left out")
    for kind in ("bpe", "sentencepiece_unigram"):
        tokenizers[kind].save(tmp_path / kind)
    paths = [f"ours={tmp_path / 'bpe'}", str(tmp_path / "sentencepiece_unigram")]
    options = ["--only", "eng", "deu", "--english=eng", f"--out={tmp_path / 'out'}"]
    assert main(["compare", *paths, "--texts", str(tmp_path / "languages.zip"), *options]) == 0
    written = json.loads((tmp_path / "out" / "compare.json").read_text())["tokenizers"]
    assert list(written) == ["ours", "sentencepiece_unigram"] and set(written["ours"]["groups"]) == {
        "eng",
        "deu",
    }
    tokens = len(tokenizers["bpe"].encode("hallo schöne welt"))
    assert written["ours"]["groups"]["deu"]["tokens"] == tokens
    assert (tmp_path / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "deu" in capsys.readouterr().out
    assert main(["compare", *paths, "--texts", str(tmp_path / "languages.zip"), "--only", "fra"]) == 2
    assert "no texts named fra" in capsys.readouterr().err


DOCUMENTS = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \nab1é"), min_size=1, max_size=60
)


@settings(max_examples=20, deadline=None)
@given(text=DOCUMENTS, length=st.integers(1, 9))
def test_patches_end_where_the_models_patchers_end_them(text, length):
    import jax.numpy as jnp

    from model.blocks.patches import ENTROPY_RULES, Clues, SpacePatcher, StaticPatcher

    document = np.frombuffer((text * 64).encode()[:64], np.uint8)  # one length: compiled once
    token = document.astype(np.int32) + 4
    before = np.concatenate([[0], token[:-1]])
    clues = Clues(jnp.asarray(token)[None], jnp.asarray(before)[None], jnp.arange(len(token))[None])
    nats = np.random.default_rng(length).uniform(0, 3, len(token)).astype(np.float32)
    entropy_before = np.concatenate([[0], nats[:-1]]).astype(np.float32)
    theirs = [StaticPatcher(length).ends(clues), SpacePatcher(4).ends(clues)]
    theirs += [rule(nats, entropy_before, BLT_THRESHOLD)[None] for rule in ENTROPY_RULES.values()]
    ours = [static_rule(length), space_rule()]
    ours += [entropy_rule(lambda d: nats, rule=name) for name in ENTROPY_RULES]
    for mine, wanted in zip(ours, theirs, strict=True):
        wanted = np.asarray(wanted[0]).copy()
        wanted[0] = True  # the first byte of a document is a patch of its own
        assert mine(document).tolist() == wanted.tolist()


def test_patches_are_counted_document_by_document():
    found = patch_statistics(["abcdefgh", "abc"], static_rule(3))
    assert found.histogram == {1: 3, 2: 1, 3: 2}  # 1+3+3+1 and 1+2
    assert (found.documents, found.bytes, found.patches) == (2, 11, 6)
    assert found.bytes_per_patch == 11 / 6 and found.one_byte_share == 0.5
    assert patch_statistics(["abcdefgh"], static_rule(3), longest=2).histogram == {1: 4, 2: 2}
    assert patch_statistics([""], space_rule()).patches == 0


@settings(max_examples=40, deadline=None)
@given(text=DOCUMENTS)
def test_the_patches_of_bpe_are_its_tokens(bpe, text):
    lengths = patch_lengths(np.frombuffer(text.encode(), np.uint8), bpe_rule(bpe))
    assert lengths.tolist() == [len(bpe.bytes_of(i)) for i in bpe.encode(text)]


def test_a_byte_dataset_gives_its_documents_back(tmp_path):
    texts = ["héllo\nworld", "", "中文 <|endoftext|>"]
    write_dataset(tmp_path / "text", [{"id": str(i), "text": t} for i, t in enumerate(texts)], "text")
    tokenizer = train_tokenizer("bytes", [], 0)
    dataset = tokenize_dataset(tmp_path / "text", tokenizer, tmp_path / "tokens")
    assert [d.tobytes().decode() for d in byte_documents(dataset, tokenizer.offset)] == texts
    assert dataset.manifest["tokens"] == dataset.manifest["bytes"] + 2 * len(texts)
    found = patch_statistics(byte_documents(dataset, tokenizer.offset), space_rule())
    assert found.bytes == dataset.manifest["bytes"]


def test_mistakes_of_patching_are_met_with_what_is_wanted(tokenizers, texts):
    with pytest.raises(ValueError, match="at least one byte"):
        static_rule(0)
    with pytest.raises(ValueError, match="above, rise"):
        entropy_rule(len, rule="falls")
    with pytest.raises(ValueError, match="3 bytes, but entropies"):
        patch_statistics(["abc"], entropy_rule(lambda d: d[1:]))
    with pytest.raises(ValueError, match="changes the text"):
        patch_statistics(["A  b"], bpe_rule(train_tokenizer("wordpiece", texts, 700)))


def test_every_byte_tokenizer_is_loaded_with_its_offset(tmp_path):
    from data.tokenizer.raw_bytes import ByteTokenizer

    ByteTokenizer(["<a>", "<b>"], offset=7, bos="<a>", eos=["<b>"]).save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("\x00é") == [7, 7 + 0xC3, 7 + 0xA9] and loaded.vocab_size == 263
    assert (loaded.bos_id, loaded.eos_ids) == (0, (1,)) and loaded.decode([0, 7 + 65, 1]) == "A"

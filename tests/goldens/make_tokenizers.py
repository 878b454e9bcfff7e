"""Writes tokenizers/cases.json: ids, texts and chats that transformers 5 gives for small tokenizer folders, and what
llama.cpp's converter says of their special tokens.

    uv venv .venvs/tokenizers
    uv pip install --python .venvs/tokenizers/bin/python transformers==5.23.0 gguf==0.19.0 jinja2 \\
        sentencepiece protobuf
    .venvs/tokenizers/bin/python tests/goldens/make_tokenizers.py

A case is a vocabulary (trained here on a few lines) and the files around it. Each file is written in full where the
vocabulary is small, or as a change to the vocabulary's tokenizer.json.
"""

import base64
import copy
import io
import json
import tempfile
from pathlib import Path

import sentencepiece
import tokenizers
from gguf import SpecialVocab
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

OUT = Path(__file__).parent / "tokenizers" / "cases.json"
CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the hello world says hello to the world.",
    "Hello World! This is a test of the tokenizer; it has it's and don't, naïve café, 12345 and 3.14.",
    "中文 字符 and 日本語 and emoji 😀 here. <tool> <think> user: hi assistant: hello",
    "a  b   c\n\nd\te  user\nhello\nassistant\nhi there [INST] and [/INST] the end",
] * 4
TEXTS = [
    "",
    " ",
    "hello",
    " hello",
    "hello ",
    "  two  spaces  inside  ",
    "hello world the quick brown fox",
    "Naïve CAFÉ, e\u0301 \u00e9 Ünïcode",
    "中文 and 日本語 mixed中文",
    "emoji 😀👨\u200d👩\u200d👧 end",
    "line\nbreaks\n\n\ttabs\r\n",
    "<s>hello</s> <unk> x</s>",
    "<|endoftext|><|im_start|>user\nhi<|im_end|>",
    "[CLS] hello [SEP] [MASK][PAD]",
    "<think>reason</think> answer <tool> x <tool>y",
    "a<tool>b <one> c<one>d  <left>  <right>  e",
    "<extra_id_0> x <extra_id_99>",
    "it's don't 12345 3.14",
    "\u2581meta \u2581\u2581 space",
    "x <0x0A> y",
]
MESSAGES = [{"role": "user", "content": "hello the"}, {"role": "assistant", "content": " world "}]


KEYS = {
    "model_max_length": 3, "max_len": 3, "padding_side": "left", "truncation_side": "left", "truncation": True,
    "clean_up_tokenization_spaces": True, "split_special_tokens": True, "model_input_names": ["input_ids"],
    "processor_class": "X", "errors": "strict", "trim_offsets": False, "do_basic_tokenize": False,
    "never_split": ["hello"], "keep_accents": True, "spaces_between_special_tokens": True, "sp_model_kwargs": {"x": 1},
    "use_default_system_prompt": True, "from_slow": True, "pad_to_multiple_of": 8, "pad_token_type_id": 1,
    "max_length": 2, "stride": 1, "truncation_strategy": "longest_first", "name_or_path": "x", "is_local": True,
    "special_tokens_map_file": "x.json", "tokenizer_file": "x.json", "vocab_file": "x", "backend": "x", "legacy": True,
    "remove_space": False, "fix_mistral_regex": True, "chat_control_tokens": ["hello"], "response_schema": {},
    "unk_id": 3, "verbose": True, "return_tensors": "np", "device_map": "auto",
    "tokenizer_type": "x", "bos_token_id": 1, "task": "x", "language": None, "default_prompt": "x", "use_fast": False,
}  # fmt: skip


def chatml(begin: str, end: str) -> str:
    return (
        "{% for m in messages %}{{ '"
        + begin
        + "' + m.role + '\n' + m.content + '"
        + end
        + " ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + begin + "assistant\n' }}{% endif %}"
    )


def byte_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(CORPUS, trainer)
    return made


def llama(scheme: str = "first") -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=390, special_tokens=special, limit_alphabet=60)
    made.train_from_iterator(CORPUS, trainer)
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < 3]
    made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def word_piece() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        CORPUS + [text.lower() for text in CORPUS] + ["cafe naive ünicode Unicode 中文"],
        trainers.WordPieceTrainer(vocab_size=260, special_tokens=special),
    )
    return made


def unigram() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return made


def sentence_pieces(kind: str, **options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type=kind,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return model.getvalue()


SP_BPE = {"vocab_size": 360, "byte_fallback": True, "normalization_rule_name": "identity"}
SP_BPE |= {"remove_extra_whitespaces": False, "character_coverage": 0.98}
SP_T5 = {"vocab_size": 120, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "character_coverage": 0.98}
SP_T5 |= {"normalization_rule_name": "identity", "hard_vocab_limit": False}


def spec_of(made: tokenizers.Tokenizer) -> dict:
    return json.loads(made.to_str())


def changed(spec: dict, **changes) -> dict:
    return copy.deepcopy(spec) | changes


def token(content: str, **flags) -> dict:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
    return {"content": content} | plain | flags


def vocabularies() -> dict:
    return {
        "byte_level": spec_of(byte_level()),
        "llama": spec_of(llama()),
        "word_piece": spec_of(word_piece()),
        "unigram": spec_of(unigram()),
        "sp_bpe": base64.b64encode(sentence_pieces("bpe", **SP_BPE)).decode(),
        "sp_t5": base64.b64encode(sentence_pieces("unigram", **SP_T5)).decode(),
    }


def cases(base: dict) -> list[dict]:
    """Each: the vocabulary, changes to its tokenizer.json (or how it is laid out), and the other files."""
    found: list[dict] = []

    def case(
        name: str, vocabulary: str, config: dict | None = None, layout: str = "json", changes=None, **files
    ):
        found.append(
            {
                "name": name,
                "vocabulary": vocabulary,
                "layout": layout,
                "changes": changes or {},
                "files": {"tokenizer_config.json": config or {}} | files,
            }
        )

    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    sp = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | {
        "chat_template": chatml("<s>", "</s>")
    }
    cl = {"eos_token": "<|im_end|>", "chat_template": chatml("<|im_start|>", "<|im_end|>")}
    # Space marks.
    for scheme in ("first", "always", "never"):
        steps = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
        case(f"metaspace {scheme}", "llama", fast | sp, changes={"pre_tokenizer": steps})
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    older = {"normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}, "pre_tokenizer": None}
    case("prepend normalizer", "llama", fast | sp, changes=older)
    for legacy in (None, True, False):
        for prefix in (None, True, False):
            config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_prefix_space": prefix} | sp
            case(f"LlamaTokenizer legacy={legacy} prefix={prefix}", "llama", config, changes=older)
    case(
        "LlamaTokenizerFast, legacy", "llama", {"tokenizer_class": "LlamaTokenizerFast", "legacy": True} | sp
    )
    llama_class = {"tokenizer_class": "LlamaTokenizer", "legacy": True} | sp
    case(
        "LlamaTokenizer of a mistral",
        "llama",
        llama_class,
        changes=older,
        **{"config.json": {"model_type": "mistral"}},
    )
    for prefix in (None, True, False):
        config = {"tokenizer_class": "GPT2Tokenizer"} | cl
        config |= {} if prefix is None else {"add_prefix_space": prefix}
        case(f"GPT2Tokenizer prefix={prefix}", "byte_level", config)
        case(f"PreTrainedTokenizerFast prefix={prefix}", "byte_level", config | fast)
    spaced = {"pre_tokenizer": spec_of(byte_level())["pre_tokenizer"] | {"add_prefix_space": True}}
    case("byte level with a prefix space in the file", "byte_level", fast | cl, changes=spaced)
    # Added tokens that stand beside tokenizer.json.
    n = len(base["byte_level"]["model"]["vocab"])
    flags = [
        token("<tool>"), token("<one>", single_word=True), token("<left>", lstrip=True), token("<right>", rstrip=True),
        token("<think>", special=True), token("</think>", special=True, rstrip=True), token("hello", normalized=True),
    ]  # fmt: skip
    decoder = {str(n + i): t for i, t in enumerate(flags)}
    case("added_tokens_decoder", "byte_level", fast | cl | {"added_tokens_decoder": decoder})
    m = len(base["llama"]["model"]["vocab"])
    spoken = {str(m + i): t for i, t in enumerate(flags)}
    for scheme in ("first", "always"):
        steps = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
        case(
            f"added_tokens_decoder, metaspace {scheme}",
            "llama",
            fast | sp | {"added_tokens_decoder": spoken},
            changes={"pre_tokenizer": steps},
        )
    rewritten = {
        "1": token("<|im_start|>", special=True, rstrip=True),
        "2": token("<|im_end|>", special=True, lstrip=True),
    }
    case(
        "added_tokens_decoder with other flags", "byte_level", fast | cl | {"added_tokens_decoder": rewritten}
    )
    case(
        "added_tokens.json",
        "byte_level",
        fast | cl,
        **{
            "added_tokens.json": {"<think>": n, "<tool>": n + 1},
            "special_tokens_map.json": {
                "additional_special_tokens": ["<think>"],
                "eos_token": token("<|im_end|>"),
            },
        },
    )
    case(
        "additional_special_tokens",
        "byte_level",
        fast | cl | {"additional_special_tokens": ["<think>", "</think>"]},
    )
    case(
        "extra_special_tokens, a list",
        "byte_level",
        fast | cl | {"extra_special_tokens": ["<think>", "<tool>"]},
    )
    named = {"extra_special_tokens": {"image_token": "<tool>", "audio_token": "<think>"}}
    shown = {
        "chat_template": "{{ image_token }}{{ messages[0].content }}{{ audio_token }}{{ eos_token }}{{ cls_token }}"
    }
    case("extra_special_tokens, a dict", "byte_level", fast | cl | named | shown)
    case("a token of the model's own", "byte_level", fast | cl | {"image_token": "<tool>"} | shown)
    roles = {
        "sep_token": "<sep>",
        "cls_token": "<cls>",
        "mask_token": "<mask>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    seen = {
        "chat_template": "{{ sep_token }}{{ cls_token }}{{ mask_token }}{{ pad_token }}{{ messages[0].content }}"
    }
    case("roles that no vocabulary has", "byte_level", fast | cl | roles | seen)
    # What stands around a text.
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]}
    template["single"] += [{"Sequence": {"id": "A", "type_id": 0}}]
    template |= {"pair": [*template["single"], {"Sequence": {"id": "B", "type_id": 1}}]}
    template |= {"special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    case("bos by the template processor", "llama", fast | sp, changes={"post_processor": template})
    bare = {"single": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
    bare |= {"pair": [*bare["single"], {"Sequence": {"id": "B", "type_id": 1}}]}
    case("nothing by the template processor", "llama", fast | sp, changes={"post_processor": template | bare})
    nested = {"type": "Sequence", "processors": [spec_of(byte_level())["post_processor"], template]}
    nested["processors"][1] = json.loads(
        json.dumps(template).replace("<s>", "<|endoftext|>").replace("[1]", "[0]")
    )
    case(
        "bos by a processor among others",
        "byte_level",
        fast | cl | {"bos_token": "<|endoftext|>"},
        changes={"post_processor": nested},
    )
    ending = json.loads(json.dumps(nested["processors"][1]))
    ending["single"], ending["pair"] = ending["single"][::-1], ending["pair"][::-1]
    case(
        "what ends a text is not what ends a turn",
        "byte_level",
        fast | cl,
        changes={"post_processor": ending},
    )
    # Vocabularies without tokenizer.json.
    for name in ("GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer"):
        config = {"tokenizer_class": name, "pad_token": "<|endoftext|>"} | cl
        case(f"vocab.json and merges.txt, {name}", "byte_level", config, "merges")
    case(
        "vocab.json and merges.txt of gpt2",
        "byte_level",
        None,
        "merges",
        **{"config.json": {"model_type": "gpt2"}},
    )
    case(
        "vocab.json and merges.txt, a prefix",
        "byte_level",
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        "merges",
    )
    for lower in (True, False):
        for accents in (None, True, False):
            for chinese in (True, False):
                config = {
                    "tokenizer_class": "BertTokenizer",
                    "do_lower_case": lower,
                    "strip_accents": accents,
                }
                config |= {"tokenize_chinese_chars": chinese}
                layout = "json" if chinese and accents is not None else "vocab"
                case(f"bert lower={lower} accents={accents} chinese={chinese}", "word_piece", config, layout)
    case("bert without settings", "word_piece", {"tokenizer_class": "BertTokenizer"}, "vocab")
    case(
        "t5",
        "unigram",
        {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": []}
        | {"eos_token": "</s>"},
    )
    case(
        "unigram as it is",
        "unigram",
        fast | {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    )
    case("spiece.model, T5Tokenizer", "sp_t5", {"tokenizer_class": "T5Tokenizer"}, "spiece.model")
    case("spiece.model of t5", "sp_t5", None, "spiece.model", **{"config.json": {"model_type": "t5"}})
    for legacy in (None, True, False):
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy} | sp
        case(f"tokenizer.model legacy={legacy}", "sp_bpe", config, "tokenizer.model")
    size = 360
    more = {str(size + i): t for i, t in enumerate(flags[:6])}
    for ends in ({}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}):
        config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": True} | sp | ends
        case(
            f"tokenizer.model with added tokens, {ends}",
            "sp_bpe",
            config | {"added_tokens_decoder": more},
            "tokenizer.model",
        )
    case(
        "tokenizer.model without a prefix",
        "sp_bpe",
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False} | sp,
        "tokenizer.model",
    )
    # Decoders.
    late = [
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    ]
    case(
        "a replacement after Fuse",
        "llama",
        fast | sp,
        changes={"decoder": {"type": "Sequence", "decoders": late}},
    )
    case(
        "metaspace decoder",
        "llama",
        fast | sp,
        changes={
            "decoder": {
                "type": "Metaspace",
                "replacement": "\u2581",
                "prepend_scheme": "always",
                "split": True,
            }
        },
    )
    for cleanup in (True, False):
        case(
            f"word pieces, cleanup={cleanup}",
            "word_piece",
            fast,
            changes={"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": cleanup}},
        )
    return found


def write_folder(folder: Path, base: dict, case: dict) -> None:
    """Also in tests/data/test_tokenizer_folders.py, which reads what this writes."""
    vocabulary, layout = base[case["vocabulary"]], case["layout"]
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


def answers(folder: Path) -> dict:
    theirs = AutoTokenizer.from_pretrained(str(folder))
    backend = theirs.backend_tokenizer
    ids, texts = [], []
    for text in TEXTS:
        ids.append(theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        texts.append(theirs.decode(ids[-1], skip_special_tokens=True))
    chat = None
    if theirs.chat_template:
        chat = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        chat = [chat, theirs(chat, add_special_tokens=False, split_special_tokens=False)["input_ids"]]
    converter = SpecialVocab(folder)
    special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
    return {
        "ids": ids,
        "texts": texts,
        "whole": theirs("hello", split_special_tokens=True)["input_ids"],
        "chat": chat,
        "special": special | {name: theirs.convert_tokens_to_ids(name) for name in theirs.all_special_tokens},
        "unknown": theirs.unk_token_id,
        "size": len(theirs),
        "gguf": {"ids": converter.special_token_ids, "add": converter.add_special_token},
    }


def keys(base: dict) -> list[dict]:
    """Every other key that published folders have, one at a time."""
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    roles = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    chat = {"eos_token": "<|im_end|>", "chat_template": chatml("<|im_start|>", "<|im_end|>")}
    kinds = {
        "byte_level": fast | chat,
        "word_piece": {"tokenizer_class": "BertTokenizer"},
        "unigram": fast | roles,
    }
    found = []
    for vocabulary, config in kinds.items():
        for key, value in [(None, None), *KEYS.items()]:
            given = config if key is None else config | {key: value}
            name = f"{vocabulary} by itself" if key is None else f"{vocabulary} {key}={value}"
            files = {"tokenizer_config.json": given}
            found.append(
                {"name": name, "vocabulary": vocabulary, "layout": "json", "changes": {}, "files": files}
            )
    return found


def main() -> None:
    # The trainers break ties in any order: vocabularies that were made once stay.
    base = json.loads(OUT.read_text())["vocabularies"] if OUT.exists() else vocabularies()
    written, alone, harmless = [], {}, []
    for case in [*cases(base), *keys(base)]:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), base, case)
            case |= {"wanted": answers(Path(folder))}
        if case["name"].endswith(" by itself"):
            alone[case["vocabulary"]] = case["wanted"]
        if (
            "=" in case["name"]
            and case["wanted"] == alone.get(case["vocabulary"])
            and case["layout"] == "json"
        ):
            harmless.append({key: case[key] for key in ("name", "vocabulary", "files")})
        else:
            written.append(case)
    OUT.parent.mkdir(exist_ok=True)
    content = {
        "texts": TEXTS,
        "messages": MESSAGES,
        "vocabularies": base,
        "cases": written,
        "harmless": harmless,
    }
    OUT.write_text(json.dumps(content, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(len(written), "cases,", len(harmless), "keys without effect,", OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()

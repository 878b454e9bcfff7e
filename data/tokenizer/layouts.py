"""The layouts of a Hugging Face folder that hold a vocabulary, and how each becomes a tokenizer.

tokenizer.json says all of itself; the older files hold a vocabulary alone, and the rest is what the class that
tokenizer_config.json names does. Both follow transformers 5, whose classes build some steps anew from the settings in
tokenizer_config.json, whatever tokenizer.json says.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from data.tokenizer.folder import Added, Description
from data.tokenizer.huggingface import HuggingFaceTokenizer
from data.tokenizer.interface import Tokenizer, read_json
from data.tokenizer.limits import check_limits, panics_as_errors
from data.tokenizer.pretokenizers import GGUF_PRETOKENIZERS, pattern
from data.tokenizer.sentencepiece import SentencePieceTokenizer, Word, parse_model
from data.tokenizer.spellings import byte_alphabet
from data.tokenizer.wordpiece import as_configured, read_vocabulary


def find_layout(folder: Path) -> tuple[Path, Callable[[Path, Description], Tokenizer]] | None:
    """The vocabulary's file and what reads it; None for a folder without one of `LAYOUTS`."""
    for names, build in LAYOUTS.items():
        if all((folder / name).is_file() for name in names):
            return folder / names[0], build
    return None


def missing(folder: Path) -> str:
    """What was looked for in a folder, and what lies there instead."""
    found = sorted(item.name + "/" * item.is_dir() for item in folder.iterdir()) if folder.is_dir() else []
    shown = ", ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")
    known = "; ".join(" with ".join(names) for names in LAYOUTS)
    return f"no tokenizer of a known layout. Known are {known}. In {folder} there is: {shown or 'nothing'}."


def _from_json(file: Path, about: Description) -> Tokenizer:
    check_limits(read_json(file) or {}, str(file))  # first: reading runs the normalizer on added tokens
    try:
        with panics_as_errors():
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: not a tokenizer that `tokenizers` can read: {error}") from error
    _as_its_class(backend, about)
    if about.tokenizer_class in _LIKE_BERT and isinstance(backend.model, models.WordPiece):
        return _from_backend(backend, about, _BERT_ROLES, ("cls_token", "sep_token"))
    return _from_backend(backend, about)


def _from_word_pieces(file: Path, about: Description) -> Tokenizer:
    if about.tokenizer_class not in (None, "PreTrainedTokenizer", *_LIKE_BERT):
        raise ValueError(
            f"{file}: the way of {about.tokenizer_class} to cut words is not known. Known classes: "
            f"{', '.join(_LIKE_BERT)}. Or save the tokenizer with transformers, which writes tokenizer.json."
        )
    backend = read_vocabulary(file, about.config)
    return _from_backend(backend, about, _BERT_ROLES, ("cls_token", "sep_token"))


def _from_merges(file: Path, about: Description) -> Tokenizer:
    """vocab.json and merges.txt: byte-level BPE, cut into words as the class does it."""
    names = about.tokenizer_class or _CLASS_OF_MODEL.get(about.model_type or "gpt2")
    if names not in _BYTE_LEVEL:
        raise ValueError(
            f"{file.parent}: vocab.json and merges.txt don't say how text is cut into words, and the way of "
            f"tokenizer_class={about.tokenizer_class!r}, model_type={about.model_type!r} is not known. Known classes: "
            f"{', '.join(_BYTE_LEVEL)}. Or save the tokenizer with transformers, which writes tokenizer.json."
        )
    vocabulary = read_json(file) or {}
    where = file.with_name("merges.txt")
    lines = where.read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version:")]
    if bad := next(
        (m for m in pairs if len(m) != 2 or any(p not in vocabulary for p in (*m, "".join(m)))), None
    ):
        raise ValueError(f"{where}: the merge {' '.join(bad)!r} is not made of tokens of vocab.json")
    if missing := [character for character in byte_alphabet() if character not in vocabulary]:
        raise ValueError(f"{file}: {len(missing)} of the 256 bytes are no tokens, so it is no byte-level BPE")
    style, roles = _BYTE_LEVEL[names]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [(left, right) for left, right in pairs]))
    if names in ("Qwen2Tokenizer",):
        backend.pre_tokenizer, backend.normalizer = style.build(), style.normalizer()
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=about.flag("add_prefix_space", False)
        )
        backend.normalizer = style.normalizer()
    backend.decoder = decoders.ByteLevel()
    return _from_backend(backend, about, roles)


def _from_backend(
    backend: tokenizers.Tokenizer,
    about: Description,
    defaults: dict[str, str] | None = None,
    around: tuple[str, str] | None = None,
) -> Tokenizer:
    """`defaults`: the class' own tokens of roles that no file names; `around`: the roles that stand around a text."""
    known = backend.get_vocab(with_added_tokens=True)
    implied = {role: name for role, name in (defaults or {}).items() if name in known}
    roles = implied | about.roles
    special = [*about.special, *(Added(name, special=True) for name in roles.values())]
    _add_tokens(backend, about.added, special, about.folder)
    ids = backend.get_vocab(with_added_tokens=True)
    stated = about.around(ids)
    if stated is None and around is not None and all(role in roles for role in around):
        stated = ((ids[roles[around[0]]],), (ids[roles[around[1]]],))
    return HuggingFaceTokenizer(
        backend,
        special_tokens=sorted({token.content for token in special}, key=ids.__getitem__),
        bos=roles.get("bos_token"),
        eos=[roles["eos_token"]] if "eos_token" in roles else [],
        pad=roles.get("pad_token"),
        chat_template=about.chat_template,
        roles=roles,
        around=stated,
    )


def _add_tokens(
    backend: tokenizers.Tokenizer, added: tuple[Added, ...], special: list[Added], folder: Path
) -> None:
    """Adds what tokenizer.json lacks or has with other flags. New tokens get the ids that follow the vocabulary; raises
    ValueError where the files give one another id."""
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}

    def as_token(token: Added) -> AddedToken:
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}
        return AddedToken(token.content, special=token.special, **flags)

    for token in added:
        if token.content not in present or repr(present[token.content]) != repr(as_token(token)):
            backend.add_tokens([as_token(token)])
        given = backend.token_to_id(token.content)
        if token.id is not None and given != token.id:
            raise ValueError(
                f"{folder}: the added token {token.content!r} has the id {token.id} in the folder's files, but in the "
                f"vocabulary it has {given}. Mend added_tokens_decoder (or added_tokens.json), or give a "
                "tokenizer.json that has the token."
            )
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token in special:
        if token.content not in present:
            backend.add_tokens([as_token(token)])
            present[token.content] = as_token(token)


def _as_its_class(backend: tokenizers.Tokenizer, about: Description) -> None:
    """The parts of tokenizer.json that transformers' class for the folder replaces."""
    spec = json.loads(backend.to_str())
    byte_level = "ByteLevel" in json.dumps(spec["pre_tokenizer"]) + json.dumps(spec["decoder"])
    name = about.tokenizer_class or _CLASS_OF_MODEL.get(about.model_type or "")
    if about.model_type in _AS_IN_THE_FILE:
        return
    if name == "LlamaTokenizer" and spec["model"]["type"] == "BPE" and not byte_level:
        prefix = bool(about.flag("add_prefix_space", True))
        scheme = ("always" if about.flag("legacy", False) else "first") if prefix else "never"
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
        backend.model.byte_fallback = True
        backend.model.fuse_unk = True
    elif name in _LIKE_BERT and spec["model"]["type"] == "WordPiece":
        as_configured(backend, about.config)
    elif name in _BYTE_LEVEL and spec["pre_tokenizer"] and spec["pre_tokenizer"]["type"] == "ByteLevel":
        prefix = bool(about.flag("add_prefix_space", False))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=prefix, use_regex=spec["pre_tokenizer"]["use_regex"]
        )


def _from_sentence_pieces(file: Path, about: Description) -> Tokenizer:
    name = about.tokenizer_class or _CLASS_OF_MODEL.get(about.model_type or "")
    if name in _OTHER_IDS or about.model_type in _OTHER_MODELS:
        raise ValueError(
            f"{file}: {name or about.model_type} gives other ids than the SentencePiece model by itself. Save the "
            "tokenizer with transformers, which writes tokenizer.json."
        )
    model = file.read_bytes()
    proto = parse_model(model)
    pieces = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    control = {p.piece for p in proto.pieces if p.type == p.CONTROL}
    unknown = next((p.piece for p in proto.pieces if p.type == p.UNKNOWN), None)
    roles = _roles_of_model(proto, control, unknown, about) | about.roles
    is_t5 = name == "T5Tokenizer"
    if is_t5:
        roles = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | roles
    added = _with_ids(about, pieces, _sentinels(about, len(pieces)) if is_t5 else {})
    special = ({token.content for token in added if token.special} | set(roles.values())) - {unknown}
    ids = pieces | {token.content: token.id for token in added if token.id is not None}
    around = about.around(ids)
    if around is None and is_t5 and "</s>" in ids:
        around = ((), (ids["</s>"],))
    return SentencePieceTokenizer(
        model,
        added_tokens={name: ids[name] for name in special if name not in control and name in ids},
        words={
            token.content: Word(ids[token.content], token.lstrip, token.rstrip, token.single_word)
            for token in added
            if token.content not in special and token.content != unknown
        },
        bos=roles.get("bos_token"),
        eos=[roles["eos_token"]] if "eos_token" in roles else [],
        pad=roles.get("pad_token"),
        chat_template=about.chat_template,
        strips={t.content: (t.lstrip, t.rstrip) for t in added if t.special and (t.lstrip or t.rstrip)},
        add_prefix_space=about.flag("add_prefix_space"),
        # Unstated, a class of transformers has it at the start alone; each part of a text by itself is SentencePiece's.
        prefix_after_special=bool(about.flag("legacy", about.tokenizer_class is None)),
        roles=roles,
        around=around,
    )


def _roles_of_model(proto: Any, control: set[str], unknown: str | None, about: Description) -> dict[str, str]:
    """The roles that the model itself names; but for the unknown token they count only where no file says any."""
    spec = proto.trainer_spec
    found = {"bos_token": spec.bos_piece, "eos_token": spec.eos_piece, "pad_token": spec.pad_piece}
    if about.config or about.roles:
        found = {}
    found = {role: name for role, name in found.items() if name in control}
    return found | ({"unk_token": unknown} if unknown is not None else {})


def _with_ids(about: Description, pieces: dict[str, int], sentinels: dict[str, int]) -> list[Added]:
    """Added tokens with their ids: as the files say, the model's own, or those that follow all others."""
    tokens = {token.content: token for token in (*about.added, *about.special)}
    tokens |= {name: tokens.get(name, Added(name, special=True)) for name in sentinels}
    known = {name: token.id for name, token in tokens.items() if token.id is not None}
    if clash := next((n for n, i in known.items() if n in pieces and pieces[n] != i), None):
        raise ValueError(
            f"{about.folder}: the added token {clash!r} has the id {known[clash]} in the folder's files, but in the "
            f"SentencePiece model it has {pieces[clash]}. Mend added_tokens_decoder or added_tokens.json."
        )
    known = pieces | sentinels | known
    following = max(known.values()) + 1
    made = []
    for name, token in tokens.items():
        if name not in known:
            known[name], following = following, following + 1
        made.append(Added(**{**vars(token), "id": known[name]}))
    return made


def _sentinels(about: Description, size: int) -> dict[str, int]:
    """T5's <extra_id_0> and so on, the first one with the largest id."""
    count = about.flag("extra_ids", 100)
    if not isinstance(count, int) or not 0 <= count <= 10_000:
        raise ValueError(f"tokenizer_config.json: extra_ids is {count!r:.80}; wanted 0 to 10000")
    return {f"<extra_id_{i}>": size + count - 1 - i for i in range(count)}


_GPT2_ROLES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_QWEN2_ROLES = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
_NEOX_ROLES = _GPT2_ROLES | {"pad_token": "<|padding|>"}
_BERT_ROLES = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
}  # fmt: skip

# Classes of transformers over byte-level BPE: how they cut words, and the tokens of their roles.
_BYTE_LEVEL: dict[str, Any] = {
    "GPT2Tokenizer": (pattern("gpt2"), _GPT2_ROLES),
    "CodeGenTokenizer": (pattern("gpt2"), _GPT2_ROLES),
    "GPTNeoXTokenizer": (dataclasses.replace(pattern("gpt2"), nfc=True), _NEOX_ROLES),
    "Qwen2Tokenizer": (GGUF_PRETOKENIZERS["qwen2"], _QWEN2_ROLES),
}
_CLASS_OF_MODEL = {
    **dict.fromkeys(
        ("gpt2", "gpt_neo", "gptj", "opt", "phi", "dbrx", "starcoder2", "codegen"), "GPT2Tokenizer"
    ),
    **dict.fromkeys(("gpt_neox", "mamba", "mamba2", "mpt", "olmo", "olmoe", "rwkv"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"),
    **dict.fromkeys(("t5", "mt5", "switch_transformers"), "T5Tokenizer"),
}
# Models for which transformers takes tokenizer.json as it is, whatever class the folder names.
_AS_IN_THE_FILE = {
    "granite", "granitemoe", "granitemoehybrid", "jamba", "mistral", "ministral", "mistral3", "mixtral",
    "modernbert", "olmo2", "olmo3", "phi3", "phimoe", "glm4_moe", "internlm2", "internlm3", "stablelm", "nemotron",
}  # fmt: skip
_LIKE_BERT = (
    "BertTokenizer", "ConvBertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "LayoutLMTokenizer",
    "LxmertTokenizer", "MobileBertTokenizer", "SqueezeBertTokenizer",
)  # fmt: skip
_OTHER_IDS = {
    "AlbertTokenizer", "BarthezTokenizer", "BigBirdTokenizer", "CamembertTokenizer", "DebertaV2Tokenizer",
    "FNetTokenizer", "M2M100Tokenizer", "MarianTokenizer", "MBartTokenizer", "MBart50Tokenizer", "NllbTokenizer",
    "PegasusTokenizer", "ReformerTokenizer", "RemBertTokenizer", "SeamlessM4TTokenizer", "XGLMTokenizer",
    "XLMRobertaTokenizer", "XLNetTokenizer",
}  # fmt: skip

_OTHER_MODELS = {
    "albert", "big_bird", "camembert", "deberta-v2", "fnet", "m2m_100", "marian", "mbart", "pegasus", "reformer",
    "rembert", "xglm", "xlm-roberta", "xlnet",
}  # fmt: skip

LAYOUTS: dict[tuple[str, ...], Callable[[Path, Description], Tokenizer]] = {
    ("tokenizer.json",): _from_json,
    ("tokenizer.model",): _from_sentence_pieces,
    ("spiece.model",): _from_sentence_pieces,
    ("sentencepiece.bpe.model",): _from_sentence_pieces,
    ("spm.model",): _from_sentence_pieces,
    ("vocab.json", "merges.txt"): _from_merges,
    ("vocab.txt",): _from_word_pieces,
}

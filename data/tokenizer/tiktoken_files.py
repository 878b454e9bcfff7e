"""tiktoken's files (openai/tiktoken, load.py): a line a token, base64 of its bytes and its rank, which is its id.

The file lacks the pattern and the special tokens. They lie in a JSON file of the same name beside it, or are known
by the name of a published vocabulary.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.files import atomic_write
from data.tokenizer.huggingface import HuggingFaceTokenizer
from data.tokenizer.interface import Tokenizer, read_json, to_json
from data.tokenizer.pretokenizers import PreTokenizer, pattern
from data.tokenizer.raw_bytes import ByteTokenizer
from data.tokenizer.spellings import byte_alphabet


@dataclasses.dataclass(frozen=True)
class Published:
    """What a published ranks file lacks; special tokens with their ids."""

    pretokenizer: PreTokenizer
    special_tokens: Mapping[str, int]
    end: str = "<|endoftext|>"


_CL100K = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
}
PUBLISHED = {
    "gpt2": Published(pattern("gpt2"), {"<|endoftext|>": 50256}),
    "cl100k": Published(pattern("cl100k"), _CL100K | {"<|endofprompt|>": 100276}),
    "o200k": Published(pattern("o200k"), {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    "qwen": Published(
        dataclasses.replace(pattern("cl100k", digits=1), nfc=True),
        {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    ),
}


def load_tiktoken(path: str | os.PathLike, published: str | None = None) -> Tokenizer:
    """The tokenizer of a ranks file.

    `published`: one of `PUBLISHED`, whose pattern and special tokens it has. By default the JSON file beside it says
    them, and without one the file's name (gpt2.tiktoken, cl100k_base.tiktoken). Raises ValueError.
    """
    path = Path(path)
    ranks = read_ranks(path)
    beside = read_json(path.with_suffix(".json")) if published is None else None
    if beside is not None:
        return _from_description(ranks, beside, path)
    name = published or path.stem.removesuffix("_base")
    if name not in PUBLISHED:
        raise ValueError(
            f"{path}: a ranks file has no pattern and no special tokens. There is no {path.with_suffix('.json').name} "
            f"beside it that says them, and {name!r} is not a published vocabulary ({', '.join(PUBLISHED)})."
        )
    known = PUBLISHED[name]
    return from_ranks(ranks, known.pretokenizer, known.special_tokens, eos=[known.end], bos=None, pad=None)


def save_tiktoken(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """Writes the ranks to `path` and the rest to the JSON file beside it.

    Raises ValueError for what ranks and one pattern can't say.
    """
    path = Path(path)
    if not isinstance(tokenizer, (HuggingFaceTokenizer, ByteTokenizer)):
        raise ValueError(f"tiktoken files hold byte-level BPE; this is a {type(tokenizer).__name__}")
    spec = json.loads(tokenizer.backend.to_str())
    style = _style(spec)
    specials = set(tokenizer.special_tokens.values())
    ids = [i for i in sorted(spec["model"]["vocab"].values()) if i not in specials]
    _check_ranks(spec, specials)
    lines = [base64.b64encode(tokenizer.bytes_of(i)) + b" %d\n" % i for i in ids]
    description = {
        "pattern": style.patterns[0],
        "normalization": "NFC" if style.nfc else None,
        "special_tokens": tokenizer.special_tokens,
        "bos": tokenizer.special_name(tokenizer.bos_id),
        "eos": [tokenizer.special_name(i) for i in tokenizer.eos_ids],
        "pad": tokenizer.special_name(tokenizer.pad_id),
        "chat_template": tokenizer.chat_template,
    }
    atomic_write(path.with_suffix(".json"), to_json(description))
    atomic_write(path, b"".join(lines))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes of every token to its rank. Raises ValueError naming the line that is none."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}: line {number} is {line[:60]!r}; wanted base64 and a rank") from None
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise ValueError(
            f"{path}: {len(missing)} of the 256 bytes are no tokens, so not every text can be written"
        )
    return ranks


def from_ranks(
    ranks: Mapping[bytes, int],
    style: PreTokenizer,
    special_tokens: Mapping[str, int],
    **names: Any,
) -> Tokenizer:
    """The tokenizer that gives tiktoken's ids.

    tiktoken merges the pair whose whole has the lowest rank. A token's own bytes, merged by lower ranks only, end as
    the one pair that makes it; a token that does not end as a pair is only ever met as a whole word.
    """
    import tokenizers
    from tokenizers import decoders, models

    spell = {byte: character for character, byte in byte_alphabet().items()}
    spelled = {token: "".join(spell[b] for b in token) for token in ranks}
    merges, whole_words = [], style.ignore_merges
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        parts = _parts(token, ranks)
        if len(parts) == 2:
            merges.append((spelled[parts[0]], spelled[parts[1]]))
        else:
            whole_words = True
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()} | dict(special_tokens)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    backend.pre_tokenizer, backend.decoder = style.build(), decoders.ByteLevel()
    if style.nfc:
        backend.normalizer = style.normalizer()
    return HuggingFaceTokenizer(backend, special_tokens=list(special_tokens), **names)


def _parts(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """What is left of a token's bytes when all pairs of lower rank are merged, the lowest first."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        rank, at = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if rank >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _from_description(ranks: dict[bytes, int], beside: dict[str, Any], path: Path) -> Tokenizer:
    try:
        style = PreTokenizer((beside["pattern"],), nfc=beside.get("normalization") == "NFC")
        names = {key: beside.get(key) for key in ("bos", "eos", "pad", "chat_template")}
        return from_ranks(ranks, style, beside["special_tokens"], **names | {"eos": names["eos"] or []})
    except KeyError as error:
        raise ValueError(f"{path.with_suffix('.json')}: the key {error} is missing") from error


def _style(spec: dict[str, Any]) -> PreTokenizer:
    """The pre-tokenizer of a tokenizer.json. Raises ValueError for more than one pattern, which tiktoken has not."""
    steps = spec["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    *splits, last = steps
    normalizer = (spec["normalizer"] or {}).get("type")
    if spec["model"]["type"] != "BPE" or last.get("type") != "ByteLevel" or normalizer not in (None, "NFC"):
        raise ValueError(
            "tiktoken files hold byte-level BPE of unchanged text; this tokenizer is another kind"
        )
    patterns = [
        s["pattern"].get("Regex") for s in splits if s["type"] == "Split" and s["behavior"] == "Isolated"
    ]
    if last["use_regex"] and not splits:
        return dataclasses.replace(pattern("gpt2"), nfc=normalizer == "NFC")
    if not splits:
        return PreTokenizer((r"[\s\S]+",))
    if len(splits) != 1 or patterns != [splits[0]["pattern"].get("Regex")] or last["use_regex"]:
        raise ValueError("tiktoken files have one pattern; this tokenizer cuts text in several steps")
    return PreTokenizer((patterns[0],), spec["model"]["ignore_merges"], normalizer == "NFC")


def _check_ranks(spec: dict[str, Any], specials: set[int]) -> None:
    """Raises ValueError unless the order of ids is that of the merges, and every token is made by one."""
    if any(not token["special"] for token in spec["added_tokens"]):
        raise ValueError("tiktoken files have no added tokens that are plain text; this tokenizer has some")
    vocabulary = spec["model"]["vocab"]
    made = [vocabulary["".join(pair)] for pair in spec["model"]["merges"]]
    if missing := [character for character in byte_alphabet() if character not in vocabulary]:
        raise ValueError(f"{len(missing)} of the 256 bytes are no tokens; tiktoken files have all")
    if any(a > b for a, b in zip(made, made[1:])):
        raise ValueError("tiktoken merges in the order of ids; this tokenizer's merges have another order")
    others = (
        set(vocabulary.values())
        - specials
        - set(made)
        - {vocabulary[c] for c in byte_alphabet() if c in vocabulary}
    )
    if others and not spec["model"]["ignore_merges"]:
        raise ValueError(f"{len(others)} tokens are made by no merge; tiktoken would use them all the same")

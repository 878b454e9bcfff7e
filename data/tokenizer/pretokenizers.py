"""How byte-level BPE cuts text into words before it merges: our own pattern, and those of published models by
the name that GGUF files give them (`tokenizer.ggml.pre`; llama.cpp, src/llama-vocab.cpp)."""

from __future__ import annotations

import dataclasses

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """Regular expressions applied one after the other, each isolating its matches."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is in the vocabulary is taken whole, merges or not
    nfc: bool = False  # the published tokenizer.json composes characters first

    def build(self) -> pre_tokenizers.PreTokenizer:
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


def pattern(name: str, digits: int | None = None) -> PreTokenizer:
    """A pattern to train with, by name; numbers are cut into groups of up to `digits` (None: as the pattern has it).

    "ours" is GPT-4's with groups of two. Raises ValueError for an unknown name or another count than 1, 2 or 3.
    """
    if name not in PATTERNS:
        raise ValueError(f"pattern={name!r}; known are {', '.join(PATTERNS)}")
    if digits not in (None, 1, 2, 3):
        raise ValueError(f"digits={digits}: numbers are cut into groups of 1, 2 or 3 digits")
    text, number, ignore_merges = PATTERNS[name]
    if digits is not None:
        group = r"\p{N}" if digits == 1 else rf"\p{{N}}{{1,{digits}}}"
        number = " ?" + group if number.startswith(" ?") else group
    return PreTokenizer((text.replace(_NUMBER, number),), ignore_merges)


_NUMBER = "<number>"  # where a pattern has its alternative for numbers
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|<number>| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|<number>"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_O200K_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    rf"|<number>|{_O200K_TAIL}"
)

# name -> (pattern with a place for numbers, its own numbers, whether words of the vocabulary are taken whole)
PATTERNS: dict[str, tuple[str, str, bool]] = {
    "ours": (_GPT4, r"\p{N}{1,2}", False),
    "gpt2": (_GPT2, r" ?\p{N}+", False),
    "cl100k": (_GPT4, r"\p{N}{1,3}", False),
    "o200k": (_O200K, r"\p{N}{1,3}", False),
    "llama3": (_GPT4, r"\p{N}{1,3}", True),
}

_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}|{_O200K_TAIL}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)

_gpt2 = pattern("gpt2")
_single_digits_gpt2 = PreTokenizer((r"\p{N}", *_gpt2.patterns))
_llama3 = pattern("llama3")
_qwen2 = dataclasses.replace(pattern("cl100k", digits=1), nfc=True)
_o200k = pattern("o200k")

GGUF_PRETOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _gpt2,
    "phi-2": _gpt2,
    "mpt": _gpt2,
    "olmo": _gpt2,
    "gpt-neox": _gpt2,
    "smollm": _single_digits_gpt2,
    "starcoder": _single_digits_gpt2,
    "refact": _single_digits_gpt2,
    "command-r": _single_digits_gpt2,
    "codeshell": _single_digits_gpt2,
    "exaone": _single_digits_gpt2,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "dbrx": pattern("cl100k"),
    "smaug-bpe": pattern("cl100k"),
    "chatglm-bpe": pattern("cl100k"),
    "qwen2": _qwen2,
    "deepseek-r1-qwen": _qwen2,
    "stablelm2": pattern("cl100k", digits=1),
    "deepseek-v3": PreTokenizer(_DEEPSEEK3),
    "gpt-4o": _o200k,
    "llama4": _o200k,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True),
}

"""What a Hugging Face folder says of its tokenizer beside the vocabulary: the tokens of each role, added tokens, what
stands around a text, and the chat template. Read as transformers 5 does (tokenization_utils_base.py,
`_from_pretrained`): tokenizer_config.json first, then the older special_tokens_map.json and added_tokens.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.tokenizer.interface import read_json

LARGEST_ID = 1 << 24  # of an added token; the largest published vocabularies have a quarter of a million
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class Added:
    """A token that is added to a vocabulary, or found whole in a text before the vocabulary's own rules."""

    content: str
    id: int | None = None
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclasses.dataclass(frozen=True)
class Description:
    """`roles`: "bos_token" and the like, with those that a model names itself ("image_token"), to the token.

    `added`: in the order of their ids; `special`: every token that is declared as one, whether in `added` or not.
    """

    folder: Path
    config: dict[str, Any]
    roles: dict[str, str]
    added: tuple[Added, ...]
    special: tuple[Added, ...]
    chat_templates: dict[str, str]  # "default", and "tool_use" for dialogues with tools
    tokenizer_class: str | None
    model_type: str | None

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    def flag(self, key: str, default: Any = None) -> Any:
        """A setting of tokenizer_config.json; `null` is no setting."""
        value = self.config.get(key)
        return default if value is None else value

    def around(self, ids: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """What `add_bos_token` and `add_eos_token` put around a text; None where neither is stated."""
        stated = [self.config.get(f"add_{end}_token") for end in ("bos", "eos")]
        if stated == [None, None]:
            return None
        found = [ids.get(self.roles.get(f"{end}_token", "")) for end in ("bos", "eos")]
        before, after = (
            (i,) if wanted and i is not None else () for wanted, i in zip(stated, found, strict=True)
        )
        return before, after


def read_description(folder: Path) -> Description:
    """Reads the small files of a folder. Raises ValueError that names the file and the key that is not as it should
    be."""
    where = folder / "tokenizer_config.json"
    config = read_json(where) or {}
    older = read_json(folder / "special_tokens_map.json") or {}
    model = read_json(folder / "config.json") or {}
    if "added_tokens_decoder" in config:
        added = _decoder(config["added_tokens_decoder"], where)
    else:  # as transformers: the older map goes over the configuration only where no decoder is written
        config = config | {key: value for key, value in older.items() if value is not None}
        added = None
    missing = {key: value for key, value in older.items() if key not in config}
    named = _named(missing, folder / "special_tokens_map.json") | _named(config, where)
    extra = _extra(config, where) or _extra(missing, folder / "special_tokens_map.json")
    special = {token.content: token for token in [*named.values(), *extra]}
    if added is None:
        added = _encoder(folder, set(special))
    special |= {token.content: token for token in added if token.special}
    flags = {token.content: token for token in added}
    return Description(
        folder,
        config,
        {role: token.content for role, token in named.items()},
        tuple(sorted(added, key=lambda token: -1 if token.id is None else token.id)),
        tuple(dataclasses.replace(flags.get(name, token), special=True) for name, token in special.items()),
        _chat_templates(folder, config),
        _class_name(config, model),
        model.get("model_type") if isinstance(model.get("model_type"), str) else None,
    )


def _named(config: Mapping[str, Any], where: Path) -> dict[str, Added]:
    """The tokens with a name: the seven roles, other keys that end in "_token", a dict of `extra_special_tokens`."""
    found = {key: config.get(key) for key in ROLES}
    found |= {
        key: value
        for key, value in config.items()
        if key.endswith("_token") and key not in ROLES and isinstance(value, (str, dict))
    }
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(config.get(key), dict):
            found |= config[key]
    return {key: _token(value, where, key) for key, value in found.items() if value is not None}


def _extra(config: Mapping[str, Any], where: Path) -> list[Added]:
    """Special tokens without a role."""
    found = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(key)
        if value is None or isinstance(value, dict):
            continue
        if not isinstance(value, list):
            raise ValueError(f"{where}: {key} is {value!r:.80}; wanted a list of tokens")
        found += [_token(token, where, key) for token in value]
    return found


def _token(value: Any, where: Path, key: str) -> Added:
    """A special token, which a file writes as a string or as an object."""
    if isinstance(value, str):
        return Added(value, special=True)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return dataclasses.replace(_flags(value), special=True)
    raise ValueError(f'{where}: {key} is {value!r:.80}; wanted a token: a string or {{"content": ...}}')


def _flags(token: Mapping[str, Any], id: int | None = None) -> Added:
    special = bool(token.get("special", False))
    normalized = token.get("normalized")
    return Added(
        token["content"],
        id,
        special,
        *(bool(token.get(flag, False)) for flag in ("lstrip", "rstrip", "single_word")),
        normalized=not special if normalized is None else bool(normalized),
    )


def _decoder(value: Any, where: Path) -> list[Added]:
    try:
        return [_flags(token, _bounded(int(i), token["content"], where)) for i, token in value.items()]
    except _IdError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f'{where}: added_tokens_decoder is {value!r:.80}; wanted {{"id": {{"content": ...}}, ...}}'
        ) from None


class _IdError(ValueError):
    """An id that no vocabulary has."""


def _bounded(i: int, name: str, where: Path) -> int:
    if not 0 <= i < LARGEST_ID:
        raise _IdError(f"{where}: the added token {name!r:.80} has the id {i}; wanted 0 to {LARGEST_ID - 1}")
    return i


def _encoder(folder: Path, special: set[str]) -> list[Added]:
    """added_tokens.json: {token: id}, where what is special stands in the other files."""
    file = folder / "added_tokens.json"
    tokens = read_json(file) or {}
    if bad := [name for name, i in tokens.items() if not isinstance(i, int)]:
        raise ValueError(f"{file}: {bad[0]!r} has the id {tokens[bad[0]]!r}; wanted a number")
    for name, i in tokens.items():
        _bounded(i, name, file)
    return [
        Added(name, i, special=name in special, normalized=name not in special) for name, i in tokens.items()
    ]


def _class_name(config: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    return name.removesuffix("Fast") if isinstance(name, str) else None


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Those in files of their own go over the one in the configuration, as in transformers."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    if "default" in found:
        return found
    template = (read_json(folder / "chat_template.json") or config).get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict) and "default" not in template:
        raise ValueError(f"{folder}: chat_template has {sorted(template)}, none of them named 'default'")
    return template if isinstance(template, dict) else {} if template is None else {"default": template}

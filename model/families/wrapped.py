"""Reads the text model of models of text and images: Gemma 3 from 4B, Llama 4, Mistral 3.

Their config.json has the text model under `text_config`. Their tensors have the text model's names after a prefix;
transformers 5 and the published folders have different ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# model_type of the whole model -> model_type of its text model
TEXT = {"gemma3": "gemma3_text", "llama4": "llama4_text", "mistral3": "mistral"}
# Defaults of keys that text_config may omit, by model_type of the text model; families have the other defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131_072,
    },
    "llama4_text": {
        "vocab_size": 202_048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "max_position_embeddings": 131_072,
    },
    "mistral": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 131_072,
    },
}
# Keys of the whole model, used if text_config lacks them.
SHARED = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
PREFIXES = (("model.language_model.", "model."), ("language_model.", ""))
OTHERS = (
    "vision_tower.",
    "vision_model.",
    "multi_modal_projector.",
)  # parts other than text, at the top level or in "model."


def text_config(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's config. Raises ValueError if there is none."""
    text, model_type = saved.get("text_config"), saved["model_type"]
    if not isinstance(text, dict):
        raise ValueError(f"model_type={model_type!r} needs a text_config; given {str(text)[:100]}.")
    if text.get("model_type", TEXT[model_type]) != TEXT[model_type]:
        raise ValueError(
            f"text_config.model_type={str(text['model_type'])[:100]!r} is not supported in {model_type}; only "
            f"{TEXT[model_type]!r} is."
        )
    shared = {key: saved[key] for key in SHARED if saved.get(key) is not None and text.get(key) is None}
    known = {key: value for key, value in DEFAULTS[TEXT[model_type]].items() if text.get(key) is None}
    return {**text, **shared, **known, "model_type": TEXT[model_type]}


def is_wrapped(names: Collection[str]) -> bool:
    """Whether a folder's tensors have the names of a whole model."""
    return any(text_name(name) != name for name in names)


def text_name(name: str) -> str | None:
    """A tensor's name in the text model; None for a tensor of another part."""
    if name.removeprefix("model.").startswith(OTHERS):
        return None
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def left_out(names: Collection[str]) -> dict[str, int]:
    """The number of tensors of each part other than text."""
    found: dict[str, int] = {}
    for name in names:
        if text_name(name) is None:
            part = name.removeprefix("model.").split(".")[0]
            found[part] = found.get(part, 0) + 1
    return found

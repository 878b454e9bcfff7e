"""Families of models: how their configs and tensor names map to ours. The model itself never asks for one."""

from model.families import (
    bloom,
    cohere,
    falcon,
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    mpt,
    olmo,
    phi,
    qwen,
    smollm3,
    starcoder2,
)
from model.families.common import Family

# A model without a family of its own is saved as the first that can hold it.
_ALL = (
    llama.FAMILY,
    qwen.QWEN2,
    qwen.QWEN3,
    mistral.FAMILY,
    *(gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3),
    olmo.OLMO2,
    granite.FAMILY,
    smollm3.FAMILY,
    phi.PHI3,
    cohere.FAMILY,
    starcoder2.FAMILY,
    gpt2.FAMILY,
    gpt_neox.FAMILY,
    bloom.FAMILY,
    mpt.FAMILY,
    falcon.FAMILY,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}  # by Hugging Face's model_type

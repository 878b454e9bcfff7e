"""Families of models: how their configs and tensor names map to ours. The model itself never asks for one."""

from model.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3, LlamaFamily

# Hugging Face's model_type to its family; a model is saved as the first that can hold it.
FAMILIES: dict[str, LlamaFamily] = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "mistral": MISTRAL}

"""What MoE families share: which layers have experts, and the names of their tensors."""

from __future__ import annotations

from typing import Any

from model.blocks.ffn import GatedMLP
from model.blocks.moe import MoE
from model.families.common import Reader
from model.families.tensors import Names

EXPERTS: Names = {
    "model.layers.{i}.mlp.gate.weight": "ffn/router",
    "model.layers.{i}.mlp.experts.{e}.gate_proj.weight": "ffn/experts/gate",
    "model.layers.{i}.mlp.experts.{e}.up_proj.weight": "ffn/experts/up",
    "model.layers.{i}.mlp.experts.{e}.down_proj.weight": "ffn/experts/down",
}
SHARED_EXPERT: Names = {  # Qwen: one, with a gate
    "model.layers.{i}.mlp.shared_expert.gate_proj.weight": "ffn/shared/gate",
    "model.layers.{i}.mlp.shared_expert.up_proj.weight": "ffn/shared/up",
    "model.layers.{i}.mlp.shared_expert.down_proj.weight": "ffn/shared/down",
    "model.layers.{i}.mlp.shared_expert_gate.weight": "ffn/shared_gate",
}
SHARED_EXPERTS: Names = {  # DeepSeek: several in one
    "model.layers.{i}.mlp.shared_experts.gate_proj.weight": "ffn/shared/gate",
    "model.layers.{i}.mlp.shared_experts.up_proj.weight": "ffn/shared/up",
    "model.layers.{i}.mlp.shared_experts.down_proj.weight": "ffn/shared/down",
    "model.layers.{i}.mlp.gate.e_score_correction_bias": "ffn/choice_bias",
}


def read_sparse_layers(config: Reader, layers: int, num_experts: int) -> list[bool]:
    """Whether each layer has experts: every `decoder_sparse_step`th, except `mlp_only_layers`."""
    every, dense = config.integer("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        raise ValueError(f"mlp_only_layers={str(dense)[:200]} is not a list of layer numbers.")
    dense = set(dense)
    return [i not in dense and num_experts > 0 and (i + 1) % every == 0 for i in range(layers)]


def write_sparse_layers(cfg: Any) -> dict[str, Any]:
    dense = [i for i, block in enumerate(cfg.blocks) if not isinstance(block.ffn, MoE)]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def moe_of(cfg: Any) -> Any:
    """The model's `MoE`. Raises ValueError for a model without one."""
    for block in cfg.blocks:
        if isinstance(block.ffn, MoE):
            return block.ffn
    raise ValueError("this model has no experts")


def dense_of(cfg: Any) -> Any:
    """The network of the layers without experts, or None."""
    return next((block.ffn for block in cfg.blocks if isinstance(block.ffn, GatedMLP)), None)


def first_sparse_layer(cfg: Any) -> int:
    """The number of layers before the first with experts."""
    return next((i for i, block in enumerate(cfg.blocks) if isinstance(block.ffn, MoE)), len(cfg.blocks))

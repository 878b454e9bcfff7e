"""MTP modules in checkpoints: the layout of DeepSeek-V3 and GLM-4.5, and that of Qwen3-Next."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.blocks.block import Block
from model.blocks.norms import Norm
from model.families.common import Reader
from model.families.tensors import MTP_PREFIX, Conv, Copy, Folded, Fused, Merged, Names, Rule, Whole
from model.readouts.mtp import SequentialMTP

MAX_MODULES = 64  # a config.json with more is damaged; DeepSeek-V3 has one
LAYER = "model.layers.{n}"
NEXTN: Names = {  # beside the block; the module is stored as a layer after the last one
    f"{LAYER}.enorm.weight": "mtp/embedding_norm/scale",
    f"{LAYER}.hnorm.weight": "mtp/hidden_norm/scale",
    f"{LAYER}.eh_proj.weight": "mtp/join",
    f"{LAYER}.shared_head.norm.weight": "mtp/final_norm/scale",
    f"{LAYER}.embed_tokens.weight": Copy("embedding"),
    f"{LAYER}.shared_head.head.weight": Copy("head"),
}
MTP: Names = {
    "mtp.pre_fc_norm_embedding.weight": "mtp/embedding_norm/scale",
    "mtp.pre_fc_norm_hidden.weight": "mtp/hidden_norm/scale",
    "mtp.fc.weight": "mtp/join",
    "mtp.norm.weight": "mtp/final_norm/scale",
}


def nextn(names: Names) -> Names:
    """The names of DeepSeek's MTP modules; their blocks have the names of ordinary blocks."""
    return _of_blocks(names, LAYER) | NEXTN


def mtp(names: Names) -> Names:
    """The names of Qwen's MTP module."""
    return _of_blocks(names, "mtp.layers.{k}") | MTP


def read_mtp(config: Reader, block: Block, norm: Norm, most: int = MAX_MODULES) -> SequentialMTP | None:
    """The MTP modules of the config; by default one, as in transformers and, without a key, in Qwen3-Next."""
    key = config.alias("num_nextn_predict_layers", "num_mtp_layers")
    count = config.integer(key, 1, least=0, most=most)
    return SequentialMTP((block,) * count, norm) if count else None


def write_mtp(cfg: Any) -> dict[str, Any]:
    return {"num_nextn_predict_layers": 0 if cfg.mtp is None else len(cfg.mtp.blocks)}


def _of_blocks(names: Names, layer: str) -> Names:
    start = "model.layers.{i}"
    return {
        name.replace(start, layer): _prefixed(rule) for name, rule in names.items() if name.startswith(start)
    }


def _prefixed(rule: Rule) -> Rule:
    if isinstance(rule, str):
        return MTP_PREFIX + rule
    if isinstance(rule, Fused):
        grouped = MTP_PREFIX + rule.grouped if isinstance(rule.grouped, str) else rule.grouped
        return dataclasses.replace(rule, ours=_each(rule.ours), grouped=grouped)
    if isinstance(rule, Conv):
        return Conv(_each(rule.ours))
    if isinstance(rule, Folded):
        return Folded(MTP_PREFIX + rule.ours, MTP_PREFIX + rule.rows_of)
    if isinstance(rule, Whole | Merged):
        return dataclasses.replace(rule, ours=MTP_PREFIX + rule.ours)
    return rule


def _each(ours: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(MTP_PREFIX + name for name in ours)

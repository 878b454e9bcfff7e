"""Model configs as earlier versions saved them, in today's names."""

from __future__ import annotations

from typing import Any

KINDS = {
    "SequentialFuture": "SequentialMTP",
    "ParallelFuture": "ParallelMTP",
    "Narrowing": "RecursionExpertChoice",
    "Assigned": "RecursionTokenChoice",
}
FIELDS = {  # by today's kind: a field's earlier name to today's
    "Rope": {"turning": "rotated_fraction"},
    "Attention": {"keys_values": "kv_sharing"},
    "ModelConfig": {"future": "mtp"},
}
KV_SHARING = {"own": "none", "give": "provide", "take": "reuse"}


def upgraded(part: dict[str, Any]) -> dict[str, Any]:
    """One part of a saved config, by itself: its kind and fields under today's names."""
    kind = KINDS.get(str(part.get("kind")), part.get("kind"))
    names = FIELDS.get(str(kind), {})
    part = {names.get(name, name): value for name, value in part.items()} | {"kind": kind}
    if kind == "Attention" and part.get("kv_sharing") in KV_SHARING:
        part["kv_sharing"] = KV_SHARING[part["kv_sharing"]]
    if kind == "Block" and "parallel" in part:
        part["residual"] = _residual(part.pop("parallel"), part)
    return part


def _residual(parallel: str, block: dict[str, Any]) -> dict[str, Any]:
    """The residual that a block's own fields said; takes them out."""
    scales = {"scale": block.pop("residual_scale", 1.0), "skip_scale": block.pop("skip_scale", 1.0)}
    if parallel == "no":
        return {"kind": "Residual", **scales}
    return {"kind": "ParallelResidual", "norms": parallel, **scales}

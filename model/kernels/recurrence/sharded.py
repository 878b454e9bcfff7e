"""How a mesh splits a recurrence: rows and heads are independent, the tokens of a row are sequential."""

from __future__ import annotations

from model.kernels import mesh
from model.sharding import Axes, ShardingRules


def split_rows_and_heads(rules: ShardingRules | None, B: int, H: int) -> tuple[Axes, Axes]:
    """(the axes of the current mesh that split B rows, those that split H heads).

    Raises:
      ValueError: they do not divide them.
    """
    batch, heads = mesh.split_by(rules, "batch", "act_heads")
    mesh.check_divides(heads, mesh.Size(H, "heads", "act_heads"))
    mesh.check_divides(batch, mesh.Size(B, "rows of the batch", "batch"))
    return batch, heads

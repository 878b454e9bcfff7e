"""Checks that a config fits the tensors of its file, before any memory is allocated for it.

A damaged or hostile config.json may ask for any size. No size may exceed the largest tensor, and there may not be more
layers and experts than tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import Any

from model.config import ModelConfig

# Fields that do not affect the shapes of tensors.
NO_SIZES = frozenset(
    """
    max_length window chunk original_max_length max_distance experts_per_token groups_per_token num_groups functions
    longest_patch max_patches special_ids slots
    """.split()
)


def check_fits(
    cfg: ModelConfig, shapes: Collection[tuple[int, ...]], blocks_per_layer: int, experts_apart: bool
) -> None:
    """Raises ValueError for a model that is larger than these tensors.

    Args:
      shapes: the shapes of all tensors.
      blocks_per_layer: our blocks in one layer of the file.
      experts_apart: whether each expert has its own tensors.
    """
    stacks = [stack.blocks for stack in cfg.stacks] + ([cfg.mtp.blocks] if cfg.mtp is not None else [])
    layers = sum(len(stack) for stack in stacks) // blocks_per_layer
    if layers > len(shapes):
        raise ValueError(f"the config has {layers} layers, but only {len(shapes)} tensors.")
    experts = sum(getattr(block.ffn, "num_experts", 0) for stack in stacks for block in stack)
    if experts_apart and experts > len(shapes):
        raise ValueError(f"the config has {experts} experts in all layers, but only {len(shapes)} tensors.")
    largest = max((math.prod(shape) for shape in shapes), default=0)
    for name, value in _sizes(cfg, set()):
        if value > largest:
            raise ValueError(
                f"the config has {name}={value}, but the largest of its tensors has {largest} numbers."
            )


def _sizes(part: Any, seen: set[int], where: str = "") -> Iterator[tuple[str, int]]:
    """Every size in a config and its parts, each part once."""
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, tuple):
        for item in part:
            yield from _sizes(item, seen, where)
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            value, name = getattr(part, field.name), f"{where}.{field.name}".lstrip(".")
            if type(value) is int and field.name not in NO_SIZES:
                yield name, value
            else:
                yield from _sizes(value, seen, name)

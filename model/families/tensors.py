"""A checkpoint's tensors and our parameters, side by side: one table, read in both directions.

Other formats store a linear map as [outputs, inputs] with heads folded into one axis; ours is [inputs, outputs] with
heads of their own. So every tensor is a reshape of ours, after a transpose where it is a linear map.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from model.config import ModelConfig
from model.function import Params, param_shapes

Path = tuple[str, ...]

# Linear maps among our parameters: how many leading axes are inputs.
INPUT_AXES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and the parameter that it is."""

    name: str  # in the checkpoint
    path: Path  # in our unrolled parameters
    shape: tuple[int, ...]  # in the checkpoint
    our_shape: tuple[int, ...]
    transposed: bool

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        """A view of `theirs` where numpy can give one."""
        return (theirs.T if self.transposed else theirs).reshape(self.our_shape)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        return ours.reshape(self.shape[::-1]).T if self.transposed else ours.reshape(self.shape)


def tensor_table(cfg: ModelConfig, names: Mapping[str, str]) -> list[Tensor]:
    """The tensors of a checkpoint of `cfg`, embedding and head first, then layer by layer.

    Args:
      names: our parameter, such as "embedding" or "mixer/q", to the checkpoint's name; "{i}" is the layer's number.

    Raises:
      ValueError: a parameter that the format has no name for.
    """
    scanned = cfg.replace(scan=True)  # one trace for each run of equal blocks
    shapes = param_shapes(scanned)
    runs = {name: numbers for name, _, numbers in scanned.runs()}
    table = [
        _tensor(names, (key,), leaf, leaf.shape)
        for key, leaf in _flat(shapes)
        if key.split("/")[0] not in runs
    ]
    for run, numbers in runs.items():
        for i in numbers:
            table += [
                _tensor(names, (f"block_{i}", key), leaf, leaf.shape[1:], i)
                for key, leaf in _flat(shapes[run])
            ]
    return table


def unflatten(params: Mapping[Path, object]) -> Params:
    """{("block_0", "mixer", "q"): array} to nested dicts."""
    tree: Params = {}
    for path, value in params.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def get(params: Params, path: Path) -> Any:
    """The array at a path."""
    node: Any = params
    for key in path:
        node = node[key]
    return node


def _tensor(
    names: Mapping[str, str], path: Path, leaf, shape: tuple[int, ...], layer: int | None = None
) -> Tensor:
    key = path[-1]
    if key not in names:
        raise ValueError(
            f"the format has no tensor for the parameter {'/'.join(path)}; it holds {', '.join(sorted(names))}. "
            'Save with format="native".'
        )
    inputs = INPUT_AXES.get(key.split("/")[-1])
    if inputs is None:
        theirs = (math.prod(shape),) if key.startswith(("mixer/", "ffn/")) else tuple(shape)
    else:
        theirs = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
    full_path = tuple(part for name in path for part in name.split("/"))
    return Tensor(names[key].format(i=layer), full_path, theirs, tuple(shape), inputs is not None)


def _flat(tree: Params, prefix: str = "") -> list[tuple[str, jax.ShapeDtypeStruct]]:
    found = []
    for key, value in tree.items():
        found += _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else [(prefix + key, value)]
    return found

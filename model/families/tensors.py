"""A checkpoint's tensors and our parameters, side by side: one table, read in both directions.

Other formats store a linear map as [outputs, inputs] with heads folded into one axis, sometimes several maps in one
tensor, sometimes one tensor for each expert; ours are [inputs, outputs] with heads of their own and experts stacked.
So every tensor is made of ours by reshapes, transposes and concatenation alone, and no bit changes on the way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from model.config import ModelConfig
from model.function import Params, logical_axes, param_shapes

Path = tuple[str, ...]

# Linear maps among our parameters, by the last part of their names: how many axes are inputs.
INPUT_AXES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}
INPUT_AXES |= {"router": 1, "shared_gate": 1, "q_a": 1, "q_b": 1, "kv_a": 1, "kv_b": 1}


@dataclasses.dataclass(frozen=True)
class Fused:
    """Several of our parameters in one tensor, side by side along its outputs."""

    ours: tuple[str, ...]
    grouped: bool = (
        False  # not one whole after the other: for each key/value head (or channel) a part of each
    )
    transposed: bool = True  # [outputs, inputs], as torch's Linear has it


def kept(ours: str) -> Fused:
    """A linear map that is stored as [inputs, outputs]."""
    return Fused((ours,), transposed=False)


@dataclasses.dataclass(frozen=True)
class Whole:
    """Stored in the very shape that ours has."""

    ours: str


@dataclasses.dataclass(frozen=True)
class Merged:
    """Stacked experts, one below the other in one matrix."""

    ours: str
    transposed: bool = True  # each [outputs, inputs]


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution's kernel, ours [..., width], stored as [channels, 1, width]."""

    ours: str


Rule = str | Fused | Whole | Merged | Conv
Leaves = dict[str, tuple[tuple[int, ...], Path]]  # our name to shape and logical axes
# A checkpoint's name to ours, such as "mixer/q". "{i}" is the layer's number, "{e}" the expert's.
Names = dict[str, Rule]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A parameter of ours, or one expert's part of it."""

    path: Path  # in our unrolled parameters
    shape: tuple[int, ...]  # of the piece
    whole: tuple[int, ...]  # of the parameter
    expert: int | None
    lead: int  # axes that come first in both layouts (stacked experts)
    inputs: int  # axes that are inputs; 0: no linear map

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape with inputs and outputs folded into one axis each."""
        lead, rest = self.shape[: self.lead], self.shape[self.lead :]
        if self.inputs == 0:
            return *lead, math.prod(rest)
        return *lead, math.prod(rest[: self.inputs]), math.prod(rest[self.inputs :])


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and the parameters that it is."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    transposed: bool
    groups: int = 1  # the outputs are so many groups, each with a part of every piece

    def to_ours(self, theirs: np.ndarray) -> list[np.ndarray]:
        """One array for each piece; views of `theirs` where numpy can give them."""
        if len(self.pieces) == 1 and not self.transposed:
            return [theirs.reshape(self.pieces[0].shape)]
        lead = self.pieces[0].matrix[:-2]
        theirs = theirs.reshape(*lead, -1, theirs.shape[-1])
        matrix = np.swapaxes(theirs, -1, -2) if self.transposed else theirs
        if len(self.pieces) == 1:
            return [matrix.reshape(self.pieces[0].shape)]
        grouped = matrix.reshape(*matrix.shape[:-1], self.groups, -1)
        found, start = [], 0
        for piece in self.pieces:
            stop = start + piece.matrix[-1] // self.groups
            found.append(grouped[..., start:stop].reshape(piece.shape))
            start = stop
        return found

    def to_theirs(self, ours: list[np.ndarray]) -> np.ndarray:
        if len(ours) == 1 and not self.transposed:
            return ours[0].reshape(self.shape)
        parts = [array.reshape(piece.matrix) for array, piece in zip(ours, self.pieces, strict=True)]
        if len(parts) == 1:
            matrix = parts[0]
        else:
            grouped = [part.reshape(*part.shape[:-1], self.groups, -1) for part in parts]
            joined = np.concatenate(grouped, axis=-1)
            matrix = joined.reshape(*joined.shape[:-2], -1)
        return (np.swapaxes(matrix, -1, -2) if self.transposed else matrix).reshape(self.shape)


def tensor_table(cfg: ModelConfig, names: Names) -> list[Tensor]:
    """The tensors of a checkpoint of `cfg`, embedding and head first, then layer by layer.

    Raises:
      ValueError: a parameter that the format has no name for.
    """
    theirs = {key: (name, rule) for name, rule in names.items() for key in _ours(rule)}
    table = []
    for layer, leaves in _groups(cfg):
        done = set()
        for key in leaves:
            if key not in theirs:
                raise ValueError(
                    f"the format has no tensor for the parameter {key}; it holds {', '.join(sorted(theirs))}. "
                    'Save with format="native".'
                )
            name, rule = theirs[key]
            if name in done:
                continue
            done.add(name)
            missing = [other for other in _ours(rule) if other not in leaves]
            if missing:
                raise ValueError(
                    f"the format's tensor {name} also holds {', '.join(missing)}, which this model lacks. "
                    'Save with format="native".'
                )
            table += _tensors(name, rule, layer, leaves)
    return table


def name_of(names: Names, ours: str) -> str:
    """The checkpoint's name of a parameter outside the blocks."""
    return next(name for name, rule in names.items() if ours in _ours(rule))


def _ours(rule: Rule) -> tuple[str, ...]:
    if isinstance(rule, str):
        return (rule,)
    return rule.ours if isinstance(rule, Fused) else (rule.ours,)


def _groups(cfg: ModelConfig) -> Iterator[tuple[int | None, Leaves]]:
    """(None, everything outside the blocks), then (layer, what is in it) for each block."""
    scanned = cfg.replace(scan=True)  # one trace for each run of equal blocks
    shapes, axes = param_shapes(scanned), logical_axes(scanned)
    runs = {name: numbers for name, _, numbers in scanned.runs()}

    def flat(shape_tree: Params, axes_tree: Params, drop: int) -> Leaves:
        pairs = zip(_flat(shape_tree), _flat(axes_tree), strict=True)
        return {key: (leaf.shape[drop:], of_leaf[drop:]) for (key, leaf), (_, of_leaf) in pairs}

    outside = [{key: value for key, value in tree.items() if key not in runs} for tree in (shapes, axes)]
    yield None, flat(outside[0], outside[1], 0)
    for run, numbers in runs.items():
        leaves = flat(shapes[run], axes[run], 1)
        for i in numbers:
            yield i, leaves


def _tensors(name: str, rule: Rule, layer: int | None, leaves: Leaves) -> Iterator[Tensor]:
    """One tensor, or one for each expert."""
    experts = leaves[_ours(rule)[0]][0][0] if "{e}" in name else 0
    for expert in range(experts) if experts else (None,):
        pieces = tuple(_piece(key, leaves[key], layer, expert) for key in _ours(rule))
        full_name = name.format(i=layer, e=expert)
        first = pieces[0]
        if isinstance(rule, Conv):
            shape = (math.prod(first.shape[:-1]), 1, first.shape[-1])
            yield Tensor(full_name, shape, pieces, transposed=False)
            continue
        if isinstance(rule, Whole):
            yield Tensor(full_name, first.shape, pieces, transposed=False)
            continue
        transposed = first.inputs > 0 and (isinstance(rule, str) or rule.transposed)
        if isinstance(rule, Merged):
            lead, rows, columns = first.matrix
            shape = (lead * columns, rows) if transposed else (lead * rows, columns)
            yield Tensor(full_name, shape, pieces, transposed)
            continue
        groups = 1
        if isinstance(rule, Fused) and rule.grouped:
            groups = min(piece.shape[piece.lead + piece.inputs] for piece in pieces)
        shape = (*first.matrix[:-1], sum(piece.matrix[-1] for piece in pieces))
        if len(pieces) == 1 and first.inputs == 0 and layer is None:
            shape = first.shape
        if transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        yield Tensor(full_name, shape, pieces, transposed, groups)


def _piece(key: str, leaf: tuple[tuple[int, ...], Path], layer: int | None, expert: int | None) -> Piece:
    path = tuple(key.split("/")) if layer is None else (f"block_{layer}", *key.split("/"))
    shape, axes = leaf
    inputs = INPUT_AXES.get(path[-1], 0)
    if expert is not None:
        return Piece(path, shape[1:], shape, expert, 0, inputs)
    return Piece(path, shape, shape, None, int(axes[:1] == ("experts",) and len(shape) > 1), inputs)


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


def _flat(tree: Params, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        found += _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else [(prefix + key, value)]
    return found

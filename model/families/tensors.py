"""A checkpoint's tensors and our parameters, side by side: one table, read in both directions.

Other formats store a linear map as [outputs, inputs] with heads folded into one axis, sometimes several maps in one
tensor, sometimes one tensor for each expert; ours are [inputs, outputs] with heads of their own and experts stacked.
So every tensor is made of ours by reshapes, transposes and concatenation alone, and no bit changes on the way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from model.blocks.future import future_blocks
from model.config import STACKS, Block, ModelConfig
from model.function import Params, logical_axes, param_shapes

Path = tuple[str, ...]

# What stands before our names of what is in the blocks of a stack; "" before those in the model's own blocks.
PREFIXES = {stack: f"{stack.removesuffix('_')}/" if stack else "" for stack in STACKS}
ENCODER = PREFIXES["encoder_"]
FUTURE = "future/"  # before our names of what is in a module that says a later token, and in its block

# Linear maps among our parameters, by the last part of their names: how many axes are inputs.
INPUT_AXES: dict[str, int] = dict.fromkeys(("q", "k", "v", "gate", "up", "down", "router", "shared_gate"), 1)
INPUT_AXES |= dict.fromkeys(("q_a", "q_b", "kv_a", "kv_b"), 1)  # latent attention
INPUT_AXES |= dict.fromkeys(("in_z", "in_x", "in_B", "in_C", "in_dt", "dt_low", "dt", "B", "C"), 1)  # Mamba
INPUT_AXES |= dict.fromkeys(("x", "y", "z", "a", "b"), 1)  # RG-LRU, DeltaNet
INPUT_AXES |= dict.fromkeys(("r", "w_a", "w_b", "a_a", "a_b", "g_a", "g_b", "v_a", "v_b"), 1)  # RWKV-7
INPUT_AXES |= dict.fromkeys(("dense", "class_head"), 1)  # heads of encoders
INPUT_AXES |= dict.fromkeys(("join",), 1)  # modules of the future
INPUT_AXES |= {"pooled": 1, "latent": 2, "from_latent": 1}  # patches of bytes


@dataclasses.dataclass(frozen=True)
class Fused:
    """Several of our parameters in one tensor, side by side along its outputs."""

    ours: tuple[str, ...]
    # Not one whole after the other: for each key/value head (or channel) a part of each. The groups are as many as the
    # smallest of them has heads, or as the parameter that is named has.
    grouped: bool | str = False
    transposed: bool = True  # [outputs, inputs], as torch's Linear has it


def kept(ours: str) -> Fused:
    """A linear map that is stored as [inputs, outputs]."""
    return Fused((ours,), transposed=False)


@dataclasses.dataclass(frozen=True)
class Whole:
    """Stored in the very shape that ours has, after so many axes of length one."""

    ours: str
    ones: int = 0


@dataclasses.dataclass(frozen=True)
class Merged:
    """Stacked experts, one below the other in one matrix."""

    ours: str
    transposed: bool = True  # each [outputs, inputs]


@dataclasses.dataclass(frozen=True)
class Conv:
    """Kernels of a convolution, ours [taps, ...], side by side along the channels of [channels, 1, taps]."""

    ours: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Folded:
    """Ours is flat, theirs a matrix with as many rows as another parameter has numbers, or heads."""

    ours: str
    rows_of: str


@dataclasses.dataclass(frozen=True)
class Copy:
    """In each module of the future: the same as a parameter outside the blocks (of a tied head: the embedding)."""

    ours: str


Rule = str | Fused | Whole | Merged | Conv | Folded | Copy
Leaf = tuple[tuple[int, ...], Path, Path]  # shape, logical axes, where it is in our unrolled parameters
Leaves = dict[str, Leaf]  # by our name
# A checkpoint's name to ours, such as "mixer/q", or "encoder/mixer/q" in an encoder's block, "future/mixer/q" in a
# module of the future, which also has "future/join". "{i}" is the layer's number, "{pair}" that of a pair of blocks,
# "{e}" the expert's; "{n}" the number of the module as if it were a layer, "{k}" its number from 0.
Names = dict[str, Rule]
NamesOf = Callable[[Block | None], Names]


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
    repeats: str | None = None  # the tensor whose copy it is; where it is missing, that one is all

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


def tensor_table(cfg: ModelConfig, names: Names | NamesOf, blocks_per_layer: int = 1) -> list[Tensor]:
    """The tensors of a checkpoint of `cfg`, embedding and head first, then layer by layer.

    Args:
      names: of all, or a function that gives those of a block, and of what is outside for None.
      blocks_per_layer: of ours in one layer of the checkpoint.

    Raises:
      ValueError: a parameter that the format has no name for.
    """
    table: list[Tensor] = []
    for block, numbers, leaves in _groups(cfg, blocks_per_layer):
        own = names(block) if callable(names) else names
        theirs = {key: (name, rule) for name, rule in own.items() for key in _ours(rule)}
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
            table += _tensors(name, rule, numbers, leaves)
        if "k" in numbers:
            copies = {name: rule.ours for name, rule in own.items() if isinstance(rule, Copy)}
            table += [_copy(name.format(**numbers), copied, table) for name, copied in copies.items()]
    return table


def name_of(names: Names | NamesOf, ours: str) -> str:
    """The checkpoint's name of a parameter outside the blocks."""
    names = names(None) if callable(names) else names
    return next(name for name, rule in names.items() if ours in _ours(rule))


def _ours(rule: Rule) -> tuple[str, ...]:
    if isinstance(rule, str):
        return (rule,)
    if isinstance(rule, Copy):
        return ()
    return rule.ours if isinstance(rule, Fused | Conv) else (rule.ours,)


def _groups(cfg: ModelConfig, blocks_per_layer: int) -> Iterator[tuple[Block | None, dict[str, int], Leaves]]:
    """(None, {}, everything outside the blocks), then (block, its numbers by the letters of `Names`, what is in it) for
    each block of a stack and each module of the future."""
    kinds = tuple(dict.fromkeys(cfg.blocks))
    small = cfg.replace(
        scan=True, blocks=kinds
    )  # one trace for each kind of block, however often it is there
    shapes, axes = param_shapes(small), logical_axes(small)
    runs = {name: (stack, block, numbers) for stack in STACKS for name, block, numbers in small.runs(stack)}
    modules = future_blocks(cfg.future)
    inside = runs.keys() | modules.keys()
    outside = [{key: value for key, value in tree.items() if key not in inside} for tree in (shapes, axes)]
    yield None, {}, _leaves(outside[0], outside[1], 0, "", ())
    run_of = {block: run for run, (stack, block, _) in runs.items() if stack == ""}
    layers = [(run, stack, i) for run, (stack, _, numbers) in runs.items() if stack for i in numbers]
    layers += [(run_of[block], "", i) for i, block in enumerate(cfg.blocks)]
    for run, stack, i in layers:
        leaves = _leaves(shapes[run], axes[run], 1, PREFIXES[stack], (f"{stack}block_{i}",))
        yield runs[run][1], {"i": i // blocks_per_layer, "pair": i // 2}, leaves
    for k, (name, block) in enumerate(modules.items()):
        leaves = _leaves(shapes[name], axes[name], 0, FUTURE, (name,))
        yield block, {"k": k, "n": len(cfg.blocks) // blocks_per_layer + k}, leaves


def _leaves(shapes: Params, axes: Params, drop: int, prefix: str, home: Path) -> Leaves:
    """Of a tree of parameters at `home`, without their first `drop` axes."""
    return {
        prefix + key.removeprefix("block_0/"): (leaf.shape[drop:], of_leaf[drop:], (*home, *key.split("/")))
        for (key, leaf), (_, of_leaf) in zip(_flat(shapes), _flat(axes), strict=True)
    }


def _copy(name: str, ours: str, table: list[Tensor]) -> Tensor:
    """A tensor that repeats that of a parameter outside the blocks."""
    by_path = {tensor.pieces[0].path: tensor for tensor in reversed(table)}
    original = by_path.get((ours,)) or by_path["embedding",]
    return dataclasses.replace(original, name=name, repeats=original.name)


def _tensors(name: str, rule: Rule, numbers: Mapping[str, int], leaves: Leaves) -> Iterator[Tensor]:
    """One tensor, or one for each expert."""
    ours = _ours(rule)
    experts = leaves[ours[0]][0][0] if "{e}" in name else 0
    for expert in range(experts) if experts else (None,):
        pieces = tuple(_piece(rule, leaves[key], expert) for key in ours)
        transposed = pieces[0].inputs > 0 and getattr(rule, "transposed", True)
        groups = _group_count(rule, pieces, leaves)
        shape = _stored_shape(rule, pieces, transposed, leaves, outside=not numbers)
        yield Tensor(name.format(**numbers, e=expert), shape, pieces, transposed, groups)


def _stored_shape(
    rule: Rule, pieces: tuple[Piece, ...], transposed: bool, leaves: Leaves, outside: bool
) -> tuple[int, ...]:
    first = pieces[0]
    if isinstance(rule, Whole):
        return *(1,) * rule.ones, *first.shape
    if isinstance(rule, str) and outside and first.inputs == 0:
        return first.shape
    if isinstance(rule, Folded):
        like = leaves[rule.rows_of][0]
        rows = like[0] if len(like) == 1 else like[1]
        return rows, math.prod(first.shape) // rows
    outputs = sum(piece.matrix[-1] for piece in pieces)
    if first.inputs == 0:
        return *first.matrix[:-1], outputs
    *lead, inputs, _ = first.matrix
    if isinstance(rule, Conv):
        return outputs, 1, inputs
    rows, columns = (outputs, inputs) if transposed else (inputs, outputs)
    if isinstance(rule, Merged):
        return math.prod(lead) * rows, columns
    return *lead, rows, columns


def _group_count(rule: Rule, pieces: tuple[Piece, ...], leaves: Leaves) -> int:
    """How many groups of outputs a tensor has, each with a part of every piece."""
    if not isinstance(rule, Fused) or not rule.grouped:
        return 1
    if isinstance(rule.grouped, str):
        return leaves[rule.grouped][0][1]
    return min(piece.shape[piece.lead + piece.inputs] for piece in pieces)


def _piece(rule: Rule, leaf: Leaf, expert: int | None) -> Piece:
    whole, axes, path = leaf
    shape = whole if expert is None else whole[1:]
    lead = int(expert is None and axes[:1] == ("experts",) and len(shape) > 1)
    inputs = INPUT_AXES.get(path[-1], 0) if len(shape) - lead > 1 else 0
    if path[-1] == "o":  # all but the model's width
        inputs = len(shape) - 1
    if isinstance(rule, Whole):
        lead, inputs = 0, 0
    if isinstance(rule, Conv):
        inputs = 1
    return Piece(path, shape, whole, expert, lead, inputs)


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

"""Maps a checkpoint's tensors to our parameters and back, with one table for both directions.

Checkpoints store a linear map as [outputs, inputs] with heads folded into one axis, sometimes several maps in one
tensor, or one tensor for each expert. Our parameters are [inputs, outputs] with separate axes for heads and experts.
Reshapes, transposes and concatenation convert between them, so no bit changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from model.config import Block, ModelConfig
from model.function import Params
from model.parameters import ParamInfo, param_info
from model.readouts.mtp import mtp_blocks

Path = tuple[str, ...]

ENCODER = "encoder/"  # prefix of our names in the encoder's blocks; other stacks have their own
MTP_PREFIX = "mtp/"  # prefix of our names in an MTP module and its block


@dataclasses.dataclass(frozen=True)
class Fused:
    """Several of our parameters in one tensor, concatenated along its outputs."""

    ours: tuple[str, ...]
    # The parameters are interleaved: for each key/value head (or channel), a part of each. There are as many groups as
    # the smallest parameter has heads, or the parameter of this name.
    grouped: bool | str = False
    transposed: bool = True  # [outputs, inputs], as in torch's Linear


def untransposed(ours: str) -> Fused:
    """A linear map that is stored as [inputs, outputs]."""
    return Fused((ours,), transposed=False)


@dataclasses.dataclass(frozen=True)
class Whole:
    """Stored in our shape, after `ones` axes of length one."""

    ours: str
    ones: int = 0


@dataclasses.dataclass(frozen=True)
class Merged:
    """Stacked experts, concatenated along the rows of one matrix."""

    ours: str
    transposed: bool = True  # each [outputs, inputs]


@dataclasses.dataclass(frozen=True)
class Conv:
    """Convolution kernels, ours [taps, ...], concatenated along the channels of [channels, 1, taps]."""

    ours: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Folded:
    """Our vector is a matrix there, with as many rows as another parameter has numbers or heads."""

    ours: str
    rows_of: str


@dataclasses.dataclass(frozen=True)
class Copy:
    """In each MTP module: a copy of a parameter outside the blocks; for a tied head, the embedding."""

    ours: str


Rule = str | Fused | Whole | Merged | Conv | Folded | Copy
Leaf = tuple[ParamInfo, Path]  # a block's parameter, and its path in our unrolled parameters
Leaves = dict[str, Leaf]  # by our name
# A checkpoint's name -> ours, such as "mixer/q", "encoder/mixer/q" in an encoder's block, or "mtp/mixer/q" and
# "mtp/join" in an MTP module. "{i}" is the number of the layer, "{pair}" of a pair of blocks, "{e}" of the expert,
# "{k}" of the MTP module, and "{n}" its number if it counts as a layer.
Names = dict[str, Rule]
NamesOf = Callable[[Block | None], Names]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One of our parameters, or one expert's part of it."""

    path: Path  # in our unrolled parameters
    shape: tuple[int, ...]  # of the piece
    whole: tuple[int, ...]  # of the parameter
    expert: int | None
    lead: int  # leading axes in both layouts (stacked experts)
    inputs: int  # input axes; 0: not a linear map
    dtype: np.dtype  # of new parameters

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape with inputs and outputs folded into one axis each."""
        lead, rest = self.shape[: self.lead], self.shape[self.lead :]
        if self.inputs == 0:
            return *lead, math.prod(rest)
        return *lead, math.prod(rest[: self.inputs]), math.prod(rest[self.inputs :])


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and the parameters that it holds."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    transposed: bool
    groups: int = 1  # the outputs are in this many groups, each with a part of every piece
    repeats: str | None = None  # the tensor that it copies; the copy may be missing

    def to_ours(self, theirs: np.ndarray) -> list[np.ndarray]:
        """One array for each piece; views of `theirs` if possible."""
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
      names: all names, or a function from a block (None: outside blocks) to its names.
      blocks_per_layer: our blocks in one layer of the checkpoint.

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
    """Yields (block, its numbers by placeholder of `Names`, its leaves), first for parameters outside blocks."""
    kinds = tuple(dict.fromkeys(cfg.blocks))
    small = cfg.replace(scan=True, blocks=kinds)  # one trace for each kind of block
    infos = param_info(small)
    modules = mtp_blocks(cfg.mtp)
    yield None, {}, _leaves(_outside_blocks(small, infos), "", ())
    others = [stack for stack in small.stacks if stack.name]
    layers = [(stack, run, i) for stack in others for run in stack.runs(scan=True) for i in run.layers]
    own = {run.block: run for run in small.runs()}
    layers += [(small.stack(), own[block], i) for i, block in enumerate(cfg.blocks)]
    for stack, run, i in layers:
        home, prefix = ((stack.name,), f"{stack.name}/") if stack.name else ((), "")
        leaves = _leaves(cast(Params, stack.part_of(infos))[run.name], prefix, (*home, f"block_{i}"))
        yield run.block, {"i": i // blocks_per_layer, "pair": i // 2}, leaves
    for k, (name, block) in enumerate(modules.items()):
        leaves = _leaves(infos[name], MTP_PREFIX, (name,))
        yield block, {"k": k, "n": len(cfg.blocks) // blocks_per_layer + k}, leaves


def _outside_blocks(cfg: ModelConfig, infos: Params) -> Params:
    """The tree without the runs of its stacks and without MTP modules."""
    found = {key: value for key, value in infos.items() if key not in mtp_blocks(cfg.mtp)}
    for stack in cfg.stacks:
        runs = {run.name for run in stack.runs(cfg.scan)}
        part = {key: value for key, value in (stack.part_of(found) or {}).items() if key not in runs}
        found = {**found, stack.name: part} if stack.name else part
    return found


def _leaves(infos: Params, prefix: str, home: Path) -> Leaves:
    """The leaves of a tree of parameters at `home`, without the axis of layers."""
    return {
        prefix + key.removeprefix("block_0/"): (info.of_layer(), (*home, *key.split("/")))
        for key, info in _flat(infos)
    }


def _copy(name: str, ours: str, table: list[Tensor]) -> Tensor:
    """A tensor that copies a parameter outside the blocks."""
    by_path = {tensor.pieces[0].path: tensor for tensor in reversed(table)}
    original = by_path.get((ours,)) or by_path["embedding",]
    return dataclasses.replace(original, name=name, repeats=original.name)


def _tensors(name: str, rule: Rule, numbers: Mapping[str, int], leaves: Leaves) -> Iterator[Tensor]:
    """One tensor, or one for each expert."""
    ours = _ours(rule)
    experts = leaves[ours[0]][0].shape[0] if "{e}" in name else 0
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
        like = leaves[rule.rows_of][0].shape
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
    """The number of groups of outputs, each with a part of every piece."""
    if not isinstance(rule, Fused) or not rule.grouped:
        return 1
    if isinstance(rule.grouped, str):
        return leaves[rule.grouped][0].shape[1]
    return min(piece.shape[piece.lead + piece.inputs] for piece in pieces)


def _piece(rule: Rule, leaf: Leaf, expert: int | None) -> Piece:
    info, path = leaf
    whole, skipped = info.shape, int(expert is not None)
    shape = whole[skipped:]
    lead = int(expert is None and info.axes[:1] == ("experts",) and len(shape) > 1)
    inputs = len(info.input_axes)
    if len(shape) - lead <= 1 or info.input_axes != tuple(range(skipped + lead, skipped + lead + inputs)):
        inputs = 0  # a vector, or stored in our layout: a head has its outputs first in both
    if isinstance(rule, Whole):
        lead, inputs = 0, 0
    if isinstance(rule, Conv):
        inputs = 1
    return Piece(path, shape, whole, expert, lead, inputs, info.dtype)


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

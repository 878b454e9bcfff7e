"""Which numbers are merged as one tensor: what a Hugging Face folder of the model keeps as one tensor.

Angles, trimming and rescaling depend on it. So a merge of native checkpoints, scanned or not, equals a merge of folders
and that of other tools. Where no family can express a model, each parameter of a block, or of an expert, is a tensor.
"""

from __future__ import annotations

from typing import Any, cast

from flax.traverse_util import flatten_dict

from model.config import ModelConfig
from model.families.tensors import Piece, Tensor, tensor_table
from model.formats.huggingface import family_of
from model.parameters import ParamInfo, param_info

Keys = tuple[str, ...]


def merged_tensors(cfg: ModelConfig) -> list[Tensor]:
    """All tensors of a model; their pieces have paths in its unrolled parameters."""
    try:
        family = family_of(cfg)
    except ValueError:
        return _of_parameters(cfg)
    table = tensor_table(cfg, family.names_of(cfg), family.blocks_per_layer)
    return [tensor for tensor in table if tensor.repeats is None]


def _of_parameters(cfg: ModelConfig) -> list[Tensor]:
    found = []
    for path, info in flat(param_info(cfg.replace(scan=False))).items():
        split = info.axes[:1] == ("experts",) and len(info.shape) > 1
        for expert in range(info.shape[0]) if split else (None,):
            found.append(_of_parameter(path, info, expert))
    return found


def _of_parameter(path: Keys, info: ParamInfo, expert: int | None) -> Tensor:
    skipped = int(expert is not None)
    shape, inputs = info.shape[skipped:], len(info.input_axes)
    if len(shape) < 2 or info.input_axes != tuple(range(skipped, skipped + inputs)):
        inputs = 0  # a vector, or outputs come first already
    piece = Piece(path, shape, info.shape, expert, 0, inputs, info.dtype)
    stored = piece.matrix[::-1] if inputs else shape  # [outputs, inputs]
    name = "/".join(path) + ("" if expert is None else f"[{expert}]")
    return Tensor(name, stored, (piece,), transposed=inputs > 0)


def flat(tree: Any) -> dict[Keys, Any]:
    """The leaves of a tree of parameters by path."""
    return cast(dict, flatten_dict(tree))

"""Quantizes the linear maps of a trained model, and dequantizes them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from model.blocks.linear import within_block
from model.config import ModelConfig
from model.function import Params
from model.kernels import native
from model.kernels.choice import said
from model.kernels.quantized_matmul import formats, panels
from model.kernels.quantized_matmul.formats import FORMATS, Kind
from model.layout import relayout
from model.packed import Packed
from model.parameters import ParamInfo, param_info
from model.weights import Quantized, in_whole_bytes, is_quantized

Path = tuple[str, ...]


def quantize(
    cfg: ModelConfig,
    params: Params,
    kind: Kind,
    block: int | Literal["all"] | None = None,
    targets: tuple[str, ...] = ("*",),
    *,
    double: bool = False,
) -> Params:
    """Rounds linear maps to few bits, with a scale for each block of inputs of an output; `apply` takes the result.

    Args:
      kind: "int8", "fp8", "int4", "uint4" (with an offset a block), "mxfp4" or "nf4".
      block: inputs that share a scale; None: the format's; "all": one scale an output, as the experts' kernel needs.
      targets: a map's name ("q") or its path within the block ("mixer/q"), with the wildcards `*` and `?`. Routers and
        embeddings, including a tied head, are not quantized.
      double: the scales are kept in 8 bits.

    Raises:
      ValueError: an unknown kind, a target that is no linear map or is already quantized, or a block that does not fit.
    """
    if kind not in FORMATS:
        raise ValueError(f"kind={kind!r} is no format of weights. Use one of {', '.join(FORMATS)}.")
    flat = cast(dict[Path, Any], flatten_dict(params))
    infos = cast(dict[Path, ParamInfo], flatten_dict(param_info(cfg)))
    for path in dict.fromkeys(path for target in targets for path in _matches(infos, target)):
        quantized = _quantized(path, flat[path], infos[path], kind, block)
        flat[path] = quantized.double_quantized() if double else quantized
    return cast(Params, unflatten_dict(flat))


def quantize_fitting(cfg: ModelConfig, params: Params, kind: Kind) -> Params:
    """`quantize` of all linear maps that are not quantized yet, in blocks of the format's size or the next smaller one
    that fits a map's inputs."""
    flat = cast(dict[Path, Any], flatten_dict(params))
    infos = cast(dict[Path, ParamInfo], flatten_dict(param_info(cfg)))
    for path, array in flat.items():
        if infos[path].is_weight and not is_quantized(array):
            sizes = tuple(infos[path].shape[i] for i in infos[path].input_axes)
            block = next(n for n in range(FORMATS[kind].block, 0, -1) if scale_blocks(sizes, n))
            flat[path] = _quantized(path, array, infos[path], kind, block)
    return cast(Params, unflatten_dict(flat))


def dequantize(params: Params, dtype: Any = jnp.float32) -> Params:
    """The tree with each quantized weight as an array; other arrays are unchanged."""
    widen = lambda leaf: leaf.dense(dtype) if is_quantized(leaf) else leaf
    return jax.tree.map(widen, params, is_leaf=is_quantized)


def packed_for_decoding(cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same model with its weights as the platform of its parameters multiplies them.

    On one CPU quantized weights are packed (`model.packed`), and so are bfloat16 ones of a model that computes in
    float32; in unrolled blocks, since a scan would copy each layer's. Weights of experts, and of kinds and shapes
    without panels, stay as they are, as int8 where their dtype is int4.
    """
    infos = cast(dict[Path, ParamInfo], flatten_dict(param_info(cfg)))
    flat = cast(dict[Path, Any], flatten_dict(params))
    wanted = {
        path for path, leaf in flat.items() if path in infos and _can_be_packed(cfg, path, leaf, infos[path])
    }
    if not wanted:
        return cfg, in_whole_bytes(params)
    if reason := native.missing():
        said(
            "quantized", "plain", "there are no native kernels", reason, "Each step widens all weights first."
        )
        return cfg, in_whole_bytes(params)
    cfg, params = relayout(cfg, params, scan=False)
    infos = cast(dict[Path, ParamInfo], flatten_dict(param_info(cfg)))
    flat = cast(dict[Path, Any], flatten_dict(params))
    for path, leaf in flat.items():
        if path in infos and _can_be_packed(cfg, path, leaf, infos[path]):
            flat[path] = _packed(leaf, infos[path])
    return cfg, in_whole_bytes(unflatten_dict(flat))


def _can_be_packed(cfg: ModelConfig, path: Path, leaf: Any, info: ParamInfo) -> bool:
    arrays = jax.tree.leaves(leaf)
    if not all(isinstance(x, jax.Array) for x in arrays) or "experts" in info.axes:
        return False
    devices = {device for x in arrays for device in x.devices()}
    if len(devices) > 1 or devices.pop().platform != "cpu":
        return False
    if isinstance(leaf, Quantized):
        return True
    is_map = info.is_weight or path == ("embedding",)
    return not is_quantized(leaf) and is_map and leaf.dtype == jnp.bfloat16 and cfg.dtype == "float32"


def _packed(weight: Quantized | jax.Array, info: ParamInfo) -> Quantized | jax.Array | Packed:
    """In panels, if its shape allows it."""
    if isinstance(weight, Quantized):
        matrix = weight.matrix()
        if panels.refusal(matrix.values_IO.shape[0], matrix.scales_NO.shape[0], weight.kind):
            return weight
        return Packed(panels.pack(matrix), weight.shape, weight.inputs)
    places = list(info.input_axes) or [weight.ndim - 1]  # a table of vectors gives them as its outputs
    inputs = math.prod(weight.shape[i] for i in places)
    if panels.refusal(inputs, 1, "bfloat16"):
        return weight.astype(jnp.float32)
    order = places + [i for i in range(weight.ndim) if i not in places]
    matrix_IO = weight.transpose(order).reshape(inputs, -1)
    return Packed(panels.pack_bfloat16(matrix_IO), weight.shape, tuple(i - weight.ndim for i in places))


def scale_blocks(sizes: tuple[int, ...], block: int) -> tuple[int, ...] | None:
    """The number of blocks along each input axis, the last axis filled first; None: the block does not fit."""
    counts = []
    for size in reversed(sizes):
        part = math.gcd(block, size)
        if part not in (block, size):
            return None
        counts.append(size // part)
        block //= part
    return tuple(reversed(counts)) if block == 1 else None


def _matches(infos: dict[Path, ParamInfo], target: str) -> Iterator[Path]:
    """The weights that match a target."""
    named = [path for path in infos if any(fnmatch.fnmatchcase(name, target) for name in _names(path))]
    weights = [path for path in named if infos[path].is_weight]
    if not weights:
        known = sorted({path[-1] for path, info in infos.items() if info.is_weight})
        found = (
            f"{'/'.join(named[0])} is no weight that can be quantized"
            if named
            else "no parameter is named so"
        )
        raise ValueError(f"targets: {target!r}: {found}. Those that can are named {', '.join(known)}.")
    yield from weights


def _names(path: Path) -> tuple[str, str]:
    return path[-1], "/".join(within_block(path))


def _quantized(
    path: Path, array: Any, info: ParamInfo, kind: Kind, block: int | Literal["all"] | None
) -> Quantized:
    name = "/".join(path)
    if is_quantized(array):
        raise ValueError(f"{name} is already quantized, as {array.kind}.")
    sizes = tuple(info.shape[i] for i in info.input_axes)
    inputs = math.prod(sizes)
    block = inputs if block == "all" else block or FORMATS[kind].block
    counts = scale_blocks(sizes, block)
    if counts is None:
        fitting = [n for n in range(1, inputs + 1) if scale_blocks(sizes, n)]
        raise ValueError(
            f"{name}: blocks of {block} do not fit its inputs ({' x '.join(map(str, sizes))}). Use one of "
            f"{', '.join(map(str, fitting))}, or leave it out of the targets."
        )
    places = list(info.input_axes)
    order = places + [i for i in range(len(info.shape)) if i not in places]
    back = [order.index(i) for i in range(len(order))]
    array = jnp.asarray(array).transpose(order)
    rounded = formats.quantize(array.reshape(inputs, -1), kind, block)
    values = rounded.values_IO.reshape(array.shape).transpose(back)
    by_block = lambda part: part.reshape(*counts, *array.shape[len(places) :]).transpose(back)
    offsets = None if rounded.offsets_NO is None else by_block(rounded.offsets_NO)
    negative = tuple(i - len(order) for i in places)
    return Quantized(values, by_block(rounded.scales_NO), kind, negative, offsets=offsets)

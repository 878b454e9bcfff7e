"""The plan of a merge: for each tensor of the result, its sources and its numbers. It reads no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from configs.typed import ConfigError
from model.adapters import is_readout
from model.config import ModelConfig
from model.families.tensors import Tensor
from model.formats import storage
from model.formats.lazy import named
from model.function import param_shapes
from model.merge.architecture import check_can_be_merged, check_same, unrolled
from model.merge.recipe import (
    Dare,
    LayerSource,
    Method,
    Recipe,
    Setting,
    Slice,
    Ties,
    check_patterns,
    names_of,
    value_of,
)
from model.merge.tensors import Keys, flat, merged_tensors
from model.readouts.mtp import mtp_blocks

LEAST_SUM = 1e-8  # of weights that are normalized


class Model(NamedTuple):
    """A source, opened: its parameters are still in its files."""

    path: str
    cfg: ModelConfig
    params: dict[Keys, Any]  # unrolled, by path


class Place(NamedTuple):
    """Where a tensor of the result comes from."""

    part: Slice
    layer: int | None  # the number within the slice; None outside the main stack
    depth: float  # of the layer in its slice or stack, from 0 to 1


@dataclasses.dataclass(frozen=True)
class Step:
    """The merge of one tensor."""

    tensor: Tensor
    method: Method  # with a number for each setting
    sources: tuple[tuple[Model, Tensor], ...]
    base: tuple[Model, Tensor] | None
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    dtypes: tuple[np.dtype, ...]  # of the pieces in the result


@dataclasses.dataclass(frozen=True)
class Plan:
    cfg: ModelConfig
    steps: list[Step]


def plan(recipe: Recipe, dtype: str | None = None) -> Plan:
    """Opens the sources and checks that they and the recipe fit.

    Args:
      dtype: of the result; default: each parameter's in its first source.

    Raises:
      ConfigError: models of different architectures, with adapters or quantized; layers that a model does not have;
        patterns that match nothing; weights that can't be normalized.
    """
    paths = [source.model for source in recipe.sources]
    more = [path for path in (recipe.base, recipe.config) if path is not None]
    models = {path: _open(path) for path in dict.fromkeys([*paths, *more])}
    parts = _whole(recipe, models) if recipe.models else recipe.slices
    cfg = _config(recipe, parts, models)
    tensors = merged_tensors(cfg)
    check_patterns(recipe, [piece.path for tensor in tensors for piece in tensor.pieces])
    steps = [_step(recipe, _place(cfg, parts, tensor), tensor, models) for tensor in tensors]
    if dtype is not None:
        cfg = cfg.replace(dtype=dtype, param_dtype=dtype)
        steps = _in_dtype(cfg, steps)
    return Plan(cfg, steps)


def _open(path: str) -> Model:
    cfg, params = storage.load_lazily(path)
    check_can_be_merged(path, cfg, params)
    leaves = unrolled(cfg, params).items()
    return Model(path, cfg, {keys: named(leaf, f"{path}: {'/'.join(keys)}") for keys, leaf in leaves})


def _whole(recipe: Recipe, models: dict[str, Model]) -> tuple[Slice, ...]:
    """Whole models as one slice."""
    first = models[recipe.models[0].model].cfg
    depth = len(first.blocks)
    for path, model in models.items():
        check_same(recipe.models[0].model, first, path, model.cfg, shapes_only=recipe.config is not None)
    return (
        Slice(tuple(LayerSource(s.model, s.weight, s.density, layers=(0, depth)) for s in recipe.models)),
    )


def _config(recipe: Recipe, parts: Sequence[Slice], models: dict[str, Model]) -> ModelConfig:
    """The config of the result. Raises ConfigError if the sources of a slice differ."""
    first, blocks = parts[0].models[0].model, []
    for i, part in enumerate(parts):
        lead = part.models[0]
        ranges = [(source.model, source.layers) for source in part.models]
        if recipe.base is not None and (part.method or recipe.method).needs_base:
            ranges.append((recipe.base, _base_layers(part)))
        if recipe.config is not None:
            ranges.append((recipe.config, lead.layers))
        for path, layers in ranges:
            count = len(models[path].cfg.blocks)
            if layers[1] > count:
                raise ConfigError(f"slices[{i}] asks for layers {list(layers)} of {path}, which has {count}.")
        found = [models[path].cfg.blocks[slice(*layers)] for path, layers in ranges]
        wanted = models[first].cfg.replace(blocks=found[0])
        for (path, _), of_path in zip(ranges, found):
            cfg = models[path].cfg.replace(blocks=of_path)
            check_same(lead.model, wanted, path, cfg, shapes_only=recipe.config is not None)
        blocks += found[-1] if recipe.config is not None else found[0]
    return models[recipe.config or first].cfg.replace(blocks=tuple(blocks), scan=models[first].cfg.scan)


def _base_layers(part: Slice) -> tuple[int, int]:
    return part.base_layers or part.models[0].layers


def _place(cfg: ModelConfig, parts: Sequence[Slice], tensor: Tensor) -> Place:
    path = tensor.pieces[0].path
    layer = _number(path[0])
    if layer is not None:
        for part in parts:
            start, stop = part.models[0].layers
            if layer < stop - start:
                return Place(part, layer, layer / (stop - start - 1) if stop - start > 1 else 1.0)
            layer -= stop - start
    stacks = {stack.name: stack for stack in cfg.stacks}
    names = list(stacks)
    part = parts[-1] if _is_after(cfg, path, names[names.index("") + 1 :]) else parts[0]
    inner = _number(path[1]) if path[0] in stacks else None
    if inner is None:
        return Place(part, None, 0.0)
    return Place(part, None, inner / max(1, len(stacks[path[0]].blocks) - 1))


def _number(name: str) -> int | None:
    """Of a block, by its name."""
    kind, _, number = name.partition("_")
    return int(number) if kind == "block" and number.isdecimal() else None


def _is_after(cfg: ModelConfig, path: Keys, stacks: Sequence[str]) -> bool:
    """Whether a parameter outside the main stack's blocks is used after them."""
    own = path[0] in mtp_blocks(cfg.mtp) or path[0] in stacks
    return (
        own or is_readout(path) or path[0] in ("final_norm", "head_transform", "head", "head_bias", "pooler")
    )


def _step(recipe: Recipe, place: Place, tensor: Tensor, models: dict[str, Model]) -> Step:
    part, method = place.part, place.part.method or recipe.method
    number = lambda setting, where: _number_of(setting, tensor, place, where)
    where = "method" if part.method is None else "the slice's method"
    settings = {name: number(getattr(method, name), f"{where}.{name}") for name in method.settings}
    weights = tuple(number(s.weight, f"weight of {s.model}") for s in part.models)
    densities = tuple(number(s.density, f"density of {s.model}") for s in part.models)
    for source, density in zip(part.models, densities):
        if not 0 < density <= 1:
            raise ConfigError(
                f"density of {source.model} is {density:g} for {tensor.name}; wanted more than 0, up to 1."
            )
    if _divides_by_sum(method) and abs(sum(weights)) < LEAST_SUM:
        raise ConfigError(
            f"the weights of {tensor.name} sum to 0 ({', '.join(f'{w:g}' for w in weights)}), and normalize divides by "
            "their sum. Change them, or set normalize to false."
        )
    sources = tuple(_of_source(models[s.model], tensor, place.layer, s.layers) for s in part.models)
    base = None
    if method.needs_base and recipe.base is not None:
        base = _of_source(models[recipe.base], tensor, place.layer, _base_layers(part))
    model, stored = sources[0]
    dtypes = tuple(np.dtype(model.params[piece.path].dtype) for piece in stored.pieces)
    method = dataclasses.replace(method, **settings)
    return Step(tensor, method, sources, base, weights, densities, dtypes)


def _divides_by_sum(method: Method) -> bool:
    """Whether all weights are added up; with elected signs, those that agree are, number by number."""
    elects = isinstance(method, Ties) or (isinstance(method, Dare) and method.elect_signs)
    return getattr(method, "normalize", False) and not elects


def _number_of(setting: Setting | None, tensor: Tensor, place: Place, where: str) -> float:
    """A setting's number for a tensor. Raises ConfigError if it has several numbers, for different parameters."""
    if setting is None:
        return 1.0
    found = {
        piece.path: value_of(setting, names_of(piece.path), place.depth, where) for piece in tensor.pieces
    }
    if len(set(found.values())) > 1:
        shown = ", ".join(f"{'/'.join(path)}: {value:g}" for path, value in found.items())
        raise ConfigError(f"{where}: {shown}; they are one tensor, {tensor.name}. Give them one number.")
    return next(iter(found.values()))


def _of_source(
    model: Model, tensor: Tensor, layer: int | None, layers: tuple[int, int]
) -> tuple[Model, Tensor]:
    """The tensor of a source that belongs to one of the result."""
    if layer is None:
        return model, tensor
    home = f"block_{layers[0] + layer}"
    pieces = tuple(dataclasses.replace(piece, path=(home, *piece.path[1:])) for piece in tensor.pieces)
    return model, dataclasses.replace(tensor, pieces=pieces)


def _in_dtype(cfg: ModelConfig, steps: list[Step]) -> list[Step]:
    """The steps with results in the config's dtype, but for what is float32 in any model."""
    shapes = flat(param_shapes(cfg.replace(scan=False)))
    of = lambda step: tuple(np.dtype(shapes[piece.path].dtype) for piece in step.tensor.pieces)
    return [dataclasses.replace(step, dtypes=of(step)) for step in steps]

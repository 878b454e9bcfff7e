"""Whether models have one architecture, so that their parameters can be merged, and in what they differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from configs.typed import ConfigError
from model.config import ModelConfig
from model.function import param_shapes
from model.layout import relayout
from model.merge.tensors import Keys, flat
from model.weights import is_quantized

# What changes how a model runs, not what it computes.
HOW_IT_RUNS = frozenset(("scan", "dtype", "param_dtype", "remat", "kernels", "max_length", "family"))


def check_can_be_merged(path: str, cfg: ModelConfig, params: Any) -> None:
    """Raises ConfigError for a model with adapters or quantized weights."""
    if cfg.adapters is not None:
        raise ConfigError(
            f"{path}: has adapters, which are no part of its weights. Merge one of them into the model first: "
            f"python -m model convert {path} DST --slot=0."
        )
    quantized = ["/".join(keys) for keys, leaf in flat(params).items() if is_quantized(leaf)]
    if quantized:
        raise ConfigError(
            f"{path}: {quantized[0]} is quantized, and a merge of rounded weights would be rounded twice. Give the "
            "model that it was made from, or dequantize it first (model.dequantize, model.save)."
        )


def check_same(first: str, wanted: ModelConfig, path: str, cfg: ModelConfig, *, shapes_only: bool) -> None:
    """Raises ConfigError that names what differs.

    Args:
      shapes_only: only shapes of parameters and kinds of blocks need to be equal.
    """
    found = _other_shapes(wanted, cfg) if shapes_only else list(differences(wanted, cfg))
    if not found:
        return
    shown = "; ".join(f"{name} is {one} and {other}" for name, one, other in found[:5])
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
    mend = "Only models of one architecture can be merged."
    if not shapes_only and not _other_shapes(wanted, cfg):
        mend = "Their shapes are equal: to merge them nevertheless, name the model that gives the config (`config`)."
    raise ConfigError(f"{first} and {path} differ: {shown}{more}. {mend}")


def differences(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, value, other value) of each field that differs between two configs, at any depth."""
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        for field in dataclasses.fields(one):
            if name or field.name not in HOW_IT_RUNS:
                inner = f"{name}.{field.name}" if name else field.name
                yield from differences(getattr(one, field.name), getattr(other, field.name), inner)
    elif isinstance(one, tuple) and isinstance(other, tuple):
        if len(one) != len(other):
            yield f"the number of {name}", len(one), len(other)
            return
        for i, (a, b) in enumerate(zip(one, other)):
            yield from differences(a, b, f"{name}[{i}]")
    elif one != other:
        short = lambda part: type(part).__name__ if dataclasses.is_dataclass(part) else part
        yield name, short(one), short(other)


def _other_shapes(one: ModelConfig, other: ModelConfig) -> list[tuple[str, Any, Any]]:
    """(name, value, other value) of kinds of blocks and shapes that differ."""
    kinds = [(f"blocks[{i}]", _kinds(a), _kinds(b)) for i, (a, b) in enumerate(zip(one.blocks, other.blocks))]
    shapes = [
        {"/".join(keys): leaf.shape for keys, leaf in flat(param_shapes(cfg.replace(scan=False))).items()}
        for cfg in (one, other)
    ]
    names = dict.fromkeys([*shapes[0], *shapes[1]])
    found = [*kinds, *((name, *(of.get(name, "absent") for of in shapes)) for name in names)]
    return [(name, a, b) for name, a, b in found if a != b]


def _kinds(block: Any) -> str:
    parts = (getattr(block, field.name) for field in dataclasses.fields(block))
    return ", ".join(type(part).__name__ for part in parts if dataclasses.is_dataclass(part))


def unrolled(cfg: ModelConfig, params: Any) -> dict[Keys, Any]:
    """The parameters by path, with one group a block."""
    _, params = relayout(cfg, params, scan=False)
    return flat(params)

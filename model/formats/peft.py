"""Reads and writes PEFT adapter folders: adapter_config.json and adapter_model.safetensors.

Format: https://huggingface.co/docs/peft (peft 0.21): for each adapted tensor of the base model, `lora_A` [rank,
inputs], `lora_B` [outputs, rank] and, for DoRA, `lora_magnitude_vector` [outputs].
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from configs.files import replacing
from model.adapters import is_adapter
from model.blocks.linear import column_lengths, within_block
from model.blocks.lora import LoRA
from model.config import ModelConfig
from model.families.common import Reader
from model.families.tensors import Path as Place
from model.families.tensors import Piece, Tensor, get, tensor_table
from model.formats import safetensors_file
from model.formats.huggingface import family_of
from model.formats.peft_init import read_init, with_taken_out
from model.formats.peft_targets import Patterns, check_targets, read_by_module
from model.formats.safetensors_file import StoredTensor
from model.function import Params, logical_axes, param_shapes
from model.layout import relayout
from model.weights import is_quantized

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
ENDS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
ENDS |= {"lora_magnitude_vector.weight": "magnitude"}

# Keys that do not change the numbers of an adapter with given tensors.
IGNORED_KEYS = frozenset(
    """
    auto_mapping base_model_name_or_path revision inference_mode task_type peft_version lora_dropout fan_in_fan_out
    runtime_config megatron_core eva_config corda_config loftq_config lora_ga_config qalora_group_size
    ensure_weight_tying
    """.split()
)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A folder: the parts of each adapted tensor of the base model."""

    folder: Path
    rank: int
    alpha: float
    rank_stabilized: bool
    decomposed: bool
    init: str | None  # a key of `peft_init.TAKEN_OUT`; such adapters are read with twice their rank
    alphas: Mapping[str, float]  # modules with their own
    ranks: Mapping[str, int]
    # name of the base model's tensor -> part -> stored tensor
    tensors: Mapping[str, Mapping[str, StoredTensor]]

    def spec(self, module: str, rank: int) -> LoRA:
        alpha = self.alphas.get(module, self.alpha)
        if self.init is None:
            return LoRA(rank, alpha, rank_stabilized=self.rank_stabilized)
        growth = 2**0.5 if self.rank_stabilized else 2.0  # the scale uses the folder's rank
        return LoRA(2 * rank, alpha * growth, rank_stabilized=self.rank_stabilized)


def load_adapters(
    cfg: ModelConfig, params: Params, folders: Sequence[str | Path]
) -> tuple[ModelConfig, Params]:
    """The model with the adapters of these folders, one in each slot.

    Ranks and scales may differ: smaller adapters are padded with zeros, and different scales are multiplied into `b`.

    Raises:
      ValueError: damaged folders, tensors that this model does not have, or settings that are not supported.
    """
    scan, (cfg, params) = cfg.scan, relayout(cfg, params, scan=False)
    table = {tensor.name: tensor for tensor in _table(cfg)}
    adapters = [_read(Path(folder)) for folder in folders]
    for adapter in adapters:
        _check_fits(adapter, table)
    specs = {_spec(adapter, name) for adapter in adapters for name in adapter.tensors}
    shared = specs.pop() if len(specs) == 1 else None
    rank = max(spec.rank for spec in [*specs, *([shared] if shared else [])])
    targets = {
        "/".join(within_block(piece.path))
        for a in adapters
        for name in a.tensors
        for piece in table[name].pieces
    }
    spec = dataclasses.replace(
        shared or LoRA(rank, float(rank)),
        targets=tuple(sorted(targets)),
        slots=len(adapters),
        decomposed=any(adapter.decomposed for adapter in adapters),
    )
    cfg = cfg.replace(adapters=spec)
    new = _empty(cfg, params)
    for slot, adapter in enumerate(adapters):
        for name in adapter.tensors:
            _fill(new, params, cfg, adapter, table[name], slot, 1.0 if shared else _spec(adapter, name).scale)
    return relayout(cfg, unflatten_dict(flatten_dict(params) | new), scan=scan)


def save_adapter(folder: str | Path, cfg: ModelConfig, params: Params, slot: int = 0, base: str = "") -> None:
    """Writes one adapter as a folder that PEFT loads.

    Args:
      base: name or path of the base model, for PEFT.

    Raises:
      ValueError: PEFT cannot express the adapters: maps in one tensor of the base model with different `a`, or
        experts.
    """
    spec = cfg.adapters
    if spec is None or not 0 <= slot < spec.slots:
        raise ValueError(f"slot={slot}: the model's adapters are {spec}.")
    cfg, params = relayout(cfg, params, scan=False)
    stored: dict[str, np.ndarray] = {}
    modules = set()
    for tensor in _table(cfg):
        if spec.adapts(within_block(tensor.pieces[0].path)) and tensor.pieces[0].inputs:
            module = tensor.name.removesuffix(".weight")
            modules.add(module.rpartition(".")[2])
            parts = _to_theirs(tensor, params, slot, spec.decomposed)
            stored |= {f"{PREFIX}{module}.{end}": value for end, value in parts.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.rank_stabilized,
        "use_dora": spec.decomposed,
        "target_modules": sorted(modules),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    with replacing(Path(folder), CONFIG) as new:
        shapes = {name: (value.dtype, value.shape) for name, value in stored.items()}
        safetensors_file.write(new / WEIGHTS, shapes, lambda name: stored[name])
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _table(cfg: ModelConfig) -> list[Tensor]:
    """The base model's tensors, by its family's names."""
    plain = cfg.replace(adapters=None)
    family = family_of(plain)
    return tensor_table(plain, family.names_of(plain), family.blocks_per_layer)


def _spec(adapter: Adapter, name: str) -> LoRA:
    return adapter.spec(name.removesuffix(".weight"), adapter.tensors[name]["a"].shape[0])


def _empty(cfg: ModelConfig, params: Params) -> dict[Place, np.ndarray]:
    """Adapters without effect: zeros, and for DoRA the lengths of the maps' columns."""
    made, axes = {}, logical_axes(cfg)
    shapes: dict[Place, Any] = dict(flatten_dict(param_shapes(cfg)))
    for path, leaf in shapes.items():
        if not is_adapter(path):
            continue
        made[path] = np.zeros(leaf.shape, np.float32)
        if path[-1].endswith("_lora_magnitude"):
            lead = get(axes, path).index("adapters")
            weight = _array(params, (*path[:-1], path[-1].removesuffix("_lora_magnitude")))
            inputs = weight.ndim - (made[path].ndim - 1)
            made[path][:] = np.expand_dims(column_lengths(weight, inputs, lead), lead)
    return made


def _fill(new, params: Params, cfg: ModelConfig, adapter: Adapter, tensor: Tensor, slot: int, scale: float):
    """Puts one tensor's part of an adapter into its slot."""
    parts = {
        part: np.asarray(stored.read(), np.float32) for part, stored in adapter.tensors[tensor.name].items()
    }
    if adapter.init is not None:
        weight = _weight(tensor, params)
        own = _spec(adapter, tensor.name).scale
        parts["a"], parts["b"] = with_taken_out(adapter.init, weight, parts["a"], parts["b"], own)
    rank = parts["a"].shape[0]
    b = _of_outputs(tensor, rank).to_ours(parts["b"])
    lengths = _of_outputs(tensor, 1).to_ours(parts["magnitude"][:, None]) if "magnitude" in parts else None
    for i, piece in enumerate(tensor.pieces):
        where = (slot,) if piece.expert is None else (piece.expert, slot)
        of = lambda end, piece=piece, where=where: new[(*piece.path[:-1], piece.path[-1] + end)][where]
        a = parts["a"].T.reshape(*piece.shape[: piece.inputs], rank)
        of("_lora_a")[..., :rank] = a
        of("_lora_b")[:rank] = b[i] * scale
        if lengths is not None:
            of("_lora_magnitude")[...] = lengths[i][0]
        elif cast(LoRA, cfg.adapters).decomposed:  # a LoRA adapter among DoRA adapters: the length of the sum
            weight = _array(params, piece.path)
            weight = weight if piece.expert is None else weight[piece.expert]
            update = np.tensordot(of("_lora_a"), of("_lora_b"), 1)
            of("_lora_magnitude")[...] = column_lengths(weight + update, piece.inputs)


def _weight(tensor: Tensor, params: Params) -> np.ndarray:
    """The base model's map, float32 [outputs, inputs]."""
    whole = [_array(params, piece.path) for piece in tensor.pieces]
    pieces = [
        x if piece.expert is None else x[piece.expert] for x, piece in zip(whole, tensor.pieces, strict=True)
    ]
    weight = tensor.to_theirs(pieces)
    return weight if tensor.transposed else weight.T


def _array(params: Params, path: Place) -> np.ndarray:
    """A map's weight in float32, dequantized if it is quantized."""
    found = get(params, path)
    return np.asarray(found.dense(np.float32) if is_quantized(found) else found, np.float32)


def _to_theirs(tensor: Tensor, params: Params, slot: int, decomposed: bool) -> dict[str, np.ndarray]:
    pieces = tensor.pieces
    if pieces[0].lead:
        raise ValueError(
            f"{tensor.name} holds all experts in one tensor, for which PEFT has no LoRA. Merge the adapter instead, or "
            'save the whole model with format="native".'
        )
    where = lambda piece: (slot,) if piece.expert is None else (piece.expert, slot)
    of = lambda piece, end: np.asarray(get(params, (*piece.path[:-1], piece.path[-1] + end)))[where(piece)]
    a, *others = [of(piece, "_lora_a") for piece in pieces]
    if any(not np.array_equal(a, other) for other in others):
        raise ValueError(
            f"{tensor.name} holds {', '.join(piece.path[-1] for piece in pieces)} in one tensor, and their adapters "
            'have no common `a`. Merge the adapter instead, or save the whole model with format="native".'
        )
    rank = a.shape[-1]
    found = {
        "lora_A.weight": a.reshape(-1, rank).T,
        "lora_B.weight": _of_outputs(tensor, rank).to_theirs([of(piece, "_lora_b") for piece in pieces]),
    }
    if decomposed:
        lengths = [of(piece, "_lora_magnitude")[None] for piece in pieces]
        found["lora_magnitude_vector"] = _of_outputs(tensor, 1).to_theirs(lengths)[:, 0]
    return found


def _of_outputs(tensor: Tensor, inputs: int) -> Tensor:
    """A map from so many inputs to the outputs of `tensor`, in its order of them."""
    pieces = []
    for piece in tensor.pieces:
        shape = (inputs, *piece.shape[piece.inputs :])
        pieces.append(Piece(piece.path, shape, shape, piece.expert, 0, 1, piece.dtype))
    outputs = sum(piece.matrix[-1] for piece in pieces)
    return Tensor(tensor.name, (outputs, inputs), tuple(pieces), True, tensor.groups)


def _read(folder: Path) -> Adapter:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: has no {CONFIG}; wanted an adapter folder of PEFT.")
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder}: has no {WEIGHTS} (pickles are not read).")
    try:
        saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG}: not JSON: {error}") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{folder / CONFIG}: is a JSON {type(saved).__name__}; wanted an object.")
    config = Reader(saved, f"{folder / CONFIG}: ")
    config.must_be("peft_type", "LORA")
    config.must_be("bias", "none")
    tensors, patterns = _by_module(folder / WEIGHTS), Patterns(config)
    modules = [name.removesuffix(".weight") for name in tensors]
    check_targets(config, modules, patterns)
    adapter = Adapter(
        folder,
        config.integer("r"),
        config.number("lora_alpha"),
        config.flag("use_rslora", False),
        config.flag("use_dora", False),
        read_init(config.where, config.get("init_lora_weights", True)),
        read_by_module(config, "alpha_pattern", Reader.number, modules, patterns),
        read_by_module(config, "rank_pattern", Reader.integer, modules, patterns),
        tensors,
    )
    for _, key, value in config.unread():
        if key not in IGNORED_KEYS and value is not None and value is not False and value not in ([], ""):
            raise ValueError(f"{folder / CONFIG}: {key}={str(value)[:200]} is not supported.")
    _check_shapes(adapter)
    return adapter


def _by_module(path: Path) -> dict[str, dict[str, StoredTensor]]:
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in safetensors_file.read_header(path).items():
        end = next((end for end in ENDS if name.endswith("." + end)), None)
        if end is None or not name.startswith(PREFIX):
            raise ValueError(
                f"{path}: tensor {name!r} is no part of a LoRA; wanted names that begin with {PREFIX} and end in "
                f"{', '.join(ENDS)}."
            )
        base = name.removeprefix(PREFIX).removesuffix(end) + "weight"
        found.setdefault(base, {})[ENDS[end]] = tensor
    if not found:
        raise ValueError(f"{path}: has no tensors.")
    return found


def _check_shapes(adapter: Adapter) -> None:
    wanted = {"a", "b"} | ({"magnitude"} if adapter.decomposed else set())
    for name, parts in adapter.tensors.items():
        if set(parts) != wanted:
            raise ValueError(
                f"{adapter.folder}: {name} has {sorted(parts)}; wanted {sorted(wanted)} "
                f"by use_dora={adapter.decomposed}."
            )
        rank = adapter.ranks.get(name.removesuffix(".weight"), adapter.rank)
        matrices = all(len(parts[part].shape) == 2 for part in "ab")
        if not matrices or (rank, rank) != (parts["a"].shape[0], parts["b"].shape[-1]):
            raise ValueError(
                f"{adapter.folder}: {name} has lora_A {parts['a'].shape} and lora_B {parts['b'].shape}, with "
                f"r={rank} in {CONFIG}{' (rank_pattern)' * (rank != adapter.rank)}."
            )


def _check_fits(adapter: Adapter, table: Mapping[str, Tensor]) -> None:
    maps = {
        name for name, tensor in table.items() if tensor.pieces[0].inputs and len(tensor.pieces[0].path) > 1
    }
    for name, parts in adapter.tensors.items():
        if name not in maps or table[name].pieces[0].lead:
            raise ValueError(
                f"{adapter.folder}: adapts {name}, which is no linear map in a block of this model. It is an adapter "
                "of another base, or of a part that supports none (embeddings, heads, stacked experts)."
            )
        outputs, inputs = parts["b"].shape[0], parts["a"].shape[1]
        theirs = _of_outputs(table[name], inputs).shape
        piece = table[name].pieces[0]
        if (outputs, inputs) != (theirs[0], math.prod(piece.shape[: piece.inputs])):
            raise ValueError(
                f"{adapter.folder}: adapts {name} as a map from {inputs} to {outputs}; this model's has the shape "
                f"{table[name].shape}. It is an adapter of another base."
            )

"""Reads and writes models in Hugging Face folders: config.json and safetensors, whole or in shards.

The layout is that of transformers' `save_pretrained`. Weights are memory-mapped; pickles and code in a folder are never
run.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from configs.files import replacing
from model.adapters import check_without_adapters
from model.config import ModelConfig, ScalarHead
from model.families import FAMILIES, wrapped
from model.families.common import Family
from model.families.tensors import NamesOf, Tensor, get, name_of, tensor_table, unflatten
from model.formats import fp8, mxfp4, safetensors_file
from model.formats.fits import check_fits
from model.formats.fp8 import ScaledTensor
from model.formats.lazy import Lazy, Stacked
from model.formats.mxfp4 import PackedTensor
from model.formats.safetensors_file import StoredTensor
from model.function import Params
from model.layout import relayout, without_mtp

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

Stored = StoredTensor | PackedTensor | ScaledTensor

_log = logging.getLogger(__name__)


def load_config(folder: str | Path) -> ModelConfig:
    """The model of a folder's config.json, or of the file itself; activations have the dtype of the weights.

    Raises ValueError for a family or setting that is not supported.
    """
    folder = Path(folder)
    family, cfg, saved = _read_config(folder)
    names_decide = cfg.mtp is not None or saved["model_type"] in wrapped.TEXT
    names = _stored_names(folder) if names_decide else None
    if names is None:
        return cfg
    cfg = _with_head_of(family, cfg, names)
    return cfg if cfg.mtp is None or _has_mtp(family, cfg, names) else cfg.replace(mtp=None)


def load(folder: str | Path, dtype: str | None = None) -> tuple[ModelConfig, Params]:
    """(cfg, lazy parameters; see `model.formats.lazy`) of a folder.

    Args:
      dtype: of parameters (but for those that are float32 in any model) and activations; default: as stored.

    Raises:
      FileNotFoundError: no weights.
      ValueError: damaged files; tensors that are missing, unknown, or of another shape than in the config.
    """
    folder = Path(folder)
    family, cfg, saved = _read_config(folder)
    if dtype is not None:
        cfg = cfg.replace(dtype=dtype, param_dtype=dtype)
    head = name_of(family.names_of(cfg), "head")
    unjoined = read_headers(folder, may_lack=(head, f"language_model.{head}"))
    cfg = _with_head_of(family, cfg, unjoined.keys())
    headers = _tensors(folder, unjoined, saved)
    if cfg.mtp is not None and not _has_mtp(family, cfg, headers.keys()):
        cfg = cfg.replace(mtp=None)
        _log.warning("%s: has no tensors for multi-token prediction; the model is read without it.", folder)
    names = family.names_of(cfg)
    _check_fits(folder, family, cfg, headers)
    table = tensor_table(cfg, names, family.blocks_per_layer)
    stored = _respelt(family, {tensor.name for tensor in table}, headers)
    _check_tensors(folder, cfg, family, names, table, stored)
    parts: dict[tuple[str, ...], list[Lazy]] = {}
    for tensor in (tensor for tensor in table if tensor.repeats is None):
        for i, piece in enumerate(tensor.pieces):
            make = functools.partial(_read_piece, tensor, i, stored[tensor.name])
            values = Lazy(piece.shape, piece.dtype if dtype else stored[tensor.name].dtype, make)
            parts.setdefault(piece.path, []).append(values)
    stacked = {piece.path for tensor in table for piece in tensor.pieces if piece.expert is not None}
    params = {path: Stacked(values) if path in stacked else values[0] for path, values in parts.items()}
    return cfg.replace(param_dtype=str(params["embedding",].dtype)), unflatten(params)


def _tensors(folder: Path, stored: dict[str, StoredTensor], saved: dict[str, Any]) -> dict[str, Stored]:
    """The tensors of a folder that belong to the model, with packed weights decoded."""
    joined: dict[str, Any] = mxfp4.join(stored)
    text = wrapped.text_config(saved) if saved["model_type"] in wrapped.TEXT else saved
    if (block := fp8.block_of(text.get("quantization_config"))) is not None:
        joined = fp8.join(joined, block)
    if not wrapped.is_wrapped(joined):
        return joined
    if others := wrapped.left_out(joined):
        _log.warning(
            "%s: only the text model is read; left out: %s.",
            folder,
            ", ".join(f"{part} ({count} tensors)" for part, count in sorted(others.items())),
        )
    named = [(wrapped.text_name(name), tensor) for name, tensor in joined.items()]
    return {name: tensor for name, tensor in named if name is not None}


def _with_head_of(family: Family, cfg: ModelConfig, names: Collection[str]) -> ModelConfig:
    """The config of a model of text and images. Its two configs may disagree on a tied head; the tensors decide."""
    if not wrapped.is_wrapped(names):
        return cfg
    head = name_of(family.names_of(cfg), "head")
    return cfg.replace(tied_head=all(wrapped.text_name(name) != head for name in names))


def _check_fits(folder: Path, family: Family, cfg: ModelConfig, stored: dict[str, Stored]) -> None:
    try:
        apart = any("{e}" in name for name in family.names_of(cfg)(cfg.blocks[0]))
        check_fits(cfg, [tensor.shape for tensor in stored.values()], family.blocks_per_layer, apart)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None


def _read_piece(tensor: Tensor, i: int, stored: Stored) -> np.ndarray:
    return tensor.to_ours(stored.read())[i]


def save(
    folder: str | Path,
    cfg: ModelConfig,
    params: Params,
    tokenizer: dict[str, bytes],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers loads; parameters keep their dtype.

    MTP modules that no family can express are left out, with a line in the log.

    Args:
      tokenizer: files to write beside the weights, by name.
      max_shard_bytes: size of one file of weights; a larger tensor has its own file.

    Raises:
      ValueError: no family can express this model, or `folder` holds something other than a model.
    """
    folder = Path(folder)
    if cfg.mtp is not None and not _can_be_saved(cfg):
        cfg, params = without_mtp(cfg, params)
        _log.warning(
            "%s: written without multi-token prediction, which no family supports in this model.", folder
        )
    family = family_of(cfg)
    cfg, params = relayout(cfg, params, scan=False)
    names = family.names_of(cfg)
    table = {tensor.name: tensor for tensor in tensor_table(cfg, names, family.blocks_per_layer)}
    shards = _plan_shards(table, params, max_shard_bytes)
    with replacing(folder) as new:
        for name, content in tokenizer.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(content)
        for file, held in shards.items():
            tensors = {name: (_dtype_of(params, table[name]), table[name].shape) for name in held}
            safetensors_file.write(new / file, tensors, lambda name: _values(params, table[name]))
        if len(shards) > 1:
            (new / INDEX).write_text(json.dumps(_index(shards, table, params), indent=2) + "\n")
        dtype = str(_dtype_of(params, table[name_of(names, "embedding")]))
        config = family.write_config(cfg) | {"torch_dtype": dtype} | _token_ids(tokenizer)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _read_config(folder: Path) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """(the family, the model, the content of the file)."""
    path = folder / "config.json" if folder.is_dir() else folder
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: is a JSON {type(saved).__name__}; wanted an object.")
    model_type = saved.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES.keys() | wrapped.TEXT.keys():
        known = ", ".join([*FAMILIES, *wrapped.TEXT])
        raise ValueError(f"{path}: model_type={str(model_type)[:100]!r} is not known. Known: {known}.")
    if "auto_map" in saved:
        _log.warning(
            "%s names its own code (auto_map), which is not run; the model is read as %s", path, model_type
        )
    try:
        text = wrapped.text_config(saved) if model_type in wrapped.TEXT else saved
        family = FAMILIES[text["model_type"]]
        return family, family.read_config(text), saved
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_headers(folder: Path, may_lack: Collection[str] = ()) -> dict[str, StoredTensor]:
    """All tensors of the folder, from one file or from the shards of the index.

    Args:
      may_lack: names in the index that no shard needs to have, as old versions of transformers wrote for tied heads.
    """
    if (folder / WEIGHTS).is_file():
        return safetensors_file.read_header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        pickles = sorted(item.name for item in folder.glob("*.bin"))
        if pickles:
            raise ValueError(
                f"{folder}: has only pickled weights ({pickles[0]}), which can run code when they are read. Convert "
                "them with transformers, on a machine that trusts them: "
                "AutoModelForCausalLM.from_pretrained(src).save_pretrained(dst)."
            )
        raise FileNotFoundError(f"{folder}: has neither {WEIGHTS} nor {INDEX}.")
    files = _read_index(folder / INDEX)
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(files.values())):
        if not (folder / file).is_file():
            raise ValueError(f"{folder / INDEX}: names the shard {file}, which is not there.")
        for name, tensor in safetensors_file.read_header(folder / file).items():
            if files.get(name) != file:
                raise ValueError(
                    f"{folder / file}: holds {name!r}, which the index puts in {files.get(name)}."
                )
            stored[name] = tensor
    lost = sorted(name for name in set(files) - set(stored) if name not in may_lack)
    if lost:
        raise ValueError(f"{folder / INDEX}: names {len(lost)} tensors that no shard has: {_some(lost)}.")
    return stored


def _stored_names(folder: Path) -> set[str] | None:
    """Of a folder's tensors; None where no weights are beside the config."""
    if (folder / WEIGHTS).is_file():
        return set(safetensors_file.read_header(folder / WEIGHTS))
    return set(_read_index(folder / INDEX)) if (folder / INDEX).is_file() else None


def _has_mtp(family: Family, cfg: ModelConfig, stored: Collection[str]) -> bool:
    """Whether the folder has the first MTP module.

    The config does not tell: transformers drops the modules and keeps the key, and Qwen3-Next has no key for them.
    """
    layers = len(cfg.blocks) // family.blocks_per_layer
    return name_of(family.names_of(cfg), "mtp/join").format(n=layers, k=0) in stored


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path}: has no weight_map of tensor names to files.")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path}: puts {name!r} in {str(file)[:80]!r}; wanted a .safetensors file beside it."
            )
    return files


def _respelt(family: Family, wanted: set[str], stored: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors under the model's names; a file may have the family's aliases, or lack the prefix of a bare model."""
    start = next((name.split(".")[0] for name in wanted if ".0." in name), "")
    found = {}
    for name, tensor in stored.items():
        others = (*family.tensor_aliases(name), f"{start}.{name}")
        others = [other for other in others if other in wanted and other not in stored]
        found[name if name in wanted or not others else others[0]] = tensor
    return found


def _check_tensors(
    folder: Path,
    cfg: ModelConfig,
    family: Family,
    names: NamesOf,
    table: list[Tensor],
    stored: dict[str, Stored],
) -> None:
    table = [tensor for tensor in table if tensor.name in stored or tensor.repeats is None]
    missing = [tensor.name for tensor in table if tensor.name not in stored]
    if missing:
        raise ValueError(
            f"{folder}: lacks {len(missing)} tensors that config.json requires: {_some(missing)}."
        )
    for tensor in table:
        if stored[tensor.name].shape != tensor.shape:
            raise ValueError(
                f"{stored[tensor.name].file}: tensor {tensor.name!r} is {stored[tensor.name].shape}, but by "
                f"config.json it would be {tensor.shape}."
            )
        if stored[tensor.name].dtype not in safetensors_file.DTYPES.values():
            raise ValueError(
                f"{stored[tensor.name].file}: tensor {tensor.name!r} is {stored[tensor.name].dtype}; wanted one of "
                f"{', '.join(safetensors_file.DTYPES)}."
            )
        if tensor.repeats and not _same_bits(stored[tensor.name], stored[tensor.repeats]):
            raise ValueError(
                f"{stored[tensor.name].file}: {tensor.name!r} differs from {tensor.repeats!r}, which the model uses "
                "instead; only modules that share the model's embedding and head can be read."
            )
    extra = sorted(set(stored) - {tensor.name for tensor in table})
    ignored = [name for name in extra if name.endswith(family.ignored_tensors)]
    if cfg.tied_head and (head := name_of(names, "head")) in extra:
        embedding = name_of(names, "embedding")
        if not np.array_equal(stored[head].read(), stored[embedding].read()):
            raise ValueError(
                f"{folder}: tie_word_embeddings is true, yet {head!r} differs from {embedding!r}. Set it to false in "
                "config.json to use both."
            )
        ignored.append(head)
    if ignored:
        _log.info(
            "%s: ignored %d tensors that the model does not need: %s",
            folder,
            len(ignored),
            _some(ignored),
        )
    unknown = [name for name in extra if name not in ignored]
    if unknown:
        raise ValueError(
            f"{folder}: has {len(unknown)} tensors that the model does not have: {_some(unknown)}."
        )


def _same_bits(one: Stored, other: Stored) -> bool:
    as_bytes = lambda stored: np.ascontiguousarray(stored.read()).view(np.uint8)
    return one.dtype == other.dtype and np.array_equal(as_bytes(one), as_bytes(other))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _can_be_saved(cfg: ModelConfig) -> bool:
    return any(family.why_not(cfg) is None for family in FAMILIES.values())


def family_of(cfg: ModelConfig) -> Family:
    """The family to save a model as: its own, or the first that can express it. Raises ValueError if none can."""
    check_without_adapters(cfg)
    scalars = [head for head in cfg.heads if isinstance(head, ScalarHead)]
    if scalars:
        names = ", ".join(head.name for head in scalars)
        raise ValueError(f'a Hugging Face folder cannot hold the heads {names}. Save with format="native".')
    own = FAMILIES.get(cfg.family or "")
    reasons = []
    for family in ([own] if own else []) + list(FAMILIES.values()):
        why = family.why_not(cfg)
        if why is None:
            return family
        reasons.append(f"{family.model_type} {why}")
    raise ValueError(
        f"no Hugging Face family can express this model: {'; '.join(reasons[:2])}, and so on for {len(FAMILIES)} "
        'families. Save with format="native".'
    )


def _dtype_of(params: Params, tensor: Tensor) -> np.dtype:
    dtypes = {np.dtype(get(params, piece.path).dtype) for piece in tensor.pieces}
    dtype = dtypes.pop()
    if dtypes or dtype not in safetensors_file.DTYPES.values():
        raise ValueError(
            f"{tensor.name} would be {' and '.join(map(str, {dtype} | dtypes))}; float32, float16 or bfloat16 can be "
            "saved, one in a tensor."
        )
    return dtype


def _values(params: Params, tensor: Tensor) -> np.ndarray:
    ours = (get(params, piece.path) for piece in tensor.pieces)
    pieces = [
        np.asarray(value if piece.expert is None else value[piece.expert])
        for piece, value in zip(tensor.pieces, ours, strict=True)
    ]
    return tensor.to_theirs(pieces)


def _nbytes(params: Params, tensor: Tensor) -> int:
    return math.prod(tensor.shape) * _dtype_of(params, tensor).itemsize


def _plan_shards(table: dict[str, Tensor], params: Params, most: int) -> dict[str, list[str]]:
    """File name -> tensor names, in the order of the layers."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in table.items():
        nbytes = _nbytes(params, tensor)
        if not shards or nbytes > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= nbytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


def _index(shards: dict[str, list[str]], table: dict[str, Tensor], params: Params) -> dict[str, Any]:
    total = sum(_nbytes(params, tensor) for tensor in table.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted((name, file) for file, names in shards.items() for name in names)),
    }


def _token_ids(tokenizer: dict[str, bytes]) -> dict[str, Any]:
    """bos, eos and pad for config.json; without them transformers assumes those of Llama 2."""
    saved = json.loads(tokenizer.get("generation_config.json", b"{}"))
    return {key: saved.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}

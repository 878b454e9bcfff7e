"""`load` and `save` for run folders, checkpoints, Hugging Face folders and GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Sharding

from configs.paths import ModelPath, resolve_model
from model.config import ModelConfig
from model.formats import checkpoint
from model.formats.lazy import LAZY, place
from model.function import Params
from model.kernels.backend import Kernels
from model.layout import relayout
from model.weights import is_quantized, shardings_like

Format = Literal["native", "huggingface", "gguf"]


def load_config(path: str | Path) -> ModelConfig:
    """The model's config; reads no weights."""
    return _load_config(resolve_model(path))


def load(
    path: str | Path,
    *,
    cfg: ModelConfig | None = None,
    shardings: Any = None,
    dtype: str | None = None,
    packed: bool = False,
) -> tuple[ModelConfig, Params]:
    """Read a model.

    Args:
      path: run folder (its newest checkpoint), checkpoint, Hugging Face folder or GGUF file.
      cfg: a config to use instead of the stored one; it may differ in how the model runs (`scan`, `dtype`, `remat`).
      shardings: a `Sharding` or a tree of them in the layout of `cfg`; default: the first device.
      dtype: of the parameters in memory, such as "bfloat16", but for those that are float32 in any model (the router's
        choice bias); default: as stored (GGUF: float32).
      packed: quantized tensors of a GGUF file become `Quantized` weights with the file's own values and scales.

    Raises:
      FileNotFoundError, ValueError: nothing usable at `path`, or a damaged file; says what was found.
    """
    found = resolve_model(path)
    if found.kind == "native":
        stored = checkpoint.load_config(found.weights)
        same_layout = cfg is None or cfg.scan == stored.scan
        stored, params = checkpoint.load_native(found.weights, shardings if same_layout else None, dtype)
    else:
        stored, params = _load_lazily(found, dtype, packed)
    if cfg is None:
        cfg = stored
    _check_same_model(path, stored, cfg)
    _, params = relayout(stored, params, scan=cfg.scan)
    return cfg, _place(params, shardings)


def save(
    path: str | Path,
    cfg: ModelConfig,
    params: Params,
    format: Format = "native",
    *,
    tokenizer: dict[str, bytes] | None = None,
) -> None:
    """Write a model; it replaces an existing one at `path` only when it is complete.

    Args:
      tokenizer: the tokenizer's files by name, to write beside the weights; see `data.Tokenizer.save`.

    Raises:
      ValueError: the format cannot express this model.
    """
    quantized = [name for name, leaf in flatten_dict(params, sep="/").items() if is_quantized(leaf)]
    if quantized and format != "native":
        raise ValueError(
            f"format={format!r} does not support quantized weights such as {quantized[0]}: dequantize them first "
            '(model.dequantize), or save with format="native".'
        )
    if format == "native":
        lazy = any(isinstance(leaf, LAZY) for leaf in jax.tree.leaves(params))
        write = checkpoint.save_native_lazily if lazy else checkpoint.save_native
        write(path, cfg, params, tokenizer or {})
    elif format == "huggingface":
        from model.formats import huggingface

        huggingface.save(path, cfg, params, tokenizer or {})
    elif format == "gguf":
        from model.formats.gguf import writing as gguf

        gguf.save(path, cfg, params, tokenizer or {})
    else:
        raise ValueError(f"format={format!r} is not one of native, huggingface, gguf.")


def load_lazily(path: str | Path, dtype: str | None = None) -> tuple[ModelConfig, Params]:
    """As `load`, but each parameter is read at its first use, so `save` and `lazy.place` never hold the whole model."""
    return _load_lazily(resolve_model(path), dtype)


def _load_lazily(found: ModelPath, dtype: str | None, packed: bool = False) -> tuple[ModelConfig, Params]:
    if found.kind == "native":
        return checkpoint.load_lazily(found.weights, dtype)
    if found.kind == "huggingface":
        from model.formats import huggingface

        return huggingface.load(found.weights, dtype)
    from model.formats.gguf import reading as gguf

    return gguf.load(found.weights, dtype, packed)


def _place(params: Params, shardings: Any) -> Params:
    """The parameters on the devices; they are placed one by one, so memory holds at most one twice."""
    leaves, tree = jax.tree.flatten(params)
    params.clear()
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(shardings, Sharding):
        wanted = [shardings] * len(leaves)
    else:
        wanted = jax.tree.leaves(shardings_like(jax.tree.unflatten(tree, leaves), shardings))
    for i, sharding in enumerate(wanted):
        leaves[i] = jax.block_until_ready(place(leaves[i], sharding))
    return jax.tree.unflatten(tree, leaves)


def _load_config(found: ModelPath) -> ModelConfig:
    if found.kind == "native":
        return checkpoint.load_config(found.weights)
    if found.kind == "huggingface":
        from model.formats import huggingface

        return huggingface.load_config(found.weights)
    from model.formats.gguf import reading as gguf

    return gguf.load_config(found.weights)


def _check_same_model(path, stored: ModelConfig, wanted: ModelConfig) -> None:
    free = {
        "scan": False,
        "dtype": "float32",
        "param_dtype": "float32",
        "remat": "none",
        "kernels": Kernels(),
        "max_length": 1,
    }
    if stored.replace(**free) != wanted.replace(**free):
        raise ValueError(
            f"{path} holds another model than the config asks for: stored {stored.replace(**free)}, "
            f"wanted {wanted.replace(**free)}."
        )

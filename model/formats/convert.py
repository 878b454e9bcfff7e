"""Converts a model to another format, with its tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs.paths import resolve_model
from configs.typed import ConfigError
from model.adapters import merge_adapter
from model.formats import storage
from model.formats.lazy import LAZY, named
from model.formats.peft import load_adapters
from model.quantization import dequantize
from model.weights import is_quantized

FORMATS = ("huggingface", "native", "gguf")

# The tokenizer's files in a Hugging Face folder: any one of the first makes a tokenizer, the others go with it.
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tiktoken.model", "tekken.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "spm.model"),
)
BESIDE = (
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)

Files = dict[str, bytes]


def convert(
    source: str | Path,
    destination: str | Path,
    format: storage.Format | None = None,
    dtype: str | None = None,
    gguf_tokenizer: Callable[[Path], Files] | None = None,
    *,
    adapter: str | Path | None = None,
    slot: int | None = None,
) -> storage.Format:
    """Read the model at `source` and write it at `destination`.

    Args:
      format: default: gguf for a name that ends in .gguf, else huggingface.
      dtype: of parameters and activations; default: as stored (quantized: float32).
      gguf_tokenizer: maps a GGUF file to its tokenizer as files of a Hugging Face folder, for example with
        `data.load_tokenizer(path).save(folder)`; needed only from GGUF to another format.
      adapter: a PEFT folder to merge into the model.
      slot: the slot to merge of the model's own adapters. What is merged into quantized weights makes them dense.

    Returns:
      the format that was written.

    Raises:
      ValueError: a model that the format or the dtype can't hold, or a destination that is not empty.
    """
    destination = Path(destination).expanduser()
    if format is None:
        format = "gguf" if destination.suffix == ".gguf" else "huggingface"
    if format == "gguf" and destination.suffix != ".gguf":
        raise ConfigError(f"{destination}: a GGUF model is one file; give it a name that ends in .gguf.")
    if destination.exists() and (destination.is_file() or any(destination.iterdir())):
        raise ConfigError(f"{destination}: already exists. Remove it, or give another path.")
    tokenizer = tokenizer_files(source, gguf_tokenizer)
    cfg, params = storage.load_lazily(source, dtype)
    params = jax.tree_util.tree_map_with_path(
        lambda keys, array: named(array, f"{source}: {_path(keys)}"), params
    )
    if dtype is not None:
        cfg = cfg.replace(dtype=dtype, param_dtype=dtype)
    if adapter is not None:
        cfg, params = load_adapters(cfg, params, [adapter])
    if adapter is not None or slot is not None:
        params = _dense(params, dtype or "float32")
        cfg, params = merge_adapter(cfg, params, slot or 0)
        _check_merged(params)
    storage.save(destination, cfg, params, format, tokenizer=tokenizer)
    return format


def _dense(params: Any, dtype: str) -> Any:
    """Without quantized weights: a sum that is rounded to few bits again would lose most of a small adapter."""
    read = lambda leaf: jax.tree.map(jnp.asarray, leaf) if is_quantized(leaf) else leaf
    return dequantize(jax.tree.map(read, params, is_leaf=is_quantized), jnp.dtype(dtype))


def _path(keys: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in keys)


def _check_merged(params: Any) -> None:
    """Casts a merged parameter after the sum. Raises ValueError for values beyond float16, which ends at 65504."""
    for keys, array in jax.tree_util.tree_leaves_with_path(params):
        if not isinstance(array, LAZY) and array.dtype == jnp.float16 and not jnp.isfinite(array).all():
            raise ValueError(
                f"{_path(keys)} with its adapter has values that float16 can't hold: its largest is 65504. Use "
                "bfloat16."
            )


def tokenizer_files(source: str | Path, gguf_tokenizer: Callable[[Path], Files] | None) -> Files:
    """The files of a model's tokenizer, by name; {} for a model without one."""
    found = resolve_model(source)
    if found.kind == "huggingface":
        return _of_folder(found.weights)
    if found.tokenizer is None:
        return {}
    if found.kind == "gguf":
        if gguf_tokenizer is None:
            raise ValueError(
                f"{source}: the tokenizer is inside the GGUF file; give `gguf_tokenizer` to read it."
            )
        return gguf_tokenizer(found.tokenizer)
    folder = found.tokenizer
    return {str(item.relative_to(folder)): item.read_bytes() for item in folder.rglob("*") if item.is_file()}


def _of_folder(folder: Path) -> Files:
    """The tokenizer files of a Hugging Face folder."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return {}
    files = [folder / name for name in (*TOKENIZERS, *BESIDE)] + sorted(folder.glob("chat_templates/*.jinja"))
    files += sorted(folder.glob("*.tiktoken"))
    contents = {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}
    if "generation_config.json" not in contents:  # older folders name the end of a text only in config.json
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
        contents["generation_config.json"] = json.dumps(ids).encode()
    return contents

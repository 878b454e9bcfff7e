"""Describes a model as text or JSON: groups of parameters with shape, size and role; bytes, flops, cache, memory."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from pathlib import Path

import jax.numpy as jnp

from configs.paths import resolve_model
from model.config import ModelConfig
from model.formats import checkpoint, huggingface, storage
from model.formats.gguf import container
from model.inspect.anatomy import Anatomy, Group, anatomy


def describe(path: str | Path, batch: int = 1, context: int | None = None) -> str:
    """A table of the model at `path`, which may also be only a config: a config.json or a saved ModelConfig.

    Args:
      batch, context: rows and tokens a row for flops, cache and memory; default: one row of full length.

    Raises ValueError or FileNotFoundError if nothing usable is at `path`.
    """
    cfg, stored = _find(Path(path).expanduser())
    found = anatomy(cfg, batch, context)
    return "\n".join([str(path), *_table(found), "", *_totals(cfg, stored, found)])


def describe_json(path: str | Path, batch: int = 1, context: int | None = None) -> str:
    """The same figures as one JSON object; see `model.inspect.anatomy.Anatomy`."""
    cfg, stored = _find(Path(path).expanduser())
    figures = dataclasses.asdict(anatomy(cfg, batch, context))
    return json.dumps({"path": str(path), "stored": stored, "dtype": cfg.dtype, **figures}, indent=1)


def describe_config(cfg: ModelConfig, batch: int = 1, context: int | None = None) -> str:
    """The table of a config in memory."""
    found = anatomy(cfg, batch, context)
    return "\n".join([*_table(found), "", *_totals(cfg, "not stored", found)])


def _find(path: Path) -> tuple[ModelConfig, str]:
    """(the config, a sentence on the stored weights)."""
    if path.suffix == ".json" and path.is_file():
        return _read_json(path), "no weights here, only a config"
    found = resolve_model(path)
    cfg = storage.load_config(path)
    if found.kind == "gguf":
        tensors = container.read(found.weights).tensors.values()
        return cfg, _stored("GGUF", [(tensor.type, tensor.nbytes or 0) for tensor in tensors])
    if found.kind == "native":
        return cfg, _stored("native checkpoint", checkpoint.stored_arrays(found.weights))
    try:
        tensors = huggingface.read_headers(found.weights).values()
    except FileNotFoundError:
        return cfg, "no weights here, only a config"
    return cfg, _stored(
        "safetensors", [(str(tensor.dtype), tensor.stop - tensor.start) for tensor in tensors]
    )


def _read_json(path: Path) -> ModelConfig:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if isinstance(saved, dict) and saved.get("format") == "crucible":
        saved = saved.get("model")
    if isinstance(saved, dict) and saved.get("kind") == "ModelConfig":
        return ModelConfig.from_dict(saved)
    return huggingface.load_config(path)


def _stored(kind: str, tensors: list[tuple[str, int]]) -> str:
    counts = collections.Counter(name for name, _ in tensors)
    listed = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return f"{kind}, {_bytes(sum(size for _, size in tensors))} ({listed})"


def _table(found: Anatomy) -> list[str]:
    rows = []
    for (stack, blocks), groups in itertools.groupby(
        found.groups, key=lambda group: (group.stack, group.blocks)
    ):
        run_groups = list(groups)
        if blocks is not None:
            rows.append(_run_row(stack, blocks, run_groups, found.parameters))
        indent = "" if blocks is None else "  "
        rows += [_row(indent, group, found.parameters) for group in run_groups]
    rows.append(("total", "", "", f"{found.parameters:,}", "100.0 %", ""))
    return _aligned([("group", "shape", "axes", "parameters", "share", "what it does"), *rows])


def _run_row(stack: str, blocks: tuple[int, int], groups: list[Group], total: int) -> tuple[str, ...]:
    size, count, (first, last) = sum(group.parameters for group in groups), groups[0].count, blocks
    label = f"{' '.join(stack.split('_'))} block".strip()
    if count == 1:
        return f"{label} {first}", "", "", f"{size:,}", _share(size, total), ""
    alike = f"{count} equal blocks of {size // count:,} parameters; each line is all of them"
    return f"{label} {first}-{last}", "", "", f"{size:,}", _share(size, total), alike


def _row(indent: str, group: Group, total: int) -> tuple[str, ...]:
    shape, axes = (" x ".join(str(n or "-") for n in items) for items in (group.shape, group.axes))
    share = _share(group.parameters, total)
    return indent + group.name, shape, axes, f"{group.parameters:,}", share, group.role


def _totals(cfg: ModelConfig, stored: str, found: Anatomy) -> list[str]:
    sizes = [f"{_bytes(found.parameters * jnp.dtype(d).itemsize)} in {d}" for d in ("float32", "bfloat16")]
    forward, backward = found.forward_flops_per_token, found.backward_flops_per_token
    rows = f"{found.batch} x {found.context:,} tokens"
    lines = [
        ("stored", stored),
        ("parameters", f"{found.parameters:,}: {', '.join(sizes)}"),
        ("computes in", f"{cfg.dtype}; longest context {cfg.max_length:,} tokens"),
        (
            "flops a token",
            f"{forward:.4g} forward, {backward:.4g} backward, in the mean over {found.context:,} tokens",
        ),
        ("cache", f"{_cache(cfg, found)}; {_bytes(found.serving['cache'])} for {rows}"),
        ("to train", _memory(found.training) + f" (float32, traced) for {rows}"),
        ("to serve", _memory(found.serving) + f" ({cfg.dtype}) for {rows}"),
    ]
    if found.mtp_flops_per_token:
        extra = f"{found.mtp_flops_per_token:.4g} more forward in training, for multi-token prediction"
        lines.insert(4, ("", extra))
    if found.active_parameters != found.parameters:
        share = _share(found.active_parameters, found.parameters)
        lines.insert(2, ("active", f"{found.active_parameters:,} parameters a token, {share} of all"))
    return [f"{name:<14} {text}" for name, text in lines]


def _cache(cfg: ModelConfig, found: Anatomy) -> str:
    parts = []
    if found.cache_bytes_per_token or not found.state_bytes_per_row:
        parts.append(f"{found.cache_bytes_per_token:,} bytes a token in {cfg.dtype}")
    if found.state_bytes_per_row:
        parts.append(f"{found.state_bytes_per_row:,} bytes a row of any length")
    return " and ".join(parts)


def _memory(parts: dict[str, int]) -> str:
    listed = " + ".join(f"{_bytes(size)} {name}" for name, size in parts.items())
    return f"{_bytes(sum(parts.values()))} = {listed}"


def _share(size: int, total: int) -> str:
    return f"{100 * size / total:.1f} %"


def _bytes(count: int) -> str:
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:,.0f} {units[0]}" if units[0] == "bytes" else f"{size:,.1f} {units[0]}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in (3, 4) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]

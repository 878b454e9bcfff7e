"""What a model is made of, as text: every weight group with shape, size and task; bytes, flops and cache of
the whole.
"""

from __future__ import annotations

import collections
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from configs import gguf
from configs.paths import resolve_model
from model import checkpoint, huggingface, storage
from model.cache import cache_axes, has_recurrent_state, init_pages
from model.config import STACKS, ModelConfig
from model.flops import forward_flops_per_token, train_flops_per_token
from model.function import Params, param_shapes

# What each parameter does, by the last two parts of its path.
TASKS = {
    "embedding": "a vector for each token",
    "token_types": "a vector for each kind of token",
    "positions/table": "a vector for each position",
    "head": "logits: one direction for each token of the vocabulary",
    "head_bias": "bias of the logits",
    "head_transform/dense": "what the logits are read from",
    "head_transform/dense_bias": "its bias",
    "pooler/dense": "the vector that stands for the text, from its first token",
    "pooler/dense_bias": "its bias",
    "encoder_final_norm/scale": "scale of what the encoder gives",
    "final_norm/scale": "scale of the last hidden state",
    "mixer_norm/scale": "scale of what attention reads",
    "mixer/q": "queries: what each head looks for",
    "mixer/k": "keys: what each token offers to be found by",
    "mixer/v": "values: what a token passes on when looked at",
    "mixer/o": "adds the heads' findings to the residual stream",
    "mixer/q_bias": "bias of the queries",
    "mixer/k_bias": "bias of the keys",
    "mixer/v_bias": "bias of the values",
    "mixer/o_bias": "bias of attention's output",
    "q_norm/scale": "scale of each head's query",
    "k_norm/scale": "scale of each head's key",
    "mixer/relative": "a number for each range of distances: what attention adds to its scores",
    "cross_norm/scale": "scale of what cross attention reads",
    "cross/q": "queries to the encoder",
    "cross/k": "keys of the encoder's tokens",
    "cross/v": "values of the encoder's tokens",
    "cross/o": "adds what was found in the encoder to the residual stream",
    "ffn_norm/scale": "scale of what the feed-forward network reads",
    "ffn/gate": "gate: silu of this opens a feature",
    "ffn/up": "value of each feature",
    "ffn/down": "adds the open features to the residual stream",
    "ffn/gate_bias": "bias of the gates",
    "ffn/up_bias": "bias of the features",
    "ffn/down_bias": "bias of the feed-forward output",
}

_ORDER = {name: i for i, name in enumerate(TASKS)}


def describe(path: str | Path, batch: int = 1, context: int | None = None) -> str:
    """A table of the model at `path`, which may also be a config alone: a config.json or a saved ModelConfig.

    Args:
      batch, context: rows and tokens a row for which cache and flops are given; default: one row of full
        length.

    Raises ValueError or FileNotFoundError where nothing usable is at `path`.
    """
    cfg, stored = _find(Path(path).expanduser())
    context = cfg.max_length if context is None else context
    if batch < 1 or context < 1:
        raise ValueError(f"batch={batch} and context={context} must be at least 1.")
    return "\n".join([str(path), *_table(cfg), "", *_totals(cfg, stored, batch, context)])


def parameter_count(cfg: ModelConfig) -> int:
    """Of the whole model; a tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(cfg.replace(scan=True))))


def cache_bytes_per_token(cfg: ModelConfig) -> int:
    """Keys and values of one token of one row, over all blocks, in the dtype of the computation."""
    return _cache_bytes(cfg, "slots")


def state_bytes_per_row(cfg: ModelConfig) -> int:
    """What recurrent blocks keep of a row of any length, and cross attention of an encoder's longest text."""
    return _cache_bytes(cfg, "rows")


def _cache_bytes(cfg: ModelConfig, axis: str) -> int:
    if not cfg.causal:  # an encoder has no cache
        return 0
    cfg = cfg.replace(scan=False)
    axes, state = cache_axes(cfg), jax.eval_shape(lambda: init_pages(cfg, 1, 1))
    leaves = [leaf for name, part in state.items() for key, leaf in part.items() if axis in axes[name][key]]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _find(path: Path) -> tuple[ModelConfig, str]:
    """The config, and a sentence on how the weights are stored."""
    if path.suffix == ".json" and path.is_file():
        return _read_json(path), "no weights here, a config alone"
    found = resolve_model(path)
    cfg = storage.load_config(path)
    if found.kind == "gguf":
        tensors = gguf.read(found.weights).tensors.values()
        return cfg, _stored("GGUF", [(tensor.type, tensor.nbytes or 0) for tensor in tensors])
    if found.kind == "native":
        return cfg, _stored("native checkpoint", checkpoint.stored_arrays(found.weights))
    try:
        tensors = huggingface.read_headers(found.weights).values()
    except FileNotFoundError:
        return cfg, "no weights here, a config alone"
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


def _table(cfg: ModelConfig) -> list[str]:
    scanned = cfg.replace(scan=True)
    shapes, total = param_shapes(scanned), parameter_count(cfg)
    runs = {name: (stack, numbers) for stack in STACKS for name, _, numbers in scanned.runs(stack)}
    rows = []
    before = {"embedding": shapes["embedding"]}
    after = {key: value for key, value in shapes.items() if key not in runs and key != "embedding"}
    rows += [_row(name, shape, 1, total, _task(cfg, name)) for name, shape in _flat(before)]
    for run, (stack, numbers) in runs.items():
        size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes[run]))
        count = len(numbers)
        label = stack.replace("_", " ") + f"block {numbers[0]}" + (f"-{numbers[-1]}" if count > 1 else "")
        alike = (
            ""
            if count == 1
            else f"{count} equal blocks of {size // count:,} parameters; each line is all of them"
        )
        rows.append((label, "", f"{size:,}", _share(size, total), alike))
        rows += [
            _row(f"  {name}", shape[1:], count, total, _task(cfg, name)) for name, shape in _flat(shapes[run])
        ]
    rows += [_row(name, shape, 1, total, _task(cfg, name)) for name, shape in _flat(after)]
    rows.append(("total", "", f"{total:,}", "100.0 %", ""))
    return _aligned([("group", "shape", "parameters", "share", "what it does"), *rows])


def _row(
    name: str, shape: tuple[int, ...], count: int, total: int, task: str
) -> tuple[str, str, str, str, str]:
    size = math.prod(shape) * count
    return name, " x ".join(map(str, shape)), f"{size:,}", _share(size, total), task


def _task(cfg: ModelConfig, name: str) -> str:
    if name == "embedding" and cfg.tied_head:
        return "a vector for each token, in and out (tied head)"
    short = _short(name)
    if short in TASKS:
        return TASKS[short]
    if "/" in short:
        return ""
    head = short.removesuffix("_bias").removesuffix("_head")
    return f"the {head} head" + (": its bias" if short.endswith("_bias") else "")


def _short(name: str) -> str:
    return "/".join(name.split("/")[-2:])


def _totals(cfg: ModelConfig, stored: str, batch: int, context: int) -> list[str]:
    parameters, per_token = parameter_count(cfg), cache_bytes_per_token(cfg)
    sizes = {name: _bytes(parameters * jnp.dtype(name).itemsize) for name in ("float32", "bfloat16")}
    forward, train = forward_flops_per_token(cfg, context), train_flops_per_token(cfg, context)
    of_batch = _bytes(batch * context * per_token)
    of_rows = f"; {_bytes(state_bytes_per_row(cfg))} a row of any length" if has_recurrent_state(cfg) else ""
    lines = [
        ("stored", stored),
        ("parameters", f"{parameters:,}: {', '.join(f'{size} in {name}' for name, size in sizes.items())}"),
        ("computes in", f"{cfg.dtype}; longest context {cfg.max_length:,} tokens"),
        (
            "flops a token",
            f"{forward:.4g} forward, {train:.4g} in training, in the mean over {context:,} tokens",
        ),
        (
            "cache",
            f"{per_token:,} bytes a token in {cfg.dtype}; {of_batch} for {batch} x {context:,} tokens{of_rows}",
        ),
    ]
    return [f"{name:<14} {text}" for name, text in lines]


def _flat(tree: Params, prefix: str = "") -> list[tuple[str, tuple[int, ...]]]:
    found = []
    for key, value in tree.items():
        found += _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else [(prefix + key, value.shape)]
    return found


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
            cell.rjust(width) if i in (2, 3) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]

"""Checkpoints. All calls to Orbax, and to TensorStore below it, are in this file.

A checkpoint is an Orbax folder, written under a temporary name and renamed when complete:

    params/                        arrays of the model
    optimizer/                     of a training run: the rest of its state (optimizer, step, skipped steps, rng)
    train/state.json               of a training run: step and data position, readable without arrays
    meta/model.json                the model config, and which weights are quantized; marks the folder as a Crucible
                                   checkpoint
    tokenizer/                     the tokenizer's files and the chat template
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from configs.files import replacing
from model.config import ModelConfig
from model.formats.lazy import Sliced, Stacked
from model.function import Params, param_shapes
from model.kernels.quantized_matmul.formats import FORMATS
from model.weights import Quantized, is_quantized, shardings_like

FORMAT_VERSION = 1

CHUNK_BYTES = 2**24  # bytes of a chunk of an array that is written in parts

Files = dict[str, bytes]  # relative file name -> content


class Checkpoints:
    """The `checkpoints/` of a run folder: asynchronous atomic saves; a policy deletes old steps."""

    def __init__(self, folder: str | Path, *, keep: int = 2, keep_every: int = 0):
        """Keep the newest `keep` checkpoints, and all at multiples of `keep_every` (0: none)."""
        policies = ocp.training.preservation_policies
        policy: Any = policies.LatestN(keep)
        if keep_every:
            policy = policies.AnyPreservationPolicy([policy, policies.EveryNSteps(keep_every)])
        every_call: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        self._folder = Path(folder).absolute()
        self._checkpointer = ocp.training.Checkpointer(
            str(self._folder),
            save_decision_policy=every_call,
            preservation_policy=policy,
            cleanup_tmp_directories=True,
        )
        self._pending = None

    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(
        self, step: int, cfg: ModelConfig, params: Params, optimizer: Any, train: dict, tokenizer: Files
    ) -> None:
        """Start writing in the background, after an earlier save has finished."""
        self.wait()
        progress = _Folder({"state.json": json.dumps(train, indent=1).encode()})
        items = _model_items(cfg, params, tokenizer) | {"optimizer": optimizer, "train": progress}
        self._pending = self._checkpointer.save_checkpointables_async(step, items, force=True, overwrite=True)

    def restore(self, step: int, params: Params, optimizer: Any) -> tuple[Params, Any, dict]:
        """(params, the rest of the state, train) at `step`; the given ShapeDtypeStructs have shapes and shardings."""
        train = _Folder({})
        wanted = {"params": _to_plain(params), "optimizer": optimizer, "train": train}
        items = self._checkpointer.load_checkpointables(step, wanted)
        found = _from_plain(items["params"], params)
        return found, items["optimizer"], json.loads(train.files["state.json"])

    def progress(self, step: int) -> dict:
        """`train` of `step`, without its arrays."""
        return json.loads((self._folder / str(step) / "train" / "state.json").read_text())

    def shapes_beside_params(self, step: int) -> dict[tuple[str, ...], tuple[int, ...]]:
        """The arrays that `step` holds beside the parameters: their shapes by path."""
        return shapes_by_path(ocp.metadata(str(self._folder / str(step)), "optimizer").metadata)

    def wait(self) -> None:
        """Wait until the last save is on disk under its final name."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        self.wait()
        self._checkpointer.close()


def shapes_by_path(tree: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shapes of a tree's arrays; named tuples, which a checkpoint reads back as dicts, have the same paths."""
    name = lambda key: str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key))))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(map(name, path)): tuple(leaf.shape) for path, leaf in leaves}


def save_native(path: str | Path, cfg: ModelConfig, params: Params, tokenizer: Files) -> None:
    """Write a checkpoint without optimizer and data position at `path`, replacing what was there."""
    ocp.save_checkpointables(str(Path(path).absolute()), _model_items(cfg, params, tokenizer), overwrite=True)


def save_native_lazily(path: str | Path, cfg: ModelConfig, params: Params, tokenizer: Files) -> None:
    """As `save_native`, for parameters that are still in files: at most one is in memory at a time.

    Orbax needs all arrays at once, so it writes a checkpoint of small arrays; TensorStore then writes the real ones.
    """
    small = jax.tree.map(lambda leaf: np.zeros((1,) * len(leaf.shape), leaf.dtype), _to_plain(params))
    items = _model_items(cfg, params, tokenizer) | {"params": small}
    with replacing(Path(path).absolute(), own="meta/model.json") as new:
        ocp.save_checkpointables(str(new), items, overwrite=True)
        write = lambda keys, leaf: _write_parts(_stored_at(new, keys), leaf)
        jax.tree_util.tree_map_with_path(write, _to_plain(params))


def _write_parts(kvstore: dict, array: Any) -> None:
    chunk = list(array.shape)
    for axis in range(len(chunk)):
        row_bytes = math.prod(chunk[axis + 1 :]) * array.dtype.itemsize
        chunk[axis] = max(1, min(chunk[axis], CHUNK_BYTES // max(row_bytes, 1)))
    codecs = [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 3}}]
    metadata = {"shape": array.shape, "data_type": array.dtype.name, "codecs": codecs}
    metadata["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}
    store = tensorstore.open(spec, create=True, delete_existing=True).result()
    if not isinstance(array, (Sliced, Stacked)) or not array.shape:  # these cannot be read in parts
        store.write(np.asarray(array)).result()
        return
    for start in range(0, array.shape[0], chunk[0]):
        index = (slice(start, min(start + chunk[0], array.shape[0])), *[slice(None)] * (len(chunk) - 1))
        store[index].write(array[index]).result()


def load_config(path: str | Path) -> ModelConfig:
    return ModelConfig.from_dict(_meta(path)["model"])


def stored_shapes(path: str | Path) -> Params:
    """The parameters of a checkpoint as ShapeDtypeStructs, with the config's shapes and the stored dtypes."""
    flat: dict[Any, Any] = dict(flatten_dict(param_shapes(load_config(path)), sep="/"))
    arrays: dict[Any, Any] = dict(flatten_dict(_stored_metadata(path), sep="/"))
    for name in flat.keys() & arrays.keys():
        flat[name] = jax.ShapeDtypeStruct(flat[name].shape, arrays[name].dtype)
    for name, saved in _meta(path).get("quantized", {}).items():
        values: Any = jax.ShapeDtypeStruct(flat[name].shape, FORMATS[saved["kind"]].dtype)
        steps: Any = saved.get("scale_steps")
        kept = jnp.dtype(saved.get("scale_dtype", "float32")) if steps is None else jnp.dtype(jnp.uint8)
        scales: Any = jax.ShapeDtypeStruct(tuple(saved["scales"]), kept)
        steps = None if steps is None else jax.ShapeDtypeStruct(tuple(steps), jnp.float32)
        offsets: Any = scales if saved.get("offsets") else None
        flat[name] = Quantized(values, scales, saved["kind"], tuple(saved["inputs"]), steps, offsets)
    return unflatten_dict(flat, sep="/")


def _meta(path: str | Path) -> dict[str, Any]:
    return json.loads((Path(path) / "meta" / "model.json").read_text())


def load_native(
    path: str | Path, shardings: Any = None, dtype: str | None = None
) -> tuple[ModelConfig, Params]:
    """Read a checkpoint's model.

    Args:
      path: the checkpoint's own folder.
      shardings: one `Sharding`, or a tree of them like the parameters; default: the first device.
      dtype: casts parameters while reading; quantized weights, and what is float32 in any model, stay as they are.
    """
    cfg, shapes = load_config(path), stored_shapes(path)
    wanted_shapes = shapes if dtype is None else param_shapes(cfg.replace(param_dtype=dtype))
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _, s=shardings: s, shapes)
    shaped = lambda leaf, dtype, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    def wanted(leaf: Any, like: Any, sharding: Any) -> Any:
        if not is_quantized(leaf):
            return shaped(leaf, like.dtype, sharding)
        return jax.tree.map(lambda part, sharding: shaped(part, part.dtype, sharding), leaf, sharding)

    shardings = shardings_like(shapes, shardings)
    abstract = jax.tree.map(wanted, shapes, wanted_shapes, shardings, is_leaf=is_quantized)
    items = ocp.load_checkpointables(str(Path(path).absolute()), {"params": _to_plain(abstract)})
    return cfg, _from_plain(items["params"], abstract)


def load_lazily(path: str | Path, dtype: str | None = None) -> tuple[ModelConfig, Params]:
    """As `load_native`, but parameters are read at their first use, stacked layers one at a time."""
    cfg, shapes = load_config(path), stored_shapes(path)
    plain = {key for key, leaf in flatten_dict(shapes).items() if not is_quantized(leaf)}
    wanted: dict[Any, Any] = {}
    if dtype is not None:
        wanted = dict(flatten_dict(param_shapes(cfg.replace(param_dtype=dtype))))
    casts = {key: np.dtype(leaf.dtype) for key, leaf in wanted.items() if key in plain}

    def stored(keys, leaf) -> Sliced:
        kvstore = _stored_at(Path(path).absolute(), keys)
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()
        if array.shape != leaf.shape:
            raise ValueError(
                f"{path}: {kvstore['path']} has the shape {array.shape}; the model's config says {leaf.shape}."
            )
        stored_dtype = np.dtype(array.dtype.numpy_dtype)
        read = lambda index: array[index].read().result()
        return Sliced(leaf.shape, casts.get(tuple(key.key for key in keys), stored_dtype), read)

    found = jax.tree_util.tree_map_with_path(stored, _to_plain(shapes))
    return cfg, _from_plain(found, shapes)


def _stored_at(path: Path, keys: Any) -> dict:
    """The TensorStore spec of a parameter in an Orbax checkpoint."""
    name = ".".join(key.key for key in keys)
    return {"driver": "ocdbt", "base": f"file://{path}/params/", "path": f"{name}/"}


def stored_arrays(path: str | Path) -> list[tuple[str, int]]:
    """(dtype, bytes) of each parameter of a checkpoint; reads no weights."""
    leaves = jax.tree.leaves(_stored_metadata(path))
    return [(str(leaf.dtype), math.prod(leaf.shape) * leaf.dtype.itemsize) for leaf in leaves]


def _stored_metadata(path: str | Path) -> dict[str, Any]:
    """The tree of a checkpoint's arrays, with the shape and dtype of each."""
    return ocp.metadata(str(Path(path).absolute()), "params").metadata


def _model_items(cfg: ModelConfig, params: Params, tokenizer: Files) -> dict[str, Any]:
    meta = {"format": "crucible", "version": FORMAT_VERSION, "model": cfg.to_dict()}
    quantized = {
        name: {"kind": leaf.kind, "inputs": leaf.inputs, "scales": leaf.scales.shape}
        | ({} if leaf.scale_steps is None else {"scale_steps": leaf.scale_steps.shape})
        | ({} if leaf.offsets is None else {"offsets": True})
        | ({"scale_dtype": "float16"} if leaf.scales.dtype == jnp.float16 else {})
        for name, leaf in flatten_dict(params, sep="/").items()
        if isinstance(leaf, Quantized)
    }
    if quantized:
        meta["quantized"] = quantized
    return {
        "params": _to_plain(params),
        "meta": _Folder({"model.json": json.dumps(meta, indent=1).encode()}),
        "tokenizer": _Folder(tokenizer),
    }


def _to_plain(params: Params) -> Params:
    """The tree as dicts and arrays, which Orbax stores by name."""
    parts = ("values", "scales", "scale_steps", "offsets")
    of = lambda leaf: {name: getattr(leaf, name) for name in parts if getattr(leaf, name) is not None}
    split = lambda leaf: of(leaf) if is_quantized(leaf) else leaf
    return jax.tree.map(split, params, is_leaf=is_quantized)


def _from_plain(plain: Params, like: Params) -> Params:
    """The inverse of `_to_plain`, with the structure of `like`."""
    join = lambda leaf, part: dataclasses.replace(leaf, **part) if is_quantized(leaf) else part
    return jax.tree.map(join, like, plain, is_leaf=is_quantized)


class _Folder:
    """Plain files as one item of an Orbax checkpoint (a `StatefulCheckpointable`)."""

    def __init__(self, files: Files):
        self.files = files

    async def save(self, directory) -> Awaitable[None]:
        async def write():
            folder = await directory.await_creation()
            for name, content in self.files.items():
                target = Path(folder) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)

        return write()

    async def load(self, directory) -> Awaitable[None]:
        async def read():
            root = Path(directory)
            self.files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

        return read()


logging.getLogger("orbax").setLevel(logging.ERROR)

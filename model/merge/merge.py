"""Merges models as a recipe says: parameters are read, merged in float32 and written a tensor at a time."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax.traverse_util import unflatten_dict

from configs.typed import ConfigError
from model.families.tensors import Tensor
from model.formats import storage
from model.formats.convert import Files, tokenizer_files
from model.formats.lazy import Lazy, Stacked
from model.function import Params
from model.layout import relayout
from model.merge import methods
from model.merge.plan import Model, Plan, Step, plan
from model.merge.recipe import Dare, Linear, ModelStock, Passthrough, Recipe, Slerp, TaskArithmetic, Ties
from model.merge.tensors import Keys

Report = Callable[[int, int], None]  # bytes of the result that are merged, and all of them


def merge(
    recipe: Recipe,
    destination: str | Path,
    format: Literal["huggingface", "native"] = "huggingface",
    dtype: str | None = None,
    *,
    gguf_tokenizer: Callable[[Path], Files] | None = None,
    report: Report = lambda done, total: None,
) -> Plan:
    """Merge models and write the result, which appears at `destination` when it is complete.

    Args:
      dtype: of parameters and activations; default: as stored in the first source.
      gguf_tokenizer: as for `model.formats.convert.convert`, if a GGUF file gives the tokenizer.

    Raises:
      ValueError: a recipe that does not fit its models, or a destination that is not empty; nothing is written.
    """
    destination = Path(destination).expanduser()
    if destination.suffix == ".gguf":
        raise ConfigError(
            f"{destination}: a merge writes a folder; give its name, and convert it: python -m model convert."
        )
    if destination.exists() and (destination.is_file() or any(destination.iterdir())):
        raise ConfigError(f"{destination}: already exists. Remove it, or give another path.")
    tokenizer = tokenizer_files(recipe.tokenizer or recipe.sources[0].model, gguf_tokenizer)
    found = plan(recipe, dtype)
    storage.save(destination, found.cfg, merged_params(found, report), format, tokenizer=tokenizer)
    return found


def merged_params(plan: Plan, report: Report = lambda done, total: None) -> Params:
    """The merged parameters, each computed when it is read (see `model.formats.lazy`)."""
    merging = _Merging(plan.steps, report)
    parts: dict[Keys, list[Any]] = {}
    split = set()
    for i, step in enumerate(plan.steps):
        for j, piece in enumerate(step.tensor.pieces):
            make = functools.partial(merging.piece, i, j)
            name = "/".join(piece.path)
            parts.setdefault(piece.path, []).append(Lazy(piece.shape, step.dtypes[j], make, name=name))
            if piece.expert is not None:
                split.add(piece.path)
    flat = {path: Stacked(found) if path in split else found[0] for path, found in parts.items()}
    _, params = relayout(plan.cfg.replace(scan=False), unflatten_dict(flat), scan=plan.cfg.scan)
    return params


class _Merging:
    """Runs the steps of a plan on demand."""

    def __init__(self, steps: list[Step], report: Report):
        self._steps, self._report = steps, report
        size = lambda piece, dtype: math.prod(piece.shape) * dtype.itemsize
        self._bytes = [sum(map(size, step.tensor.pieces, step.dtypes)) for step in steps]
        self._total = sum(self._bytes)
        self._left, self._bytes_done = set(range(len(steps))), 0
        # Pieces of a tensor that were merged with one that was asked for, until they are asked for, too. A writer asks
        # for them soon; of two tensors at most, so that memory stays small.
        self._waiting: dict[int, dict[int, np.ndarray]] = {}

    def piece(self, i: int, j: int) -> np.ndarray:
        """Piece j of the tensor of step i, float32."""
        if j not in self._waiting.get(i, {}):
            merged = np.asarray(run(self._steps[i]))  # numpy makes scalars of arrays without axes
            self._waiting[i] = dict(enumerate(self._steps[i].tensor.to_ours(merged)))
            self._count(i)
        waiting = self._waiting[i]
        found = waiting.pop(j)
        if not waiting:
            del self._waiting[i]
        while len(self._waiting) > 2:
            self._waiting.pop(next(iter(self._waiting)))
        return found

    def _count(self, i: int) -> None:
        if i in self._left:  # a tensor may be merged again, for a piece that is asked for much later
            self._left.remove(i)
            self._bytes_done += self._bytes[i]
            self._report(self._bytes_done, self._total)


def run(step: Step) -> np.ndarray:
    """The merged tensor, float32, in the layout of a Hugging Face folder."""
    method, weights = step.method, step.weights
    theta = lambda: (_read(model, tensor) for model, tensor in step.sources)
    if isinstance(method, Linear):
        return methods.linear(theta(), weights, method.normalize)
    if isinstance(method, Slerp):
        theta_0, theta_1 = theta()
        return methods.slerp(theta_0, theta_1, _number(method.t))
    if isinstance(method, Passthrough):
        return np.float32(_number(method.scale)) * next(theta())
    if step.base is None:
        raise ValueError(f"{type(method).__name__} needs a base.")
    theta_0 = _read(*step.base)
    if isinstance(method, ModelStock):
        return methods.model_stock(theta_0, list(theta()), method.filter_wise)
    tau = (np.subtract(theta_i, theta_0, out=theta_i) for theta_i in theta())
    scale = _number(method.scale)
    if isinstance(method, TaskArithmetic):
        return methods.task_arithmetic(theta_0, tau, weights, scale, method.normalize)
    sparse = _sparse(step, method, tau)
    if isinstance(method, Ties) or method.elect_signs:
        return methods.ties(theta_0, sparse, weights, scale, method.normalize)
    return methods.task_arithmetic(theta_0, sparse, weights, scale, method.normalize)


def _sparse(step: Step, method: Ties | Dare, tau: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for i, (density, tau_i) in enumerate(zip(step.densities, tau)):
        if isinstance(method, Ties):
            yield methods.trim(tau_i, density, method.rescale)
        else:
            yield methods.drop(tau_i, density, _generator(method.seed, step.tensor, i), method.rescale)


def _generator(seed: int, tensor: Tensor, source: int) -> np.random.Generator:
    """Random numbers that follow from the names alone, so the order of the merge does not matter."""
    piece = tensor.pieces[0]
    text = f"{seed} {'/'.join(piece.path)} {piece.expert} {source}"
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"))


def _number(setting: Any) -> float:
    """A setting of a step, which `plan` made a number."""
    return float(setting)


def _read(model: Model, tensor: Tensor) -> np.ndarray:
    """A new array: the caller may change it."""
    found = [(model.params[piece.path], piece.expert) for piece in tensor.pieces]
    pieces = [np.asarray(array if expert is None else array[expert]) for array, expert in found]
    return np.array(tensor.to_theirs(pieces), np.float32, order="C")

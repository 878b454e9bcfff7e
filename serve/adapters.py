"""LoRA adapters that requests name: several in one batch, of different ranks, loaded and dropped while the engine runs.

Each has a slot of the model's own adapters (model/blocks/lora.py), padded to their rank with zeros, which change
nothing. Chen et al. 2023 (Punica), arXiv:2310.18547, and Sheng et al. 2023 (S-LoRA), arXiv:2311.03285, serve so.
"""

# N slots, R rank

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from model import ModelConfig
from model.adapters import add_adapters, is_adapter
from model.blocks.lora import LoRA
from model.formats.peft import load_adapters
from model.function import logical_axes
from serve.request import RequestError


@dataclasses.dataclass(frozen=True)
class _Loaded:
    slot: int
    number: int  # of the load, so that a name that is loaded again shares no cached prefix with what it was


class AdapterSlots:
    """The adapters of one engine, by name, and their place in its parameters."""

    def __init__(self, cfg: ModelConfig, slots: int, rank: int, targets: tuple[str, ...]):
        if cfg.adapters is not None:
            raise ValueError(
                f"adapter_slots={slots}: the model has adapters of its own ({cfg.adapters}); merge or drop them first."
            )
        self._base, self._slots = cfg, slots
        self._spec = LoRA(
            rank, float(rank), targets, slots
        )  # a scale of 1: that of each adapter is part of its `b`
        self._loaded: dict[str, _Loaded] = {}
        self._loads = 0

    def extend(self, params: Any) -> tuple[ModelConfig, Any]:
        """The model with empty slots, where its parameters are."""
        cfg, extended = add_adapters(self._base, params, self._spec, jax.random.key(0))
        place = jax.tree.leaves(params)[0].sharding
        if isinstance(place, NamedSharding):
            place = NamedSharding(place.mesh, PartitionSpec())
        flat = {
            p: jax.device_put(x, place) if is_adapter(p) else x for p, x in flatten_dict(extended).items()
        }
        self._axis = {
            p: names.index("adapters")
            for p, names in cast(dict, flatten_dict(logical_axes(cfg))).items()
            if is_adapter(p)
        }
        return cfg, unflatten_dict(flat)

    def join(self, params: Any, extended: Any) -> Any:
        """Other parameters of the model, with the adapters of `extended`."""
        return unflatten_dict(flatten_dict(params) | self._only(extended))

    def without(self, extended: Any) -> Any:
        return unflatten_dict({p: x for p, x in flatten_dict(extended).items() if not is_adapter(p)})

    def load(self, name: str, folder: str | Path, extended: Any) -> Any:
        """The parameters with the adapter of a PEFT folder in a free slot.

        Raises:
          ValueError: the name is taken, no slot is free, or the folder is not an adapter that fits.
        """
        if name in self._loaded:
            raise ValueError(f"an adapter named {name!r} is loaded; drop it first.")
        free = set(range(self._slots)) - {loaded.slot for loaded in self._loaded.values()}
        if not free:
            raise ValueError(
                f"all {self._slots} slots have adapters ({', '.join(self._loaded)}); drop one first."
            )
        cfg, params = load_adapters(self._base, self.without(extended), [folder])
        assert cfg.adapters is not None  # of the folder
        given = self._only(params)
        self._check_fits(folder, cfg.adapters, given)
        slot, new = min(free), {}
        for path, array in self._only(extended).items():
            axis = self._axis[path]
            part = jnp.zeros(array.shape[:axis] + array.shape[axis + 1 :], array.dtype)
            if path in given:
                one = jnp.take(jnp.asarray(given[path], jnp.float32), 0, axis=axis)
                if path[-1].endswith("_lora_b"):
                    one *= cfg.adapters.scale
                part = jnp.pad(one, [(0, m - n) for n, m in zip(one.shape, part.shape, strict=True)])
            index = (slice(None),) * axis + (slot,)
            new[path] = jax.device_put(array.at[index].set(part.astype(array.dtype)), array.sharding)
        self._loads += 1
        self._loaded[name] = _Loaded(slot, self._loads)
        return unflatten_dict(flatten_dict(extended) | new)

    def drop(self, name: str) -> None:
        """Free the slot of an adapter; its numbers stay there until another needs it."""
        del self._loaded[self._known(name)]

    def slot(self, name: str | None) -> int:
        """That of an adapter; -1 for None."""
        return -1 if name is None else self._loaded[self._known(name)].slot

    def identity(self, name: str | None) -> int:
        """Another number for each adapter that was ever loaded; 0 for None."""
        return 0 if name is None else self._loaded[self._known(name)].number

    @property
    def names(self) -> list[str]:
        return list(self._loaded)

    def _known(self, name: str) -> str:
        if name not in self._loaded:
            loaded = ", ".join(self._loaded) or "none is loaded"
            raise RequestError(
                "adapter", f"this engine has no adapter named {name!r:.100}; it has: {loaded}."
            )
        return name

    def _only(self, params: Any) -> dict[tuple, Any]:
        return {path: x for path, x in flatten_dict(params).items() if is_adapter(path)}

    def _check_fits(self, folder: str | Path, given: LoRA, arrays: dict[tuple, Any]) -> None:
        if given.decomposed:
            raise ValueError(
                f"{folder} is a DoRA adapter, which has no slot; merge it (model.adapters.merge_adapter)."
            )
        if given.rank > self._spec.rank:
            raise ValueError(
                f"{folder} has rank {given.rank}, and this engine's slots have {self._spec.rank}: make it with "
                f"adapter_rank={given.rank}."
            )
        if missing := sorted("/".join(path) for path in arrays if path not in self._axis):
            raise ValueError(
                f"{folder} adapts {missing[0].removesuffix('_lora_a')}, which adapter_targets="
                f"{self._spec.targets} leaves out."
            )

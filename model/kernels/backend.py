"""The back end that kernels are traced for: that of the current platform, or the one of `use`.

To compile for a TPU on another machine: `with backend.use("tpu", chip="v5p"): ...`. The back end is a part of the cache
key of `jax.jit`, so a function is traced again under another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Literal, TypeVar

import jax
from jax.sharding import AxisType

_log = logging.getLogger(__name__)

# jax's device_kind -> name of the chip
CHIPS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Backend:
    """The platform and chip that kernels are for."""

    name: Literal["plain", "tpu", "gpu"] = "plain"  # jnp; Pallas kernels for TPUs; kernels for GPUs
    chip: str | None = None  # a value of CHIPS, for its tile sizes; None: sizes for every chip
    interpret: bool = False  # run Pallas kernels interpreted, slowly, on any platform

    def of_chip(self, table: dict[str, T], default: T) -> T:
        """This chip's entry, or the default without a chip."""
        return table[self.chip] if self.chip else default

    def __post_init__(self):
        if self.name not in ("plain", "tpu", "gpu"):
            raise ValueError(f'There is no back end {self.name!r}. Use "plain", "tpu" or "gpu".')
        known = sorted(set(CHIPS.values()))
        if self.chip is not None and self.chip not in known:
            raise ValueError(
                f"No block sizes are known for the chip {self.chip!r}. Use one of {known}, or None."
            )


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The implementation of each operation, by its name in the operation's table; "auto": the platform's."""

    attention: str = "auto"  # model.kernels.attention
    paged: str = "auto"  # model.kernels.paged_attention
    cross_entropy: str = "auto"  # model.kernels.cross_entropy
    grouped: str = "auto"  # products of experts: model.kernels.grouped_matmul
    quantized: str = "auto"  # model.kernels.quantized_matmul
    quantized_grouped: str = "auto"  # model.kernels.grouped_matmul.quantized
    ssd: str = "auto"  # model.kernels.ssd
    delta_rule: str = "auto"  # model.kernels.delta_rule


_context = jax.make_user_context(default_value=None)
_kernels = jax.make_user_context(default_value=Kernels())


def current() -> Backend:
    """The back end of the innermost `use`, or the platform's."""
    return _context.value or _of_platform()


def for_cpu() -> bool:
    """Whether traced programs are for a CPU; see cpu.py."""
    return current().name == "plain" and jax.default_backend() == "cpu"


def for_one_cpu() -> bool:
    """`for_cpu` without a mesh: to split an array that devices share moves its parts between them."""
    mesh = jax.sharding.get_abstract_mesh()
    return for_cpu() and all(kind == AxisType.Manual for kind in mesh.axis_types)


@contextlib.contextmanager
def use(
    name: Literal["plain", "tpu", "gpu"], chip: str | None = None, interpret: bool = False
) -> Iterator[Backend]:
    """Kernels traced within use this back end on any platform."""
    chosen = Backend(name, chip, interpret)
    with _context(chosen):
        yield chosen


def kernels() -> Kernels:
    """The implementations of the innermost `prefer`."""
    return _kernels.value


@contextlib.contextmanager
def prefer(kernels: Kernels) -> Iterator[None]:
    """Operations traced within use these implementations."""
    with _kernels(kernels):
        yield


@functools.cache
def _of_platform() -> Backend:
    chosen = Backend()
    if jax.default_backend() == "gpu":
        chosen = Backend("gpu")
    if jax.default_backend() == "tpu":
        chosen = Backend("tpu", CHIPS.get(jax.devices()[0].device_kind))
    _log.info("Kernels: %s, since the platform is %s.", chosen, jax.default_backend())
    return chosen

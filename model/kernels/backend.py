"""Which platform and chip kernels are traced for: the one that is here, or the one that `use` names.

Programs that are compiled for a TPU on a machine that has none name it: `with backend.use("tpu", chip="v5p"): ...`. The
back end is part of what `jax.jit` caches by, so a function that was traced under one is traced again under another.
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

# jax's device_kind to the name of the chip
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
    """Where kernels run."""

    name: Literal["plain", "tpu", "gpu"] = (
        "plain"  # jnp, left to the compiler; Pallas kernels for TPUs; libraries' kernels for GPUs
    )
    chip: str | None = None  # one of CHIPS' values, for its tile sizes; None: sizes that serve every chip
    interpret: bool = False  # Pallas kernels step by step on any platform: right numbers, slowly

    def of_chip(self, table: dict[str, T], default: T) -> T:
        """This chip's entry; the default where no chip is named."""
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
    """Which implementation of an operation runs, by its name in that operation's table; "auto": the platform's."""

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
    """The one that the innermost `use` names, or else the platform's."""
    return _context.value or _of_platform()


def for_cpu() -> bool:
    """Whether programs that are traced are for a CPU, where XLA needs some operations in another form; see cpu.py."""
    return current().name == "plain" and jax.default_backend() == "cpu"


def for_one_cpu() -> bool:
    """`for_cpu`, and no mesh splits what is traced: to cut an array that devices share sends its parts about."""
    mesh = jax.sharding.get_abstract_mesh()
    return for_cpu() and all(kind == AxisType.Manual for kind in mesh.axis_types)


@contextlib.contextmanager
def use(
    name: Literal["plain", "tpu", "gpu"], chip: str | None = None, interpret: bool = False
) -> Iterator[Backend]:
    """Kernels that are traced within take this back end, whatever the platform."""
    chosen = Backend(name, chip, interpret)
    with _context(chosen):
        yield chosen


def kernels() -> Kernels:
    """What the innermost `prefer` names."""
    return _kernels.value


@contextlib.contextmanager
def prefer(kernels: Kernels) -> Iterator[None]:
    """What is traced within takes these implementations."""
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

"""Compiling for TPUs on a machine that has none: libtpu knows them all.

`make test` installs it apart from the other packages; tests that need it are skipped where it is in neither place.
"""

import functools
import importlib.util
import itertools
import math
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from model.sharding import MESH_AXES

os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # test workers share the machine
}

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

_APART = Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"
_installed = importlib.util.find_spec("libtpu") is not None
if _APART.is_file() and not _installed:
    os.environ.setdefault("TPU_LIBRARY_PATH", str(_APART))

needs_libtpu = pytest.mark.skipif(
    not _installed and not _APART.is_file(), reason="libtpu is not installed: make install (Linux on x86-64)"
)


@functools.cache
def one_chip(chip: str) -> NamedSharding:
    """Whole arrays on one device of such a chip."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    return NamedSharding(Mesh(topology.devices[:1], ("x",)), PartitionSpec())


def chips_of(chip: str, **sizes: int) -> Mesh:
    """A mesh of such chips with these sizes of its axes; four at most."""
    from jax.experimental import topologies

    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return Mesh(np.asarray(devices[: math.prod(shape)]).reshape(shape), MESH_AXES, axis_types=kinds)


def compile_for(chip: str, function, *arguments: jax.ShapeDtypeStruct):
    """The program of `function` for one such chip."""
    on_chip = one_chip(chip)
    return jax.jit(function, in_shardings=on_chip, out_shardings=on_chip).lower(*arguments).compile()


def sweep(cases: Iterable, smallest: str) -> list[tuple]:
    """(chip, case): each case for the chip that has the least room, and for one of the others in turn.

    What differs between chips is the size of blocks, what differs between cases the kernel; all pairs would say little
    more and take hours.
    """
    others = itertools.cycle(chip for chip in CHIPS if chip != smallest)
    return [(chip, case) for case in cases for chip in (smallest, next(others))]


def assert_not_moved(program: str, arrays) -> None:
    """The text of this program makes nothing of these arrays' shapes but what lies where they lay."""
    shapes = {",".join(map(str, x.shape)) for x in arrays}
    assert shapes
    for line in program.splitlines():
        made = re.match(r"\s*(?:ROOT )?%[\w.-]+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if made and made[1] in shapes:
            assert made[2] in ("parameter", "get-tuple-element", "bitcast"), line

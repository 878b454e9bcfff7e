"""What TPU chips can do, and what libtpu has to be told on a machine that has none."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LIBRARY_PATH": str(
        Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"
    ),  # where `make install` puts it
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one jax device."""

    flops: float  # a second, bfloat16
    bandwidth: float  # bytes a second, of main memory
    vmem: int  # MiB of a core, of which v4 and v5p have two to a device

    def roofline(self, flops: float, moved: float) -> tuple[float, str]:
        """(seconds, what binds)."""
        return max((flops / self.flops, "flops"), (moved / self.bandwidth, "bytes"))


# cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x; VMEM: TpuInfo of jax.experimental.pallas.tpu. A tpu7x is two
# devices of one core each, so its 2307e12 flops and 7380e9 bytes a second are halved here.
CHIPS = {
    "v4": Chip(275e12, 1228e9, 16),
    "v5e": Chip(197e12, 819e9, 128),
    "v5p": Chip(459e12, 2765e9, 64),
    "v6e": Chip(918e12, 1640e9, 128),
    "tpu7x": Chip(2307e12 / 2, 7380e9 / 2, 64),
}

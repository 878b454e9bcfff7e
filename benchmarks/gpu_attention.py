"""Attention on a GPU: our kernels beside cudnn's and the plain form, and what Triton compiles them to without a GPU.

python -m benchmarks.gpu attention     times, flops a second and the largest difference from the plain form
python -m benchmarks.gpu registers     shared memory, registers and spills; wants `pip install triton`, and no card
"""

# T tokens, H query heads, K key/value heads, C width of a key, E width of a value

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from model.kernels import backend
from model.kernels.attention import Mask, Scores, self_attention
from model.kernels.backend import Kernels

ARCHITECTURES = {"A100": 80, "RTX 30": 86, "H100": 90, "B200": 100, "RTX 50": 120}


@dataclasses.dataclass(frozen=True)
class Case:
    T: int
    heads: tuple[int, int]  # of queries, of keys and values
    widths: tuple[int, int]  # of keys, of values
    documents: int = 1
    mask: Mask = Mask()
    softcap: float | None = None
    sinks: bool = False

    def pairs(self) -> int:
        """Of a query and a key it sees."""
        query = np.arange(self.T // self.documents)
        seen = np.minimum(query + 1, self.mask.window or self.T)
        return int(seen.sum()) * self.documents


CASES = {
    "Llama 8B, whole rows": Case(8192, (32, 8), (128, 128)),
    "Llama 8B, 8 documents": Case(8192, (32, 8), (128, 128), documents=8),
    "Gemma 2 9B, window, soft-cap": Case(8192, (16, 8), (256, 256), mask=Mask(window=4096), softcap=50.0),
    "gpt-oss, window, sinks": Case(8192, (64, 8), (64, 64), mask=Mask(window=128), sinks=True),
    "latent, 8 documents": Case(8192, (32, 32), (192, 128), documents=8),
}
SMALL = {
    name: dataclasses.replace(case, T=128, heads=(4, 2), widths=(32, 16 if case.widths[0] == 192 else 32))
    for name, case in CASES.items()
}


def attention(options: argparse.Namespace, say: Callable[..., None], timed: Callable[..., float]) -> None:
    """One row of each case in bfloat16. `--small` interprets the kernels on a CPU, whose times say nothing."""
    for name, case in (SMALL if options.small else CASES).items():
        arguments, wanted = inputs(case), None
        for form in ("plain", "triton", "cudnn"):
            try:
                forward, both = programs(case, form, options.small, arguments)
            except ValueError as refused:
                say("attention", case=name, form=form, refused=str(refused))
                continue
            found = jax.tree.map(lambda x: np.asarray(x, np.float32), both(*arguments))
            wanted = wanted or found
            differences = [float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True)]
            say(
                "attention",
                case=name,
                form=form,
                **speed(case, forward, both, arguments, timed),
                differences=differences,
            )


def speed(
    case: Case, forward: Callable, both: Callable, arguments: tuple, timed: Callable
) -> dict[str, float]:
    flops = 2 * case.pairs() * case.heads[0] * sum(case.widths)
    seconds = timed(lambda: jax.block_until_ready(forward(*arguments)), 10)
    seconds_of_both = timed(lambda: jax.block_until_ready(both(*arguments)), 10)
    return {
        "forward_seconds": seconds,
        "seconds_with_gradients": seconds_of_both,
        "forward_tflops": flops / seconds / 1e12,
        # a backward pass multiplies five times where the forward one does twice
        "tflops_with_gradients": 3.5 * flops / seconds_of_both / 1e12,
    }


def inputs(case: Case) -> tuple[jax.Array, ...]:
    """(q, k, v, sinks, direction of the output)."""
    (H, K), (C, E) = case.heads, case.widths
    shapes = [(1, case.T, H, C), (1, case.T, K, C), (1, case.T, K, E), (H,), (1, case.T, H, E)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes))


def programs(case: Case, form: str, interpret: bool, arguments: tuple) -> tuple[Callable, Callable]:
    """(output, output and gradients of queries, keys and values), compiled."""

    def forward(q, k, v, sinks, direction):
        at = jnp.arange(case.T)[None]
        each = case.T // case.documents
        ids = at // each if case.documents > 1 else None
        scores = Scores(softcap=case.softcap, sinks_H=sinks if case.sinks else None)
        return self_attention(q, k, v, at % each, ids, case.mask, scores)

    def both(q, k, v, sinks, direction):
        out, pull = jax.vjp(lambda *qkv: forward(*qkv, sinks, direction), q, k, v)
        return out, *pull(direction)

    with backend.use("gpu", interpret=interpret), backend.prefer(Kernels(attention=form)):
        return tuple(jax.jit(run).lower(*arguments).compile() for run in (forward, both))


def registers(options: argparse.Namespace, say: Callable[..., None]) -> None:
    """Every kernel of every entry of the table of tiles, compiled by Triton for each architecture. XLA brings its own
    version of Triton, whose counts may differ a little."""
    for (itemsize, width), dtype, extra in entries():
        for kernel, text, tile in triton_modules(width, dtype, extra):
            for chip, architecture in ARCHITECTURES.items():
                if options.small and (width, chip) != (64, "H100"):
                    continue
                shape = {"bytes": itemsize, "width": width, **extra, "tile": dataclasses.asdict(tile)}
                say("registers", kernel=kernel, chip=chip, **shape, **compiled(text, architecture, tile))


def as_on(card: str = "NVIDIA H100") -> contextlib.AbstractContextManager:
    """Where kernels are traced to be lowered for CUDA without a card: from 0.12 on, JAX asks which one it would be."""
    if jax.__version_info__ < (0, 12):
        return contextlib.nullcontext()
    device = AbstractDevice(card, None, "gpu")
    mesh = AbstractMesh((1,), ("card",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def entries() -> Iterator[tuple[tuple[int, int], Any, dict[str, Any]]]:
    from model.kernels.attention.gpu_triton import TILES

    for itemsize, width in TILES:
        dtype = {2: jnp.bfloat16, 4: jnp.float32}[itemsize]
        for softcap in (None, 50.0):
            yield (itemsize, width), dtype, {"softcap": softcap}


def triton_modules(width: int, dtype: Any, extra: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """(name, module in Triton's dialect, tile) of the three kernels, for a packed row."""
    from jax._src.pallas.triton import lowering

    from model.kernels.attention.gpu_triton import TILES, flash_attention

    found, lower = [], lowering.lower_jaxpr_to_triton_module

    def watched(jaxpr, *rest, **options):
        result = lower(jaxpr, *rest, **options)
        found.append((jaxpr.debug_info.func_name, result.module.operation.get_asm()))
        return result

    q, k = (jax.ShapeDtypeStruct((1, 4096, heads, width), dtype) for heads in (8, 2))
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    total = lambda q, k, v, ids: flash_attention(q, k, v, ids, ids, **extra)[0].astype(jnp.float32).sum()
    lowering.lower_jaxpr_to_triton_module = watched
    try:
        with as_on():
            jax.jit(jax.grad(total, (0, 1, 2))).trace(q, k, k, ids).lower(lowering_platforms=("cuda",))
    finally:
        lowering.lower_jaxpr_to_triton_module = lower
    tiles = TILES[jnp.dtype(dtype).itemsize, width]
    return [(*module, tile) for module, tile in zip(found, tiles, strict=True)]


def compiled(text: str, architecture: int, tile: Any) -> dict[str, Any]:
    """What Triton and ptxas say of a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ttir"), Path(folder, "kernel.cubin")
        source.write_text(text)
        how = {"num_warps": tile.warps, "num_stages": tile.stages}
        kernel = triton.compile(str(source), target=GPUTarget("cuda", architecture, 32), options=how)
        binary.write_bytes(kernel.asm["cubin"])
        command = [tools / "cuobjdump", "--dump-resource-usage", binary]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", usage)}
    return {
        "shared_bytes": kernel.metadata.shared,
        "registers": counts["reg"],
        "spilled_bytes": counts["stack"],
    }

"""Where scoring targets in tiles overtakes all logits at once: seconds of a step (values and gradients) and its memory.

    python -m benchmarks.cross_entropy [--vocabulary=32768] [--width=512] [--bfloat16]

On the platform that jax finds, on one device. `WHOLE_LOGITS_BYTES` (model/kernels/cross_entropy/) is the size
of the logits from which tiles are taken on a CPU or GPU: set it to where they are no slower. On a TPU tiles are always
taken; here too the kernels are timed beside the rest.
"""

from __future__ import annotations

import argparse
import functools
import time

import jax
import jax.numpy as jnp

from model.kernels import backend
from model.kernels.cross_entropy import cross_entropy
from model.kernels.cross_entropy.reference import from_all_logits

TOKENS = (256, 1024, 4096, 8192, 16384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--stripe-megabytes", type=int, nargs="+", default=(32, 128))
    parser.add_argument("--bfloat16", action="store_true")
    options = parser.parse_args()
    dtype = jnp.bfloat16 if options.bfloat16 else jnp.float32
    print(f"{jax.devices()[0].device_kind}, V={options.vocabulary}, D={options.width}, {dtype.__name__}")
    print(f"{'tokens':>7} {'logits MB':>10} {'form':<18} {'ms':>9} {'temporary MB':>13}")
    for N in options.tokens:
        for name, score in forms(options.stripe_megabytes).items():
            seconds, temporary = measured(score, N, options.vocabulary, options.width, dtype)
            logits = 4 * N * options.vocabulary
            print(
                f"{N:>7} {logits / 1e6:>10.0f} {name:<18} {1e3 * seconds:>9.1f} {temporary / 1e6:>13.0f}",
                flush=True,
            )


def forms(stripe_megabytes) -> dict:
    """By name, each a function as `cross_entropy`."""
    striped = {
        f"{megabytes} MB stripes": functools.partial(cross_entropy, stripe_bytes=megabytes << 20)
        for megabytes in stripe_megabytes
    }
    plain = {name: functools.partial(_plainly, score) for name, score in striped.items()}
    kernels = {f"kernel, {name}": score for name, score in striped.items()}
    on_tpu = backend.current().name == "tpu"
    return {"all logits": from_all_logits} | plain | (kernels if on_tpu else {})


def _plainly(score, *arguments):
    with backend.use("plain"), backend.prefer(backend.Kernels(cross_entropy="stripes")):
        return score(*arguments)


def measured(score, N: int, V: int, D: int, dtype, repeats: int = 5) -> tuple[float, int]:
    """(seconds of the quickest of some steps, bytes of temporary memory)."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden_ND, head_VD = (jax.random.normal(key, (n, D), dtype) for key, n in zip(keys, (N, V)))
    targets_N = jax.random.randint(keys[2], (N,), 0, V)

    def loss(hidden_ND, head_VD):
        return -jnp.mean(score(hidden_ND, head_VD * D**-0.5, targets_N).logprobs)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden_ND, head_VD).compile()
    jax.block_until_ready(step(hidden_ND, head_VD))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(hidden_ND, head_VD))
        best = min(best, time.perf_counter() - start)
    return best, step.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()

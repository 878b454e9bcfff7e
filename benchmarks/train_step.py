"""The train step on this machine's CPU beside PyTorch's, on the same work, turn by turn.

    python -m benchmarks.train_step [--model=llama|moe|mamba2] [--rows=8] [--length=512] [--rounds=5]

25 million parameters (with 8 experts, 2 a token: 78 million), float32, AdamW, clipping by the global norm, as
`python -m train` runs it. The peer is transformers' own model, eager and under torch.compile. Each round runs ours and
then each peer, a step that is not timed and one that is: after another process's turn the first has to get its memory
from the system again. The figures are medians over the rounds. All get memory in huge pages, where Linux gives them on
request. A plain matrix product has its turn in each round, too, forward and with both of its gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from model.compilation import prepare_compiler, training_options

VOCAB = 4096
TORCH = ("torch==2.13.0", "transformers==5.23.0")
PEERS = {"PyTorch eager": [], "PyTorch compiled": ["--compiled"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("llama", "moe", "mamba2"), default="llama")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    WORKERS[options.worker](options) if options.worker else compare(options)


def compare(options: argparse.Namespace) -> None:
    from benchmarks.venvs import python_of

    shape = [f"--model={options.model}", f"--rows={options.rows}", f"--length={options.length}"]
    ours = [sys.executable, "-m", "benchmarks.train_step", *shape]
    with tempfile.TemporaryDirectory() as cache:
        workers = {"Crucible": Worker([*ours, "--worker=steps"], cache)}
        cached = Worker([*ours, "--worker=compile"], cache).first["compile_seconds"]
    product = Worker([*ours, "--worker=product"])
    for name in options.peers:
        python = str(python_of("torch", *TORCH))
        workers[name] = Worker([python, "benchmarks/peers/torch_step.py", *shape, *PEERS[name]])
    for round in range(options.rounds):
        for name, worker in workers.items():
            worker.step()
            print(f"round {round + 1}: {name} {worker.seconds[-1]:.2f} s", file=sys.stderr, flush=True)
        product.step()
    report(options, workers)
    report_compiler(workers["Crucible"], cached, product)


class Worker:
    """A process that takes steps when it is told to."""

    def __init__(self, command: list[str], cache: str = ""):
        settings = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        if cache:
            settings["JAX_COMPILATION_CACHE_DIR"] = cache
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | settings
        )
        self.first = self._answer()
        self.answers: list[dict] = []

    @property
    def seconds(self) -> list[float]:
        return [answer["seconds"][-1] for answer in self.answers]

    def step(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("2\n")
        self._process.stdin.flush()
        self.answers.append(self._answer())

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended without an answer; see its message above.")
        return json.loads(line)


def report(options: argparse.Namespace, workers: dict[str, Worker]) -> None:
    tokens = options.rows * options.length
    ours = statistics.median(workers["Crucible"].seconds)
    print(f"{options.model}, {options.rows} rows of {options.length} tokens, {options.rounds} rounds")
    print(
        f"{'':<18} {'s/step':>7} {'tokens/s':>9} {'ours is':>8} {'peak MB':>8} {'first step s':>12} parameters"
    )
    for name, worker in workers.items():
        seconds = statistics.median(worker.seconds)
        print(
            f"{name:<18} {seconds:>7.2f} {tokens / seconds:>9.0f} {seconds / ours:>7.2f}x "
            f"{worker.answers[-1]['peak_bytes'] / 1e6:>8.0f} {worker.first['seconds']:>12.1f} "
            f"{worker.first['parameters'] / 1e6:.1f} M"
        )


def report_compiler(ours: Worker, cached: float, product: Worker) -> None:
    rate = ours.first["flops"] / statistics.median(ours.seconds) / 1e9
    print(f"ours: {rate:.0f} GFLOP/s; of a plain matrix product's")
    for name in product.first["rates"]:
        gflops = statistics.median(answer["rates"][name] for answer in product.answers)
        print(f"  {gflops:.0f} {name}: {rate / gflops:.2f}")
    print(f"compiled in {ours.first['compile_seconds']:.1f} s; from the cache in {cached:.1f} s")


def take_steps(options: argparse.Namespace) -> None:
    """As many as asked for on standard input; answers in JSON."""
    state, batch, flops, compiled, compile_seconds = compile_step(options)
    seconds, (state, loss) = timed(lambda: run(compiled, state, batch))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    say(
        seconds=seconds + compile_seconds,
        loss=loss,
        parameters=parameters,
        flops=flops,
        compile_seconds=compile_seconds,
    )
    for line in sys.stdin:
        taken = []
        for _ in range(int(line)):
            seconds, (state, loss) = timed(lambda state=state: run(compiled, state, batch))
            taken.append(seconds)
        say(seconds=taken, loss=loss)


def compile_step(options: argparse.Namespace):
    prepare_compiler()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    step, state, batch, flops = make_step(options)
    seconds, compiled = timed(lambda: step.lower(state, batch).compile())
    return state, batch, flops, compiled, seconds


def compile_again(options: argparse.Namespace) -> None:
    say(compile_seconds=compile_step(options)[-1])


def take_products(options: argparse.Namespace) -> None:
    """Rates of float32 products as the feed-forward networks have them, compiled as the step is: medians of ten, once
    and for each line of standard input."""
    N, D, F = 4096, 512, 1408
    x_ND, w_DF, d_NF = jnp.ones((N, D)), jnp.ones((D, F)), jnp.ones((N, F))
    forms = {
        "alone": lambda x_ND, w_DF, d_NF: x_ND @ w_DF,
        "with both of its gradients": lambda x_ND, w_DF, d_NF: (x_ND @ w_DF, d_NF @ w_DF.T, x_ND.T @ d_NF),
    }
    jitted = {name: jax.jit(form, compiler_options=training_options()) for name, form in forms.items()}

    def rate(product) -> float:
        run = lambda: jax.block_until_ready(product(x_ND, w_DF, d_NF))
        results = run()
        seconds = statistics.median(timed(run)[0] for _ in range(10))
        return len(jax.tree.leaves(results)) * 2 * N * D * F / seconds / 1e9

    rates = lambda: {name: rate(product) for name, product in jitted.items()}
    say(rates=rates())
    for _ in sys.stdin:
        say(rates=rates())


WORKERS = {"steps": take_steps, "compile": compile_again, "product": take_products}


def make_step(options: argparse.Namespace):
    """(the jitted step, its state, a batch, flops of a step)."""
    from model import init
    from model.inspect.flops import train_flops_per_token
    from train.algorithms import LanguageModelling
    from train.optimizers import AdamW, make_optimizer
    from train.schedules import Cosine
    from train.step import make_train_step, new_state

    cfg = make_config(options)
    params = init(cfg, jax.random.key(0))
    optimizers = {"policy": make_optimizer(AdamW(), Cosine(), 1000, cfg)}
    train_step = make_train_step(LanguageModelling(), {"policy": cfg}, optimizers)
    step = jax.jit(
        lambda state, batch: train_step(state, {}, batch),
        donate_argnums=0,
        compiler_options=training_options(),
    )
    tokens = jax.random.randint(jax.random.key(1), (options.rows, options.length), 0, VOCAB)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "loss_weights": jnp.ones(tokens.shape, jnp.float32),
        "segment_ids": jnp.ones(tokens.shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(options.length), tokens.shape),
    }
    state = new_state({"policy": params}, optimizers)
    return step, state, batch, tokens.size * train_flops_per_token(cfg, options.length)


def make_config(options: argparse.Namespace):
    from model import ModelConfig, RMSNorm, decoder
    from model.blocks.block import Block
    from model.blocks.mamba2 import Mamba2
    from train.presets import Mixture

    if options.model == "mamba2":
        return ModelConfig(VOCAB, 512, (Block(Mamba2(16, 64, 64), None),) * 14, final_norm=RMSNorm())
    width = 704 if options.model == "moe" else 1408
    cfg = decoder(VOCAB, 512, 8, 8, 4, 64, width, tied_head=True)
    return Mixture(ffn_width=width).put_into(cfg) if options.model == "moe" else cfg


def run(compiled, state, batch):
    state, metrics = compiled(state, batch)
    return state, float(metrics["loss"].mean())


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def say(**answer) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(answer | {"peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()

"""Train steps of large models, compiled for TPU slices on a machine that has none: does it fit, and how does it run.

    python -m benchmarks.compiled [--only=llama-8b ...] [--remat=none|products|offload|full] [--save=FOLDER]
                                  [--split-residual] [--option xla_tpu_scoped_vmem_limit_kib=65536]

For each model and slice: bytes of a device's memory that the program needs and that are left, the kernels in it, its
collectives, those that run beside other work and those that do not, float32 products, copies of large arrays, and the
bytes that it moves to and from main memory (benchmarks.traffic) beside those that it must.
Needs libtpu, which `make install` puts beside the environment.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from benchmarks.chips import CHIPS, ENVIRONMENT
from benchmarks.compiled_cases import CASES, Case
from benchmarks.traffic import Traffic, is_idle_transpose, traffic
from model import ModelConfig, ShardingRules
from model.blocks.remat import POLICIES
from model.compilation import training_options
from model.families import FAMILIES
from model.function import param_shapes
from model.inspect.flops import train_flops_per_token
from model.kernels import backend
from train.algorithms import LanguageModelling
from train.mesh import make_mesh, param_shardings, state_shardings
from train.optimizers import AdamW, make_optimizer
from train.schedules import Cosine
from train.step import make_train_step, new_state

HBM = {
    "v5p": 95.7e9,
    "v6e": 31.25 * 2**30,
}  # bytes that a program may have, as libtpu says it when one does not fit
LARGE = 2**22  # numbers: of arrays that are worth a look


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--remat", choices=POLICIES, default="full")
    parser.add_argument("--layers", type=int, help="of the model, fewer than it has: for a quick look")
    parser.add_argument(
        "--split-residual", action="store_true", help="over `tensor`, too: sharding.act_embed=('tensor',)"
    )
    parser.add_argument("--save", type=Path, help="a folder for the compiled programs' text")
    parser.add_argument("--option", nargs="*", default=[], metavar="NAME=VALUE", help="of XLA, to try one")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    jax.config.update("jax_platforms", "cpu")
    for name in options.only:
        case = CASES[name]
        start = time.monotonic()
        cfg = model_of(case, options)
        tried = dict(option.split("=", 1) for option in options.option)
        rules = ShardingRules(act_embed=("tensor",)) if options.split_residual else ShardingRules()
        compiled = compile_step(cfg, case, tried, rules)
        text = compiled.as_text()
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            (options.save / f"{name}.hlo").write_text(text)
        report(name, case, cfg, compiled.memory_analysis(), text, time.monotonic() - start)
        report_traffic(case, cfg, compiled.memory_analysis().argument_size_in_bytes, traffic(text))


def model_of(case: Case, options: argparse.Namespace) -> ModelConfig:
    saved = case.config | ({"num_hidden_layers": options.layers} if options.layers else {})
    cfg = FAMILIES[saved["model_type"]].read_config(saved)
    return cfg.replace(dtype="bfloat16", param_dtype="float32", scan=True, remat=options.remat)


def compile_step(
    cfg: ModelConfig, case: Case, tried: dict[str, str] | None = None, rules: ShardingRules = ShardingRules()
):
    """The train step of `python -m train` on the case's slice; `tried` are options of XLA beside those it has."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices
    mesh = make_mesh(case.mesh, list(devices))
    optimizers = {"policy": make_optimizer(AdamW(), Cosine(), 1000, cfg)}
    state = jax.eval_shape(lambda p: new_state({"policy": p}, optimizers), param_shapes(cfg))
    shardings = state_shardings(state, {"policy": param_shardings(cfg, mesh, rules)}, mesh)
    with jax.set_mesh(mesh), backend.use("tpu", chip=case.chip):
        step = make_train_step(LanguageModelling(), {"policy": cfg}, optimizers, rules=rules)
        placed = jax.tree.map(
            lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), state, shardings
        )
        rows = NamedSharding(mesh, rules.spec(("batch",)))
        of = lambda dtype: jax.ShapeDtypeStruct((case.rows, case.length), dtype, sharding=rows)
        ints = {key: of(jnp.int32) for key in ("tokens", "targets", "segment_ids", "positions")}
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        return jitted.lower(placed, {}, ints | {"loss_weights": of(jnp.float32)}).compile(
            training_options("tpu", case.chip) | (tried or {})
        )


def report(name: str, case: Case, cfg: ModelConfig, memory, text: str, seconds: float) -> None:
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(cfg)))
    program = Program(text)
    print(
        f"{name}: {parameters / 1e9:.1f} G parameters on {case.topology}, {case.rows} rows of {case.length}, "
        f"{cfg.remat} remat, compiled in {seconds:.0f} s"
    )
    spare = 1 - needed / HBM[case.chip]
    print(
        f"  memory: {needed / 1e9:.1f} GB of {HBM[case.chip] / 1e9:.1f}, {spare:.0%} spare "
        f"(state {memory.argument_size_in_bytes / 1e9:.1f}, temporary {memory.temp_size_in_bytes / 1e9:.1f})"
    )
    for title, counts in program.findings().items():
        found = ", ".join(f"{what} x {n}" for what, n in counts.most_common(8))
        print(f"  {title}: {found or 'none'}")


def report_traffic(case: Case, cfg: ModelConfig, state: int, found: Traffic) -> None:
    """Beside what a step can't do without: what products, kernels and collectives read and write, each once, and the
    optimizer's pass over the state."""
    chip, devices = CHIPS[case.chip], math.prod(map(int, case.topology.split(":")[1].split("x")))
    ideal = found.wanted + 2 * state
    parts = ", ".join(f"{kind} {moved / 1e9:.0f}" for kind, moved in found.by_kind.items())
    print(
        f"  bytes moved: {found.moved / 1e9:.0f} GB a step, {found.moved / ideal:.2f} of the ideal ({parts})"
    )
    flops = case.rows * case.length * train_flops_per_token(cfg, case.length) / devices
    print(
        f"  at the chip's rates: {found.moved / chip.bandwidth:.2f} s for its bytes, "
        f"{flops / chip.flops:.2f} s for the model's flops",
        flush=True,
    )


class Program:
    """What a compiled program's text says."""

    def __init__(self, text: str):
        self._lines = text.splitlines()
        shape = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\w+)\[([\d,]*)\]")
        found = (match for line in self._lines if (match := shape.match(line)))
        self._shapes = {m[1]: (m[2], tuple(map(int, filter(None, m[3].split(","))))) for m in found}

    def findings(self) -> dict[str, collections.Counter]:
        return {
            "kernels": self._kernels(),
            "collectives beside other work": self._collectives(beside=True),
            "collectives waited for": self._collectives(beside=False),
            "float32 products of large arrays": self._products(),
            "copies and transposes of large arrays": self._copies(),
        }

    def _kernels(self) -> collections.Counter:
        lines = (line for line in self._lines if 'custom_call_target="tpu_custom_call"' in line)
        names = (re.search(r'op_name="[^"]*?/([\w.]+)(?:/pallas_call)?"', line) for line in lines)
        return collections.Counter(name[1] if name else "unnamed" for name in names)

    def _collectives(self, beside: bool) -> collections.Counter:
        """Of arrays with more than one number; an all-reduce of which each device keeps a part is a reduce-scatter.

        Those beside other work are begun and ended by operations of their own, or stand in several computations,
        one for each part of what runs beside them.
        """
        kinds, places, within = {}, collections.defaultdict(set), ""
        named = re.compile(
            r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
        )
        for number, line in enumerate(self._lines):
            if line.endswith("{"):
                within = line.split()[0].lstrip("%")
            elif (m := named.search(line)) and re.search(r"\[\d", line[: m.start()]):
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else f"line {number}"
                kinds[key] = "reduce-scatter" if within.startswith("all-reduce-scatter") else m[1]
                places[key] |= {within, "its end"} if m[2] else {within}
        return collections.Counter(kind for key, kind in kinds.items() if (len(places[key]) > 1) is beside)

    def _products(self) -> collections.Counter:
        found = collections.Counter()
        for line in self._lines:
            if m := re.search(r" (?:dot|convolution)\(%?([\w.\-]+), %?([\w.\-]+)\)", line):
                factors = [self._shapes.get(name, ("?", ())) for name in m.groups()]
                if all(dtype == "f32" for dtype, _ in factors) and _large(factors):
                    found[" by ".join(str(list(shape)) for _, shape in factors)] += 1
        return found

    def _copies(self) -> collections.Counter:
        found = collections.Counter()
        for line in self._lines:
            if m := re.match(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\w+)\[([\d,]+)\]\S* (copy|transpose)\(", line):
                if math.prod(map(int, m[2].split(","))) >= LARGE and not is_idle_transpose(line):
                    found[f"{m[3]} {m[1]}[{m[2]}]"] += 1
        return found


def _large(factors) -> bool:
    return max(math.prod(shape) for _, shape in factors) >= LARGE


if __name__ == "__main__":
    main()

"""Every kernel compiled for one TPU chip on a machine that has none: what it must cost, and what the compiler says.

    python -m benchmarks.kernels --topology=v5p:2x2x1 [--only flash_attention ...] [--csv=FILE] [--save=FOLDER]

One row for each shape of kernel_cases, pass and form, ours first, JAX's own or the plain form after it:
    Gflop, MB    of the mathematics: useful flops, and every input and output once
    roofline     microseconds: the longer of flops / peak and bytes / bandwidth, and which of the two it is
    VMEM         MiB: the most that one kernel holds at a time (windows, twice where they are buffered, scratch and
                 what its products spill), as the compiler puts it into the program (`used_scoped_memory_configs`);
                 of a program without kernels the most that one of XLA's own operations holds
    code, temp   MB: of the compiled program, and of main memory beside what comes in and goes out
    XLA's        Gflop, MB and microseconds of cost_analysis(). It knows a kernel by the estimate that the kernel
                 gives: `told` says how many of the kernels give one; of others no flops are counted, and each array
                 that they are given once. The body of a loop is counted once, too.
Nothing is run: no figure is a measured time. Needs libtpu, which `make install` puts beside the environment.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.chips import CHIPS, ENVIRONMENT
from benchmarks.kernel_cases import KERNELS, Case, Form
from model.kernels import backend

FORWARD, BOTH = "forward", "forward+backward"


@dataclasses.dataclass
class Row:
    kernel: str
    shape: str
    what: str
    form: str
    flops: float
    bytes: float
    roofline: float  # seconds
    bound: str
    vmem: int = 0
    code: int = 0
    temporary: int = 0
    xla_flops: float = math.nan
    xla_bytes: float = math.nan
    xla_seconds: float = math.nan
    told: str = ""
    compile_seconds: float = math.nan
    note: str = ""
    failure: str = ""


def main() -> None:
    options = _parser().parse_args()
    os.environ |= ENVIRONMENT
    jax.config.update("jax_platforms", "cpu")
    work = [job for kernel in options.only for job in jobs(kernel)]
    show = Table(f"Kernels on one {options.topology.split(':')[0]}", len(work))
    rows = []
    for job in work:
        show.begin(job)
        rows.append(measure(job, options.topology, options.save))
        show.add(rows[-1])
    show.finish(rows)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
            writer.writeheader()
            writer.writerows(map(dataclasses.asdict, rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5p:2x2x1", help=f"of {', '.join(CHIPS)}; one device is taken")
    parser.add_argument("--only", nargs="*", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--csv", type=Path, help="a file for all figures, in units without prefixes")
    parser.add_argument("--save", type=Path, help="a folder for the compiled programs' text")
    return parser


@dataclasses.dataclass(frozen=True)
class Job:
    kernel: str
    case: Case
    what: str
    name: str  # of the form

    @property
    def form(self) -> Form:
        return self.case.forms[self.name]


def jobs(kernel: str) -> Iterator[Job]:
    for case in KERNELS[kernel]():
        for what in (FORWARD, BOTH) if case.backward else (FORWARD,):
            for name in case.forms:
                yield Job(kernel, case, what, name)


def measure(job: Job, topology: str, save: Path | None = None) -> Row:
    """The row of a job; where it does not compile, why."""
    name = topology.split(":")[0]
    if name not in CHIPS:
        raise SystemExit(f"--topology={topology}: use one of {', '.join(CHIPS)}, e.g. v5p:2x2x1.")
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    with backend.use("tpu", name):
        flops, moved = ideal(job.case, job.what)
        row = Row(
            job.kernel, job.case.shape, job.what, job.name, flops, moved, *CHIPS[name].roofline(flops, moved)
        )
        start = time.monotonic()
        try:
            compiled = compile_form(job.form, job.what, device)
        except Exception as error:  # whatever a kernel or the compiler has to say
            row.failure = _reason(error)
            return row
    row.compile_seconds = time.monotonic() - start
    text = compiled.as_text()
    if save:
        save.mkdir(parents=True, exist_ok=True)
        words = re.sub(r"\W+", "-", f"{job.kernel} {job.case.shape} {job.what} {job.name}")
        (save / f"{words}.hlo").write_text(text)
    fill(row, compiled, text)
    if job.kernel == "optimizer":
        row.note = passes(text, job.case)
    return row


def ideal(case: Case, what: str) -> tuple[float, float]:
    """(useful flops, bytes that must be moved)."""
    if what == FORWARD and case.bytes is not None:
        return case.flops, case.bytes
    function, arguments = program(next(iter(case.forms.values())), what)
    moved = size_of(arguments) + size_of(jax.eval_shape(function, *arguments))
    return case.flops * (1 if what == FORWARD else 3), moved


def program(form: Form, what: str):
    """(function, its arguments)."""
    if what == FORWARD:
        return form.run, (form.floats, form.rest)

    def step(floats, rest, direction):
        out, pull = jax.vjp(lambda floats: form.run(floats, rest), floats)
        return out, pull(direction)[0]

    return step, (form.floats, form.rest, jax.eval_shape(form.run, form.floats, form.rest))


def compile_form(form: Form, what: str, device):
    function, arguments = program(form, what)
    mesh = Mesh([device], ("x",))
    on_chip = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):  # some kernels of JAX ask the mesh for the kind of the device
        jitted = jax.jit(function, in_shardings=on_chip, out_shardings=on_chip, donate_argnums=form.donated)
        return jitted.lower(*arguments).compile()


def size_of(tree) -> float:
    """Bytes; numbers of four bits are half of one."""

    def bits(x) -> int:
        return jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else 8 * x.dtype.itemsize

    return sum(math.prod(x.shape) * bits(x) / 8 for x in jax.tree.leaves(tree))


def fill(row: Row, compiled, text: str) -> None:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    kernels = re.findall(KERNEL, text, re.DOTALL)
    row.vmem = scoped_vmem("\n".join(kernels) if kernels else text)
    row.code, row.temporary = memory.generated_code_size_in_bytes, memory.temp_size_in_bytes
    row.xla_flops, row.xla_bytes = cost.get("flops", math.nan), cost.get("bytes accessed", math.nan)
    seconds = cost.get("optimal_seconds", math.nan)
    row.xla_seconds = seconds if seconds >= 0 else math.nan  # of some kernels it is below 0
    told = sum('"cost_estimate"' in call for call in kernels)
    row.told = f"{told} of {len(kernels)}" if kernels else ""


KERNEL = r'custom_call_target="tpu_custom_call".*?(?=\n\s*(?:ROOT )?%[\w.\-]+ |\nENTRY|\Z)'  # may be of several lines


def scoped_vmem(text: str) -> int:
    """Bytes of the fast memory (space 1) of the operation that holds most."""
    held = re.findall(r'"used_scoped_memory_configs":\[(.*?)\]', text)
    space = re.compile(r'"memory_space":"1","offset":"\d+","size":"(\d+)"')
    return max((sum(map(int, space.findall(one))) for one in held), default=0)


def _reason(error: Exception) -> str:
    """Its first line, and of memory that does not suffice how much was wanted."""
    words = str(error).strip() or type(error).__name__
    wanted = re.search(r"Scoped allocation with size .*? limit|Used .*? of .*? hbm", words)
    return f"{words.splitlines()[0]} {wanted[0] if wanted else ''}".strip()[:160]


ROLES = {"floats[0]": "gradients", "rest[0]": "parameters", ".mu": "first moments", ".nu": "second moments"}
MOVES_NOTHING = ("parameter", "tuple", "get-tuple-element", "bitcast", "copy-done", "constant")


def passes(text: str, case: Case) -> str:
    """How often an optimizer's program reads each tree from main memory, and writes a tree of their size."""
    count = size_of(next(iter(case.forms.values())).floats) / 4
    entry = text[text.index("\nENTRY") :].splitlines()[1:]
    role, size, read, written = {}, {}, Counter(), 0
    for line in entry:
        found = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:,|$)", line)
        if not found:
            continue
        name, results, operation, operands = found.groups()
        if operation == "parameter":
            size[name] = _numbers(results)
            role[name] = next((r for key, r in ROLES.items() if key in line.split("op_name=")[-1]), None)
        elif operation not in MOVES_NOTHING:
            for operand in re.findall(r"%([\w.\-]+)", operands):
                read[role.get(operand)] += size.get(operand, 0)
            written += _numbers(results.split("}, ")[0] if operation == "copy-start" else results)
    reads = ", ".join(f"{role} {read[role] / count:.2f}" for role in ROLES.values())
    return f"read: {reads}; written: {written / count:.2f} trees"


def _numbers(shapes: str) -> int:
    """Of all float32 arrays that are in main memory: those in the fast memory are marked S(1)."""
    arrays = re.findall(r"f32\[([\d,]+)\](?:\{([^}]*)\}?)?", shapes)
    return sum(math.prod(map(int, dims.split(","))) for dims, layout in arrays if "S(1)" not in layout)


COLUMNS = (
    "shape",
    "pass",
    "form",
    "Gflop",
    "MB",
    "roofline us",
    "bound by",
    "VMEM MiB",
    "code MB",
    "temp MB",
)
COLUMNS += ("XLA's Gflop", "XLA's MB", "XLA's us", "told", "compiled s")


def cells(row: Row) -> list[str]:
    first = [row.shape, row.what, row.form, _short(row.flops / 1e9), _short(row.bytes / 1e6)]
    first += [_short(row.roofline * 1e6), row.bound]
    if row.failure:
        return [*first, row.failure, *[""] * (len(COLUMNS) - len(first) - 1)]
    figures = row.vmem / 2**20, row.code / 1e6, row.temporary / 1e6
    figures += row.xla_flops / 1e9, row.xla_bytes / 1e6, row.xla_seconds * 1e6
    return [*first, *map(_short, figures), row.told, f"{row.compile_seconds:.1f}"]


def _short(x: float) -> str:
    """Three digits at least."""
    return "" if math.isnan(x) else f"{x:.0f}" if x >= 100 else f"{x:.3g}"


class Table:
    """On a terminal a bar while it works and one table at the end; otherwise Markdown, row by row."""

    def __init__(self, title: str, total: int):
        self._title, self._total, self._done, self._kernel = title, total, 0, ""
        self._rich = sys.stdout.isatty()

    def begin(self, job: Job) -> None:
        self._done += 1
        words = f"{self._done}/{self._total} {job.kernel}, {job.case.shape}, {job.what}, {job.name}"
        end = "\r" if sys.stderr.isatty() else "\n"
        print(f"{words[:110]:110}", end=end, file=sys.stderr, flush=True)

    def add(self, row: Row) -> None:
        if self._rich:
            return
        if row.kernel != self._kernel:
            self._kernel = row.kernel
            print(f"\n{row.kernel}\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        print(f"| {' | '.join(cells(row))} |", flush=True)

    def finish(self, rows: list[Row]) -> None:
        if self._rich:
            from rich.console import Console
            from rich.table import Table as Rich

            shown = Rich(title=self._title, title_justify="left")
            for number, column in enumerate(COLUMNS):
                shown.add_column(column, justify="left" if number < 3 else "right", overflow="fold")
            for before, row in zip([None, *rows], rows):
                if before and before.kernel != row.kernel:
                    shown.add_section()
                shown.add_row(*cells(row))
            Console().print(shown)
        for row in rows:
            if row.note:
                print(f"\n{row.shape}: {row.note}")


if __name__ == "__main__":
    main()

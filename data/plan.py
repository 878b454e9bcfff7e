"""`python -m data.plan`: what a run will read before anything trains: documents, tokens, share and epochs of each
source in each phase of the mixture, what the packing wastes, and a warning where a source is repeated too often.

`python -m train` logs the same table, and with --plan prints it and stops.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import configs
from data.batches import BatchKind, OpenMixture, open_mixture, reading_of
from data.mixture import BatchSpec
from data.packing import Waste

DESCRIPTION = __doc__ or ""
WORTH_REPEATING = 4.0  # epochs: up to here repeated tokens are nearly worth new ones, arXiv:2305.16264


@dataclasses.dataclass(frozen=True)
class Draw:
    """What one phase takes from one source."""

    phase: int  # from 1
    start: int  # step
    source: str
    documents: int  # of the source
    tokens: int  # of an epoch of it
    share: float  # of the phase's examples
    examples: int  # drawn in this phase
    drawn_tokens: int
    epochs: float  # from the start of the run to the end of this phase


@dataclasses.dataclass(frozen=True)
class Plan:
    """All draws of a run, by phase; by source what packing wastes, and how many documents are too long for a row and
    left out (`dropped`) or cut off (`truncated`); and how often a source may be repeated."""

    draws: tuple[Draw, ...]
    waste: dict[str, Waste]
    dropped: dict[str, int]
    truncated: dict[str, int]
    max_epochs: float

    def table(self) -> str:
        head = ("phase", "from step", "source", "documents", "tokens", "share", "drawn tokens", "epochs")
        cells = [head] + [
            (
                str(d.phase), f"{d.start:,}", d.source, f"{d.documents:,}", f"{d.tokens:,}", f"{d.share:.2%}",
                f"{d.drawn_tokens:,}", f"{d.epochs:.2f}",
            )
            for d in self.draws
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        left = (2,)  # the column of names
        lines = [
            "  ".join(
                cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
            )
            for row in cells
        ]
        wasted = [
            f"packing of {source}: {w.padding:.2%} padding, {w.cut:.2%} of documents cut, {w.needless:.2%} without need"
            for source, w in self.waste.items()
        ]
        return "\n".join([*lines, *wasted, *self.warnings()])

    def warnings(self) -> list[str]:
        last = {draw.source: draw.epochs for draw in self.draws}
        documents = {draw.source: draw.documents for draw in self.draws}
        long = [
            f"warning: {counts[source]:,} of {count:,} records of {source} are longer than a row and {what}: "
            "raise seq_len."
            for counts, what in ((self.dropped, "left out"), (self.truncated, "cut off"))
            for source, count in documents.items()
            if counts[source]
        ]
        return long + [
            f"warning: {source} is repeated {epochs:.1f} times, more than {self.max_epochs:g}: lower its weight, set "
            f"balance.max_epochs={self.max_epochs:g}, or add data."
            for source, epochs in last.items()
            if epochs > self.max_epochs * 1.0001
        ]


def make_plan(
    opened: OpenMixture, examples_per_step: int, steps: int, max_epochs: float | None = None
) -> Plan:
    """What a run of `steps` reads. `max_epochs`: above it there is a warning (default: four)."""
    schedule, total = opened.schedule, steps * examples_per_step
    draws = []
    for k, start in enumerate(schedule.starts):
        if start >= total:
            break
        stop = min(total, schedule.starts[k + 1]) if k + 1 < len(schedule.starts) else total
        before, after = schedule.counts(start, k), schedule.counts(stop, k)
        for i, (folder, size) in enumerate(opened.sizes.items()):
            drawn = after[i] - before[i]
            if schedule.shares[k][i]:
                tokens = round(drawn * size.tokens / size.examples)
                draws.append(
                    Draw(
                        k + 1, start // examples_per_step, folder, size.documents, size.tokens,
                        schedule.shares[k][i], drawn, tokens, after[i] / size.examples,
                    )
                )  # fmt: skip
    packers = {folder: source.packer for folder, source in opened.sources.items()}
    waste = {folder: packer.waste() for folder, packer in packers.items()}
    dropped = {folder: packer.dropped for folder, packer in packers.items()}
    truncated = {folder: packer.truncated for folder, packer in packers.items()}
    return Plan(tuple(draws), waste, dropped, truncated, max_epochs or WORTH_REPEATING)


def make_run_plan(spec: BatchSpec, steps: int, kind: BatchKind) -> Plan:
    """The plan of a run as its config says, without a batch being read."""
    if not spec.mixture:
        raise configs.ConfigError("config.data.mixture is empty: name at least one dataset and its weight.")
    mixture, reading = spec.whole_mixture(), reading_of(spec, kind)
    per_step = spec.batch_size // (2 if kind == "preference" else 1)
    opened = open_mixture(mixture, per_step, spec.seq_len, spec.seed, reading, steps)
    return make_plan(opened, per_step, steps, spec.balance.max_epochs)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """The mixture of a run and its length; `data` has the keys of config.data of `python -m train`."""

    data: BatchSpec = BatchSpec()
    steps: int = 1000
    kind: BatchKind = "lm"


def main(config: PlanConfig, workdir: Path | None) -> int:
    print(make_run_plan(config.data, config.steps, config.kind).table())
    return 0


if __name__ == "__main__":
    sys.exit(configs.run(main, PlanConfig, description=DESCRIPTION, workdir_required=False))

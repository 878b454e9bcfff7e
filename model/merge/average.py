"""The average of checkpoints: of the last ones of a run, or of named ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.paths import complete_steps
from configs.typed import ConfigError
from model.merge.recipe import Linear, Recipe, Source


def average_of(paths: Sequence[str], last: int | None = None) -> Recipe:
    """The recipe of an average with equal weights.

    Args:
      paths: models, or with `last` one run folder.
      last: the number of the run's newest checkpoints.

    Raises:
      ConfigError: not one run folder with so many checkpoints, or a single model without `last`.
    """
    if last is None:
        if len(paths) < 2:
            raise ConfigError(
                f"an average of {paths[0]} alone is {paths[0]}. Give several models, or a run with --last=N."
            )
        return Recipe(Linear(), tuple(Source(path) for path in paths))
    if len(paths) != 1:
        raise ConfigError(
            f"--last={last} takes the checkpoints of one run folder; {len(paths)} paths are given."
        )
    folder = Path(paths[0]).expanduser()
    folder = folder if folder.name == "checkpoints" else folder / "checkpoints"
    if not folder.is_dir():
        raise ConfigError(
            f"{paths[0]}: has no checkpoints/, so it is no run folder; --last={last} needs one."
        )
    steps = complete_steps(folder)
    if not 1 <= last <= len(steps):
        raise ConfigError(
            f"--last={last}: {paths[0]} has {len(steps)} complete checkpoints ({', '.join(map(str, steps))})."
        )
    return Recipe(Linear(), tuple(Source(str(folder / str(step))) for step in steps[-last:]))

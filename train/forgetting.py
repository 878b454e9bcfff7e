"""What fine-tuning costs: the loss on text that the model knew, before and after.

The text is `config.forgetting.mixture` or, where that is empty and `init_from` is a run, that run's validation data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import data
from configs import ConfigError, atomic_write
from data.batches import open_mixture
from data.shards import read_manifest
from model import ModelConfig
from model.function import Params
from train.algorithms import LanguageModelling, objective_of
from train.config import TrainConfig
from train.mesh import place_batch
from train.metrics import Window

FILE = "forgetting.json"


class Forgetting:
    """Measures it, and keeps what was measured before the first step in `forgetting.json`."""

    def __init__(
        self, config: TrainConfig, cfg: ModelConfig, mesh: Any, workdir: Path, rows_here: dict[str, int]
    ):
        self._config, self._mesh, self._path, self._rows_here = config, mesh, workdir / FILE, rows_here
        self.mixture = remembered_text(config)
        if not config.forgetting.mixture:  # a run must not fail for text that it was not given
            self.mixture = {folder: w for folder, w in self.mixture.items() if self._can_read(folder)}
        objective = objective_of(LanguageModelling(mtp_weight=0.0), cfg, config.sharding)
        self._measure = jax.jit(lambda params, batch: objective(params, batch)[1])

    def before(self, params: Params) -> None:
        """Measure the model before its first step."""
        if self.mixture and not self._path.exists():
            self._write({"before": self._figures(params)})

    def after(self, params: Params) -> dict[str, float]:
        """{"forgetting": the rise of bits a byte, or of nats a token where bytes are not known}; {} without text."""
        if not self.mixture or not self._path.exists():
            return {}
        found = json.loads(self._path.read_text(encoding="utf-8")) | {"after": self._figures(params)}
        rises = []
        for folder, before in found["before"].items():
            if folder not in found["after"]:
                continue
            unit = "bits_per_byte" if "bits_per_byte" in before else "nll"
            rises.append(found["after"][folder][unit] - before[unit])
            shown = f"{before[unit]:.4f} -> {found['after'][folder][unit]:.4f} {unit.replace('_', ' ')}"
            print(f"forgetting on {folder}: {shown} ({rises[-1] / max(before[unit], 1e-9):+.1%})")
        self._write(found)
        return {"forgetting": sum(rises) / len(rises)} if rises else {}

    def _can_read(self, folder: str) -> bool:
        spec = self._config.data
        try:
            open_mixture({folder: 1.0}, spec.batch_size, spec.seq_len, spec.seed)
        except ConfigError as error:
            print(f"forgetting is not measured on {folder}: {error}")
            return False
        return True

    def _write(self, found: dict[str, Any]) -> None:
        if jax.process_index() == 0:
            atomic_write(self._path, json.dumps(found, indent=1) + "\n")

    def _figures(self, params: Params) -> dict[str, dict[str, float]]:
        """{folder: {"nll" in nats a token, "bits_per_byte"}}."""
        figures = {}
        for folder in self.mixture:
            window = Window()
            for batch in self._batches(folder):
                window.add(self._measure(params, place_batch(batch, self._mesh, self._config.sharding)))
            nll = window.means().get("nll")
            if nll is None:
                print(f"forgetting is not measured on {folder}: no token of it counts in the loss")
                continue
            figures[folder] = {"nll": nll}
            manifest = read_manifest(Path(folder))
            if manifest.get("kind") == "tokens" and manifest.get("bytes"):
                tokens_a_byte = manifest["trained_tokens"] / manifest["bytes"]
                figures[folder]["bits_per_byte"] = nll / math.log(2) * tokens_a_byte
        return figures

    def _batches(self, folder: str) -> Iterator[dict[str, np.ndarray]]:
        spec = self._config.data
        reading = data.Reading("lm", num_epochs=1, shuffle=False)
        rows = data.make_batches(
            {folder: 1.0}, spec.batch_size, spec.seq_len, spec.seed, reading, **self._rows_here
        )
        for _, batch in zip(range(self._config.forgetting.batches), rows):
            yield batch


def remembered_text(config: TrainConfig) -> dict[str, float]:
    """The datasets on which forgetting is measured; {} for a new model, or where nothing is known of the old one."""
    if config.forgetting.mixture:
        missing = [folder for folder in config.forgetting.mixture if not Path(folder).is_dir()]
        if missing:
            raise ConfigError(f"config.forgetting.mixture: {missing[0]} is no dataset.")
        return config.forgetting.mixture
    before = None if config.init_from is None else Path(config.init_from) / "config.json"
    if before is None or not config.forgetting.batches or not before.is_file():
        return {}
    spec = json.loads(before.read_text(encoding="utf-8")).get("data")
    validation = spec.get("validation", {}) if isinstance(spec, dict) else {}
    if not isinstance(validation, dict):
        return {}
    kinds = {folder: _kind(Path(folder)) for folder in validation}
    return {folder: weight for folder, weight in validation.items() if kinds[folder] in ("tokens", "chat")}


def _kind(folder: Path) -> str | None:
    return read_manifest(folder).get("kind") if (folder / "manifest.json").is_file() else None

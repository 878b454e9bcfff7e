"""`python -m train.teacher`: the likeliest tokens of a teacher for the rows of a run's batches, written to disk once.

A row of a run is a pure function of its datasets, packing, length and seed, so a row's number is all that a student
needs to find what the teacher said. The folder:

    begun.json            the teacher, the batches (a hash of config.data and of the datasets' content), k, rows
    manifest.json         the same, once all rows are there
    rows-00000000.npz     ids uint32 and logprobs float16 [rows, T, k] of the rows from this number on
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import configs
import data
import model
from configs import ConfigError
from configs.files import temporary_beside
from configs.typed import check_at_least
from data.shards import hash_of
from model.compilation import prepare_compiler
from train.checks import check_datasets, content_of
from train.config import DataSpec, Execution, MeshSpec
from train.mesh import make_mesh, param_shardings, place_batch
from train.metrics import clock
from train.models import Model, batch_inputs
from train.references import fingerprint

FORMAT, MANIFEST, BEGUN = "crucible-teacher-cache", "manifest.json", "begun.json"


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """What a teacher reads, and how much of its answer is kept. `data` and `steps` are those of the student's run."""

    teacher: str = ""  # run folder, checkpoint, Hugging Face folder or GGUF file
    steps: int = 1000
    k: int = 32  # likeliest tokens kept; the mass of all others is one number, 1 less their sum
    temperature: float = 1.0  # divides the teacher's logits; the student's is config.algorithm.temperature
    data: DataSpec = DataSpec()
    run: Execution = Execution()
    mesh: MeshSpec = MeshSpec()
    sharding: model.ShardingRules = model.ShardingRules()

    def __post_init__(self):
        check_at_least(1, steps=self.steps, k=self.k)
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}; wanted more than 0.")


def batches_key(spec: DataSpec, rows: int) -> str:
    """A hash of what decides the rows: the datasets and their content, mixture, packing, length, seed; with phases the
    run's length, too.
    """
    said = configs.to_dict(spec) | {"batch_size": None, "validation": None, "validation_batches": None}
    content = list(content_of(spec).values())
    return hash_of("teacher", said | {"check_tokenizer": None}, content, rows if spec.phases else None)


def write_cache(config: TeacherConfig, workdir: Path, log: Any = print) -> dict[str, Any]:
    """Write what is missing of a cache; returns its manifest."""
    if not config.teacher:
        raise ConfigError("give config.teacher: the model to read distributions from.")
    if jax.process_count() > 1:
        raise ConfigError("python -m train.teacher runs on one host: its devices share the rows.")
    prepare_compiler()
    tokenizer = data.load_tokenizer(config.teacher)
    config = dataclasses.replace(config, data=config.data.with_tokenizer(tokenizer))
    mesh, rules = make_mesh(config.mesh), config.sharding
    cfg = config.run.apply_to(model.load_config(config.teacher))
    check_datasets(config.data, tokenizer, config.teacher, cfg.vocab_size)
    if config.k >= tokenizer.vocab_size:
        raise ConfigError(
            f"config.k={config.k} is not below the vocabulary of {tokenizer.vocab_size} tokens."
        )
    rows = config.steps * config.data.batch_size
    manifest = {
        "format": FORMAT,
        "teacher": config.teacher,
        "batches": batches_key(config.data, rows),
        "k": config.k,
    }
    manifest |= {"temperature": config.temperature, "seq_len": config.data.seq_len, "rows": rows}
    manifest |= {"batch_size": config.data.batch_size}
    with jax.set_mesh(mesh):
        _, params = model.load(config.teacher, cfg=cfg, shardings=param_shardings(cfg, mesh, rules))
        manifest |= {"fingerprint": fingerprint(params)}
        _begin(workdir, manifest)
        configs.save(config, workdir / "config.json")

        @jax.jit
        def likeliest(params, batch):
            logits = Model(cfg, params, rules)(batch_inputs(batch)).logits[..., : tokenizer.vocab_size]
            logprobs = jax.nn.log_softmax(logits / config.temperature)
            return jax.lax.top_k(logprobs, config.k)

        done = [start for start in range(0, rows, config.data.batch_size) if _shard(workdir, start).exists()]
        first = next((s for s in range(0, rows, config.data.batch_size) if s not in set(done)), rows)
        batches = data.make_run_batches(config.data, config.steps, "lm", start=first)
        began = time.monotonic()
        for start in range(first, rows, config.data.batch_size):
            logprobs, ids = likeliest(params, place_batch(next(batches), mesh, rules))
            _save(_shard(workdir, start), np.asarray(ids, np.uint32), np.asarray(logprobs, np.float16))
            made = start + config.data.batch_size - first
            rate = made / (time.monotonic() - began)
            left = clock((rows - first - made) / rate)
            log(f"rows {first + made}/{rows}  {rate:,.1f} rows/s  left {left}")
    configs.atomic_write(workdir / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


class TeacherCache:
    """Reads a folder of `write_cache`.

    Raises:
      ConfigError: no such folder, an unfinished one, or one for other batches than the run's.
    """

    def __init__(self, folder: str | Path, spec: DataSpec, rows: int, temperature: float):
        self._folder = Path(folder)
        path = self._folder / MANIFEST
        if not path.is_file():
            raise ConfigError(
                f"config.algorithm.cache={folder} holds no finished cache (no {MANIFEST}). Write it with "
                "python -m train.teacher; the same command goes on where one was cut off."
            )
        self.manifest = json.loads(path.read_text(encoding="utf-8"))
        if self.manifest["batches"] != batches_key(spec, rows):
            raise ConfigError(
                f"config.algorithm.cache={folder} was written for other batches than config.data gives: datasets and "
                "what is in them, weights, packing, seq_len and seed must be the same."
            )
        if self.manifest["temperature"] != temperature:
            raise ConfigError(
                f"config.algorithm.cache={folder} was written at temperature {self.manifest['temperature']}, and "
                f"config.algorithm.temperature={temperature}."
            )
        self._rows = sorted(int(p.stem.removeprefix("rows-")) for p in self._folder.glob("rows-*.npz"))
        self._held: tuple[int, dict[str, np.ndarray]] | None = None

    def rows(self, start: int, count: int) -> dict[str, np.ndarray]:
        """`teacher_ids` int32 and `teacher_logprobs` float16, [count, T, k], of the rows from `start` on."""
        if start + count > self.manifest["rows"]:
            raise ConfigError(
                f"{self._folder} holds {self.manifest['rows']} rows, and the run needs row {start + count}. Write it "
                "with as many config.steps as the run has."
            )
        parts, row = [], start
        while row < start + count:
            first = max(r for r in self._rows if r <= row)
            shard = self._read(first)
            part = slice(row - first, min(start + count - first, len(shard["ids"])))
            parts.append({name: x[part] for name, x in shard.items()})
            row = first + part.stop
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {"teacher_ids": joined["ids"].astype(np.int32), "teacher_logprobs": joined["logprobs"]}

    def _read(self, first: int) -> dict[str, np.ndarray]:
        if self._held is None or self._held[0] != first:
            with np.load(_shard(self._folder, first), allow_pickle=False) as arrays:
                self._held = first, {name: arrays[name] for name in ("ids", "logprobs")}
        return self._held[1]


def _shard(folder: Path, start: int) -> Path:
    return folder / f"rows-{start:08d}.npz"


def _save(path: Path, ids: np.ndarray, logprobs: np.ndarray) -> None:
    temporary = temporary_beside(path)
    with open(temporary, "wb") as file:
        np.savez(file, ids=ids, logprobs=logprobs)
    os.replace(temporary, path)


def _begin(workdir: Path, manifest: dict[str, Any]) -> None:
    """Notes what the rows will be of. Raises ConfigError where rows of something else are."""
    path = workdir / BEGUN
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if before != manifest and (before is not None or any(workdir.glob("rows-*.npz"))):
        raise ConfigError(
            f"{workdir} holds a cache of another teacher or of other batches. Give another --workdir."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    configs.atomic_write(path, json.dumps(manifest, indent=1) + "\n")


def main(config: TeacherConfig, workdir: Path) -> int:
    manifest = write_cache(config, workdir)
    print(f"{workdir}: {manifest['k']} likeliest tokens of {config.teacher} for {manifest['rows']:,} rows")
    return 0


if __name__ == "__main__":
    sys.exit(configs.run(main, TeacherConfig, description=__doc__ or ""))

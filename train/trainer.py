"""One trainer for every algorithm: build, restore, step, log, validate, sample, checkpoint."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

import configs
import data
import model
from configs.files import only_one
from model.compilation import prepare_compiler
from model.function import Params
from model.inspect.flops import MFU_FORMULA, mfu, peak_text, train_flops_per_token
from train.checks import content_of
from train.config import TrainConfig
from train.forgetting import Forgetting
from train.learner import Learner
from train.mesh import place_batch, rows_here
from train.metrics import MetricsLog, Progress, Window
from train.sampling import draw_samples
from train.schedules import learning_rate
from train.setup import Setup, prepare_run
from train.stopping import Stopping
from train.teacher import TeacherCache


class TrainingDiverged(RuntimeError):
    """Too many steps in a row without a finite loss and gradient."""


def train(config: TrainConfig, workdir: Path, stop_at: int | None = None) -> dict[str, Any]:
    """Train until `config.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      stop_at: stop after this step like an interruption; the schedule still spans `config.steps`.

    Returns:
      final figures: step, loss, tokens_per_second, mfu, and the last validation metrics.

    Raises:
      TrainingDiverged: `config.max_bad_steps` steps in a row were not finite.
      Stopped, KeyboardInterrupt: after SIGTERM or Ctrl-C; the current step is saved.
      ValueError: mesh, data and model do not fit together; says how to fix it.
    """
    prepare_compiler()
    setup = prepare_run(config, Path(workdir))
    with jax.set_mesh(setup.mesh), held(workdir):
        return _Run(setup, Path(workdir)).loop(stop_at or config.steps)


class _Run:
    def __init__(self, setup: Setup, workdir: Path):
        self.setup, self.config, self.workdir = setup, setup.config, workdir
        # a config that the run's state does not fit is refused here, and config.json stays as it was
        self.learner = Learner(self.config, setup.plan, setup.tokenizer, workdir)
        save_config(self.config, workdir)
        self.examples = self.learner.progress.get("examples", 0)
        self.schedule = learning_rate(self.config.schedule, self.config.optimizer.peak_lr, self.config.steps)
        rows = self._rows_here()
        self.forgetting = Forgetting(self.config, setup.cfg, setup.mesh, workdir, rows)
        self.log = MetricsLog(workdir, self.steps_done, write=jax.process_index() == 0)
        self.stopping, self._saved = Stopping(), 0

    @property
    def steps_done(self) -> int:
        return int(self.learner.state.step)

    def loop(self, stop_at: int) -> dict[str, float]:
        config, start = self.config, self.steps_done
        self._announce(start)
        progress, window, clock = Progress(config.steps, start), Window(), _Rate(self.setup)
        pending, bad_in_a_row, last = None, 0, {}
        if not start:
            self.forgetting.before(self.learner.params)
        with contextlib.closing(self.learner), self.stopping:
            batches = self._training_batches() if start < stop_at else iter(())
            for step in range(start + 1, stop_at + 1):
                batch = self.learner.prepare(place_batch(next(batches), self.setup.mesh, config.sharding))
                metrics = self.learner.step(batch)
                self.examples += config.data.batch_size
                if (
                    pending is not None
                ):  # metrics of the step before, so the host never waits for the current one
                    bad_in_a_row = self._count_bad(window.add(pending), bad_in_a_row)
                pending = metrics
                if step % config.log_every == 0 or step == stop_at:
                    bad_in_a_row = self._count_bad(window.add(pending), bad_in_a_row)
                    pending = None
                    rate = cast(jax.Array, self.schedule(step - 1))
                    last = window.means() | clock.tick(step - start) | {"lr": float(rate)}
                    self.log.write(step, "train", last)
                    self._show(progress, step, last)
                with clock.paused():
                    self._periodic(step, stop_at)
                if self.stopping.asked:
                    self._save(step)  # the signal may have come after this step's turn to be saved
                    break
        if start == config.steps:  # all steps are saved; the last validation may have been cut short
            self.log.forget(start, "validation")
            self._validate(start)
        final = last | self._last_validation()
        if self.steps_done == config.steps:
            final |= self.forgetting.after(self.learner.params)
        self.log.close()
        if self.steps_done < stop_at:
            self.stopping.leave(self.steps_done)
        return final | {"step": self.steps_done} | clock.overall()

    def _periodic(self, step: int, stop_at: int) -> None:
        config, end = self.config, step == self.config.steps
        # Save first, so that a failure below loses no steps.
        if end or step == stop_at or self.stopping.asked or step % config.checkpoint.every == 0:
            self._save(step)
        if end or (config.validate_every and step % config.validate_every == 0):
            self._validate(step)
        if config.samples.prompts and (end or (config.samples.every and step % config.samples.every == 0)):
            for row in draw_samples(
                self.setup.cfg, self.learner.params, self.setup.tokenizer, config.samples
            ):
                self.log.write_sample({"step": step} | row)

    def _save(self, step: int) -> None:
        if step != self._saved:
            position = {"examples": self.examples, "seed": self.config.seed}
            self.learner.save(step, position | {"datasets": content_of(self.config.data)})
            self._saved = step

    def _rows_here(self) -> dict[str, int]:
        index, count = rows_here(self.setup.mesh, self.config.sharding, self.config.data.batch_size)
        return {"process_index": index, "process_count": count}

    def _training_batches(self) -> Iterator[dict[str, np.ndarray]]:
        spec, kind, steps = self.config.data, self.config.batch_kind, self.config.steps
        batches = data.make_run_batches(spec, steps, kind, start=self.examples, **self._rows_here())
        if jax.process_index() == 0:
            per_step = spec.batch_size // (2 if kind == "preference" else 1)
            print(data.make_plan(batches.opened, per_step, steps, spec.balance.max_epochs).table())
        if getattr(self.config.algorithm, "cache", None) is None:
            return batches
        return self._with_teacher(batches)

    def _with_teacher(self, batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """The batches with what a teacher said of their rows, from its cache."""
        algorithm, spec, row = cast(Any, self.config.algorithm), self.config.data, self.examples
        total = self.config.steps * spec.batch_size
        cache = TeacherCache(algorithm.cache, spec, total, algorithm.temperature)
        part, parts = self._rows_here().values()
        here = spec.batch_size // parts
        for batch in batches:
            yield batch | cache.rows(row + part * here, here)
            row += spec.batch_size

    def _validation_batches(self) -> Iterator[dict[str, np.ndarray]]:
        spec, reading = self.config.data, data.Reading(self.config.batch_kind, spans=self.config.data.spans)
        return data.make_batches(
            spec.validation, spec.batch_size, spec.seq_len, spec.seed, reading, **self._rows_here()
        )

    def _validate(self, step: int) -> None:
        if not self.config.data.validation:
            return
        means = self._validation_means(None)
        if (average := self.learner.averaged_params()) is not None:
            means |= {f"average_{name}": value for name, value in self._validation_means(average).items()}
        self.log.write(step, "validation", means)
        self.validation = {f"validation_{name}": value for name, value in means.items()}
        print(f"\nvalidation at step {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in means.items()))

    def _validation_means(self, policy: Params | None) -> dict[str, float]:
        """Loss and metrics on the validation data, with `policy` in place of the current parameters if it is given."""
        batches, window = self._validation_batches(), Window()
        for _ in range(self.config.data.validation_batches):
            batch = place_batch(next(batches), self.setup.mesh, self.config.sharding)
            window.add(self.learner.measure(batch, policy))
        return window.means()

    def _last_validation(self) -> dict[str, float]:
        return getattr(self, "validation", {})

    def _count_bad(self, means: dict[str, float], in_a_row: int) -> int:
        if not means["skipped"]:
            return 0
        in_a_row += 1
        if in_a_row >= self.config.max_bad_steps:
            raise TrainingDiverged(
                f"{in_a_row} steps in a row had no finite loss or gradient (last loss {means['loss']}); their updates "
                f"were skipped. Lower config.optimizer.peak_lr (now {self.config.optimizer.peak_lr:g}), lengthen the "
                "warmup, set config.algorithm.z_loss=1e-4, or look at the batch; the newest checkpoint is from before."
            )
        return in_a_row

    def _announce(self, start: int) -> None:
        setup, spec = self.setup, self.config.data
        count = sum(int(np.prod(s.shape)) for s in jax.tree.leaves(model.param_shapes(setup.cfg)))
        axes = (
            " ".join(f"{name}={size}" for name, size in setup.mesh.shape.items() if size > 1) or "one device"
        )
        print(
            f"model {count / 1e6:.2f}M parameters, mesh {axes}, batch {spec.batch_size} x {spec.seq_len} tokens"
        )
        print(f"{MFU_FORMULA}; {peak_text()}")
        if start:
            print(f"going on from step {start} in {self.workdir}")
            before = self.learner.progress.get("datasets", {})
            for folder, content in content_of(spec).items():
                if before.get(folder, content) != content:
                    print(
                        f"warning: {folder} was written again since step {start}: the run goes on at the place where "
                        "it was, so some of the data may come twice and some never."
                    )

    def _show(self, progress: Progress, step: int, last: dict[str, float]) -> None:
        shown = {"loss": f"{last['loss']:.4f}"}
        if "accuracy" in last:
            shown["accuracy"] = f"{last['accuracy']:.3f}"
        rate = {"tokens/s": f"{last['tokens_per_second']:,.0f}"}
        rate |= {} if last["mfu"] is None else {"MFU": f"{last['mfu']:.1%}"}
        skipped = {"skipped": str(int(self.learner.state.extra["skipped"]))} if last["skipped"] else {}
        progress.show(step, **shown, **rate, **skipped)


class _Rate:
    """Tokens a second and MFU, between log lines and overall; validation and checkpoints do not count."""

    def __init__(self, setup: Setup):
        spec = setup.config.data
        self._tokens = spec.batch_size * spec.seq_len
        trains_mtp = setup.config.algorithm.trains_mtp(setup.cfg)
        computed = setup.cfg if trains_mtp else setup.cfg.replace(mtp=None)
        self._flops, self._devices = train_flops_per_token(computed, spec.seq_len), setup.mesh.size
        self._mark, self._steps = time.monotonic(), 0
        self._seconds, self._counted = 0.0, 0

    def tick(self, steps: int) -> dict[str, float]:
        now, done = time.monotonic(), steps - self._steps
        seconds = now - self._mark
        if self._steps:  # the first window includes compilation
            self._seconds, self._counted = self._seconds + seconds, self._counted + done
        self._mark, self._steps = now, steps
        return self._figures(done, seconds)

    def overall(self) -> dict[str, float]:
        return self._figures(self._counted, self._seconds) if self._counted else {}

    def paused(self):
        rate = self

        class Pause:
            def __enter__(self):
                self.began = time.monotonic()

            def __exit__(self, *_):
                rate._mark += time.monotonic() - self.began

        return Pause()

    def _figures(self, steps: int, seconds: float) -> dict[str, Any]:
        tokens_per_second = steps * self._tokens / max(seconds, 1e-9)
        share = mfu(tokens_per_second * self._flops, self._devices)
        return {"tokens_per_second": tokens_per_second, "mfu": share}


def held(workdir: Path) -> contextlib.AbstractContextManager:
    """Holds a run's folder, on the process that writes there. Raises ConfigError: another run holds it."""
    return only_one(workdir) if jax.process_index() == 0 else contextlib.nullcontext()


def save_config(config: Any, workdir: Path) -> None:
    """Write config.json; print what differs from the run's previous config."""
    path, new = workdir / "config.json", configs.to_dict(config)
    if path.exists():
        old = _flat(json.loads(path.read_text()))
        for key, value in _flat(new).items():
            if old.get(key) != value:
                print(f"config.{key} is now {value!r}; this run had {old.get(key)!r} before.")
    if jax.process_index() == 0:
        configs.save(config, path)


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat

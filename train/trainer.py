"""One trainer for every objective: build, restore, step, log, validate, sample, checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

import configs
import data
import model
from configs.exits import Stopped
from data import Tokenizer
from model import ModelConfig
from model.adapters import add_adapters, is_adapter
from model.blocks.linear import within_block
from model.blocks.lora import LoRA
from model.blocks.moe import MoE
from model.compilation import prepare_compiler, training_options
from model.inspect.flops import MFU_FORMULA, mfu, peak_text, train_flops_per_token
from train import objectives
from train.checkpoints import TrainCheckpoints, check_reference, has_checkpoint
from train.checks import check_datasets, check_same_model, check_validation
from train.config import TrainConfig
from train.mesh import check_mesh, make_mesh, param_shardings, place_batch, rows_here
from train.metrics import MetricsLog, Progress, Window
from train.optimizer import adamw, learning_rate
from train.sampling import draw_samples
from train.step import make_train_step


class TrainingDiverged(RuntimeError):
    """Too many steps in a row without a finite loss and gradient."""


@dataclasses.dataclass
class Setup:
    """The parts of a run, built from its config."""

    config: TrainConfig
    cfg: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    optimizer: optax.GradientTransformation
    objective: objectives.Objective
    prepare: Callable[[dict], dict]  # maps a placed batch to the objective's batch
    initial_params: Callable[[], Any]


def train(config: TrainConfig, workdir: Path, stop_at: int | None = None) -> dict[str, Any]:
    """Train until `config.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      stop_at: stop after this step like an interruption; the schedule still spans `config.steps`.

    Returns:
      final figures: step, loss, tokens_per_second, mfu, and the last validation metrics.

    Raises:
      TrainingDiverged: `config.max_bad_steps` steps in a row were not finite.
      Stopped: after SIGTERM; the current step is saved.
      ValueError: mesh, data and model do not fit together; says how to fix it.
    """
    prepare_compiler()
    setup = prepare_run(config, Path(workdir))
    with jax.set_mesh(setup.mesh):
        return _Run(setup, Path(workdir)).loop(stop_at or config.steps)


def prepare_run(config: TrainConfig, workdir: Path | None = None) -> Setup:
    """Build a run; one that has begun in `workdir` takes its model and tokenizer from there."""
    mesh = make_mesh(config.mesh)
    begun = workdir if workdir is not None and has_checkpoint(workdir) else None
    source = begun or config.tokenizer or config.init_from
    if source is None:
        raise configs.ConfigError("give config.tokenizer (a tokenizer or run folder) or config.init_from.")
    tokenizer = data.load_tokenizer(source)
    _check_batch(config, mesh)
    if config.objective == "dpo" and config.init_from is None:
        raise configs.ConfigError("objective dpo compares with a frozen reference: give config.init_from.")
    adapters = config.adapters.build()
    if config.init_from is None:
        if adapters is not None:
            raise configs.ConfigError("config.adapters adapt a model: give config.init_from.")
        cfg = config.model.build(tokenizer.vocab_size, config.run)
        if begun is not None:
            check_same_model(config.run.apply_to(model.load_config(begun)), cfg, begun, config.model)
    else:
        cfg = config.run.apply_to(model.load_config(begun or config.init_from))
        if begun is not None and adapters is not None:
            if cfg.adapters != adapters:
                raise configs.ConfigError(
                    f"{begun} trains {cfg.adapters or 'no adapters'}, and config.adapters asks for {adapters}. Give "
                    "the old values, or start a new run in another --workdir."
                )
            cfg = cfg.replace(adapters=None)
    base_cfg, cfg = cfg, cfg if adapters is None else _with_adapters(config, cfg, adapters)
    _check_balance(config, cfg)
    check_mesh(cfg, mesh, config.sharding)
    if cfg.vocab_size < tokenizer.vocab_size:
        raise configs.ConfigError(
            f"the tokenizer {source} has {tokenizer.vocab_size} tokens and the model {cfg.vocab_size} rows for them. "
            "Use the tokenizer that the model was trained with."
        )
    check_datasets(config.data, tokenizer, source, cfg.vocab_size)
    check_validation(config.data, config.batch_kind)
    shardings = param_shardings(cfg, mesh, config.sharding)

    def load_initial():
        if config.init_from is None:
            make = jax.jit(lambda key: model.init(cfg, key), out_shardings=shardings)
            return make(jax.random.key(config.seed))
        base = param_shardings(base_cfg, mesh, config.sharding)
        _, params = model.load(config.init_from, cfg=base_cfg, shardings=base)
        if adapters is not None:
            _, params = add_adapters(base_cfg, params, adapters, jax.random.key(config.seed))
        return jax.device_put(params, shardings)

    optimizer = adamw(config.optimizer, config.steps, cfg)
    objective, prepare = _objective(config, cfg, load_initial, workdir)
    return Setup(config, cfg, tokenizer, mesh, optimizer, objective, prepare, load_initial)


def _objective(config: TrainConfig, cfg: ModelConfig, load_initial, workdir: Path | None):
    rules = config.sharding
    if config.objective == "lm":
        objective = objectives.language_modelling(cfg, rules, config.z_loss, config.mtp_weight)
        return objective, lambda batch: batch
    assert config.init_from is not None
    reference = load_initial()
    if workdir is not None:
        check_reference(workdir, config.init_from, reference)
    with_reference = jax.jit(functools.partial(objectives.with_reference, cfg, rules=rules))
    objective = objectives.dpo(cfg, rules, config.dpo_beta, config.dpo_label_smoothing)
    return objective, lambda batch: with_reference(reference, batch)


def _with_adapters(config: TrainConfig, cfg: ModelConfig, adapters: LoRA) -> ModelConfig:
    if cfg.adapters is not None:
        raise configs.ConfigError(
            f"config.adapters: {config.init_from} has adapters already ({cfg.adapters}). Leave out config.adapters to "
            "train them further, or give config.init_from the model with its adapters merged."
        )
    with_them = cfg.replace(adapters=adapters)
    paths = list(flatten_dict(model.param_shapes(with_them)))
    if not any(map(is_adapter, paths)):
        names = sorted({"/".join(within_block(path)) for path in paths if len(path) > 1})
        raise configs.ConfigError(
            f"config.adapters.targets={adapters.targets}: no linear map of the model matches. Its parameters are "
            f"{', '.join(names)}."
        )
    return with_them


def _check_balance(config: TrainConfig, cfg: ModelConfig) -> None:
    networks = [network for block in cfg.blocks for network in block.networks]
    over_batch = any(isinstance(n, MoE) and n.balance_over == "batch" and n.balance_loss for n in networks)
    if over_batch and config.microbatches > 1:
        raise configs.ConfigError(
            f"balance_over='batch' balances the load of a whole batch, and config.microbatches={config.microbatches} "
            "cuts it. Set config.microbatches=1, or balance_over='document'."
        )


def _check_batch(config: TrainConfig, mesh: Mesh) -> None:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = 2 if config.objective == "dpo" else 1
    unit = ways * rows * config.microbatches
    if config.data.batch_size % unit:
        raise configs.ConfigError(
            f"config.data.batch_size={config.data.batch_size} is not a multiple of {unit} = data*fsdp devices ({ways}) "
            f"* microbatches ({config.microbatches}) * rows an example ({rows}). Use "
            f"{max(unit, config.data.batch_size // unit * unit)}."
        )
    if not config.data.mixture:
        raise configs.ConfigError(
            "config.data.mixture is empty: name at least one token dataset and its weight."
        )


class _Run:
    def __init__(self, setup: Setup, workdir: Path):
        self.setup, self.config, self.workdir = setup, setup.config, workdir
        workdir.mkdir(parents=True, exist_ok=True)
        save_config(self.config, workdir)
        rules = self.config.sharding
        self.checkpoints = TrainCheckpoints(
            workdir, self.config.checkpoint, setup.cfg, setup.tokenizer, setup.mesh, rules
        )
        self.state, progress = self.checkpoints.restore_or_init(
            setup.initial_params, setup.optimizer, self.config.seed
        )
        self.examples = progress.get("examples", 0)
        step = make_train_step(setup.objective, setup.optimizer, self.config.microbatches, rules)
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        options = training_options()
        self.train_step = jax.jit(
            step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options
        )
        self.eval_step = jax.jit(
            lambda params, batch: setup.objective(params, batch), compiler_options=options
        )
        self.schedule = learning_rate(self.config.optimizer, self.config.steps)
        self.log = MetricsLog(workdir, int(self.state.step), write=jax.process_index() == 0)
        self.stopping = False

    def loop(self, stop_at: int) -> dict[str, float]:
        config, start = self.config, int(self.state.step)
        self._announce(start)
        progress, window, clock = Progress(config.steps, start), Window(), _Rate(self.setup)
        pending, bad_in_a_row, last = None, 0, {}
        with contextlib.closing(self.checkpoints), Preemption(self):
            batches = self._training_batches() if start < stop_at else iter(())
            for step in range(start + 1, stop_at + 1):
                batch = self.setup.prepare(place_batch(next(batches), self.setup.mesh, config.sharding))
                self.state, metrics = self.train_step(self.state, batch)
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
                if self.stopping:
                    break
        if start == config.steps:  # all steps are saved; the last validation may have been cut short
            self.log.forget(start, "validation")
            self._validate(start)
        final = last | self._last_validation()
        self.log.close()
        if self.stopping and int(self.state.step) < stop_at:
            raise Stopped(f"stopped after step {int(self.state.step)}; the same command goes on from here.")
        return final | {"step": int(self.state.step)} | clock.overall()

    def _periodic(self, step: int, stop_at: int) -> None:
        config, end = self.config, step == self.config.steps
        # Save first, so that a failure below loses no steps.
        if end or step == stop_at or self.stopping or step % config.checkpoint.every == 0:
            self.checkpoints.save(step, self.state, {"examples": self.examples, "seed": config.seed})
        if end or (config.validate_every and step % config.validate_every == 0):
            self._validate(step)
        if config.samples.prompts and (end or (config.samples.every and step % config.samples.every == 0)):
            for row in draw_samples(self.setup.cfg, self.state.params, self.setup.tokenizer, config.samples):
                self.log.write_sample({"step": step} | row)

    def _rows_here(self) -> dict[str, int]:
        index, count = rows_here(self.setup.mesh, self.config.sharding, self.config.data.batch_size)
        return {"process_index": index, "process_count": count}

    def _training_batches(self) -> Iterator[dict[str, np.ndarray]]:
        spec, kind, steps = self.config.data, self.config.batch_kind, self.config.steps
        batches = data.make_run_batches(spec, steps, kind, start=self.examples, **self._rows_here())
        if jax.process_index() == 0:
            per_step = spec.batch_size // (2 if kind == "preference" else 1)
            print(data.make_plan(batches.opened, per_step, steps, spec.balance.max_epochs).table())
        return batches

    def _validation_batches(self) -> Iterator[dict[str, np.ndarray]]:
        spec, reading = self.config.data, data.Reading(self.config.batch_kind)
        return data.make_batches(
            spec.validation, spec.batch_size, spec.seq_len, spec.seed, reading, **self._rows_here()
        )

    def _validate(self, step: int) -> None:
        spec, window = self.config.data, Window()
        if not spec.validation:
            return
        batches = self._validation_batches()
        for _ in range(spec.validation_batches):
            batch = self.setup.prepare(place_batch(next(batches), self.setup.mesh, self.config.sharding))
            loss, metrics = self.eval_step(self.state.params, batch)
            window.add(metrics | {"loss": loss})
        means = window.means()
        self.log.write(step, "validation", means)
        self.validation = {f"validation_{name}": value for name, value in means.items()}
        print(f"\nvalidation at step {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in means.items()))

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
                "warmup, set config.z_loss=1e-4, or look at the batch; the newest checkpoint is from before."
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

    def _show(self, progress: Progress, step: int, last: dict[str, float]) -> None:
        shown = {"loss": f"{last['loss']:.4f}"}
        if "accuracy" in last:
            shown["accuracy"] = f"{last['accuracy']:.3f}"
        rate = {"tokens/s": f"{last['tokens_per_second']:,.0f}"}
        rate |= {} if last["mfu"] is None else {"MFU": f"{last['mfu']:.1%}"}
        skipped = {"skipped": str(int(self.state.skipped))} if last["skipped"] else {}
        progress.show(step, **shown, **rate, **skipped)


class _Rate:
    """Tokens a second and MFU, between log lines and overall; validation and checkpoints do not count."""

    def __init__(self, setup: Setup):
        spec = setup.config.data
        self._tokens = spec.batch_size * spec.seq_len
        trains_mtp = setup.config.objective == "lm" and setup.config.mtp_weight
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


class Preemption:
    """While active, SIGTERM (a preemption notice) makes the run save and stop after the current step."""

    def __init__(self, run: Any):
        self._run = run

    def __enter__(self):
        def stop(*_):
            self._run.stopping = True

        try:
            self._old = signal.signal(signal.SIGTERM, stop)
        except ValueError:  # not the main thread
            self._old = None

    def __exit__(self, *_):
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)


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

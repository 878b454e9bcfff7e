"""The loop: sample a group of answers to each problem, reward them, step the policy, hand it to the engine."""

# P problems a step, G answers a problem

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

import configs
import data
import model
from data.packing import shuffled
from model.compilation import prepare_compiler
from model.inspect.flops import forward_flops_per_token, mfu, train_flops_per_token
from rl.advantages import group_advantages, has_signal
from rl.config import RLConfig
from rl.problems import held_out_problems, training_problems
from rl.rollout import Rollout, Sampler, problems_of_step
from rl.scoring import RewardScorer
from rl.trajectory import batch_of
from rl.verifiers import Verifiers
from serve import Engine
from train.algorithms import GRPO, PPO
from train.checkpoints import has_checkpoint
from train.learner import Learner, make_plan
from train.mesh import check_mesh, make_mesh, place_batch
from train.metrics import MetricsLog, Progress, Window
from train.start import policy_start
from train.stopping import Stopping
from train.trainer import TrainingDiverged, held, save_config


class SamplerMismatch(RuntimeError):
    """Sampler and trainer give the same tokens different probabilities."""


def run(config: RLConfig, workdir: Path, stop_at: int | None = None) -> dict[str, Any]:
    """Train until `config.steps`, from the newest checkpoint in `workdir` when there is one.

    Args:
      stop_at: leave after this step as an interruption would.

    Returns:
      final figures: step, the last step's metrics, `validation_accuracy`, `tokens_per_second`, `mfu`.

    Raises:
      SamplerMismatch: `mismatch_kl` above `config.max_mismatch_kl`.
      Stopped, KeyboardInterrupt: after SIGTERM or Ctrl-C; the step in hand is saved.
      TrainingDiverged: steps in a row without a finite gradient.
    """
    if not config.init_from and not has_checkpoint(Path(workdir)):
        raise configs.ConfigError(
            "give config.init_from: the run folder or model that the policy starts from."
        )
    prepare_compiler()
    mesh = make_mesh(config.mesh, jax.devices()[: _devices_wanted(config)])
    with (
        jax.set_mesh(mesh),
        held(workdir),
        Verifiers(workers=config.reward.workers, timeout=config.reward.timeout) as verifiers,
    ):
        return _Run(config, Path(workdir), mesh, verifiers).loop(stop_at or config.steps)


class _Run:
    def __init__(self, config: RLConfig, workdir: Path, mesh, verifiers: Verifiers):
        self.config, self.mesh, self.stopping, self._saved = config, mesh, Stopping(), 0
        # A run that has begun says all about itself; the model that it began from may be gone.
        begun = workdir if has_checkpoint(workdir) else None
        self.tokenizer = data.load_tokenizer(begun or cast(str, config.init_from))
        spec = config.rollout
        algorithm = config.algorithm
        if algorithm.temperature is None:
            algorithm = dataclasses.replace(algorithm, temperature=spec.temperature)
        self.updates = algorithm.minibatches * (algorithm.epochs if isinstance(algorithm, PPO) else 1)
        policy = policy_start(config, algorithm.roles()["policy"], self.tokenizer, begun)
        check_mesh(policy.cfg, mesh, config.sharding)
        plan = make_plan(config, algorithm, policy, mesh, self.updates)
        # a config that the run's state does not fit is refused here, and config.json stays as it was
        self.learner = Learner(config, plan, self.tokenizer, workdir)
        save_config(config, workdir)
        self.cfg = self.learner.cfg
        self.start = self.learner.progress.get("step", 0)
        self.kl_weight = self.learner.progress.get("kl_weight", getattr(algorithm, "kl_weight", 0.0))
        self.rows = _rows(config, mesh)
        self.engine = Engine(
            self.cfg,
            self.learner.params,
            self.tokenizer,
            max_rows=min(spec.prompts * spec.group, 256),
            max_length=spec.seq_len,
            copy_params=True,
            version=self.start,
        )
        self.sampler = Sampler(self.engine, self.tokenizer, verifiers, config.instruction, config.reward)
        self.problems, self.held_out = training_problems(config), held_out_problems(config)
        self.sampler.check([*self.problems, *self.held_out], spec)
        self.scorer = None
        if (rewarding := self.learner.frozen.get("reward")) is not None:
            self.scorer = RewardScorer(self.learner.cfgs["reward"], rewarding, spec.seq_len)
        self.log = MetricsLog(workdir, self.start, write=jax.process_index() == 0)
        self.rate = _Rate(self.cfg, spec.seq_len, mesh.size)
        self.validation: dict[str, float] = {}

    def loop(self, stop_at: int) -> dict[str, float]:
        config, last, bad_in_a_row = self.config, {}, 0
        count = sum(x.size for x in jax.tree.leaves(self.learner.params))
        print(
            f"policy {count / 1e6:.2f}M parameters, {config.rollout.prompts} x {config.rollout.group} answers a step"
        )
        if self.start:
            print(f"going on from step {self.start}")
        else:
            self._evaluate(0)
        progress = Progress(config.steps, self.start)
        with contextlib.closing(self.learner), self.stopping:
            for step in range(self.start + 1, stop_at + 1):
                last = self._step(step)
                bad_in_a_row = bad_in_a_row + 1 if last["skipped"] else 0
                self._check(last, bad_in_a_row)
                self.log.write(step, "train", last)
                progress.show(step, **_shown(last))
                end = step == config.steps
                # Saved first: nothing that fails below may lose the steps.
                if end or step == stop_at or self.stopping.asked or step % config.checkpoint.every == 0:
                    self._save(step)
                if end or (config.evaluate_every and step % config.evaluate_every == 0):
                    self._evaluate(step)
                if self.stopping.asked:
                    self._save(step)  # the signal may have come after this step's turn to be saved
                    break
        if self.start == config.steps:  # all steps are saved; the last evaluation may have been cut short
            self._evaluate(self.start)
        self.log.close()
        done = int(self.learner.state.step) // self.updates
        if done < stop_at:
            self.stopping.leave(done)
        return last | self.validation | {"step": done} | self.rate.overall()

    def _save(self, step: int) -> None:
        if step != self._saved:
            self.learner.save(step, {"seed": self.config.seed, "kl_weight": self.kl_weight})
            self._saved = step

    def _step(self, step: int) -> dict[str, float]:
        config, began = self.config, time.monotonic()
        problems = problems_of_step(self.problems, step - 1, config.rollout.prompts, config.seed)
        groups = self.sampler.sample(problems, config.rollout, seed=_step_seed(config.seed, step))
        sampled = time.monotonic()
        rewards_PG = np.array([[r.trajectory.rewards["total"] for r in group] for group in groups])
        rollouts, signal_P = [r for group in groups for r in group], has_signal(rewards_PG)
        if isinstance(config.algorithm, GRPO):
            advantages_PG = group_advantages(rewards_PG, normalise_std=config.algorithm.normalise_std)
            signal = np.repeat(signal_P, config.rollout.group)
            metrics = self._update(rollouts, advantages_PG.ravel(), signal, step)
        else:
            signal_P = np.ones_like(signal_P)  # a value model or a teacher says something of every answer
            nothing, all_of_them = np.zeros(len(rollouts), np.float32), np.ones(len(rollouts), bool)
            metrics = (
                self._update_actor_critic(rollouts, step)
                if isinstance(config.algorithm, PPO)
                else self._update(rollouts, nothing, all_of_them, step)
            )
        jax.block_until_ready(self.learner.params)
        done = time.monotonic()
        self.engine.update_params(self.learner.params, version=step)
        self._log_samples(step, groups, rewards_PG)
        tokens_P = np.array([sum(len(r.trajectory.tokens) for r in group) for group in groups])
        self.rate.add(done - began, int(tokens_P.sum()), int(tokens_P[signal_P].sum()))
        return (
            metrics
            | _summary(groups, signal_P)
            | {"seconds_sampling": sampled - began, "seconds_training": done - sampled}
        )

    def _update(
        self, rollouts: list[Rollout], advantages: np.ndarray, signal: np.ndarray, step: int
    ) -> dict[str, float]:
        """Steps over minibatches of the answers whose group says something; groups without signal are left out."""
        kept = np.flatnonzero(signal)
        order = kept[shuffled(len(kept), self.config.seed, step)] if len(kept) else kept
        window, first = Window(), {}
        for part in np.array_split(order, self.updates):
            means = window.add(self.learner.step(self._batch(rollouts, part, advantages)))
            first = first or (means if len(part) else {})
        if not first:  # nothing was learned; whether sampler and trainer agree is asked of as many answers
            some = np.arange(min(len(rollouts), self.rows))
            first = Window().add(self.learner.measure(self._batch(rollouts, some, advantages)))
        # Only the first minibatch is seen by the parameters that sampled it.
        return window.means() | {"mismatch_kl": first["mismatch_kl"]}

    def _update_actor_critic(self, rollouts: list[Rollout], step: int) -> dict[str, float]:
        """Rewards, values and advantages of all answers at once, then steps over minibatches of them."""
        algorithm, count = cast(PPO, self.learner.algorithm), len(rollouts)
        unit = self.mesh.shape["data"] * self.mesh.shape["fsdp"] * self.config.microbatches
        rows = -(-count // unit) * unit
        trajectories = [r.trajectory for r in rollouts]
        batch = batch_of(trajectories, np.zeros(count, np.float32), self.config.rollout.seq_len, rows)
        totals = [trajectory.rewards["total"] for trajectory in trajectories]
        batch["rewards"] = np.pad(np.asarray(totals, np.float32), (0, rows - count))
        batch["kl_weight"] = np.full(rows, self.kl_weight, np.float32)
        placed = place_batch(batch, self.mesh, self.config.sharding)
        prepared = jax.device_get(self.learner.prepare(placed))
        window, first = Window(), {}
        for epoch in range(algorithm.epochs):
            order = shuffled(count, self.config.seed, step * algorithm.epochs + epoch)
            for part in np.array_split(order, algorithm.minibatches):
                rows_of_part = {name: _filled(x[part], self.rows) for name, x in prepared.items()}
                means = window.add(
                    self.learner.step(place_batch(rows_of_part, self.mesh, self.config.sharding))
                )
                first = first or means
        means = window.means() | {"mismatch_kl": first["mismatch_kl"], "kl_weight": self.kl_weight}
        self.kl_weight = algorithm.next_kl_weight(self.kl_weight, means["kl"], count)
        return means

    def _batch(
        self, rollouts: list[Rollout], part: np.ndarray, advantages: np.ndarray
    ) -> dict[str, jax.Array]:
        trajectories = [rollouts[i].trajectory for i in part]
        batch = batch_of(trajectories, advantages[part], self.config.rollout.seq_len, self.rows)
        return place_batch(batch, self.mesh, self.config.sharding)

    def _evaluate(self, step: int) -> None:
        if not self.held_out:
            return
        rollouts = self.sampler.greedy(self.held_out, self.config.rollout)
        n = len(rollouts)
        figures = {"length": float(np.mean([r.trajectory.mask.sum() for r in rollouts]))}
        if self.config.prompts is None:
            accuracy = sum(r.correct for r in rollouts) / n
            stderr = (accuracy * (1 - accuracy) / max(n - 1, 1)) ** 0.5
            shares = sum(r.trajectory.rewards["format"] for r in rollouts) / n
            figures |= {"accuracy": accuracy, "accuracy_stderr": stderr, "format": shares}
            said = f"accuracy {accuracy:.1%} +- {stderr:.1%}, format {shares:.1%}"
        else:
            said = f"answers of {figures['length']:.1f} tokens"
        if self.scorer is not None:
            figures["score"] = float(self.scorer.scores([r.trajectory for r in rollouts]).mean())
            said += f", score {figures['score']:.3f}"
        # what the engine cached of these prompts would round the next step otherwise than in a run that begins there
        self.engine.update_params(self.learner.params, version=step)
        self.validation = {f"validation_{name}": value for name, value in figures.items()}
        self.log.forget(step, "validation")  # of a run that was cut off here
        self.log.write(step, "validation", figures)
        print(f"\nheld out at step {step}: {said}, of {n} (greedy)")

    def _check(self, last: dict[str, float], bad_in_a_row: int) -> None:
        if last["mismatch_kl"] > self.config.max_mismatch_kl:
            raise SamplerMismatch(
                f"KL(sampler || trainer) is {last['mismatch_kl']:.2e} nats a token, above config.max_mismatch_kl="
                f"{self.config.max_mismatch_kl:g}. Use one dtype for both, or raise the limit "
                "if the cache is quantised."
            )
        if bad_in_a_row >= self.config.max_bad_steps:
            raise TrainingDiverged(
                f"{bad_in_a_row} steps in a row had no finite gradient. Lower config.optimizer.peak_lr "
                f"(now {self.config.optimizer.peak_lr:g})."
            )

    def _log_samples(self, step: int, groups: list[list[Rollout]], rewards_PG: np.ndarray) -> None:
        for group, rewards_G in zip(groups[: self.config.log_samples], rewards_PG):
            best = group[int(rewards_G.argmax())]
            row = {
                "step": step,
                "prompt": best.problem.question,
                "completion": best.text,
                "answer": best.problem.answer,
            }
            self.log.write_sample(
                row | {"reward": float(rewards_G.max()), "group_mean": float(rewards_G.mean())}
            )


class _Rate:
    """Tokens a second of the whole loop, verifying included. Answers of groups without signal are sampled and not
    trained on."""

    def __init__(self, cfg, seq_len: int, devices: int):
        self._sampling, self._training = (
            forward_flops_per_token(cfg, seq_len),
            train_flops_per_token(cfg, seq_len),
        )
        self._devices, self._seconds, self._sampled, self._trained, self._steps = devices, 0.0, 0, 0, 0

    def add(self, seconds: float, sampled: int, trained: int) -> None:
        self._steps += 1
        if self._steps > 1:  # the first holds the compilation
            self._seconds += seconds
            self._sampled, self._trained = self._sampled + sampled, self._trained + trained

    def overall(self) -> dict[str, Any]:
        if not self._seconds:
            return {}
        flops = self._sampled * self._sampling + self._trained * self._training
        return {
            "tokens_per_second": self._sampled / self._seconds,
            "trained_tokens_per_second": self._trained / self._seconds,
            "mfu": mfu(flops / self._seconds, self._devices),
        }


def _shown(last: dict[str, float]) -> dict[str, str]:
    """What the progress bar says of a step."""
    forms = {"reward": ".3f", "correct": ".1%", "score": ".3f", "divergence": ".4f", "length": ".1f"}
    return {name: format(last[name], form) for name, form in forms.items() if name in last} | {
        "mismatch": f"{last['mismatch_kl']:.1e}",
        "signal": f"{last['groups_with_signal']:.0%}",
        "seconds": f"{last['seconds_sampling']:.1f}+{last['seconds_training']:.1f}",
    }


def _summary(groups: list[list[Rollout]], signal_P: np.ndarray) -> dict[str, float]:
    rollouts = [r for group in groups for r in group]

    def mean(values) -> float:
        return float(np.mean([float(v) for v in values]))

    verified = [r for r in rollouts if r.problem.task]
    figures = {
        "correct": mean(r.correct for r in verified),
        "format": mean(r.trajectory.rewards["format"] for r in verified),
        "timed_out": mean(r.trajectory.rewards["timed_out"] for r in verified),
    }
    return (figures if verified else {}) | {
        "reward": mean(r.trajectory.rewards["total"] for r in rollouts),
        "length": mean(r.trajectory.mask.sum() for r in rollouts),
        "cut_short": mean(r.trajectory.stop_reason == "length" for r in rollouts),
        "groups_with_signal": float(signal_P.mean()),
        "groups_dropped": float((~signal_P).sum()),
    }


def _rows(config: RLConfig, mesh) -> int:
    """Rows of one minibatch: the most answers that can fall into it, up to a multiple of what the batch is split by."""
    answers = -(-config.rollout.prompts * config.rollout.group // config.algorithm.minibatches)
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * config.microbatches
    return -(-answers // unit) * unit


def _filled(x: np.ndarray, rows: int) -> np.ndarray:
    """With empty rows at the end, which weigh nothing."""
    return np.pad(x, [(0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)])


def _devices_wanted(config: RLConfig) -> int | None:
    sizes = [getattr(config.mesh, axis) for axis in model.MESH_AXES]
    return None if -1 in sizes else int(np.prod(sizes))


def _step_seed(seed: int, step: int) -> Any:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint32)[0])

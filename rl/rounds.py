"""`python -m rl.rounds`: sample, score, fine-tune on the best answers or on pairs of them, and again.

With `learn_from=best` it is rejection sampling, best-of-n distillation: Anthony et al. 2017, arXiv:1705.08439 (expert
iteration); Zelikman et al. 2022, arXiv:2203.14465 (STaR); Touvron et al. 2023, arXiv:2307.09288, section 3.2. With
`learn_from=pairs` the best and the worst answer to each problem are a pair, and `train.algorithm` one of preferences:
iterative DPO, Xu et al. 2023, arXiv:2312.16682. With a `judge`, two answers to each problem are a pair, ordered by what
it prefers: Guo et al. 2024, arXiv:2402.04792. With `learn_from=knowledge` a
problem whose answers are right often enough teaches its answer, and another one the words of `abstention`: the model
learns to say what it does not know. Zhang et al. 2023, arXiv:2311.09677 (R-Tuning).

    workdir/round-1/answers/   the kept answers or pairs as a dataset: the very tokens that were sampled
    workdir/round-1/train/     the fine-tuning run on them; it is what the next round samples from
    workdir/rounds.jsonl       for each round: held-out accuracy before it, and what was sampled and kept

The same command, given again, goes on from what is finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

import configs
from configs import ConfigError, exits
from configs.files import only_one
from configs.typed import check_at_least
from data import Tokenizer
from data.shards import TokenRecord, hash_of, is_current, read_manifest, write_dataset
from data.tasks import INSTRUCTION, TaskSpec, prompt
from data.tokenize import answer_record, describe
from model.compilation import prepare_compiler
from rl.alignment.judge import Judge, JudgeSpec
from rl.config import RewardSpec, RolloutSpec
from rl.loaded import LoadedModel
from rl.problems import held_out_problems, training_problems
from rl.rollout import Rollout, Sampler
from rl.scoring import RewardScorer
from rl.verifiers import Verifiers
from serve import Engine
from train.checkpoints import has_checkpoint
from train.config import DataSpec, TrainConfig
from train.metrics import clock

ROUNDS = "rounds.jsonl"


@dataclasses.dataclass(frozen=True)
class RoundsConfig:
    """Rounds of sampling and fine-tuning."""

    init_from: str = ""  # run folder, checkpoint, Hugging Face folder or GGUF file: the policy to start from
    rounds: int = 2
    tasks: tuple[TaskSpec, ...] = (TaskSpec("chain_sum"),)
    # in place of tasks: a dataset of kind "prompt", or JSONL of prompts or dialogues; with reward_model or judge
    prompts: str | None = None
    instruction: str = INSTRUCTION  # follows each question of a task
    problems: int = 500  # other ones each round
    evaluate_problems: int = 100  # held-out problems, greedy, before each round and after the last
    learn_from: Literal["best", "pairs", "knowledge"] = "best"
    keep: int = 1  # of "best": answers to each problem
    min_reward: float = 1.0  # of "best": answers below it are never kept
    min_gap: float = 0.5  # of "pairs": the better answer earns so much more than the worse one
    min_known: float = 0.5  # of "knowledge": the share of right answers from which on a problem is known
    abstention: str = "I don't know."  # of "knowledge": the whole answer to what is not known
    reward_model: str | None = (
        None  # a run of the algorithm RewardModel; its score is added to the verifier's reward
    )
    judge: JudgeSpec | None = None  # of "pairs": it orders the first two different answers to each problem
    seed: int = 0
    rollout: RolloutSpec = RolloutSpec(group=8)  # `group` is n; `prompts` problems are sampled at once
    reward: RewardSpec = RewardSpec(format_weight=0.0)
    train: TrainConfig = TrainConfig(steps=100)  # init_from and data.mixture are filled in

    def __post_init__(self):
        check_at_least(1, rounds=self.rounds, problems=self.problems, keep=self.keep)
        check_at_least(1, evaluate_problems=self.evaluate_problems)
        if self.judge is not None and (self.learn_from != "pairs" or self.rollout.group < 2):
            raise ValueError(
                "config.judge orders pairs of answers: set learn_from=pairs and rollout.group=2."
            )
        if self.prompts is not None and self.reward_model is None and self.judge is None:
            raise ValueError(
                "config.prompts have no verifier, so their answers earn nothing: give config.reward_model, or "
                "config.judge with learn_from=pairs."
            )
        wanted = "preference" if self.learn_from == "pairs" else "lm"
        if self.train.batch_kind != wanted:
            raise ValueError(
                f"learn_from={self.learn_from!r} writes data for batches of kind {wanted!r}, and train.algorithm "
                f"{type(self.train.algorithm).__name__} takes {self.train.batch_kind!r}. Give train.algorithm.kind="
                f"{'LanguageModelling' if wanted == 'lm' else 'DPO'}."
            )


def run(config: RoundsConfig, workdir: Path) -> dict[str, Any]:
    """All rounds; returns the figures of the last evaluation.

    Raises:
      ConfigError: no policy, rounds of another config in `workdir`, or a round in which no answer was good enough.
    """
    if not config.init_from:
        raise ConfigError("give config.init_from: the run folder or model that the policy starts from.")
    saved = workdir / "config.json"
    if (
        saved.is_file()
        and dataclasses.replace(configs.load(RoundsConfig, saved), rounds=config.rounds) != config
    ):
        raise ConfigError(
            f"{workdir} holds rounds of another config (only config.rounds may change). Give the old values, or a new "
            "--workdir."
        )
    prepare_compiler()
    with only_one(workdir):
        configs.save(config, saved)
        source = config.init_from
        for number in range(1, config.rounds + 1):
            folder = workdir / f"round-{number}"
            _sample(config, source, folder / "answers", number, workdir)
            _fine_tune(config, source, folder)
            source = str(folder / "train")
        return _evaluate_last(config, source, workdir)


def best(group: Sequence[Rollout], rewards: np.ndarray, config: RoundsConfig) -> list[Rollout]:
    """The answers that are kept of one problem: the best first, none below `min_reward`, no text twice."""
    kept: dict[str, Rollout] = {}
    for i in np.argsort(-rewards, kind="stable"):
        rollout = group[i]
        if rewards[i] < config.min_reward or len(kept) == config.keep:
            break
        if rollout.trajectory.stop_reason == "stop":
            kept.setdefault(rollout.text, rollout)
    return list(kept.values())


def pair(
    group: Sequence[Rollout], rewards: np.ndarray, config: RoundsConfig
) -> tuple[Rollout, Rollout] | None:
    """The best and the worst finished answer, if their rewards are far enough apart and their texts differ."""
    finished = [i for i, rollout in enumerate(group) if rollout.trajectory.stop_reason == "stop"]
    if len(finished) < 2:
        return None
    better, worse = max(finished, key=lambda i: rewards[i]), min(finished, key=lambda i: rewards[i])
    if rewards[better] - rewards[worse] < config.min_gap or group[better].text == group[worse].text:
        return None
    return group[better], group[worse]


def _sample(config: RoundsConfig, source: str, folder: Path, number: int, workdir: Path) -> None:
    said = configs.to_dict(config) | {"train": None, "rounds": None, "init_from": None}
    loaded = LoadedModel(source, config.train.run)
    chooser = _Chooser(config, loaded)
    key = hash_of("rounds", said, number, loaded.key, chooser.key)
    if is_current(folder, key):
        if number not in {row["round"] for row in _rows(workdir)}:  # killed between the dataset and its row
            _log(workdir, number, read_manifest(folder)["sampled"])
        return
    if has_checkpoint(folder.parent / "train"):
        raise ConfigError(
            f"{folder.parent}/train has learned from answers of another policy than {source} is now, or that another "
            "reward model or judge chose. Give the old models, or a new --workdir."
        )
    figures: dict[str, Any] = {}
    tokenizer = loaded.tokenizer
    with _sampling(config, loaded) as sampler:
        figures |= _held_out(sampler, chooser.scorer, config)
        print(f"round {number}: held out before sampling: {_shown(figures)}")

        def records() -> Iterator[Any]:
            problems = training_problems(config, number)
            sampler.check(problems, config.rollout)
            sampled = solved = kept = 0
            began = time.monotonic()
            for start in range(0, len(problems), config.rollout.prompts):
                some = problems[start : start + config.rollout.prompts]
                seed = int(np.random.SeedSequence([config.seed, number, start]).generate_state(1)[0])
                groups = sampler.sample(some, config.rollout, seed)
                sampled += sum(map(len, groups))
                solved += sum(any(r.correct for r in group) for group in groups)
                for chosen in chooser.records(groups, number * len(problems) + start):
                    kept += len(chosen)
                    yield from chosen
                done = start + len(some)
                left = clock((time.monotonic() - began) / done * (len(problems) - done))
                counts = (
                    f"{solved} solved, {kept} {'pairs' if config.learn_from == 'pairs' else 'answers'} kept"
                )
                print(f"round {number}: {done}/{len(problems)} problems, {counts}, left {left}")
            figures.update(sampled=sampled, problems=len(problems), solved=solved, kept=kept)

        manifest = lambda: {"key": key, "sampled": figures} | describe(tokenizer)
        kind = "preference" if config.learn_from == "pairs" else "chat"
        dataset = write_dataset(folder, records(), kind, manifest)
    if not len(dataset):
        shutil.rmtree(folder)  # else the same command would go on with nothing
        raise ConfigError(
            f"round {number}: none of {figures['sampled']} answers earned enough (config.min_reward="
            f"{config.min_reward:g}, for pairs config.min_gap={config.min_gap:g}, for a judge its min_margin). Lower "
            "it, sample more (config.rollout.group), or start from a better policy."
        )
    _log(workdir, number, figures)


class _Chooser:
    """What a round learns of the answers to a problem."""

    def __init__(self, config: RoundsConfig, policy: LoadedModel):
        self._config, self._tokenizer = config, policy.tokenizer
        run, spec = config.train.run, config.judge
        self.scorer = self._judge = None
        self.key = ""  # of what the other models are, beside their names
        if config.reward_model is not None:
            self.scorer = RewardScorer.load(config.reward_model, run, config.rollout.seq_len)
            self.key = self.scorer.key
        if spec is not None:
            judging = LoadedModel(spec.model, run) if spec.model else policy
            self.key += judging.key
            self._judge = Judge(spec, judging, config.rollout.prompts, config.seed)

    def records(self, groups: Sequence[Sequence[Rollout]], first: int) -> list[list[Any]]:
        """For each group records of a dataset; `first` is the number of the first problem."""
        if self._judge is not None:
            return self._judged(self._judge, groups, first)
        return [_chosen(group, self._rewards(group), self._config, self._tokenizer) for group in groups]

    def _rewards(self, group: Sequence[Rollout]) -> np.ndarray:
        """[G] float64: the verifier's and the reward model's."""
        rewards = np.array([rollout.trajectory.rewards["total"] for rollout in group], np.float64)
        if self.scorer is None:
            return rewards
        return rewards + self.scorer.scores([rollout.trajectory for rollout in group])

    def _judged(self, judge: Judge, groups: Sequence[Sequence[Rollout]], first: int) -> list[list[Any]]:
        couples: dict[int, list[Rollout]] = {}
        for i, group in enumerate(groups):
            different: dict[str, Rollout] = {}
            for rollout in group:
                if rollout.trajectory.stop_reason == "stop":
                    different.setdefault(rollout.text, rollout)
            if len(different) > 1:
                couples[i] = list(different.values())[:2]
        contests = [
            (prompt(one.problem, self._config.instruction), (one.text, two.text))
            for one, two in couples.values()
        ]
        records: list[list[Any]] = [[] for _ in groups]
        for (i, couple), better in zip(couples.items(), judge.preferred(contests, first), strict=True):
            if better is not None:
                records[i] = [(_record(couple[better]), _record(couple[1 - better]))]
        return records


def _record(rollout: Rollout) -> TokenRecord:
    return TokenRecord(rollout.trajectory.tokens, rollout.trajectory.mask)


def _chosen(
    group: Sequence[Rollout], rewards: np.ndarray, config: RoundsConfig, tokenizer: Tokenizer
) -> list[Any]:
    """Records of a dataset: answers, or one pair of them."""
    if config.learn_from == "best":
        return [_record(rollout) for rollout in best(group, rewards, config)]
    if config.learn_from == "knowledge":
        right = [i for i, rollout in enumerate(group) if rollout.correct]
        if len(right) >= max(config.min_known * len(group), 1):
            return [_record(group[max(right, key=lambda i: rewards[i])])]
        problem = group[0].problem
        asked = prompt(problem, config.instruction)
        return [answer_record(asked, config.abstention, None, tokenizer, problem.id)]
    found = pair(group, rewards, config)
    return [] if found is None else [(_record(found[0]), _record(found[1]))]


def _fine_tune(config: RoundsConfig, source: str, folder: Path) -> None:
    from train.trainer import train

    spec = dataclasses.replace(config.train.data, mixture={str(folder / "answers"): 1.0})
    assert isinstance(spec, DataSpec)
    train(dataclasses.replace(config.train, init_from=source, tokenizer=None, data=spec), folder / "train")


def _evaluate_last(config: RoundsConfig, source: str, workdir: Path) -> dict[str, Any]:
    loaded = LoadedModel(source, config.train.run)
    scorer = _Chooser(config, loaded).scorer
    with _sampling(config, loaded) as sampler:
        figures = _held_out(sampler, scorer, config)
    print(f"after {config.rounds} rounds: held out: {_shown(figures)}")
    _log(workdir, config.rounds + 1, figures)
    at_start = {f"{name}_at_start": _rows(workdir)[0][name] for name in figures}
    return figures | at_start | {"rounds": config.rounds}


@contextlib.contextmanager
def _sampling(config: RoundsConfig, loaded: LoadedModel) -> Iterator[Sampler]:
    """The engine and the verifiers of a round."""
    spec = config.rollout
    rows = min(spec.prompts * spec.group, 256)
    engine = Engine(loaded.cfg, loaded.params, loaded.tokenizer, max_rows=rows, max_length=spec.seq_len)
    with Verifiers(workers=config.reward.workers, timeout=config.reward.timeout) as verifiers:
        yield Sampler(engine, loaded.tokenizer, verifiers, config.instruction, config.reward)


def _held_out(sampler: Sampler, scorer: RewardScorer | None, config: RoundsConfig) -> dict[str, float]:
    """Figures of greedy answers to held-out problems: of tasks the share that is right, that is answered at all
    (`coverage`), and of right ones among those (`precision`); of all, what a reward model gives, and the length."""
    problems = held_out_problems(config)
    if not problems:
        return {}
    sampler.check(problems, config.rollout)
    rollouts = sampler.greedy(problems, config.rollout)
    n, trajectories = len(rollouts), [rollout.trajectory for rollout in rollouts]
    figures = {"length": float(np.mean([t.mask.sum() for t in trajectories]))}
    if scorer is not None:
        figures["score"] = float(scorer.scores(trajectories).mean())
    if config.prompts is None:
        right = sum(rollout.correct for rollout in rollouts)
        answered = sum(rollout.text.strip() != config.abstention for rollout in rollouts)
        figures |= {"accuracy": right / n, "coverage": answered / n, "precision": right / max(answered, 1)}
    return figures


def _shown(figures: dict[str, float]) -> str:
    parts = []
    if "accuracy" in figures:
        parts.append(f"accuracy {figures['accuracy']:.1%} (greedy)")
    if figures.get("coverage", 1) < 1:
        parts.append(f"{figures['coverage']:.1%} answered, of these {figures['precision']:.1%} right")
    if "score" in figures:
        parts.append(f"score {figures['score']:.3f}")
    if not parts:
        parts.append(f"{figures['length']:.1f} tokens an answer" if figures else "no problems")
    return ", ".join(parts)


def _log(workdir: Path, number: int, figures: dict[str, Any]) -> None:
    rows = [row for row in _rows(workdir) if row["round"] < number] + [{"round": number} | figures]
    configs.atomic_write(workdir / ROUNDS, "".join(json.dumps(row) + "\n" for row in rows))


def _rows(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / ROUNDS
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def main(config: RoundsConfig, workdir: Path) -> int:
    final = run(config, workdir)
    configs.atomic_write(workdir / "result.json", json.dumps(final, indent=1) + "\n")
    changed = [name for name in ("accuracy", "score", "length") if name in final]
    print(
        "done: "
        + "  ".join(f"{name} {final[f'{name}_at_start']:.3f} -> {final[name]:.3f}" for name in changed)
    )
    return exits.DONE


if __name__ == "__main__":
    sys.exit(configs.run(main, RoundsConfig, description=__doc__ or ""))

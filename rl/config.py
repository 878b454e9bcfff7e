"""What one reinforcement-learning run is."""

from __future__ import annotations

import dataclasses

from configs.typed import check_above, check_at_least
from data.tasks import INSTRUCTION, TaskSpec
from train.algorithms import GRPO, PPO, OnPolicyDistillation
from train.config import CheckpointSpec, LearnerConfig, MeshSpec
from train.optimizers import AdamW, Optimizer
from train.schedules import Constant, Schedule


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    prompts: int = 32  # problems a step
    group: int = 8  # answers to each; advantages are relative within a group
    max_new_tokens: int = 64
    temperature: float = 1.0
    seq_len: int = 256  # longest prompt and answer together, tokens: the rows that the trainer sees

    def __post_init__(self):
        check_at_least(1, prompts=self.prompts, group=self.group, max_new_tokens=self.max_new_tokens)
        check_at_least(2, seq_len=self.seq_len)
        check_at_least(0, temperature=self.temperature)


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    format_weight: float = 0.1  # added for an answer in the asked format, right or wrong
    timeout: float = 5.0  # seconds that a verifier may take for one answer, queueing not counted
    workers: int = 2  # verifier processes

    def __post_init__(self):
        check_at_least(1, workers=self.workers)
        check_above(0, timeout=self.timeout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(LearnerConfig):
    """Reinforcement learning, or distillation, on what the policy writes; `init_from` is the policy to start from."""

    algorithm: GRPO | PPO | OnPolicyDistillation = GRPO()
    tasks: tuple[TaskSpec, ...] = (TaskSpec("chain_sum"),)
    # in place of tasks: a dataset of kind "prompt", or JSONL of prompts or dialogues; no verifier knows their answers
    prompts: str | None = None
    instruction: str = INSTRUCTION  # follows each question of a task
    problems: int = 2000  # different training problems, taken in shuffled epochs
    steps: int = 100
    max_mismatch_kl: float = 1e-3  # nats a token between sampler and trainer; above it the run stops
    evaluate_every: int = 20  # steps; 0: at the end only
    evaluate_problems: int = 100  # held-out problems (validation split), greedy
    log_samples: int = 4  # rollouts a step that samples.jsonl keeps
    rollout: RolloutSpec = RolloutSpec()
    reward: RewardSpec = RewardSpec()
    optimizer: Optimizer = AdamW(peak_lr=1e-5, weight_decay=0.0)
    schedule: Schedule = Constant(warmup_steps=5)
    mesh: MeshSpec = MeshSpec(data=1)
    checkpoint: CheckpointSpec = CheckpointSpec(every=20)

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, problems=self.problems, evaluate_problems=self.evaluate_problems)
        check_at_least(0, evaluate_every=self.evaluate_every, log_samples=self.log_samples)
        if not self.rollout.temperature:
            raise ValueError("config.rollout.temperature=0 has no log-probabilities; wanted more than 0.")
        if isinstance(self.algorithm, GRPO) and self.rollout.group < 2:
            raise ValueError(
                f"config.rollout.group={self.rollout.group}: GRPO compares the answers to a prompt with each other, "
                "and one alone teaches nothing. Give at least 2."
            )
        if self.prompts is not None and not self.rewards_by_model:
            raise ValueError(
                "config.prompts have no verifier, so their answers earn nothing. Take config.algorithm.kind=PPO with "
                "config.algorithm.reward, or OnPolicyDistillation with config.algorithm.teacher."
            )

    @property
    def rewards_by_model(self) -> bool:
        """Whether the algorithm learns from what another model says of an answer."""
        if isinstance(self.algorithm, PPO):
            return self.algorithm.reward is not None
        return isinstance(self.algorithm, OnPolicyDistillation)

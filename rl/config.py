"""What one reinforcement-learning run is."""

from __future__ import annotations

import dataclasses

from data.tasks import INSTRUCTION, TaskSpec
from model import ShardingRules
from train.config import CheckpointSpec, Execution, MeshSpec, OptimizerSpec, check_at_least


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


@dataclasses.dataclass(frozen=True)
class GRPOSpec:
    """Shao et al. 2024, arXiv:2402.03300, with DAPO's token-level loss and clip-higher (Yu et al. 2025,
    arXiv:2503.14476)."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    minibatches: int = 1  # updates from one set of rollouts
    normalise_std: bool = True  # divide advantages by the group's standard deviation

    def __post_init__(self):
        check_at_least(1, minibatches=self.minibatches)


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    format_weight: float = 0.1  # added for an answer in the asked format, right or wrong
    timeout: float = 5.0  # seconds that a verifier may take for one answer, queueing not counted
    workers: int = 2  # verifier processes

    def __post_init__(self):
        check_at_least(1, workers=self.workers)


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """GRPO with verifiable rewards on procedural tasks."""

    init_from: str = ""  # run folder, checkpoint, Hugging Face folder or GGUF file: the policy to start from
    tasks: tuple[TaskSpec, ...] = (TaskSpec("chain_sum"),)
    instruction: str = INSTRUCTION  # follows each question
    problems: int = 2000  # different training problems, taken in shuffled epochs
    steps: int = 100
    seed: int = 0
    microbatches: int = 1
    max_mismatch_kl: float = 1e-3  # nats a token between sampler and trainer; above it the run stops
    max_bad_steps: int = 10  # steps in a row without a finite gradient before the run stops
    evaluate_every: int = 20  # steps; 0: at the end only
    evaluate_problems: int = 100  # held-out problems (validation split), greedy
    log_samples: int = 4  # rollouts a step that samples.jsonl keeps
    rollout: RolloutSpec = RolloutSpec()
    grpo: GRPOSpec = GRPOSpec()
    reward: RewardSpec = RewardSpec()
    run: Execution = Execution()
    optimizer: OptimizerSpec = OptimizerSpec(
        peak_lr=1e-5, schedule="constant", warmup_steps=5, weight_decay=0.0, clip_norm=1.0
    )
    mesh: MeshSpec = MeshSpec(data=1)
    sharding: ShardingRules = ShardingRules()
    checkpoint: CheckpointSpec = CheckpointSpec(every=20)

    def __post_init__(self):
        check_at_least(1, problems=self.problems, steps=self.steps, microbatches=self.microbatches)
        check_at_least(1, max_bad_steps=self.max_bad_steps, evaluate_problems=self.evaluate_problems)
        check_at_least(0, evaluate_every=self.evaluate_every, log_samples=self.log_samples)

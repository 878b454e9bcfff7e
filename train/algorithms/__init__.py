"""Algorithms: each is a variant of `config.algorithm`, beside its like in one file."""

from train.algorithms.algorithm import Algorithm, Metrics, objective_of
from train.algorithms.distillation import Distillation, OnPolicyDistillation
from train.algorithms.kto import KTO
from train.algorithms.language_modelling import LanguageModelling
from train.algorithms.masked import MaskedLanguageModelling
from train.algorithms.policy_gradient import GRPO
from train.algorithms.ppo import PPO
from train.algorithms.preferences import DPO, ORPO, SimPO
from train.algorithms.rewards import ProcessRewardModel, RewardModel

Preferences = DPO | ORPO | SimPO | KTO
Rewards = RewardModel | ProcessRewardModel
AnyAlgorithm = LanguageModelling | Preferences | Rewards | Distillation | MaskedLanguageModelling

__all__ = [
    "DPO",
    "GRPO",
    "KTO",
    "ORPO",
    "PPO",
    "Algorithm",
    "AnyAlgorithm",
    "Distillation",
    "LanguageModelling",
    "MaskedLanguageModelling",
    "Metrics",
    "OnPolicyDistillation",
    "ProcessRewardModel",
    "RewardModel",
    "SimPO",
    "objective_of",
]

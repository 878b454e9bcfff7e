"""Algorithms: each is a variant of `config.algorithm`, beside its like in one file."""

from train.algorithms.algorithm import Algorithm, Metrics, objective_of
from train.algorithms.kto import KTO
from train.algorithms.language_modelling import LanguageModelling
from train.algorithms.policy_gradient import GRPO
from train.algorithms.preferences import DPO, ORPO, SimPO
from train.algorithms.rewards import ProcessRewardModel, RewardModel

AnyAlgorithm = LanguageModelling | DPO | ORPO | SimPO | KTO | RewardModel | ProcessRewardModel

__all__ = [
    "DPO",
    "GRPO",
    "KTO",
    "ORPO",
    "Algorithm",
    "AnyAlgorithm",
    "LanguageModelling",
    "Metrics",
    "ProcessRewardModel",
    "RewardModel",
    "SimPO",
    "objective_of",
]

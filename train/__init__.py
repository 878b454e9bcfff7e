"""Training: any algorithm over any models, on any mesh."""

from train.algorithms import (
    DPO,
    KTO,
    ORPO,
    LanguageModelling,
    ProcessRewardModel,
    RewardModel,
    SimPO,
    objective_of,
)
from train.config import LearnerConfig, TrainConfig
from train.learner import Learner, make_plan
from train.models import Model, Role
from train.optimizers import AdamW, make_optimizer
from train.step import State, accumulate, make_train_step, new_state

__all__ = [
    "DPO",
    "KTO",
    "ORPO",
    "AdamW",
    "LanguageModelling",
    "Learner",
    "LearnerConfig",
    "Model",
    "ProcessRewardModel",
    "RewardModel",
    "Role",
    "SimPO",
    "State",
    "TrainConfig",
    "accumulate",
    "make_optimizer",
    "make_plan",
    "make_train_step",
    "new_state",
    "objective_of",
    "train",
]


def train(config, workdir, **options):
    """Run one training; see `train.trainer.train`."""
    from train.trainer import train as run

    return run(config, workdir, **options)

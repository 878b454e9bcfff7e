"""Training: any objective on any mesh."""

from train.config import TrainConfig
from train.objectives import dpo, language_modelling
from train.optimizer import adamw, learning_rate
from train.step import TrainState, accumulate, make_train_step, new_state

__all__ = [
    "TrainConfig",
    "TrainState",
    "accumulate",
    "adamw",
    "dpo",
    "language_modelling",
    "learning_rate",
    "make_train_step",
    "new_state",
    "train",
]


def train(config, workdir, **options):
    """Run one training; see `train.trainer.train`."""
    from train.trainer import train as run

    return run(config, workdir, **options)

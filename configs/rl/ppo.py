"""PPO on sums, with a value model and a penalty for leaving the start: give config.init_from, as for sums.py."""

from configs.rl import sums


def get_config():
    config = sums.get_config()
    config.algorithm = {"kind": "PPO", "kl_weight": 0.02, "minibatches": 4, "epochs": 2}
    return config

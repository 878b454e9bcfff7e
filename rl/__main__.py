"""`python -m rl --config=configs/rl/sums.py --workdir=runs/sums --config.init_from=runs/chat`"""

import sys

import configs
from configs import exits
from rl.config import RLConfig

DESCRIPTION = """Train a model to reason by reinforcement learning with verifiable rewards (GRPO).

The run folder keeps config.json, metrics.jsonl, tensorboard/, samples.jsonl and checkpoints/. The same command,
given again, goes on from the newest checkpoint."""


def main(config: RLConfig, workdir) -> int:
    from rl.loop import SamplerMismatch, run
    from train.metrics import write_result
    from train.trainer import TrainingDiverged

    try:
        final = run(config, workdir)
    except (SamplerMismatch, TrainingDiverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return exits.FAILED
    write_result(workdir, final)
    print("done: " + "  ".join(f"{name} {value:.5g}" for name, value in final.items() if value is not None))
    return exits.DONE


if __name__ == "__main__":
    sys.exit(configs.run(main, RLConfig, description=DESCRIPTION))

"""`python -m train --config=configs/pretrain/stdlib.py --workdir=runs/stdlib [--config.key=value ...]`"""

import sys

import configs
import data
from configs import exits
from train.config import TrainConfig

DESCRIPTION = """Train a model: pretraining, fine-tuning, preferences or rewards, by config.algorithm and the dataset.

The run folder keeps config.json, metrics.jsonl, tensorboard/, samples.jsonl and checkpoints/. The same command,
given again, resumes from the newest checkpoint."""


def main(config: TrainConfig, workdir, plan: bool = False) -> int:
    if plan:
        print(data.make_run_plan(config.data, config.steps, config.batch_kind).table())
        return 0
    from train.metrics import write_result
    from train.trainer import TrainingDiverged, train

    try:
        final = train(config, workdir)
    except TrainingDiverged as error:
        print(f"error: {error}", file=sys.stderr)
        return exits.FAILED
    write_result(workdir, final)
    print("done: " + "  ".join(f"{name} {value:.5g}" for name, value in final.items() if value is not None))
    return exits.DONE


if __name__ == "__main__":
    flags = {"plan": configs.Flag(bool, False, "print documents, tokens and epochs of each source, and stop")}
    sys.exit(configs.run(main, TrainConfig, description=DESCRIPTION, flags=flags))

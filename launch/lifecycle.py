"""`python -m launch.lifecycle`: the whole life of a model in one command, and a report at the end.

    corpus -> dialogues -> pretrain -> sft -> dpo -> rl, with an evaluation after each model

Each stage is its own command in its own process with its own folder in the workdir; a stage that is done is not
redone, a stage whose config changed is, with everything after it. Killed anywhere and started again, it goes on.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import field
from pathlib import Path

import configs
from configs.exits import FAILED, MISTAKE
from data.corpus import CorpusConfig
from data.dialogues import DialogueConfig
from evals.config import EvalConfig
from launch.stages import Stage, StageFailed, run_stages
from rl.config import RLConfig
from train.config import TrainConfig
from train.metrics import clock

DESCRIPTION = __doc__ or ""


@dataclasses.dataclass(frozen=True)
class LifecycleConfig:
    """One part a stage. Paths between the stages (datasets, tokenizer, init_from, model) are filled in."""

    cpu_devices: int = (
        1  # of the training stages on a CPU: two small halves of a batch keep two cores busier than one
    )
    replay: float = 0.0  # share of fine-tuning's rows that are pretraining text, so that it is not forgotten
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    dialogues: DialogueConfig = DialogueConfig()
    pretrain: TrainConfig = field(default_factory=TrainConfig)
    sft: TrainConfig = field(default_factory=TrainConfig)
    dpo: TrainConfig = field(default_factory=TrainConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)


def plan(config: LifecycleConfig, workdir: Path) -> list[Stage]:
    """The stages in order, each with a config that names the folders of those before it."""

    def at(*parts: str) -> str:
        return str(workdir.joinpath(*parts))

    def tuned(spec: TrainConfig, kind: str, start: str) -> TrainConfig:
        share = config.replay if kind == "chat" else 0.0
        train, validation = {at("dialogues", kind, "train"): 1.0}, {at("dialogues", kind, "validation"): 1.0}
        if share:
            train = {at("dialogues", kind, "train"): 1 - share, at("corpus", "tokens", "train"): share}
        data = dataclasses.replace(spec.data, mixture=train, validation=validation)
        return dataclasses.replace(spec, init_from=at(start), data=data)

    def evaluation(model: str) -> EvalConfig:
        tasks, texts = config.evals.tasks, {"held-out text": at("corpus", "text", "test")}
        if not tasks and model != "pretrain":
            raise configs.ConfigError(
                "config.evals.tasks is empty: name the tasks that the stages are compared on."
            )
        return dataclasses.replace(config.evals, model=at(model), texts=texts)

    tokens = {split: {at("corpus", "tokens", split): 1.0} for split in ("train", "validation")}
    pretrain_data = dataclasses.replace(
        config.pretrain.data, mixture=tokens["train"], validation=tokens["validation"]
    )
    pretrain = dataclasses.replace(config.pretrain, tokenizer=at("corpus"), data=pretrain_data)
    dialogues = dataclasses.replace(config.dialogues, tokenizer=at("corpus"))
    devices = config.cpu_devices
    return [
        Stage("corpus", "data", config.corpus),
        Stage("dialogues", "data.dialogues", dialogues, after=("corpus",)),
        Stage("pretrain", "train", pretrain, ("corpus",), devices),
        Stage("eval-pretrain", "evals", evaluation("pretrain"), after=("pretrain",)),
        Stage("sft", "train", tuned(config.sft, "chat", "pretrain"), ("pretrain", "dialogues"), devices),
        Stage("eval-sft", "evals", evaluation("sft"), after=("sft",)),
        Stage("dpo", "train", tuned(config.dpo, "preferences", "sft"), ("sft", "dialogues"), devices),
        Stage("eval-dpo", "evals", evaluation("dpo"), after=("dpo",)),
        Stage("rl", "rl", dataclasses.replace(config.rl, init_from=at("dpo")), ("dpo",), devices),
        Stage("eval-rl", "evals", evaluation("rl"), after=("rl",)),
    ]


def main(config: LifecycleConfig, workdir: Path) -> int:
    from launch.report import write_report

    began = time.monotonic()
    workdir.mkdir(parents=True, exist_ok=True)
    configs.save(config, workdir / "config.json")
    try:
        records = run_stages(plan(config, workdir), workdir)
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE if error.code == MISTAKE else FAILED
    report = write_report(workdir, records)
    print(
        f"\nDone in {clock(time.monotonic() - began)} now, {clock(sum(r.seconds for r in records.values()))} in all."
    )
    print(f"The report: {report}")
    print(f"Chat with the model: {sys.executable} -m serve --model={workdir / 'rl'} --port=8000")
    return 0


if __name__ == "__main__":
    sys.exit(configs.run(main, LifecycleConfig, description=DESCRIPTION))

"""The peer of `benchmarks.post_training`: TRL's trainers with peft's LoRA on the same files, in the peer's own venv."""

import argparse
import json
import resource
import statistics
import time

import torch
import trl
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

RATES = {"sft": 5e-4, "dpo": 1e-4, "kto": 1e-4}


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.began)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--method")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--folder")
    options = parser.parse_args()
    torch.manual_seed(0)
    files = {name: f"{options.folder}/{options.method}-{name}.jsonl" for name in ("train", "held_out")}
    rows = load_dataset("json", data_files=files, cache_dir=f"{options.folder}/cache")
    tokenizer = AutoTokenizer.from_pretrained(f"{options.folder}/model")
    model = AutoModelForCausalLM.from_pretrained(f"{options.folder}/model", dtype=torch.float32)
    # the rows of a step are those of our batches: a pair has two
    per_step = options.rows // 2 if options.method == "dpo" else options.rows
    settings = {
        "output_dir": f"{options.folder}/trl",
        "per_device_train_batch_size": per_step,
        "per_device_eval_batch_size": per_step,
        "max_steps": options.steps,
        "learning_rate": RATES[options.method],
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(options.steps // 10, 1),
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "max_length": options.length,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    trainer_of = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer, "kto": trl.KTOTrainer}[options.method]
    config_of = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "kto": trl.KTOConfig}[options.method]
    clock = Clock()
    trainer = trainer_of(
        model=model,
        args=config_of(**settings),
        train_dataset=rows["train"],
        eval_dataset=rows["held_out"],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"),
        callbacks=[clock],
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(
        f"{options.folder}/trl-{options.method}"
    )  # the adapter, which the other side measures, too
    figure = "eval_rewards/accuracies" if options.method == "dpo" else "eval_loss"
    said = {"before": before[figure], "after": after[figure]}
    said |= {"loss_before": before["eval_loss"], "loss_after": after["eval_loss"]}
    said |= {"seconds_a_step": statistics.median(clock.seconds[3:]), "first_step_seconds": clock.seconds[0]}
    said["peak_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps(said))


if __name__ == "__main__":
    main()

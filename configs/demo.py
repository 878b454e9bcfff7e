"""The whole life of a small model on two CPU cores in a quarter of an hour: `make demo`.

The prose that lies on every Python machine (docstrings and the language reference) and sums from reasoning-gym;
nothing is downloaded.
"""

from ml_collections import ConfigDict

SUMS = {
    "name": "basic_arithmetic",
    "config": {
        "min_terms": 2,
        "max_terms": 3,
        "min_digits": 1,
        "max_digits": 1,
        "operators": ("+",),
        "allow_parentheses": False,
        "allow_negation": False,
    },
}
INSTRUCTION = "Answer as <answer>...</answer>."


def training(steps, peak_lr, **more):
    return {
        "steps": steps,
        "log_every": 20,
        "data": {"seq_len": 64, "batch_size": 16, "validation_batches": 4},
        "optimizer": {"peak_lr": peak_lr, "warmup_steps": 30, "b2": 0.98, "weight_decay": 0.01},
        "checkpoint": {"every": 200, "keep": 1},
        **more,
    }


def get_config():
    pretrain = training(800, 5e-3, validate_every=200)
    pretrain["model"] = {
        "width": 128,
        "layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "ffn_width": 384,
        "max_length": 256,
    }
    pretrain["data"] = {"seq_len": 256, "batch_size": 8, "validation_batches": 8}
    pretrain["samples"] = {
        "every": 200,
        "prompts": ("Return a copy of", "This module provides", "If the argument is"),
        "max_new_tokens": 40,
    }
    chat_samples = {"chat": True, "max_new_tokens": 16}
    question = f"Calculate 3 + 4.\n{INSTRUCTION}"
    sft = training(800, 2e-3, samples=chat_samples | {"prompts": (question,)})
    dpo = training(40, 2e-5, objective="dpo", log_every=5, samples=chat_samples | {"prompts": (question,)})
    return ConfigDict(
        {
            "cpu_devices": 2,
            "corpus": {
                "curation": {
                    "sources": ({"kind": "PythonStdlib", "code": False},),
                    "stages": (
                        {"kind": "Normalise"},
                        {"kind": "GopherQuality"},
                        {"kind": "CodeQuality"},
                        {"kind": "ExactDedup"},
                        {"kind": "MinHashDedup"},
                    ),
                    "validation_fraction": 0.03,
                    "test_fraction": 0.05,
                },
                "tokenizer": {
                    "kind": "bpe",
                    "vocab_size": 1024,
                    "digits": 1,
                    "tasks": (SUMS,),
                    "task_problems": 1000,
                    "instruction": INSTRUCTION,
                },
            },
            "dialogues": {
                "tasks": (SUMS,),
                "instruction": INSTRUCTION,
                "dialogues": 1100,
                "pairs": 1000,
                "validation": 100,
            },
            "pretrain": pretrain,
            "sft": sft,
            "dpo": dpo,
            "rl": {
                "tasks": (SUMS,),
                "instruction": INSTRUCTION,
                "problems": 1100,
                "steps": 60,
                "evaluate_every": 20,
                "evaluate_problems": 100,
                "rollout": {"prompts": 64, "group": 8, "max_new_tokens": 10, "seq_len": 40},
                "grpo": {"minibatches": 4},
                "optimizer": {"peak_lr": 3e-4, "warmup_steps": 5, "schedule": "cosine", "weight_decay": 0.0},
                "checkpoint": {"every": 25, "keep": 1},
            },
            "evals": {
                "tasks": (
                    {
                        **SUMS,
                        "label": "sums",
                        "problems": 130,
                        "instruction": INSTRUCTION,
                        "max_new_tokens": 12,
                    },
                ),
                "engine": {"max_rows": 64},
                "samples": 8,
            },
        }
    )

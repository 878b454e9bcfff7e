"""The whole life of a small model on two CPU cores in a quarter of an hour: `make demo`.

Prose and code that lie on every Python machine (docstrings, the language reference, some of the library's sources)
and sums from reasoning-gym; nothing is downloaded.
"""

from ml_collections import ConfigDict

SUMS = {
    "name": "basic_arithmetic",
    "config": {
        "min_terms": 2,
        "max_terms": 4,
        "min_digits": 1,
        "max_digits": 1,
        "operators": ("+",),
        "allow_parentheses": False,
        "allow_negation": False,
    },
}
INSTRUCTION = "Answer as <answer>...</answer>."


def get_config():
    return ConfigDict(
        {
            "cpu_devices": 2,
            "replay": 0.05,
            "corpus": {"curation": curation(), "tokenizer": tokenizer()},
            "dialogues": dialogues(),
            "pretrain": pretrain(),
            "sft": sft(),
            "dpo": dpo(),
            "rl": rl(),
            "evals": evals(),
        }
    )


def curation():
    return {
        "sources": (
            {"kind": "PythonStdlib", "code": False},
            {"kind": "PythonStdlib", "docstrings": False, "topics": False, "max_bytes": 300_000},
        ),
        "stages": (
            {"kind": "Normalise"},
            {"kind": "GopherQuality"},
            {"kind": "CodeQuality"},
            {"kind": "ExactDedup"},
            {"kind": "MinHashDedup"},
        ),
        "validation_fraction": 0.03,
        "test_fraction": 0.05,
    }


def tokenizer():
    return {
        "kind": "bpe",
        "vocab_size": 1024,
        "digits": 1,
        "tasks": (SUMS,),
        "task_problems": 1000,
        "instruction": INSTRUCTION,
    }


def dialogues():
    return {
        "tasks": (SUMS,),
        "instruction": INSTRUCTION,
        "dialogues": 8000,
        "pairs": 1000,
        "validation": 100,
    }


def pretrain():
    spec = training(700, 8e-3, validate_every=100)
    spec["model"] = {
        "width": 128,
        "layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "ffn_width": 384,
        "max_length": 256,
    }
    spec["data"] = {"seq_len": 256, "batch_size": 8, "validation_batches": 8}
    spec["samples"] = {
        "every": 200,
        "prompts": ("Return a copy of", "This module provides", "def __init__(self"),
        "max_new_tokens": 40,
        "temperature": 0.7,
    }
    return spec


def sft():
    return training(600, 4e-3, validate_every=100, samples=chat_samples())


def dpo():
    return training(40, 2e-5, algorithm={"kind": "DPO"}, log_every=5, samples=chat_samples())


def chat_samples():
    return {"chat": True, "max_new_tokens": 12, "prompts": (f"Calculate 3 + 4.\n{INSTRUCTION}",)}


def training(steps, peak_lr, **more):
    """What pretraining, SFT and DPO have in common."""
    return {
        "steps": steps,
        "log_every": 20,
        "data": {"seq_len": 128, "batch_size": 8, "validation_batches": 4},
        "optimizer": {"peak_lr": peak_lr, "b2": 0.98, "weight_decay": 0.01},
        "schedule": {"warmup_steps": 30},
        "checkpoint": {"every": 100, "keep": 1},
        **more,
    }


def rl():
    return {
        "tasks": (SUMS,),
        "instruction": INSTRUCTION,
        "problems": 4000,
        "steps": 120,
        "evaluate_every": 20,
        "evaluate_problems": 100,
        "rollout": {"prompts": 32, "group": 8, "max_new_tokens": 10, "seq_len": 48},
        "algorithm": {"minibatches": 4},
        "optimizer": {"peak_lr": 2.5e-4, "weight_decay": 0.0},
        "schedule": {"kind": "Cosine", "warmup_steps": 10},
        "mesh": {"data": -1},
        "checkpoint": {"every": 25, "keep": 1},
    }


def evals():
    sums = {"label": "sums", "problems": 250, "instruction": INSTRUCTION, "max_new_tokens": 12}
    return {"tasks": (SUMS | sums,), "engine": {"max_rows": 64}, "samples": 8}

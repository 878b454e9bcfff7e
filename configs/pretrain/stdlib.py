"""A small model from scratch on the corpus of configs/data/stdlib.py in runs/corpus."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "tokenizer": "runs/corpus",
            "steps": 2000,
            "validate_every": 200,
            "model": {
                "width": 256,
                "layers": 4,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 64,
                "ffn_width": 704,
                "max_length": 512,
            },
            "data": {
                "mixture": {"runs/corpus/tokens/train": 1.0},
                "validation": {"runs/corpus/tokens/validation": 1.0},
                "seq_len": 512,
                "batch_size": 8,
            },
            "optimizer": {"peak_lr": 3e-3},
            "schedule": {"warmup_steps": 100},
            "samples": {"every": 500, "prompts": ("Return a list of", "def ")},
        }
    )

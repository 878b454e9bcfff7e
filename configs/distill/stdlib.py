"""A smaller model from a larger one, on the corpus of configs/data/stdlib.py: the teacher is runs/stdlib."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "algorithm": {"kind": "Distillation", "teacher": "runs/stdlib"},
            "tokenizer": "runs/corpus",
            "steps": 1000,
            "validate_every": 200,
            "model": {
                "width": 128,
                "layers": 2,
                "num_heads": 2,
                "num_kv_heads": 1,
                "head_dim": 64,
                "ffn_width": 352,
                "max_length": 512,
            },
            "data": {
                "mixture": {"runs/corpus/tokens/train": 1.0},
                "validation": {"runs/corpus/tokens/validation": 1.0},
                "seq_len": 512,
                "batch_size": 8,
            },
            "optimizer": {"peak_lr": 3e-3},
        }
    )

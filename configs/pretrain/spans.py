"""The model of configs/pretrain/stdlib.py, on texts with hidden spans: T5's, or with `spans.py:ul2` UL2's mixture.

The corpus needs tokens for it: python -m data --config=configs/data/stdlib.py --config.tokenizer.reserved=100 ...
"""

import dataclasses

from configs.pretrain import stdlib
from data.spans import UL2, Denoiser

MODES = {"[R]": "<|reserved_97|>", "[S]": "<|reserved_98|>", "[X]": "<|reserved_99|>"}


def get_config(kind="t5"):
    denoisers = UL2 if kind == "ul2" else (Denoiser(),)
    named = [dataclasses.replace(each, mode=MODES.get(each.mode, "")) for each in denoisers]
    config = stdlib.get_config()
    spans = {"sentinel": "<|reserved_{}|>", "denoisers": tuple(dataclasses.asdict(each) for each in named)}
    config.update({"data": {"spans": spans}})
    return config

"""Low-rank adapters of a run: variants of `config.adapters`, for the model of `init_from`; only they are trained."""

from __future__ import annotations

import dataclasses
from typing import Literal

from configs.typed import check_at_least
from model.blocks import lora


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Hu et al. 2021, arXiv:2106.09685; the other parameters are frozen. Fields as in `model.blocks.lora.LoRA`."""

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*",)
    rank_stabilized: bool = False  # scale by alpha / sqrt(rank)
    decomposed: bool = False  # DoRA

    def __post_init__(self):
        check_at_least(1, rank=self.rank)
        self.build()  # checks the values

    def build(self) -> lora.LoRA:
        return lora.LoRA(self.rank, self.alpha, self.targets, 1, self.rank_stabilized, self.decomposed)


@dataclasses.dataclass(frozen=True)
class QLoRA(LoRA):
    """LoRA over linear maps that are kept in few bits. Dettmers et al. 2023, arXiv:2305.14314."""

    base: Literal["nf4", "int8"] = "nf4"  # the weights that adapters leave as they are; the rest is bfloat16
    block: int | None = None  # inputs that share a scale; None: 64 for nf4, 128 for int8
    double_quantized: bool = True  # scales are kept in 8 bits


Adapters = LoRA | QLoRA

"""The config of `python -m data.synthetic`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from data.endpoint import Endpoint
from data.synthetic.accept import Accept
from data.synthetic.documents import Rephrase, Textbook
from data.synthetic.instructions import Backtranslate, EvolInstruct, QuestionAnswer, SelfInstruct
from data.synthetic.verified import Code, Reasoning


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the model is sampled. Each request has a seed of its own, from the job and the round."""

    temperature: float = 0.8
    top_p: float = 0.95
    max_tokens: int = 1024


@dataclasses.dataclass(frozen=True)
class Mix:
    """Synthetic text beside real text. Accumulating keeps all real text; models trained on replacements of it get worse
    from generation to generation (Gerstgrasser et al. 2024, arXiv:2404.01413). Mixtures in the literature are
    a third to two thirds synthetic."""

    real: str | None = None  # a text dataset; None: the seeds, where they are one
    max_share: float = 0.5  # of all characters; rows beyond are left out, by a hash of their ids
    mode: Literal["accumulate", "replace"] = (
        "accumulate"  # replace: seeds that gave a row are left out of the real
    )

    def __post_init__(self):
        if not 0 < self.max_share <= 1:
            raise ValueError(f"max_share={self.max_share}: wanted above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Who writes, from what, after which recipe, and what is taken."""

    recipe: (
        Rephrase | Textbook | QuestionAnswer | Backtranslate | SelfInstruct | EvolInstruct | Reasoning | Code
    ) = dataclasses.field(default_factory=Rephrase)
    seeds: str = ""  # a text dataset folder, or a JSONL or Parquet file; Reasoning makes its own
    seed_field: str = "text"  # of a file
    tests_field: str = ""  # of a file: tests that the code must pass (Code)
    max_seeds: int | None = None  # the first ones in the order of a hash of their ids
    endpoint: Endpoint = dataclasses.field(default_factory=Endpoint)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    accept: Accept = dataclasses.field(default_factory=Accept)
    mix: Mix = dataclasses.field(default_factory=Mix)
    tokenizer: str = ""  # of dialogues: with one they are written as a chat dataset too

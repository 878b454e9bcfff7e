"""What is made, from what, by whom, and what is kept of it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from data.endpoint import Endpoint
from data.synthetic.recipes import AnyRecipe, Rephrase


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are sampled. Each request has a seed of its own, from the config's."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 2048


@dataclasses.dataclass(frozen=True)
class Accept:
    """Which rows stay. A row is held against the rows of its recipe that were accepted before it, in the order of the
    requests."""

    min_words: int = 5
    max_words: int = 20_000
    refusals: tuple[str, ...] = (
        "i'm sorry, but",
        "i am sorry, but",
        "i cannot fulfill",
        "i can't assist",
        "i cannot assist",
        "as an ai language model",
        "as a large language model",
    )  # looked for in the first 300 characters of what the model wrote, in small letters
    max_jaccard: float = 0.8  # of runs of five words, with an accepted row
    max_copied: float = 0.8  # Jaccard similarity with the seed
    max_rouge: float = 0.7  # ROUGE-L of an instruction with an accepted one (Self-Instruct); 1: no limit


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """One run of `python -m data.synthetic`."""

    seeds: str = ""  # a text dataset, or JSONL, Parquet, text files or a folder of them
    text_field: str = "text"  # of JSONL and Parquet: the document, or the instruction
    max_seeds: int = 0  # the first ones; 0: all
    max_characters: int = 6000  # of a seed that the model is shown
    recipes: tuple[AnyRecipe, ...] = (Rephrase(),)
    endpoint: Endpoint = Endpoint()
    sampling: Sampling = Sampling()
    accept: Accept = Accept()
    seed: int = 0
    tokenizer: str = ""  # with one, dialogues become a chat dataset
    real: str = ""  # a text dataset that the accepted texts are mixed into
    mix: Literal["accumulate", "replace"] = (
        "accumulate"  # "replace" takes the seeds' documents out of the real text
    )
    max_share: float = (
        0.5  # of the mixture that may be synthetic, by bytes: a third to two thirds in the literature
    )

    def __post_init__(self):
        if not self.recipes:
            raise ValueError("recipes is empty: name at least one")
        if not 0 <= self.max_share < 1:
            raise ValueError(f"max_share={self.max_share}: wanted 0 or more, and less than 1")

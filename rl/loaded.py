"""A model that a command asks: its parameters, its tokenizer, and a key by content."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import data
import model
from configs import ConfigError
from data import ChatTemplateError
from data.shards import hash_of
from data.tokenize import fingerprint as tokenizer_fingerprint
from model import ModelConfig
from train.config import Execution
from train.references import fingerprint as params_fingerprint

Messages = Sequence[Mapping[str, Any]]


class LoadedModel:
    """A model with its tokenizer. Raises ConfigError for a path without a model, tokenizer or chat template."""

    def __init__(self, source: str, run: Execution):
        self.source = source
        self.tokenizer = data.load_tokenizer(source)
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                f"{source} has no chat template to ask it with. Give a model that was fine-tuned."
            )
        self.cfg: ModelConfig = run.apply_to(model.load_config(source))
        _, self.params = model.load(source, cfg=self.cfg)

    @functools.cached_property
    def key(self) -> str:
        """A hash of the parameters' bits and of the chat template."""
        return hash_of(params_fingerprint(self.params), tokenizer_fingerprint(self.tokenizer))

    def prompt(self, dialogue: Messages) -> list[int]:
        """Token ids up to where the answer begins."""
        try:
            return self.tokenizer.apply_chat_template(dialogue)[0]
        except ChatTemplateError as error:
            raise ConfigError(f"the chat template of {self.source} can't show a dialogue: {error}") from error

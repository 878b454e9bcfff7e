"""Log-probabilities of the options that a judge may answer, right after its prompt."""

# N dialogues, O options, B rows of a batch, T tokens

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from configs import ConfigError
from model import Inputs, apply
from rl.loaded import LoadedModel, Messages

_FIRST_LENGTH = 64  # tokens of the shortest bucket


class OptionScorer:
    """Scores options by their first token, so these must differ.

    Args:
      seq_len: dialogues of more tokens are not scored.
      rows: dialogues that are scored at once.

    Raises:
      ConfigError: two options begin with the same token.
    """

    def __init__(self, loaded: LoadedModel, options: Sequence[str], seq_len: int, rows: int):
        self._loaded, self._seq_len, self._rows = loaded, seq_len, rows
        self._first_O = np.array([first_token(loaded, option) for option in options], np.int32)
        if len(set(self._first_O.tolist())) < len(options):
            raise ConfigError(
                f"the options {', '.join(options)} begin with the same token of {loaded.source}; "
                "give others, whose first tokens differ."
            )

    def logprobs(self, dialogues: Sequence[Messages]) -> np.ndarray:
        """float64 [N, O], in nats over the whole vocabulary; NaN for a dialogue that is too long."""
        found_NO = np.full((len(dialogues), len(self._first_O)), np.nan)
        by_length: dict[int, list[tuple[int, list[int]]]] = {}
        for i, dialogue in enumerate(dialogues):
            ids = self._loaded.prompt(dialogue)
            if len(ids) <= self._seq_len:
                by_length.setdefault(self._bucket(len(ids)), []).append((i, ids))
        for length, items in sorted(by_length.items()):
            for start in range(0, len(items), self._rows):
                part = items[start : start + self._rows]
                found_NO[[i for i, _ in part]] = self._score([ids for _, ids in part], length)
        return found_NO

    def _bucket(self, length: int) -> int:
        bucket = _FIRST_LENGTH
        while bucket < length:
            bucket *= 2
        return min(bucket, max(self._seq_len, _FIRST_LENGTH))

    def _score(self, prompts: list[list[int]], length: int) -> np.ndarray:
        tokens_BT, real_BT = (np.zeros((self._rows, length), np.int32) for _ in range(2))
        last_B1 = np.zeros((self._rows, 1), np.int32)
        for row, ids in enumerate(prompts):
            tokens_BT[row, : len(ids)], real_BT[row, : len(ids)] = ids, 1
            last_B1[row] = len(ids) - 1
        cfg, params = self._loaded.cfg, self._loaded.params
        scored_BO = np.asarray(_score(cfg, params, tokens_BT, real_BT, last_B1, self._first_O), np.float64)
        if not np.isfinite(scored_BO[: len(prompts)]).all():
            raise RuntimeError(f"the logits of {self._loaded.source} are not finite; it may be damaged")
        return scored_BO[: len(prompts)]


def first_token(loaded: LoadedModel, option: str) -> int:
    """The first token of an option where the model's answer begins, as its chat template writes answers."""
    tokenizer = loaded.tokenizer
    prompt = loaded.prompt([{"role": "user", "content": "?"}])
    after_text = prompt[-1] not in tokenizer.special_tokens.values()
    ids = tokenizer.encode_batch([option], after_text or not tokenizer.prefix_after_special)[0]
    if not ids:
        raise ConfigError(f"the option {option!r} has no token in the vocabulary of {loaded.source}.")
    return ids[0]


@functools.partial(jax.jit, static_argnums=0)
def _score(cfg, params, tokens_BT, real_BT, last_B1, first_O):
    out = apply(cfg, params, Inputs(tokens_BT, segment_ids=real_BT), logits_at=last_B1)
    assert out.logits is not None
    return jax.nn.log_softmax(out.logits[:, 0].astype(jnp.float32), axis=-1)[:, first_O]

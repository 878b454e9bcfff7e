"""What the device has computed, copied to the host and recorded in the sequences that it belongs to."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, cast

import jax

from serve.plan import PrefillBatch
from serve.programs import PromptScores
from serve.sampling import Sampled
from serve.sequence import Sequence


def fetch(sampled: Sampled, sequences: list[Sequence]) -> Sampled:
    """In numpy, by one copy from the device; the alternatives only where one of the sequences wants them."""
    if not any(sequence.request.sampling.logprobs for sequence in sequences):
        sampled = dataclasses.replace(sampled, top_token=cast(Any, None), top_logprob=cast(Any, None))
    return jax.device_get(sampled)


def keep(sequence: Sequence, i: int, kept: int, fetched: Sampled, version: int) -> None:
    """Record what belongs to the first `kept` tokens of row `i`, which are the sequence's newest."""
    sequence.first_token_at = sequence.first_token_at or time.monotonic()
    sequence.logprobs += fetched.logprob[i, :kept].tolist()
    sequence.processed_logprobs += fetched.processed_logprob[i, :kept].tolist()
    sequence.kept_mass += fetched.kept_mass[i, :kept].tolist()
    sequence.versions += [version] * kept
    alternatives = sequence.request.sampling.logprobs
    if alternatives is not None:
        sequence.model_logprobs += fetched.model_logprob[i, :kept].tolist()
    if alternatives:
        places = fetched.top_token[i, :kept, :alternatives], fetched.top_logprob[i, :kept, :alternatives]
        sequence.top_logprobs += _pairs(*places)


def take_scores(batch: PrefillBatch, device_scores: PromptScores) -> None:
    """Record the log-probabilities of the batch's tokens of prompts."""
    scores = jax.device_get(device_scores)
    for i, (sequence, count) in enumerate(zip(batch.sequences, batch.counts, strict=True)):
        start = sequence.computed
        stop = min(start + count, len(sequence.request.prompt) - 1)
        if start >= stop or not sequence.wants_prompt_scores:
            continue
        # A chunk that is computed again after a preemption replaces what it said before.
        sequence.prompt_logprobs[start:stop] = scores.logprob[i, : stop - start].tolist()
        if wanted := sequence.request.sampling.prompt_logprobs:
            places = (
                scores.top_token[i, : stop - start, :wanted],
                scores.top_logprob[i, : stop - start, :wanted],
            )
            sequence.prompt_top_logprobs[start:stop] = _pairs(*places)


def _pairs(tokens: Any, logprobs: Any) -> list[list[tuple[int, float]]]:
    return [list(zip(*place, strict=True)) for place in zip(tokens.tolist(), logprobs.tolist(), strict=True)]

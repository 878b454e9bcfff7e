"""Samples during training: continuations of prompts."""

from __future__ import annotations

from data import Tokenizer
from model import ModelConfig
from model.function import Params
from model.generate import generate
from train.config import SampleSpec


def draw_samples(
    cfg: ModelConfig, params: Params, tokenizer: Tokenizer, spec: SampleSpec
) -> list[dict[str, str]]:
    """A row {"prompt", "completion"} for each prompt of `spec`."""
    prompts = [encode_prompt(tokenizer, prompt, spec.chat) for prompt in spec.prompts]
    completions = generate(
        cfg,
        params,
        prompts,
        spec.max_new_tokens,
        stop_ids=tokenizer.eos_ids,
        temperature=spec.temperature,
        vocab_size=tokenizer.vocab_size,
    )
    return [
        {"prompt": prompt, "completion": tokenizer.decode(ids)}
        for prompt, ids in zip(spec.prompts, completions, strict=True)
    ]


def encode_prompt(tokenizer: Tokenizer, prompt: str, chat: bool) -> list[int]:
    if chat:
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt}])[0]
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + tokenizer.encode(prompt)

"""The model as an `LM` of lm-evaluation-harness 0.4: any of its tasks runs on our scorer and engine.

Importing this file imports lm_eval, so nothing else imports it before a task is asked for.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM

from data import Tokenizer
from evals.config import LMEval
from evals.exact import EngineFor
from evals.progress import ProgressLine
from evals.scoring import Scorer, Span, windows
from serve import Request, SamplingParams

# In the text of a rendered chat, this character stands on both sides of a special token. lm-eval hands text to and
# fro, and a benchmark's own text that spells a special token must not become one.
_MARK = "\ue000"
_KNOWN_OPTIONS = {"until", "do_sample", "temperature", "top_k", "top_p", "min_p", "max_gen_toks", "seed"}
_LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

logger = logging.getLogger(__name__)


class CrucibleLM(TemplateLM):
    """Log-likelihoods by the scorer, text by the engine.

    Args:
      scorer: its context is the longest that a context and a continuation may be together; more is cut from
        the left, as the harness does.
      engine_for: see `evals.exact.EngineFor`.
      name: of the model, for the harness' records.
    """

    def __init__(
        self,
        scorer: Scorer,
        engine_for: EngineFor,
        tokenizer: Tokenizer,
        spec: LMEval,
        name: str = "crucible",
    ):
        super().__init__()
        self._scorer, self._engine_for, self._tokens, self._spec = scorer, engine_for, tokenizer, spec
        self._name = name
        self.cut: dict[str, int] = {}  # "prompts" and "contexts" that lost their beginning
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile(f"{_MARK}({'|'.join(map(re.escape, names)) or '(?!)'}){_MARK}")

    @property
    def max_length(self) -> int:
        return self._scorer.context

    @property
    def eot_token_id(self) -> int:
        return self._tokens.eos_ids[0] if self._tokens.eos_ids else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: bos, else the token that ends a document."""
        for token in (self._tokens.bos_id, *self._tokens.eos_ids):
            if token is not None:
                return token
        raise ValueError(
            "lm-eval needs a token before an empty context; this tokenizer has neither bos nor eos."
        )

    @property
    def tokenizer_name(self) -> str:
        return re.sub(r"[^\w.-]+", "__", self._name)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's Jinja source; None when it is not asked for."""
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise ValueError(
                f"this model has one chat template; apply_chat_template={chat_template!r} names one."
            )
        return self._tokens.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """The dialogue as text whose special tokens are marked, so that `tok_encode` gives back exactly its
        ids.

        Without `add_generation_prompt` the last message is the beginning of the assistant's answer.
        """
        messages, begun = list(chat_history), ""
        if not add_generation_prompt:
            if messages[-1]["role"] != "assistant":
                raise ValueError("without a generation prompt the last message must be the assistant's.")
            begun = messages.pop()["content"]
        if any(_MARK in str(message.get("content")) for message in [*messages, {"content": begun}]):
            raise ValueError(
                "a message holds U+E000, which marks special tokens here. Remove it from the data."
            )
        ids = self._tokens.apply_chat_template(messages)[0]
        text = self._marked(ids)
        if self.tok_encode(text) != ids:
            raise ValueError(
                "the rendered chat does not encode to its own tokens; this tokenizer loses something."
            )
        return text + begun

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of text; bos comes first unless `add_special_tokens` is False or a rendered chat begins."""
        parts = self._special.split(string)  # text, special, text, ... , text
        ids: list[int] = []
        if add_special_tokens is None:
            add_special_tokens = self._spec.add_bos and len(parts) == 1
        if add_special_tokens and self._tokens.bos_id is not None:
            ids.append(self._tokens.bos_id)
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._tokens.special_tokens[part])
            elif part:
                ids += self._tokens.encode(part)
        return ids

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log p of whole texts, in windows without overlap of which the last has a full context."""
        spans, owners = [], []
        for i, request in enumerate(requests):
            sequence = [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            for first, start, stop in windows(len(sequence), self.max_length, self.max_length):
                spans.append(Span(sequence[first:stop], start - first))
                owners.append(i)
        totals = [0.0] * len(requests)
        progress = None if disable_tqdm else ProgressLine("lm-eval rolling", "windows")
        for i, scored in zip(owners, self._scorer.score(spans, progress), strict=True):
            totals[i] += float(scored.logprobs.sum(dtype="float64"))
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        spans, cut = [], 0
        for (_text, continuation), context_ids, continuation_ids in requests:
            if not 1 <= len(continuation_ids) <= self.max_length:
                raise ValueError(
                    f"the continuation {continuation!r:.80} has {len(continuation_ids)} tokens of its own; "
                    f"wanted 1 to {self.max_length}, the model's context."
                )
            tokens = [*context_ids, *continuation_ids]
            cut += len(tokens) > self.max_length + 1
            tokens = tokens[-(self.max_length + 1) :]
            spans.append(Span(tokens, len(tokens) - len(continuation_ids)))
        self._say_cut("contexts", cut, len(requests))
        progress = None if disable_tqdm else ProgressLine("lm-eval log-likelihoods", "requests")
        answers = [
            (float(scored.logprobs.sum(dtype="float64")), bool(scored.greedy.all()))
            for scored in self._scorer.score(spans, progress)
        ]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Text up to a stop string, an end token or the length. Repeats of a request are sampled differently,
        and the same when everything is done again."""
        if not requests:
            return []
        self._cut_prompts: list[bool] = []
        prepared = [self._generation(*request.args, number=i) for i, request in enumerate(requests)]
        longest = max(len(request.prompt) + (request.sampling.max_tokens or 0) for request in prepared)
        progress = None if disable_tqdm else ProgressLine("lm-eval answers", "requests")
        self._say_cut("prompts", sum(self._cut_prompts), len(requests))
        outputs = self._engine_for(longest).generate(prepared, progress)
        for request, output in zip(requests, outputs, strict=True):
            if output.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"the engine ended a request with {output.finish_reason}: {output.error}")
            self.cache_hook.add_partial("generate_until", request.args, output.text)
        return [output.text for output in outputs]

    def _generation(self, context: str, options: dict[str, Any], number: int) -> Request:
        options = dict(options)
        given = [options.pop(name) for name in _LENGTH_OPTIONS if options.get(name) is not None]
        if unknown := set(options) - _KNOWN_OPTIONS - set(_LENGTH_OPTIONS):
            raise ValueError(
                f"generation_kwargs {sorted(unknown)} are not known; known are {_KNOWN_OPTIONS}."
            )
        max_tokens = int(given[0]) if given else self._spec.max_new_tokens
        if max_tokens >= self.max_length:
            raise ValueError(
                f"{max_tokens} new tokens leave no room for a prompt in a context of {self.max_length}. "
                "Lower config.lm_eval.max_new_tokens, or max_gen_toks in the task."
            )
        until = options.get("until") or []
        seeds = np.random.SeedSequence([int(options.get("seed", self._spec.seed)), number])
        temperature = float(options.get("temperature", 1.0 if options.get("do_sample") else 0.0))
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature if options.get("do_sample", temperature > 0) else 0.0,
            top_k=int(options.get("top_k", 0)),
            top_p=float(options.get("top_p", 1.0)),
            min_p=float(options.get("min_p", 0.0)),
            seed=int(seeds.generate_state(1, np.uint64)[0]),
            stop=tuple(s for s in ([until] if isinstance(until, str) else until) if s),
        )
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        in_chat = self._special.search(context) is not None
        room = self.max_length - max_tokens
        self._cut_prompts.append(len(prompt) > room)
        prompt = prompt[-room:]
        return Request(prompt, sampling, detokenize=True, continuation=not in_chat)

    def _say_cut(self, what: str, cut: int, count: int) -> None:
        self.cut[what] = self.cut.get(what, 0) + cut
        if cut:
            logger.warning("%d of %d %s did not fit the model's context of %d tokens and lost their beginning.", cut,
                           count, what, self.max_length)  # fmt: skip

    def _marked(self, ids: list[int]) -> str:
        text, plain, names = "", [], {i: name for name, i in self._tokens.special_tokens.items()}
        for token in ids:
            if token in names:
                text += self._tokens.decode(plain) + f"{_MARK}{names[token]}{_MARK}"
                plain = []
            else:
                plain.append(token)
        return text + self._tokens.decode(plain)

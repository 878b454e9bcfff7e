"""Seeds through recipes, a model and the rules, into datasets.

    workdir/cache/replies.jsonl   every answer, once: what a second run does not ask again
    workdir/text/train            accepted texts, each with where it comes from, as a text dataset
    workdir/dialogues.jsonl       accepted dialogues, which `python -m data.conversations` takes too
    workdir/chat/train            these as a chat dataset, where a tokenizer is given
    workdir/mixed/train           real text and as much of the accepted texts as `max_share` lets in
    workdir/rejected.jsonl        every row that went, with its reason
    workdir/report.json           counts by recipe and reason, tokens, the share of synthetic text

All but the cache has the same bytes whenever the answers are the same, in whatever order they come.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.files import atomic_write, remove_leftovers, save
from configs.typed import ConfigError, to_dict
from data.documents import Document, make_document
from data.endpoint import Cache, Reply, ask_all
from data.shards import MANIFEST, open_dataset, write_dataset
from data.synthetic.accept import Accepted
from data.synthetic.config import SyntheticConfig
from data.synthetic.mixing import write_mixture
from data.synthetic.recipes import Made, Recipe, Refused, Seed
from data.tokenizer.texts import read_texts

_TOGETHER = 4096  # requests of which the answers are held in memory
Log = Callable[[str], None]


def synthesise(config: SyntheticConfig, workdir: Path, log: Log | None = None) -> dict[str, Any]:
    """Makes the datasets and returns the report. Killed and started again, it asks only what has no answer yet.

    Raises ConfigError for seeds or an endpoint that are missing.
    """
    log = log or (lambda line: print(line, file=sys.stderr, flush=True))
    config.endpoint.check()
    remove_leftovers(workdir)
    save(config, workdir / "config.json")
    run = _Run(config, Cache(workdir / "cache"), log)
    for number, recipe in enumerate(config.recipes):
        run.recipe(recipe, number)
    return _write(run, config, workdir)


class _Run:
    """Rows as they are made."""

    def __init__(self, config: SyntheticConfig, cache: Cache, log: Log):
        self.config, self.cache, self.log = config, cache, log
        self.texts: list[Document] = []
        self.dialogues: list[dict[str, Any]] = []
        self.rejected: list[dict[str, Any]] = []
        self.counts: dict[str, Counter] = {}
        self.tokens = self.failed = self.cached = self.asked = 0

    def recipe(self, recipe: Recipe, number: int) -> None:
        label = f"{number:02d}-{type(recipe).__name__}"
        own = recipe.own_seeds(self.config.seed)
        seeds = read_seeds(self.config) if own is None else own
        counts, accepted = self.counts.setdefault(label, Counter()), Accepted(self.config.accept)
        fresh = seeds
        for turn in range(recipe.rounds):
            grown: list[Seed] = []
            asks = [(seed, i, m) for seed in fresh for i, m in enumerate(recipe.asks(seed, seeds))]
            for at in range(0, len(asks), _TOGETHER):
                part = asks[at : at + _TOGETHER]
                requests = [self._request(label, seed, i, messages) for seed, i, messages in part]
                where = f"{label}, round {turn + 1}/{recipe.rounds}, {at + len(part)}/{len(asks)} requests"
                for (seed, i, _), request, reply in zip(part, requests, self._replies(requests, where)):
                    for made, facts in self._rows(recipe, label, seed, i, request, reply):
                        reason = accepted.reason(made, seed)
                        counts[reason or "accepted"] += 1
                        self._keep(made, facts, seed, reason)
                        if reason is None and made.instruction:
                            grown.append(Seed(facts["id"], made.instruction, seed.licence))
            if not recipe.grows or not grown:
                break
            fresh = grown
            seeds = [*seeds, *grown]

    def _request(self, label: str, seed: Seed, number: int, messages: list) -> dict[str, Any]:
        sampling = self.config.sampling
        name = f"{self.config.seed}/{label}/{seed.id}/{number}"
        chance = int(hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:7], 16)
        return {
            "model": self.config.endpoint.model,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": chance,
        }

    def _replies(self, requests: Sequence[dict[str, Any]], where: str) -> list[Reply]:
        """The replies in the order of the requests."""
        found: list[Reply] = [Reply("")] * len(requests)
        began = said = time.monotonic()
        done = tokens = 0
        for i, reply in ask_all(self.config.endpoint, requests, self.cache):
            found[i] = reply
            done, tokens = done + 1, tokens + (0 if reply.cached else reply.tokens)
            if time.monotonic() - said > 2:
                said = time.monotonic()
                rate = done / (said - began)
                left = (len(requests) - done) / rate
                self.log(f"{where}: {done:,} answered, {rate:.1f}/s, {tokens:,} tokens, {left:.0f} s left")
        self.tokens += sum(reply.tokens for reply in found)
        self.cached += sum(reply.cached for reply in found)
        self.asked += sum(not reply.cached for reply in found)
        self.failed += sum(bool(reply.error) for reply in found)
        self.log(f"{where}: done, {sum(reply.cached for reply in found):,} from the cache")
        return found

    def _rows(
        self, recipe: Recipe, label: str, seed: Seed, number: int, request: dict[str, Any], reply: Reply
    ) -> Iterator[tuple[Made, dict[str, Any]]]:
        """(row, provenance) of a reply; what makes none is rejected here."""
        prompt = json.dumps(request["messages"], sort_keys=True, ensure_ascii=False)
        facts = {
            "recipe": type(recipe).__name__,
            "model": self.config.endpoint.model or self.config.endpoint.generate,
            "prompt_sha256": hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest(),
            "seed_id": seed.id,
            "sampling": {k: request[k] for k in ("temperature", "top_p", "max_tokens", "seed")},
        }
        name = f"{label}/{hashlib.sha256(seed.id.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}/{number}"
        try:
            if reply.error:
                raise Refused(f"request: {reply.error}")
            rows = recipe.read(seed, number, reply.text)
        except Refused as error:
            self.counts[label][":".join(str(error).split(":")[:2])[:80]] += 1
            self.rejected.append({"id": name, "reason": str(error), "text": reply.text, "synthetic": facts})
            return
        for i, made in enumerate(rows):
            yield made, {"id": f"{name}/{i}", **facts}

    def _keep(self, made: Made, facts: dict[str, Any], seed: Seed, reason: str | None) -> None:
        name = facts["id"]
        synthetic = {key: value for key, value in facts.items() if key != "id"}
        if reason is not None:
            row = {"messages": made.messages} if made.messages else {"text": made.text}
            self.rejected.append({"id": name, "reason": reason, **row, "synthetic": synthetic})
        elif made.messages:
            self.dialogues.append({"id": name, "messages": made.messages, "synthetic": synthetic})
        else:
            metadata = {"type": "prose", "synthetic": synthetic, "group": seed.id}
            source = f"synthetic/{facts['recipe']}"
            self.texts.append(make_document(name, made.text, source, seed.licence, metadata))


def read_seeds(config: SyntheticConfig) -> list[Seed]:
    """The seeds of a config, in the order of their files."""
    if not config.seeds:
        raise ConfigError("there are no seeds: give config.seeds, a text dataset or a file of texts.")
    if (Path(config.seeds) / MANIFEST).is_file():
        rows: Iterator[dict[str, Any]] = iter(open_dataset(config.seeds))
    else:
        texts = read_texts([config.seeds], config.text_field)
        rows = ({"id": f"seed/{i}", "text": text} for i, text in enumerate(texts))
    found = [
        Seed(row["id"], row["text"][: config.max_characters].strip(), row.get("licence", "unknown"))
        for row in itertools.islice(rows, config.max_seeds or None)
    ]
    if not any(seed.text for seed in found):
        raise ConfigError(f"{config.seeds}: holds no text under {config.text_field!r}.")
    return [seed for seed in found if seed.text]


def _write(run: _Run, config: SyntheticConfig, workdir: Path) -> dict[str, Any]:
    report: dict[str, Any] = {
        "recipes": {label: dict(sorted(counts.items())) for label, counts in run.counts.items()},
        "texts": len(run.texts),
        "dialogues": len(run.dialogues),
        "rejected": len(run.rejected),
        "tokens": run.tokens,
        "failed_requests": run.failed,
    }
    _write_lines(workdir / "rejected.jsonl", run.rejected)
    sources = [{"name": f"synthetic/{label.split('-', 1)[1]}"} for label in run.counts]
    if run.texts:
        write_dataset(workdir / "text" / "train", run.texts, "text", {"sources": sources})
    if run.dialogues:
        _write_lines(workdir / "dialogues.jsonl", run.dialogues)
        if config.tokenizer:
            from data.load import load_tokenizer
            from data.tokenize import write_chat_dataset

            messages = (row["messages"] for row in run.dialogues)
            tokenizer = load_tokenizer(config.tokenizer)
            write_chat_dataset(messages, tokenizer, workdir / "chat" / "train", {"sources": sources})
    if config.real:
        report["mixture"] = write_mixture(config, run.texts, workdir / "mixed" / "train")
    report["config"] = to_dict(config)
    atomic_write(workdir / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report | {"requests_asked": run.asked, "requests_cached": run.cached}


def _write_lines(path: Path, rows: Sequence[Any]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write(path, "".join(lines).encode("utf-8", "replace"))

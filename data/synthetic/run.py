"""Seeds to jobs, jobs to requests and answers round by round, answers to rows, rows to a dataset with a report.

workdir/cache/replies.jsonl   every answer, by its request: what a killed run does not ask again
workdir/text or chat.jsonl    what was taken, each row with its provenance (chat/ too, where a tokenizer is given)
workdir/rejected.parquet      what was not, with its reason
workdir/mixture.json          weights of real and synthetic text, for `python -m train`
workdir/report.json           counts, reasons, tokens, diversity, share
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import configs
from configs.typed import ConfigError, to_dict
from data.documents import Document, Rejected, make_document, write_documents
from data.endpoint import Cache, ask_all, key_of
from data.shards import Dataset, hash_of, open_dataset, write_dataset
from data.sources import Jsonl, Parquet
from data.storage import suffix
from data.synthetic.accept import diversity, unlike
from data.synthetic.config import SyntheticConfig
from data.synthetic.recipe import Ask, Reject, Row, Seed
from data.synthetic.verified import Reasoning


class Made(NamedTuple):
    """What became of a job."""

    seed: Seed
    variant: int
    result: Row | Reject
    requests: tuple[str, ...]  # their keys in the cache

    @property
    def name(self) -> str:
        return f"{self.seed.id}#{self.variant}"


def synthesise(config: SyntheticConfig, workdir: Path) -> dict[str, Any]:
    """Makes the dataset and returns the report. The same call again asks only what was not answered.

    Raises ConfigError for seeds or an endpoint that are not there.
    """
    seeds = read_seeds(config)
    config.endpoint.check()
    workdir.mkdir(parents=True, exist_ok=True)
    configs.save(config, workdir / "config.json")
    cache = Cache(workdir / "cache")
    counts: Counter[str] = Counter()
    made = list(_make(config, seeds, cache, counts))
    taken, gone = _taken(config, made)
    taken, share = _bounded(config, taken)
    gone += [(m, "share: beyond max_share") for m in share.pop("left_out")]
    _write(config, workdir, taken, gone, share)
    reasons = Counter(
        reason.split(":")[0] + ":" + reason.split(":")[1] if ":" in reason else reason for _, reason in gone
    )
    report = {
        "seeds": len(seeds),
        "jobs": len(made),
        "taken": len(taken),
        "rejected": dict(sorted(reasons.items())),
        "requests": counts["requests"],
        "from_cache": counts["cached"],
        "failed": counts["failed"],
        "tokens": counts["tokens"],
        "diversity": diversity(_text_of(m) for m in taken),
        "share": share,
    }
    configs.atomic_write(workdir / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def read_seeds(config: SyntheticConfig) -> list[Seed]:
    """The seeds, in the order of a hash of their ids."""
    if isinstance(config.recipe, Reasoning):
        from data.tasks import generate

        problems = generate(config.recipe.tasks, "train", config.recipe.problems, 0)
        seeds = [Seed(p.id, p.question, facts=p) for p in problems]
    elif not config.seeds:
        raise ConfigError(
            "config.seeds is not given: name a text dataset folder, or a JSONL or Parquet file."
        )
    else:
        seeds = [seed for seed in _documents(config) if seed.text.strip()]
    if not seeds:
        raise ConfigError(f"{config.seeds}: no seed is in it.")
    seeds.sort(key=lambda seed: hashlib.sha256(seed.id.encode("utf-8", "replace")).digest())
    return seeds[: config.max_seeds]


def _documents(config: SyntheticConfig) -> Iterator[Seed]:
    if Path(config.seeds).is_dir():
        for document in open_dataset(config.seeds):
            group = document["metadata"].get("group") or document["id"]
            yield Seed(document["id"], document["text"], document["licence"], group)
        return
    extra = (config.tests_field,) if config.tests_field else ()
    kind = Parquet if suffix(config.seeds) == ".parquet" else Jsonl
    for item in kind(config.seeds, text_field=config.seed_field, metadata_fields=extra).documents():
        if isinstance(item, Rejected):
            raise ConfigError(f"{config.seeds}: {item.id}: {item.reason}")
        facts = item["metadata"].get(config.tests_field) if config.tests_field else None
        yield Seed(item["id"], item["text"], item["licence"], item["id"], facts)


def _make(config: SyntheticConfig, seeds: Sequence[Seed], cache: Cache, counts: Counter) -> Iterator[Made]:
    """Every job to its end, round by round; in the order of seeds and variants."""
    jobs = [(seed, variant) for seed in seeds for variant in range(config.recipe.variants)]
    asks: dict[int, Ask] = {
        i: config.recipe.begin(seed, variant, seeds) for i, (seed, variant) in enumerate(jobs)
    }
    keys: list[list[str]] = [[] for _ in jobs]
    results: list[Row | Reject | None] = [None] * len(jobs)
    for round_number in itertools.count(1):
        if not asks:
            break
        numbers = sorted(asks)
        requests = [_request(config, jobs[i], asks[i], round_number) for i in numbers]
        progress = _Progress(f"round {round_number}", len(requests))
        following: dict[int, Ask] = {}
        for place, reply in ask_all(config.endpoint, requests, cache):
            i = numbers[place]
            keys[i].append(key_of(requests[place], config.endpoint))
            counts.update(requests=1, cached=reply.cached, failed=bool(reply.error), tokens=reply.tokens)
            progress.add(reply.tokens, reply.cached)
            if reply.error:
                results[i] = Reject(f"failed: {reply.error}")
                continue
            answer = config.recipe.answered(jobs[i][0], asks[i], reply.text)
            if isinstance(answer, Ask):
                following[i] = answer
            else:
                results[i] = answer
        asks = following
    for (seed, variant), result, own in zip(jobs, results, keys):
        assert result is not None
        yield Made(seed, variant, result, tuple(own))


def _request(config: SyntheticConfig, job: tuple[Seed, int], ask: Ask, round_number: int) -> dict[str, Any]:
    seed, variant = job
    chance = hash_of(seed.id, variant, round_number)
    return {
        "model": config.endpoint.model,
        "messages": ask.messages,
        "temperature": config.sampling.temperature,
        "top_p": config.sampling.top_p,
        "max_tokens": config.sampling.max_tokens,
        "seed": int(chance[:8], 16) >> 1,
    }


def _taken(config: SyntheticConfig, made: Sequence[Made]) -> tuple[list[Made], list[tuple[Made, str]]]:
    """What is taken, and the rest with its reason."""
    gone: list[tuple[Made, str]] = []
    alone: list[Made] = []
    kept_of: Counter[str] = Counter()
    most = config.recipe.keep_each if isinstance(config.recipe, Reasoning) else None
    for m in made:
        reason = m.result.reason if isinstance(m.result, Reject) else config.accept.alone(m.result, m.seed)
        if reason is None and most is not None and kept_of[m.seed.id] >= most:
            reason = "enough: of this problem"
        if reason is None:
            kept_of[m.seed.id] += 1
            alone.append(m)
        else:
            gone.append((m, reason))
    taken = []
    for m, like in unlike(((m, _text_of(m)) for m in alone), config.accept.max_similarity):
        if like is None:
            taken.append(m)
        else:
            gone.append((m, f"similar: near duplicate of {like.name}"))
    return taken, gone


def _bounded(config: SyntheticConfig, taken: list[Made]) -> tuple[list[Made], dict[str, Any]]:
    """Rows within the share that synthetic text may have of all, and that share. Without real text there is no
    bound."""
    size = sum(len(_text_of(m)) for m in taken)
    real, folder = _real_characters(config, taken)
    share: dict[str, Any] = {"real": folder, "real_characters": real, "mode": config.mix.mode, "left_out": []}
    if real is not None and config.mix.max_share < 1:
        room = real * config.mix.max_share / (1 - config.mix.max_share)
        order = sorted(taken, key=lambda m: hashlib.sha256(m.name.encode("utf-8", "replace")).digest())
        sizes = itertools.accumulate(len(_text_of(m)) for m in order)
        within = {m.name for m, total in zip(order, sizes) if total <= room}
        share["left_out"] = [m for m in taken if m.name not in within]
        taken = [m for m in taken if m.name in within]
        size = sum(len(_text_of(m)) for m in taken)
    share["synthetic_characters"] = size
    share["synthetic_share"] = None if real is None else round(size / max(size + real, 1), 4)
    return taken, share


def _real_characters(config: SyntheticConfig, taken: Sequence[Made]) -> tuple[int | None, str | None]:
    folder = config.mix.real or (config.seeds if config.seeds and Path(config.seeds).is_dir() else None)
    if folder is None:
        return None, None
    manifest = open_dataset(folder).manifest
    real = manifest.get("characters")
    if real is None:
        real = sum(len(document["text"]) for document in open_dataset(folder))
    if config.mix.mode == "replace":
        used = {m.seed.id: len(m.seed.text) for m in taken}
        real -= sum(used.values())
    return max(real, 0), folder


def _write(
    config: SyntheticConfig,
    workdir: Path,
    taken: Sequence[Made],
    gone: Sequence[tuple[Made, str]],
    share: dict[str, Any],
) -> None:
    rejected = [_document(config, m) for m, _ in gone]
    write_documents(workdir / "rejected.parquet", rejected, [reason for _, reason in gone])
    documents = [_document(config, m) for m in taken]
    facts = {"key": hash_of(to_dict(config)), "sources": _sources(documents), "synthetic": share}
    facts |= {"characters": sum(len(d["text"]) for d in documents)}
    if config.recipe.writes == "text":
        write_dataset(workdir / "text", documents, "text", facts)
    else:
        rows = [
            {"id": m.name, "messages": m.result.messages, "metadata": d["metadata"]}
            for m, d in zip(taken, documents)
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        configs.atomic_write(workdir / "chat.jsonl", lines)
        if config.tokenizer:
            _write_chat(config, workdir, [row["messages"] for row in rows], facts)
    if share["real"] and config.recipe.writes == "text":
        real = (
            share["real"]
            if config.mix.mode == "accumulate"
            else _without_seeds(workdir, share["real"], taken)
        )
        synthetic = share["synthetic_share"]
        weights = {str(real): round(1 - synthetic, 4), str(workdir / "text"): synthetic}
        configs.atomic_write(workdir / "mixture.json", json.dumps(weights, indent=2) + "\n")


def _write_chat(
    config: SyntheticConfig, workdir: Path, dialogues: list[Any], facts: dict[str, Any]
) -> Dataset:
    from data.load import load_tokenizer
    from data.tokenize import write_chat_dataset

    return write_chat_dataset(dialogues, load_tokenizer(config.tokenizer), workdir / "chat", facts)


def _without_seeds(workdir: Path, folder: str, taken: Sequence[Made]) -> Path:
    """The real text without the seeds that gave a row, as a dataset."""
    used = {m.seed.id for m in taken}
    rest = (document for document in open_dataset(folder) if document["id"] not in used)
    write_dataset(workdir / "real", rest, "text", {"replaced": len(used)})
    return workdir / "real"


def _document(config: SyntheticConfig, made: Made) -> Document:
    """A row as a document that says how it came about."""
    recipe = type(config.recipe).__name__
    provenance = {
        "recipe": recipe,
        "recipe_hash": hash_of(to_dict(config.recipe)),
        "model": config.endpoint.model or config.endpoint.generate,
        "sampling": to_dict(config.sampling),
        "requests": list(made.requests),
        "seed": made.seed.id,
        "variant": made.variant,
    }
    metadata = {"type": "prose", "synthetic": provenance, "group": made.seed.group or made.seed.id}
    text = _text_of(made)
    return make_document(made.name, text, f"synthetic/{recipe}", made.seed.licence, metadata)


def _text_of(made: Made) -> str:
    return made.result.whole() if isinstance(made.result, Row) else ""


def _sources(documents: Sequence[Document]) -> list[dict[str, Any]]:
    counts = Counter((d["source"], d["licence"]) for d in documents)
    return [{"name": n, "licence": licence, "documents": c} for (n, licence), c in sorted(counts.items())]


class _Progress:
    """A line on stderr: requests, how many from the cache, tokens a second, time left."""

    def __init__(self, label: str, total: int):
        self._label, self._total, self._done, self._cached, self._tokens = label, total, 0, 0, 0
        self._began = self._said = time.monotonic()

    def add(self, tokens: int, cached: bool) -> None:
        self._done += 1
        self._cached += cached
        self._tokens += 0 if cached else tokens
        now = time.monotonic()
        if now - self._said > 2 or self._done == self._total:
            self._said, seconds = now, max(now - self._began, 1e-9)
            left = seconds / self._done * (self._total - self._done)
            print(
                f"{self._label}: {self._done:,}/{self._total:,} requests ({self._cached:,} from the cache), "
                f"{self._tokens / seconds:,.0f} tokens/s, {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )

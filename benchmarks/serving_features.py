"""What the engine's prefix cache and its drafts bring on this CPU, each beside the engine without it, in turn.

    python -m benchmarks.serving_features [--model=smollm2|PATH] [--only=prefix|drafts]

prefix: 32 requests with the same 1,900 tokens, 20 of their own and an answer of 8. drafts: greedy copies of a text that
is in the prompt, and answers at temperature 1 to prompts of random tokens, one and four requests at once; tokens a
second. Each figure is the median of three.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

TEXT = (
    "The harbour master keeps a ledger of every ship: its name, its port of origin, the tonnage it carries, and the "
    "hour at which the pilot came aboard. On Mondays the ledger is copied by hand, line for line, into a second book. "
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", choices=("prefix", "drafts"))
    options = parser.parse_args()
    import data
    import model
    from model.compilation import prepare_compiler
    from serve.__main__ import model_path

    prepare_compiler()
    path = model_path(options.model)
    cfg, params = model.load(path, packed=True)
    tokenizer = data.load_tokenizer(path)
    if options.only != "drafts":
        prefix(cfg, params)
    if options.only != "prefix":
        drafts(cfg, params, tokenizer)


def prefix(cfg: Any, params: Any) -> None:
    from serve import Request, SamplingParams

    rng, engines = random.Random(0), {on: engine(cfg, params, prefix_cache=on) for on in (False, True)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(3):
        shared = [rng.randrange(1000, 40000) for _ in range(1900)]
        own = [[rng.randrange(1000, 40000) for _ in range(20)] for _ in range(32)]
        sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        for on, each in engines.items():
            start = time.perf_counter()
            each.generate([Request([*shared, *tokens], sampling) for tokens in own])
            seconds[on].append(time.perf_counter() - start)
    without, cached = (statistics.median(seconds[on]) for on in (False, True))
    print(f"prefix: {without:.1f} s without, {cached:.2f} s with: {without / cached:.1f} times", flush=True)


def drafts(cfg: Any, params: Any, tokenizer: Any) -> None:
    from serve import Request, SamplingParams

    rng = random.Random(0)
    copied = tokenizer.encode(TEXT * 3)
    engines = {count: engine(cfg, params, draft_tokens=count) for count in (0, 7)}
    for name, temperature in (("copying", 0.0), ("random", 1.0)):
        for rows in (1, 4):
            rates: dict[int, list[float]] = {count: [] for count in engines}
            for seed in range(3):
                noise = [[rng.randrange(1000, 40000) for _ in range(60)] for _ in range(rows)]
                prompts = noise if name == "random" else [copied[3 * i :] for i in range(rows)]
                sampling = SamplingParams(temperature=temperature, max_tokens=192, ignore_eos=True, seed=seed)
                for count, each in engines.items():
                    start = time.perf_counter()
                    outputs = each.generate([Request(prompt, sampling) for prompt in prompts])
                    tokens = sum(len(out.tokens) for out in outputs)
                    rates[count].append(tokens / (time.perf_counter() - start))
            plain, drafted = (statistics.median(rates[count]) for count in engines)
            times = f"{drafted / plain:.2f} times"
            print(
                f"drafts, {name}, {rows} requests: {plain:.0f} without, {drafted:.0f} with: {times}",
                flush=True,
            )


def engine(cfg: Any, params: Any, **options: Any) -> Any:
    from serve import Engine

    sizes = {"chunk_buckets": (32,), "prefill_chunk": 256, "prefill_tokens": 256, "context_buckets": (2048,)}
    made = Engine(cfg, params, None, max_rows=8, max_length=2048, **sizes, **options)
    made.warmup()
    return made


if __name__ == "__main__":
    main()

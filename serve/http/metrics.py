"""Prometheus metrics under the names that vLLM's dashboards know."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serve.engine import EngineStats
from serve.request import Output

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """Counts outputs as they pass; reads the engine's own counts when asked."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]):
        self._registry = CollectorRegistry()
        self._model, self._stats = model_name, stats
        self._last: dict[str, float] = {}  # request -> when its last token came

        def histogram(name: str, text: str) -> Histogram:
            family = Histogram(
                f"vllm:{name}", text, ["model_name"], buckets=_SECONDS, registry=self._registry
            )
            return family.labels(model_name)

        self._first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._between = histogram("inter_token_latency_seconds", "Time per token after the first.")
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self._queue = histogram("request_queue_time_seconds", "From arrival to the first computation.")
        self._finished = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._registry.register(self)

    def observe(self, out: Output) -> None:
        times, now = out.times, time.monotonic()
        new = len(out.new_tokens)
        if new and out.id not in self._last:
            self._first_token.observe(times["first_token"] - times["submitted"])
            self._queue.observe(times["admitted"] - times["submitted"])
            new -= 1
        elif new:
            for _ in range(new):
                self._between.observe((now - self._last[out.id]) / new)
        if out.new_tokens:
            self._last[out.id] = now
        if out.finished:
            self._last.pop(out.id, None)
            self._whole.observe(times["finished"] - times["submitted"])
            self._finished.labels(self._model, out.finish_reason).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """What the engine counts itself; called by the registry."""
        stats = self._stats()
        used = 1 - stats.pages_free / stats.pages
        gauges = {
            "num_requests_running": ("Requests that have a row of the batch.", stats.running),
            "num_requests_waiting": ("Requests in the queue.", stats.waiting),
            "kv_cache_usage_perc": ("Share of the cache's pages that is held; 1 is all.", used),
        }
        counters = {
            "num_preemptions": ("Times that a request lost its pages.", stats.preemptions),
            "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "generation_tokens": ("Tokens generated.", stats.generated_tokens),
        }
        for kind, table in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in table.items():
                family = kind(f"vllm:{name}", text, labels=["model_name"])
                family.add_metric([self._model], value)
                yield family

"""Figures for Prometheus, with the meanings that vLLM's have."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from core_splitfuse.serving.loop import EngineLoop

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2.5, 5, 10, 20, 40, 80, 160)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.3, 0.5, 1, 2.5, 10)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
_LABELS = ("model_name",)


class Metrics:
    """What clients saw, counted where it is sent to them, and what the engine says of itself.

    Args:
        loop: the engine's loop.
        model: served name, a label of every figure.
    """

    def __init__(self, loop: EngineLoop, model: str) -> None:
        registry = CollectorRegistry()
        self._registry = registry

        def counter(name: str, help_text: str) -> Counter:
            return Counter(f"core_{name}", help_text, _LABELS, registry=registry).labels(model)

        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"core_{name}", help_text, _LABELS, registry=registry, buckets=buckets)
            return made.labels(model)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were answered.")
        self.new_tokens = counter("generation_tokens", "Tokens that were generated for clients.")
        self.disconnects = counter("request_disconnects", "Calls whose client went away.")
        self.first = histogram(
            "time_to_first_token_seconds", "From the call to an answer's first token.", _FIRST
        )
        self.between = histogram(
            "time_per_output_token_seconds", "From one token of an answer to the next.", _BETWEEN
        )
        self.whole = histogram(
            "e2e_request_latency_seconds", "From the call to the end of an answer.", _WHOLE
        )
        self._ended = Counter(
            "core_request_success",
            "Answers that ended.",
            (*_LABELS, "finished_reason"),
            registry=registry,
        )
        self._model = model
        for reason in ("stop", "length", "abort", "error"):
            self._ended.labels(model, reason)
        registry.register(_OfEngine(loop, model))

    def ended(self, reason: str, count: int = 1) -> None:
        """Count answers that ended with ``stop``, ``length``, ``abort`` or ``error``."""
        self._ended.labels(self._model, reason).inc(count)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class Meter:
    """Counts one call.

    Args:
        metrics: where to.
        prompt_tokens: of all its prompts.
        answers: how many are asked for.
    """

    def __init__(self, metrics: Metrics, prompt_tokens: int, answers: int) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._began = time.perf_counter()
        self._last: dict[int, float] = {}
        self._open = set(range(answers))

    def token(self, index: int) -> None:
        """A token of an answer came."""
        now = time.perf_counter()
        if not self._last:
            self._metrics.prompt_tokens.inc(self._prompt_tokens)
        if index in self._last:
            self._metrics.between.observe(now - self._last[index])
        else:
            self._metrics.first.observe(now - self._began)
        self._last[index] = now
        self._metrics.new_tokens.inc()

    def ended(self, index: int, reason: str) -> None:
        """An answer ended."""
        self._open.discard(index)
        self._metrics.ended("abort" if reason == "cancelled" else reason)
        self._metrics.whole.observe(time.perf_counter() - self._began)

    def failed(self) -> None:
        """The answers that are left will not come, for reasons of ours."""
        self._metrics.ended("error", len(self._open))
        self._open.clear()

    def gone(self) -> None:
        """The client went away, unless it has seen everything."""
        if self._open:
            self._metrics.disconnects.inc()
            self._metrics.ended("abort", len(self._open))
            self._open.clear()


class _OfEngine(Collector):
    """The engine's own figures, read when somebody asks."""

    def __init__(self, loop: EngineLoop, model: str) -> None:
        self._loop = loop
        self._model = model

    def collect(self) -> Iterator[Metric]:
        stats = self._loop.stats
        used = stats.kv_used / stats.kv_total if stats.kv_total else 0.0
        for name, help_text, value in (
            ("num_requests_running", "Requests that are being computed.", stats.running),
            ("num_requests_waiting", "Requests that are queued.", stats.waiting),
            ("kv_cache_usage_perc", "Share of the key and value store in use, 0 to 1.", used),
        ):
            gauge = GaugeMetricFamily(f"core_{name}", help_text, labels=_LABELS)
            gauge.add_metric([self._model], value)
            yield gauge
        for name, help_text, value in (
            ("prefix_cache_queries", "Tokens that were looked for in it.", stats.prompt_tokens),
            ("prefix_cache_hits", "Tokens that were found in it.", stats.reused_tokens),
            ("num_preemptions", "Times that a request had to be computed anew.", stats.evictions),
            ("engine_passes", "Forward passes.", stats.passes),
        ):
            counter = CounterMetricFamily(f"core_{name}", help_text, labels=_LABELS)
            counter.add_metric([self._model], value)
            yield counter

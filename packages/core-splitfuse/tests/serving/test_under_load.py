"""Many streaming clients, a third of them leaving: nothing leaks, and the figures are right."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import psutil
import pytest


class Crowd:
    """Clients that ask one call after the other, and what they saw."""

    def __init__(self, live: Any, seed: int, longest: int = 24) -> None:
        self._live = live
        self._longest = longest
        self._random = random.Random(seed)
        self.calls = self.left = self.prompt_tokens = self.new_tokens = self.seen = 0
        self.failed: list[str] = []

    async def run(self, clients: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=120) as http:
            client = openai.AsyncOpenAI(
                base_url=f"{self._live.address}/v1", api_key="none", max_retries=0, http_client=http
            )
            await asyncio.gather(*(self._client(client, end) for _ in range(clients)))

    async def _client(self, client: openai.AsyncOpenAI, end: float) -> None:
        while time.monotonic() < end:
            # Some of those that want to leave have got everything before; a third do leave.
            patience = self._random.randrange(1, 12) if self._random.random() < 0.45 else None
            try:
                await self._call(client, patience)
            except openai.APIError as error:
                self.failed.append(repr(error))

    async def _call(self, client: openai.AsyncOpenAI, patience: int | None) -> None:
        self.calls += 1
        stream = await client.completions.create(
            model="tiny",
            prompt=[self._random.randrange(3, 200) for _ in range(self._random.randrange(1, 90))],
            max_tokens=self._random.randrange(4, self._longest),
            n=self._random.choice([1, 1, 1, 2]),
            stream=True,
            stream_options={"include_usage": True},
        )
        seen = 0
        async for chunk in stream:
            seen += bool(chunk.choices)
            if patience is not None and seen >= patience:
                break
            if chunk.usage is not None:
                self.prompt_tokens += chunk.usage.prompt_tokens
                self.new_tokens += chunk.usage.completion_tokens
                self.seen += 1
                break
        else:
            raise AssertionError("a stream ended without its usage")
        if chunk.usage is None:
            self.left += 1
        await stream.close()


def check(live: Any, crowd: Crowd) -> dict[str, float]:
    """Nothing is held, nobody was lost, and the figures are what clients saw."""
    assert crowd.failed == []
    assert crowd.left > crowd.calls / 5
    live.settle(lambda: live.loop.idle and live.loop.stats.kv_used == 0)
    assert live.http.get("/health").status_code == 200
    found: dict[str, float] = live.metrics()
    reasons = ("stop", "length", "abort", "error")
    ended = {reason: found[f"core_request_success_total:{reason}"] for reason in reasons}
    assert ended["error"] == 0
    # A client that leaves at the last moment may have got everything.
    assert found["core_request_disconnects_total"] <= crowd.left
    assert crowd.seen + crowd.left == crowd.calls
    assert found["core_generation_tokens_total"] >= crowd.new_tokens
    assert found["core_prompt_tokens_total"] >= crowd.prompt_tokens
    finished = ended["stop"] + ended["length"]
    assert finished >= crowd.seen
    assert found["core_e2e_request_latency_seconds_count"] == finished
    assert found["core_num_requests_running"] == found["core_num_requests_waiting"] == 0
    assert live.loop._waiting == 0
    return found


@pytest.mark.parametrize("slowed", ["splitfuse"], indirect=True)
def test_a_few_seconds(slowed: Any, start: Callable[..., Any]) -> None:
    with start(slowed) as live:
        crowd = Crowd(live, 1)
        asyncio.run(crowd.run(24, 3))
        check(live, crowd)
        assert crowd.calls > 24


def test_streams_lose_and_repeat_nothing_where_memory_is_short(
    model: Any, start: Callable[..., Any]
) -> None:
    from core_splitfuse import Engine, SplitFuseSettings

    texts: dict[int, list[str]] = {}
    for tokens in (512, 4096):
        with start(Engine(model, SplitFuseSettings(kv_tokens=tokens))) as live:
            texts[tokens] = [""] * 8
            stream = live.client.completions.create(
                model="tiny",
                prompt="the fox",
                max_tokens=160,
                n=8,
                seed=4,
                logit_bias={"0": -100},
                stream=True,
            )
            for chunk in stream:
                texts[tokens][chunk.choices[0].index] += chunk.choices[0].text
            live.settle(lambda: live.loop.idle and live.loop.stats.kv_used == 0)
            preemptions = live.metrics()["core_num_preemptions_total"]
            assert (preemptions > 0) == (tokens == 512)
    assert texts[512] == texts[4096]
    assert len(set(texts[512])) == 8


@pytest.mark.nightly
@pytest.mark.parametrize(
    "settings", [None, {"kv_tokens": 16384}, {"kv_tokens": 1024}], ids=["plain", "ample", "short"]
)
def test_two_minutes_of_64_clients(
    model: Any, start: Callable[..., Any], settings: dict[str, int] | None
) -> None:
    from core.engines.plain import PlainEngine
    from core_splitfuse import Engine, SplitFuseSettings

    memory = psutil.Process().memory_info
    engine = Engine(model, SplitFuseSettings(**settings)) if settings else PlainEngine(model)
    with start(engine) as live:
        crowd = Crowd(live, 2, longest=48)
        asyncio.run(crowd.run(64, 20))
        gc.collect()
        before = memory().rss
        asyncio.run(crowd.run(64, 120))
        gc.collect()
        grown = memory().rss - before
        found = check(live, crowd)
        made = found["core_generation_tokens_total"]
        print(
            f"{settings}: {crowd.calls} calls, {crowd.left} left, {made:.0f} tokens, "
            f"{found['core_num_preemptions_total']:.0f} preemptions, "
            f"memory grew by {grown / 2**20:.1f} MiB"
        )
        assert grown < 200 * 2**20

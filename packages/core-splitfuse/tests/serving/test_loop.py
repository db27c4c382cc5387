"""The loop under bad conditions: clients that leave, engines that fail or hang, too many calls."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

LONG = {"model": "tiny", "prompt": "the fox", "max_tokens": 400, "logit_bias": {"0": -100}}
SHORT = {"model": "tiny", "prompt": "the dog", "max_tokens": 4}


def test_a_stream_that_is_closed_frees_its_memory(slowed: Any, start: Callable[..., Any]) -> None:
    slowed.pause = 0.01
    with start(slowed) as live:
        stream = live.client.completions.create(**LONG, n=3, stream=True)
        for _ in range(4):
            next(iter(stream))
        assert live.loop.stats.kv_used > 0
        stream.close()
        live.settle(lambda: live.loop.idle and live.loop.stats.kv_used == 0)
        found = live.metrics()
        assert found["core_request_disconnects_total"] == 1
        assert found["core_request_success_total:abort"] == 3
        assert found["core_generation_tokens_total"] < 3 * 400


def test_a_client_that_gives_up_waiting_frees_its_memory(
    slowed: Any, start: Callable[..., Any]
) -> None:
    slowed.pause = 0.01
    with start(slowed) as live:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.address}/v1/completions", json=LONG, timeout=0.5)
        live.settle(lambda: live.loop.idle and live.loop.stats.kv_used == 0)
        assert live.metrics()["core_request_disconnects_total"] == 1
        assert live.client.completions.create(**SHORT).choices


def test_a_client_that_leaves_before_the_first_token_frees_its_place(
    slowed: Any, start: Callable[..., Any]
) -> None:
    with start(slowed) as live:
        slowed.hold.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.address}/v1/completions", json={**LONG, "stream": True}, timeout=0.3)
        # The pass that hangs may give its token before the server hears that nobody wants it.
        live.settle(lambda: live.metrics()["core_request_disconnects_total"] == 1)
        slowed.hold.set()
        live.settle(lambda: live.loop.idle and live.loop.stats.kv_used == 0)
        assert live.metrics()["core_prompt_tokens_total"] == 0


def test_too_many_waiting_calls_are_told_to_come_again(
    slowed: Any, start: Callable[..., Any]
) -> None:
    with start(slowed, max_waiting=3) as live, ThreadPoolExecutor() as pool:
        slowed.hold.clear()
        waiting = [pool.submit(live.client.completions.create, **SHORT, n=1) for _ in range(1)]
        live.settle(lambda: not live.loop.idle)
        waiting += [pool.submit(live.client.completions.create, **SHORT, n=2)]
        # The second call is only taken in after the pass that hangs, but it counts at once.
        refused = _until_refused(live)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "queue_full"
        slowed.hold.set()
        assert [len(call.result().choices) for call in waiting] == [1, 2]
        assert live.client.completions.create(**SHORT, n=8).choices


def _until_refused(live: Any) -> httpx.Response:
    """Ask until the answer is a refusal; calls that are taken in meanwhile give up."""
    for _ in range(50):
        try:
            return httpx.post(f"{live.address}/v1/completions", json=SHORT, timeout=0.2)
        except httpx.ReadTimeout:
            continue
    raise AssertionError("never refused")


def test_a_failing_pass_fails_the_calls_in_flight_and_no_others(
    slowed: Any, start: Callable[..., Any]
) -> None:
    slowed.pause = 0.01
    with start(slowed) as live:
        stream = live.client.completions.create(**LONG, stream=True)
        next(iter(stream))
        slowed.failures = 1
        with pytest.raises(openai.APIError) as failed:
            list(stream)
        assert failed.value.code == "generation_failed"
        live.settle(lambda: live.loop.idle)
        assert live.client.completions.create(**SHORT).choices
        assert live.http.get("/health").status_code == 200
        assert live.metrics()["core_request_success_total:error"] == 1


def test_a_call_that_fails_before_its_first_token_has_a_status(
    slowed: Any, start: Callable[..., Any]
) -> None:
    with start(slowed) as live:
        for stream in (False, True):
            slowed.failures = 1
            with pytest.raises(openai.InternalServerError) as failed:
                live.client.completions.create(**SHORT, stream=stream)
            assert failed.value.status_code == 500
            assert "kernel" not in str(failed.value)
            assert live.client.completions.create(**SHORT).choices


def test_an_engine_that_keeps_failing_ends_the_loop(slowed: Any, start: Callable[..., Any]) -> None:
    with start(slowed) as live:
        slowed.failures = 100
        for _ in range(5):
            with pytest.raises(openai.InternalServerError) as failed:
                live.client.completions.create(**SHORT)
        assert failed.value.status_code == 503
        health = live.http.get("/health")
        assert health.status_code == 503
        assert "3 passes failed" in health.json()["error"]["message"]


def test_a_dead_loop_ends_the_calls_that_wait(slowed: Any, start: Callable[..., Any]) -> None:
    class Gone(BaseException):
        """What no engine should raise."""

    slowed.pause = 0.01
    with start(slowed) as live, ThreadPoolExecutor() as pool:
        stream = live.client.completions.create(**LONG, stream=True)
        next(iter(stream))
        slowed.hold.clear()
        queued = pool.submit(live.client.completions.create, **SHORT)
        live.settle(lambda: live.loop._waiting == 1)
        slowed.failures, slowed.error = 1, Gone()
        slowed.hold.set()
        with pytest.raises(openai.APIError):
            list(stream)
        with pytest.raises(openai.InternalServerError) as failed:
            queued.result()
        assert failed.value.status_code == 503
        assert live.http.get("/health").status_code == 503
        assert live.http.post("/v1/completions", json=SHORT).status_code == 503


def test_an_engine_that_hangs_shows_in_health(slowed: Any, start: Callable[..., Any]) -> None:
    with start(slowed, stuck_after=0.3) as live, ThreadPoolExecutor() as pool:
        time.sleep(0.5)
        assert live.http.get("/health").status_code == 200, "an idle server is no stuck one"
        slowed.hold.clear()
        first = pool.submit(live.client.completions.create, **SHORT)
        live.settle(lambda: live.http.get("/health").status_code == 503)
        assert "no pass" in live.http.get("/health").json()["error"]["message"]
        assert live.http.post("/v1/completions", json=SHORT).status_code == 503
        slowed.hold.set()
        assert first.result().choices
        assert live.http.get("/health").status_code == 200


def test_a_busy_engine_that_does_nothing_counts_as_stuck(
    slowed: Any, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(slowed, stuck_after=0.3) as live:
        monkeypatch.setattr(slowed, "step", list)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.address}/v1/completions", json=SHORT, timeout=0.6)
        live.settle(lambda: live.http.get("/health").status_code == 503)
        monkeypatch.undo()
        live.settle(lambda: live.http.get("/health").status_code == 200)


def test_an_idle_loop_takes_no_time(slowed: Any, start: Callable[..., Any]) -> None:
    with start(slowed) as live:
        live.client.completions.create(**SHORT)
        live.settle(lambda: live.loop.idle)
        steps = []
        slowed.step = lambda: steps.append(0) or []
        time.sleep(0.3)
        assert steps == []


def test_draining_finishes_what_runs_and_refuses_the_rest(
    slowed: Any, start: Callable[..., Any]
) -> None:
    slowed.pause = 0.005
    with start(slowed) as live:
        fields = {**LONG, "max_tokens": 60}
        stream = live.client.completions.create(**fields, stream=True)
        chunks = [next(iter(stream))]
        live.loop.drain()
        assert live.http.get("/health").status_code == 503
        refused = live.http.post("/v1/completions", json=SHORT)
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert live.loop.idle


def test_figures_are_what_clients_saw(slowed: Any, start: Callable[..., Any]) -> None:
    slowed.pause = 0.001
    with start(slowed) as live:
        calls = [
            live.client.completions.create(model="tiny", prompt="the fox", max_tokens=m, n=n)
            for m, n in [(5, 1), (9, 3), (14, 2)]
        ]
        usage = [call.usage for call in calls]
        reasons = [choice.finish_reason for call in calls for choice in call.choices]
        live.http.post("/v1/completions", json={**SHORT, "prompt": ""})
        # The loop counts what runs once a pass, which may be after clients have their answers.
        live.settle(lambda: live.metrics()["core_num_requests_running"] == 0)
        found = live.metrics()
        made = sum(use.completion_tokens for use in usage)
        assert found["core_generation_tokens_total"] == made
        assert found["core_prompt_tokens_total"] == sum(use.prompt_tokens for use in usage)
        for reason in ("stop", "length"):
            name = f"core_request_success_total:{reason}"
            assert found[name] == reasons.count(reason)
        assert found["core_time_to_first_token_seconds_count"] == 6
        assert found["core_time_per_output_token_seconds_count"] == made - 6
        assert found["core_e2e_request_latency_seconds_count"] == 6
        assert found["core_num_requests_running"] == found["core_num_requests_waiting"] == 0
        assert found["core_request_disconnects_total"] == 0
        assert found["core_engine_passes_total"] > 0


def test_running_requests_show_in_the_figures(slowed: Any, start: Callable[..., Any]) -> None:
    slowed.pause = 0.01
    with start(slowed) as live:
        stream = live.client.completions.create(**LONG, n=2, stream=True)
        next(iter(stream))
        live.settle(lambda: live.metrics()["core_num_requests_running"] == 2)
        stream.close()
        live.settle(lambda: live.metrics()["core_num_requests_running"] == 0)


def test_what_an_engine_does_not_know_is_refused(start: Callable[..., Any], model: Any) -> None:
    from core.engines.plain import PlainEngine

    with start(PlainEngine(model)) as live:
        body = json.dumps({**SHORT, "priority": 1})
        response = live.http.post(
            "/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert response.status_code == 400
        assert "priority" in response.json()["error"]["message"]


def test_what_the_engine_knows_beyond_the_contract_reaches_it(
    start: Callable[..., Any], model: Any
) -> None:
    from core_splitfuse import Engine, SplitFuseSettings

    engine = Engine(model, SplitFuseSettings(kv_tokens=1024))
    with start(engine) as live:
        late = live.client.completions.create(**LONG, extra_body={"deadline": 1e-6})
        assert late.choices[0].finish_reason == "cancelled"
        assert live.metrics()["core_request_success_total:abort"] == 1
        prompt = list(range(3, 103))
        for salt, hits in [("a", False), ("a", True), ("b", False), ("b", True)]:
            before = live.metrics()["core_prefix_cache_hits_total"]
            salted: Any = {**SHORT, "prompt": prompt, "extra_body": {"cache_salt": salt}}
            live.client.completions.create(**salted)
            assert (live.metrics()["core_prefix_cache_hits_total"] > before) == hits
        urgent = live.client.completions.create(**SHORT, extra_body={"priority": 5})
        assert urgent.choices[0].text


def test_one_thread_alone_touches_the_engine(model: Any, start: Callable[..., Any]) -> None:
    from core.engines.plain import PlainEngine

    threads: set[int] = set()

    class Watched(PlainEngine):
        def __getattribute__(self, name: str) -> Any:
            if name in {"add", "cancel", "step", "busy", "stats", "close"}:
                threads.add(threading.get_ident())
            return super().__getattribute__(name)

    engine = Watched(model)
    with start(engine) as live:
        threads.clear()
        stream = live.client.completions.create(**LONG, stream=True)
        next(iter(stream))
        stream.close()
        live.client.completions.create(**SHORT)
        live.metrics()
        live.settle(lambda: live.loop.idle)
    assert len(threads) == 1
    assert threads != {threading.get_ident()}

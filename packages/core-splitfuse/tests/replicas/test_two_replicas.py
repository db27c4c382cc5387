"""Two real replicas under Ray Serve: routed by prefix and tokens, killed, replaced, drained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("ray")
grpc: Any = pytest.importorskip("grpc")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KEY = "k"
SETTINGS = ("splitfuse.kv_tokens=16384", "splitfuse.verify=false")


@dataclass
class Running:
    """``core serve --replicas 2`` as a process."""

    process: subprocess.Popen[str]
    address: str
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        self.http = httpx.Client(base_url=self.address, headers=headers, timeout=60)

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=KEY, max_retries=0, timeout=60)

    @property
    def replicas(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "ServeReplica" in " ".join(child.cmdline())]

    def figures(self, name: str) -> dict[str, float]:
        """Samples of one name by replica."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return {s.labels["replica"]: s.value for s in samples if s.name == name}

    def settle(self, what: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "it does not come to hold"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    command = [sys.executable, "-m", "core", "serve", str(folder), "--port", "0", "--json"]
    command += ["--replicas", "2", "--grace", "20"]
    for setting in SETTINGS:
        command += ["--set", setting]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CORE_API_KEY": KEY}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith("{"))
            yield Running(process, json.loads(line)["address"])
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def asked(prompt: str, tokens: int) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }


def streamed(running: Running, prompt: str, tokens: int, begun: Callable[[], object]) -> str:
    """Read an answer to its end: ``ok``, or what the error says."""
    count = 0
    try:
        options = {"include_usage": True}
        fields = asked(prompt, tokens)
        for chunk in running.client.completions.create(
            **fields, stream=True, stream_options=options
        ):
            if not count:
                begun()
            count += 1
            if chunk.usage is not None:
                assert chunk.usage.completion_tokens == tokens
    except openai.APIError as error:
        return str(error)
    assert count
    return "ok"


def test_the_api_is_that_of_a_single_server(running: Running) -> None:
    assert running.http.get("/health").json()["replicas"] == {"running": 2, "wanted": 2}
    assert [model.id for model in running.client.models.list()] == ["tiny"]
    assert running.http.get("/").headers["content-type"].startswith("text/html")
    whole = running.client.completions.create(**asked("hello", 8))
    stream = running.client.completions.create(**asked("hello", 8), stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    bare = httpx.Client(base_url=running.address)
    assert bare.get("/health").status_code == 200
    assert bare.get("/v1/models").status_code == 401
    large = running.http.post("/v1/completions", content=b" " * (8 * 2**20 + 1))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        running.client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="the context is"):
        running.client.completions.create(**asked("hello", 10**5))
    assert running.http.get("/nowhere").json()["error"]["code"] == "not_found"


def test_other_machines_are_refused(running: Running) -> None:
    parent = psutil.Process(running.process.pid)
    listening = {
        connection.laddr
        for process in (parent, *parent.children(recursive=True))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    loopback = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    reachable = {address.port for address in listening if address.ip not in loopback}
    # Replicas of Ray Serve listen to each other, wherever they are; no other server does.
    assert len(reachable) <= 2
    for port in reachable:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_prompt_goes_where_its_beginning_is_known(running: Running) -> None:
    def rises(prompt: str) -> str:
        before = running.figures("core_prompt_tokens_total")
        running.client.completions.create(**asked(prompt, 1))
        after = running.figures("core_prompt_tokens_total")
        (replica,) = [name for name in after if after[name] > before[name]]
        return replica

    for text in ("first", "second"):
        shared = f"{text} " * 100
        at = {rises(shared + end) for end in ("", "one", "two", "three")}
        assert len(at) == 1
    reused = running.figures("core_prefix_cache_hits_total")
    assert sum(reused.values()) > 2 * 3 * 500


def test_other_prompts_go_where_fewer_tokens_wait(running: Running) -> None:
    before = running.figures("core_prompt_tokens_total")
    stream = running.client.completions.create(**asked("a long answer", 1500), stream=True)
    next(iter(stream))
    during = running.figures("core_prompt_tokens_total")
    (busy,) = [name for name in during if during[name] > before[name]]
    for prompt in ("one", "two", "three", "four"):
        running.client.completions.create(**asked(prompt, 2))
    after = running.figures("core_prompt_tokens_total")
    stream.close()
    assert after[busy] == during[busy]
    running.settle(lambda: not any(running.figures("core_num_requests_running").values()))
    assert sum(running.figures("core_request_disconnects_total").values()) == 1


def test_a_killed_replica_loses_only_what_it_was_answering(running: Running) -> None:
    begun: list[None] = []
    with ThreadPoolExecutor(24) as pool:
        streams = [
            pool.submit(streamed, running, f"{n} of many", 800, lambda: begun.append(None))
            for n in range(6)
        ]
        running.settle(lambda: len(begun) == 6)
        shares = running.figures("core_num_requests_running")
        assert sum(shares.values()) == 6
        assert all(shares.values())
        killed = running.replicas[0]
        # Of these nothing is sent until they are complete, so that they can be asked again.
        wholes = [
            pool.submit(running.client.completions.create, **asked(f"{n} whole", 50))
            for n in range(12)
        ]
        killed.kill()
        results = [stream.result() for stream in streams]
        assert [whole.result().usage.completion_tokens for whole in wholes] == [50] * 12
    lost = [result for result in results if result != "ok"]
    assert len(lost) in {int(share) for share in shares.values()}
    assert all("the replica was lost" in result for result in lost)
    running.settle(lambda: len(running.figures("core_num_requests_running")) == 2)
    assert running.http.get("/health").json()["replicas"]["running"] == 2
    assert killed.pid not in {replica.pid for replica in running.replicas}
    for n in range(4):
        assert streamed(running, f"{n} afterwards", 20, lambda: None) == "ok"


def test_sigterm_ends_all_after_the_answers(running: Running) -> None:
    stream = running.client.completions.create(**asked("the last one", 400), stream=True)
    chunks = [next(iter(stream))]
    replicas = running.replicas
    running.process.send_signal(signal.SIGTERM)
    running.settle(lambda: running.http.get("/health").status_code == 503)
    refused = running.http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    chunks += stream
    assert chunks[-1].choices[0].finish_reason == "length"
    assert running.process.wait(60) == 0
    assert not any(replica.is_running() for replica in replicas)

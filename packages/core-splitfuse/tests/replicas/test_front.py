"""What clients see when replicas are lost, without Ray: the fleet is played by the test."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import nullcontext
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from core.errors import EngineError
from core_splitfuse.replicas.calls import Call
from core_splitfuse.replicas.fleet import Fleet, FleetOptions, LostReplicaError
from core_splitfuse.replicas.front import create_front, merged
from core_splitfuse.serving.loop import UnavailableError

LOST = LostReplicaError("the replica was lost")


def start(kind: bytes, status: int = 200) -> dict[str, Any]:
    headers = [(b"content-type", kind)]
    return {"type": "http.response.start", "status": status, "headers": headers}


def part(data: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


JSON = (start(b"application/json"), part(b'{"a":', True), part(b"1}"))
EVENTS = (start(b"text/event-stream"), part(b"data: 1\n\n", True), part(b"data: 2\n\n", True))


class Played:
    """A fleet whose answers are known: one script for every time that it is asked."""

    options = FleetOptions()

    def __init__(self, *scripts: Sequence[Any]) -> None:
        self.scripts = list(scripts)
        self.calls: list[Call] = []
        self.draining = False
        self.up = 2

    def answering(self) -> Any:
        return nullcontext()

    async def running(self) -> int:
        return self.up

    async def ask(self, call: Call) -> AsyncGenerator[list[Any]]:
        self.calls.append(call)
        for step in self.scripts.pop(0):
            if isinstance(step, Exception):
                raise step
            yield [step]


def ask(fleet: Any, **options: Any) -> httpx.Response:
    client = TestClient(create_front(fleet, **options), raise_server_exceptions=False)
    headers = {"Authorization": "Bearer k", "X-Mine": "y"}
    return client.post(
        "/v1/completions?q=1", json={"prompt": [1, 2], "max_tokens": 3}, headers=headers
    )


def test_a_call_travels_without_its_key() -> None:
    fleet = Played(JSON)
    assert ask(fleet, api_key="k").json() == {"a": 1}
    (call,) = fleet.calls
    names = {name for name, _ in call.headers}
    assert (call.method, call.path, call.query, call.tokens) == (
        "POST",
        "/v1/completions",
        b"q=1",
        5,
    )
    assert json.loads(call.body) == {"prompt": [1, 2], "max_tokens": 3}
    assert b"x-mine" in names
    assert b"authorization" not in names


@pytest.mark.parametrize("sent", range(3))
def test_what_is_lost_before_a_byte_was_sent_is_asked_again(sent: int) -> None:
    fleet = Played([*JSON[:sent], LOST], [LOST], JSON)
    answer = ask(fleet)
    assert (answer.status_code, answer.json()) == (200, {"a": 1})
    assert len(fleet.calls) == 3


def test_a_stream_that_was_begun_ends_with_an_error() -> None:
    fleet = Played([*EVENTS, LOST], EVENTS)
    answer = ask(fleet)
    assert answer.status_code == 200
    first, second, error, done, _ = answer.text.split("\n\n")
    assert (first, second, done) == ("data: 1", "data: 2", "data: [DONE]")
    told = json.loads(error.removeprefix("data: "))["error"]
    assert (told["code"], told["type"]) == ("unavailable", "server_error")
    assert "the replica was lost" in told["message"]
    assert len(fleet.calls) == 1


def test_a_replica_that_is_lost_after_the_end_changes_nothing() -> None:
    for script in (JSON, (*EVENTS, part(b"data: [DONE]\n\n"))):
        fleet = Played([*script, LOST])
        answer = ask(fleet)
        assert answer.content == b"".join(message["body"] for message in script[1:])
        assert len(fleet.calls) == 1


def test_when_nobody_can_answer_the_call_ends() -> None:
    fleet = Played(*[[LOST]] * 4)
    answer = ask(fleet)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert answer.headers["retry-after"] == "1"
    assert ask(Played([UnavailableError("no replica runs")])).status_code == 503
    assert ask(Played([ValueError("a bug")])).status_code == 500


def test_an_answer_of_another_status_is_passed_on() -> None:
    answer = ask(Played((start(b"application/json", 429), part(b"{}"))))
    assert (answer.status_code, answer.content) == (429, b"{}")


def test_health_counts_replicas() -> None:
    fleet: Any = Played()
    client = TestClient(create_front(fleet))
    assert client.get("/health").json()["replicas"] == {"running": 2, "wanted": 2}
    fleet.up = 1
    assert client.get("/health").status_code == 200
    fleet.up = 0
    assert client.get("/health").status_code == 503
    fleet.up, fleet.draining = 2, True
    assert client.get("/health").status_code == 503


def test_figures_of_all_replicas_are_told_apart() -> None:
    text = (
        '# HELP x_total Things.\n# TYPE x_total counter\nx_total{model="m"} 3.0\n'
        "# HELP t Seconds.\n# TYPE t histogram\n"
        't_bucket{le="1.0"} 1.0\nt_bucket{le="+Inf"} 2.0\nt_count 2.0\nt_sum 5.0\n'
    )
    families = list(text_string_to_metric_families(merged({"a": text, "b": text}).decode()))
    assert [family.name for family in families] == ["core_replicas", "x", "t"]
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples["core_replicas",] == 2
    for replica in "ab":
        assert samples["x_total", ("model", "m"), ("replica", replica)] == 3
        assert samples["t_bucket", ("le", "+Inf"), ("replica", replica)] == 2
        assert samples["t_sum", ("replica", replica)] == 5


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADDRESS", "USAGE_STATS_ENABLED"):  # which would be set for the whole process
        monkeypatch.setenv(f"RAY_{name}", "0")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install 'core-splitfuse\[ray\]'"):
        Fleet(lambda: pytest.fail("built"), FleetOptions())

"""The router keeps account of what replicas have to do, from its choice to the end of the call."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from core_splitfuse.replicas.calls import Call
from core_splitfuse.replicas.choice import blocks_of

pytest.importorskip("ray")


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


def pending(number: int, tokens: int, prompt: bytes = b"") -> Any:
    call = Call(method="POST", path="/", tokens=tokens, blocks=blocks_of(prompt))
    return SimpleNamespace(args=[call], metadata=SimpleNamespace(internal_request_id=str(number)))


REPLICAS = [replica("a"), replica("b")]


@pytest.fixture
def router() -> Any:
    from core_splitfuse.replicas.router import PrefixRouter

    # Without what Ray Serve does before: none of it matters for the choice.
    made = PrefixRouter.__new__(PrefixRouter)
    made.initialize_state(threshold=100)
    return made


def choose(router: Any, request: Any) -> str:
    ranks = asyncio.run(router.choose_replicas(REPLICAS, request))
    assert sorted(name for rank in ranks for name in (r.replica_id.unique_id for r in rank)) == [
        "a",
        "b",
    ]
    return str(ranks[0][0].replica_id.unique_id)


def send(router: Any, request: Any) -> Any:
    name = choose(router, request)
    chosen = next(r.replica_id for r in REPLICAS if r.replica_id.unique_id == name)
    router.on_request_routed(request, chosen, None)
    return chosen


def test_a_burst_is_spread_before_any_of_it_arrives(router: Any) -> None:
    names = Counter(choose(router, pending(number, 10)) for number in range(6))
    assert names == {"a": 3, "b": 3}


def test_tokens_count_until_the_call_has_ended(router: Any) -> None:
    first = send(router, pending(1, 1000))
    others = [send(router, pending(number, 10)) for number in range(2, 10)]
    assert first not in others
    router.on_request_completed(first, "1")
    router.on_request_completed(first, "1")
    assert send(router, pending(20, 10)) is first


def test_what_never_arrives_is_forgotten(router: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from core_splitfuse.replicas import router as module

    busy = choose(router, pending(1, 1000))
    assert choose(router, pending(2, 1)) != busy
    monkeypatch.setattr(module, "_ON_ITS_WAY", -1.0)
    assert choose(router, pending(3, 1)) == busy == "a"


def test_a_prefix_draws_calls_until_the_replica_has_too_much_to_do(router: Any) -> None:
    prompt = b"the same beginning " * 20
    home = send(router, pending(1, 60, prompt))
    assert send(router, pending(2, 60, prompt + b"and more")) is home
    assert send(router, pending(3, 60, prompt + b"and others")) is not home


def test_figures_are_routed_without_a_call(router: Any) -> None:
    assert choose(router, None) == "a"

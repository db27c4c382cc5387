"""A replica runs the application of a single server, and says when it cannot."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse

from core.engines.plain import PlainEngine
from core.testing import tiny
from core_splitfuse.replicas.calls import Call
from core_splitfuse.replicas.replica import Replica, run
from core_splitfuse.serving.loop import EngineLoop

CALL = Call(method="POST", path="/a b", query=b"x=1", headers=((b"h", b"v"),), body=b"body")


async def echo(scope: Any, receive: Any, send: Any) -> None:
    request = Request(scope, receive)
    told = {
        "path": request.url.path,
        "x": request.query_params["x"],
        "h": request.headers["h"],
        "body": (await request.body()).decode(),
    }
    await JSONResponse(told)(scope, receive, send)


def test_an_application_gets_the_call_and_its_messages_come_back() -> None:
    async def go() -> list[Any]:
        return [message async for batch in run(echo, CALL) for message in batch]

    begin, body = asyncio.run(go())
    assert begin["status"] == 200
    assert body["body"] == b'{"path":"/a b","x":"1","h":"v","body":"body"}'


def test_an_error_of_the_application_comes_out() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("a bug")

    async def go() -> None:
        async for _ in run(broken, CALL):
            pass

    with pytest.raises(ValueError, match="a bug"):
        asyncio.run(go())


def test_closing_is_for_the_application_a_client_that_goes_away() -> None:
    seen: list[str] = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        seen.extend([(await receive())["type"], (await receive())["type"]])

    async def go() -> None:
        async with aclosing(run(endless, CALL)) as batches:
            await anext(batches)

    asyncio.run(go())
    assert seen == ["http.request", "http.disconnect"]


class Fails(PlainEngine):
    """An engine whose loop ends at once when it gets something to do."""

    def step(self) -> list[Any]:
        raise SystemExit


def test_a_replica_whose_loop_has_ended_is_not_well() -> None:
    from core import Request as Wanted

    loop = EngineLoop(Fails(tiny.llama()))
    replica = Replica(lambda: (loop, PlainTextResponse("ok")))
    replica.check_health()

    async def go() -> None:
        ticket = await loop.submit([Wanted(prompt=[1])])
        with pytest.raises(Exception, match="has ended"):
            async for _ in ticket.tokens():
                pass

    asyncio.run(go())
    with pytest.raises(RuntimeError, match="has ended"):
        replica.check_health()

"""Server-sent events, and an eye on clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from core_splitfuse.serving.errors import body_of

T = TypeVar("T")
Event = Mapping[str, Any]

_DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """Nobody waits for the response any more."""


class EventStream(Response):
    """Sends events as they come.

    Nothing is sent before the first event is there, so that an error until then has a status of its
    own. Later ones are an event of the stream.

    Args:
        events: what to send, as JSON.
        close: called at the end, however it comes about.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Event], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(send))
        except ClientGoneError:
            return
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in _encoded(first, events):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": _DONE})


async def _encoded(first: Event, others: AsyncIterator[Event]) -> AsyncGenerator[bytes]:
    yield _encode(first)
    try:
        async for event in others:
            yield _encode(event)
    except Exception as error:
        yield _encode(body_of(error)[1])


def _encode(event: Event) -> bytes:
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do something for a client whose body has been read, and stop when it goes away.

    Raises:
        ClientGoneError: when it did.
    """
    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGoneError
        return doing.result()
    finally:
        doing.cancel()
        watching.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

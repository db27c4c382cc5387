"""One replica: an engine of its own, in a process of its own, behind the same application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from importlib import import_module
from typing import Any

from starlette.types import ASGIApp, Message

from core_splitfuse.replicas.calls import Call
from core_splitfuse.serving.loop import EngineLoop

Build = Callable[[], tuple[EngineLoop, ASGIApp]]
"""Makes the engine's loop and the application of a replica, in its process."""

_PATIENCE = 5.0
"""Seconds that an application may take to notice that its client is gone."""


class Replica:
    """What Ray Serve runs in every process.

    Args:
        build: makes what answers.
        threads: of PyTorch; 0 leaves them as they are.
    """

    def __init__(self, build: Build, threads: int = 0) -> None:
        if threads:
            import torch

            torch.set_num_threads(threads)
        self._loop, self._app = build()

    def check_health(self) -> None:
        """Ask the engine's loop; Ray Serve replaces a replica that raises.

        Raises:
            RuntimeError: when the loop has ended, or makes no progress.
        """
        if self._loop.problem:
            raise RuntimeError(self._loop.problem)

    async def call(self, call: Call) -> AsyncGenerator[list[Message]]:
        """Answer a call, with what is there every time."""
        async for batch in run(self._app, call):
            yield batch

    async def figures(self) -> tuple[str, bytes]:
        """The replica's name, and what its ``/metrics`` tells."""
        context: Any = import_module("ray.serve").get_replica_context()
        asked = run(self._app, Call(method="GET", path="/metrics"))
        messages = [message async for batch in asked for message in batch]
        text = b"".join(message.get("body", b"") for message in messages)
        return context.replica_id.unique_id, text


async def run(app: ASGIApp, call: Call) -> AsyncGenerator[list[Message]]:
    """Run an application for one call.

    Closing the generator is for the application what a client is that goes away.

    Yields:
        The messages that were sent since the last time.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    body = [call.body]

    async def receive() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        messages.put_nowait(message)

    async def work() -> None:
        try:
            await app(_scope(call), receive, send)
        finally:
            messages.put_nowait(None)

    working = asyncio.ensure_future(work())
    try:
        while True:
            batch = [await messages.get()]
            while not messages.empty():
                batch.append(messages.get_nowait())
            yield [message for message in batch if message is not None]
            if batch[-1] is None:
                break
        await working
    finally:
        gone.set()
        await asyncio.wait({working}, timeout=_PATIENCE)
        working.cancel()


def _scope(call: Call) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": None,
        "server": None,
        "state": {},
    }

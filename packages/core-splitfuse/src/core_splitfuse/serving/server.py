"""The process that serves: a socket, uvicorn, and an end that leaves no answer unfinished."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Protocol

import uvicorn

from core import SettingsError

if TYPE_CHECKING:
    from starlette.types import ASGIApp


class Drains(Protocol):
    """What answers calls, and can be brought to an end: a loop, or several replicas."""

    @property
    def draining(self) -> bool:
        """Whether no more calls are taken."""
        ...

    @property
    def idle(self) -> bool:
        """Whether no call is being answered."""
        ...

    @property
    def problem(self) -> str:
        """Why nothing can be answered now; empty when all is well."""
        ...

    def drain(self) -> None:
        """Take no more calls; those in flight go on."""


def serve(
    app: ASGIApp,
    loop: Drains,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grace: float = 60.0,
    ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Then new calls get 503, and those in flight go on; a second signal ends them, too.

    Args:
        app: made by ``create_app``.
        loop: what answers; whoever made it closes it.
        host: address to bind to.
        port: TCP port; 0 takes a free one.
        grace: seconds that calls in flight may take after the signal.
        ready: called with the address when calls can come.

    Raises:
        SettingsError: when the address cannot be bound.
    """
    listener = _listen(host, port)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=5,
    )
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    _Server(config, loop, grace, lambda: ready(address)).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        why = error.strerror or str(error)
        fix = "choose another one by --port"
        raise SettingsError(f"cannot listen on {host} port {port}", why=why, fix=fix) from error


class _Server(uvicorn.Server):
    """Goes on serving after a signal, until the loop has nothing left to do."""

    def __init__(
        self, config: uvicorn.Config, loop: Drains, grace: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._engine_loop = loop
        self._grace = grace
        self._ready = ready
        self._deadline = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._engine_loop.draining:
            self.should_exit = self.force_exit = True
        self._engine_loop.drain()
        self._deadline = time.monotonic() + self._grace

    async def on_tick(self, counter: int) -> bool:
        if self._engine_loop.draining:
            late = time.monotonic() > self._deadline
            self.should_exit |= late or self._engine_loop.idle or bool(self._engine_loop.problem)
        return await super().on_tick(counter)

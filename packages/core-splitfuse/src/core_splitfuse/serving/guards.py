"""What a call has to pass before anybody reads it: host, key, and size."""

from __future__ import annotations

import hmac
import ipaddress

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core_splitfuse.serving.errors import ApiError, respond


class Hosts:
    """Refuses calls that name another host, which a web page could make by rebinding its name.

    Args:
        app: what to protect.
        names: hosts that may be named, in lower case, besides loopback addresses.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self._app = app
        self._names = names | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._known(Headers(scope=scope).get("host", "")):
            error = ApiError("this host name is not served here", status=403, code="unknown_host")
            await respond(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _known(self, header: str) -> bool:
        name = header.rsplit(":", 1)[0] if header.rpartition(":")[2].isdigit() else header
        name = name.strip("[]").lower()
        return name in self._names or is_loopback(name)


class Key:
    """Refuses calls without the key.

    Args:
        app: what to protect.
        key: what ``Authorization: Bearer`` has to carry.
        open_paths: paths that need no key.
    """

    def __init__(self, app: ASGIApp, key: str, open_paths: frozenset[str]) -> None:
        self._app = app
        self._wanted = f"Bearer {key}".encode()
        self._open = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._wanted):
                error = ApiError("wrong or missing API key", status=401, code="invalid_api_key")
                await respond(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Size:
    """Refuses bodies that are too large, before they are read or as soon as they turn out to be.

    Args:
        app: what to protect.
        limit: bytes.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        what = f"the body is larger than {self._limit} bytes"
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdigit() or int(length) > self._limit:
            error = ApiError(what, status=413, code="body_too_large")
            await respond(error)(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise HTTPException(413, what)  # FastAPI would make a 400 of any other error
            return message

        await self._app(scope, counted, send)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

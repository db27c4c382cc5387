"""A chat page for the browser: three files, no build step, nothing from other places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class PageFile:
    """A file of the page.

    Args:
        name: its name in this package.
        media_type: what to send as ``Content-Type``.
    """

    name: str
    media_type: str

    def read(self) -> bytes:
        """Its bytes."""
        return (files(__name__) / self.name).read_bytes()


FILES: Mapping[str, PageFile] = {
    "/": PageFile("index.html", "text/html; charset=utf-8"),
    "/page/chat.css": PageFile("chat.css", "text/css; charset=utf-8"),
    "/page/chat.js": PageFile("chat.js", "text/javascript; charset=utf-8"),
    "/page/api.js": PageFile("api.js", "text/javascript; charset=utf-8"),
    "/page/text.js": PageFile("text.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": PageFile("icon.svg", "image/svg+xml"),
}
"""The page by the paths of its files; they are no secret and need no API key."""

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""What to send with every file of the page: nothing runs that is not one of them."""

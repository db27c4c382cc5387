"""The one address in front of all replicas: the paths of a single server, answered by any of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from core_splitfuse.replicas.calls import Call
from core_splitfuse.replicas.fleet import Fleet, LostReplicaError
from core_splitfuse.serving import errors
from core_splitfuse.serving.app import MAX_BODY, guard
from core_splitfuse.serving.loop import UnavailableError
from core_splitfuse.serving.streams import ClientGoneError, unless_gone

_PAUSES = (0.05, 0.2, 0.8)
"""Seconds before an answer of which nothing was sent is asked of another replica."""


def create_front(
    fleet: Fleet,
    *,
    api_key: str = "",
    max_body: int = MAX_BODY,
    hosts: frozenset[str] | None = None,
) -> FastAPI:
    """Put the API of a single server in front of a fleet.

    ``/health`` tells how many replicas run; it is 503 when none does. ``/metrics`` holds the figures
    of all replicas, with the label ``replica``.

    Args:
        fleet: whose replicas check neither key nor size, for that is done here.
        api_key: what clients have to know; empty lets everybody in.
        max_body: bytes of a body at most.
        hosts: names in the header ``Host`` that are served, besides loopback; ``None`` for any.
    """
    app = FastAPI(title="core", docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)

    @app.get("/health")
    async def health() -> Response:
        running = await fleet.running()
        if fleet.draining or not running:
            what = "the server is shutting down" if fleet.draining else "no replica runs"
            return errors.respond(UnavailableError(what))
        wanted = fleet.options.replicas
        return JSONResponse({"status": "ok", "replicas": {"running": running, "wanted": wanted}})

    @app.get("/metrics")
    async def metrics() -> Response:
        told = await fleet.figures()
        texts = {name: text.decode() for name, text in told}
        return Response(merged(texts), media_type="text/plain; version=0.0.4")

    app.mount("/", Forward(fleet))
    guard(app, api_key=api_key, max_body=max_body, hosts=hosts)
    return app


class Forward:
    """Lets a replica answer, and another one if that is lost before a byte of it was sent.

    Args:
        fleet: of the replicas.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        with self._fleet.answering():
            body = await Request(scope, receive).body()
            try:
                await unless_gone(receive, self._answer(Call.of(scope, body), send))
            except ClientGoneError:
                return

    async def _answer(self, call: Call, send: Send) -> None:
        for pause in (*_PAUSES, None):
            reply = _Reply(send)
            try:
                async for messages in self._fleet.ask(call):
                    for message in messages:
                        await reply.take(message)
                return
            except LostReplicaError as error:
                if reply.begun:
                    await reply.end(error)
                    return
                if pause is None:
                    raise
                await asyncio.sleep(pause)


class _Reply:
    """Passes a response on: events as they come, anything else when it is complete."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._kept: list[Message] = []
        self._streams = False
        self._ended = False
        self.begun = False

    async def take(self, message: Message) -> None:
        """One message of the replica's application."""
        if message["type"] == "http.response.start":
            headers = {name.lower(): value for name, value in message["headers"]}
            kind = headers.get(b"content-type", b"")
            self._streams = kind.startswith(b"text/event-stream")
        self._kept.append(message)
        whole = message["type"] == "http.response.body" and not message.get("more_body", False)
        if self._streams or whole:
            self.begun, self._ended = True, whole
            for kept in self._kept:
                await self._send(kept)
            self._kept.clear()

    async def end(self, error: Exception) -> None:
        """End a stream with an event that tells why, unless it has ended already."""
        if self._ended:
            return
        data = json.dumps(errors.body_of(error)[1], separators=(",", ":"))
        text = f"data: {data}\n\ndata: [DONE]\n\n".encode()
        await self._send({"type": "http.response.body", "body": text, "more_body": False})


def merged(texts: dict[str, str]) -> bytes:
    """Figures of several replicas in Prometheus' text format, with a label that tells them apart.

    Args:
        texts: of every replica, by name.
    """
    registry = CollectorRegistry()
    registry.register(_Merged(texts))
    return generate_latest(registry)


class _Merged(Collector):
    def __init__(self, texts: dict[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("core_replicas", "Replicas that told.", value=len(self._texts))
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                kept = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "replica": replica}
                    kept.add_sample(sample.name, labels, sample.value)
        yield from families.values()

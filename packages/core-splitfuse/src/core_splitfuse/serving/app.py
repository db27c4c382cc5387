"""The application: paths, and who may call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from core_splitfuse.serving import errors
from core_splitfuse.serving.chat import chat, render
from core_splitfuse.serving.completions import complete
from core_splitfuse.serving.errors import ApiError, refuse
from core_splitfuse.serving.guards import Hosts, Key, Size
from core_splitfuse.serving.loop import EngineLoop
from core_splitfuse.serving.page import FILES, HEADERS, PageFile
from core_splitfuse.serving.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from core_splitfuse.serving.served import Served
from core_splitfuse.serving.service import Service

MAX_BODY = 8 * 2**20
"""Bytes of a body at most."""


def create_app(
    loop: EngineLoop,
    served: Served,
    *,
    api_key: str = "",
    max_body: int = MAX_BODY,
    default_tokens: int = 4096,
    hosts: frozenset[str] | None = None,
) -> FastAPI:
    """Put the OpenAI API, ``/health``, ``/metrics`` and the chat page in front of an engine.

    Args:
        loop: the engine's loop; whoever made it closes it.
        served: the model and its tokenizer.
        api_key: what clients have to know; empty lets everybody in.
        max_body: bytes of a body at most.
        default_tokens: tokens of a chat's answer when the call does not say.
        hosts: names in the header ``Host`` that are served, besides loopback; ``None`` for any.

    Example::

        loop = EngineLoop(run.engine(model))
        app = create_app(loop, Served.of(model, tokenizer, "mine"))
    """
    # The interactive pages of FastAPI load scripts from elsewhere.
    app = FastAPI(title="core", docs_url=None, redoc_url=None)
    service = Service(loop, served, default_tokens=default_tokens)
    errors.install(app)
    _generating(app, service)
    _tokenizing(app, service)
    _watching(app, service)
    for path, file in FILES.items():
        app.add_api_route(path, _sends(file), include_in_schema=False)
    guard(app, api_key=api_key, max_body=max_body, hosts=hosts)
    return app


def guard(app: FastAPI, *, api_key: str, max_body: int, hosts: frozenset[str] | None) -> None:
    """Let only those calls in that :func:`create_app` says."""
    # The last one is the first that a call meets.
    app.add_middleware(Size, limit=max_body)
    if api_key:
        app.add_middleware(Key, key=api_key, open_paths=frozenset({"/health", *FILES}))
    if hosts is not None:
        app.add_middleware(Hosts, names=hosts)


def _generating(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await complete(service, body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await chat(service, body, request)

    card = _card(service.served)

    @app.get("/v1/models")
    async def models() -> Mapping[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Mapping[str, Any]:
        service.served.require(name)
        return card


def _tokenizing(app: FastAPI, service: Service) -> None:
    served = service.served

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Mapping[str, Any]:
        served.require(body.model or served.name)
        if (body.prompt is None) == (body.messages is None):
            refuse("give either prompt or messages", "prompt")
        if body.messages is not None:
            text, special = await render(service, body.messages), False
        else:
            text, special = body.prompt or "", body.add_special_tokens
        (ids,) = await service.encode([text], special=special)
        return {"tokens": ids, "count": len(ids), "max_model_len": served.context or None}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Mapping[str, Any]:
        served.require(body.model or served.name)
        return {"prompt": served.decode(body.tokens, special=True)}


def _watching(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        problem = service.loop.problem
        if service.loop.draining and not problem:
            problem = "the server is shutting down"
        if problem:
            return errors.respond(ApiError(problem, status=503, code="unavailable"))
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _card(served: Served) -> Mapping[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "core",
        "max_model_len": served.context or None,
    }


def _sends(file: PageFile) -> Any:
    async def send() -> Response:
        return Response(file.read(), media_type=file.media_type, headers=HEADERS)

    return send

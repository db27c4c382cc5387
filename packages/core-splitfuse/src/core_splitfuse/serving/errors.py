"""Errors as OpenAI's clients expect them: a status, and ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from core import CoreError, EngineError
from core_splitfuse.serving.loop import BusyError, UnavailableError

logger = logging.getLogger("core.serve")

Handler = Callable[[Request, Exception], Awaitable[JSONResponse]]


class ApiError(Exception):
    """A call that is refused.

    Args:
        message: what is wrong, and what is allowed.
        status: of HTTP.
        param: the field that is to blame.
        code: for programs.
    """

    def __init__(self, message: str, *, status: int = 400, param: str = "", code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


def body_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the JSON that tell of an error."""
    if isinstance(error, ApiError):
        return error.status, _body(error.status, str(error), error.param, error.code)
    if isinstance(error, BusyError):
        return 429, _body(429, str(error), "", "queue_full")
    if isinstance(error, UnavailableError):
        return 503, _body(503, str(error), "", "unavailable")
    if isinstance(error, EngineError):
        return 400, _body(400, str(error), "", "invalid_value")
    logger.error("a call failed", exc_info=error)
    return 500, _body(500, "the server failed; its log says more", "", "internal_error")


def _body(status: int, message: str, param: str = "", code: str = "") -> dict[str, Any]:
    kinds = {429: "rate_limit_error", 401: "authentication_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": param or None, "code": code or None}
    return {"error": error}


def respond(error: Exception) -> JSONResponse:
    """The response that tells of an error."""
    status, body = body_of(error)
    headers = {"Retry-After": str(BusyError.retry_after)} if status in (429, 503) else None
    return JSONResponse(body, status, headers)


def install(app: FastAPI) -> None:
    """Let an application answer every error in this form."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return respond(error)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        return respond(_explained(cast("RequestValidationError", error)))

    async def plain(_: Request, error: Exception) -> JSONResponse:
        found = cast("HTTPException", error)
        code = _CODES.get(found.status_code, "")
        body = _body(found.status_code, str(found.detail), code=code)
        return JSONResponse(body, found.status_code, headers=found.headers)

    handlers: Mapping[type[Exception], Handler] = {
        ApiError: answer,
        CoreError: answer,
        Exception: answer,
        RequestValidationError: invalid,
        HTTPException: plain,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _explained(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    # Of a union every member complains; the one that came furthest was meant.
    first = max(error.errors(), key=lambda found: len(found["loc"]))
    where = [str(part) for part in first["loc"][1:] if not str(part).startswith("function-")]
    # Members of a union are named by their types, which are no fields.
    param = ".".join(part for part in where if "[" not in part and part not in _TYPES)
    kind = str(first["type"])
    if kind == "json_invalid":
        return ApiError("the body is no JSON", code="invalid_json")
    if kind == "missing":
        message = f"{param} is missing" if param else "the body is missing, or is no JSON"
        return ApiError(message, param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return ApiError(f"unknown field {param}", param=param, code="unknown_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(f"{param}: {message}" if param else message, param=param, code="invalid_value")


_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_TYPES = frozenset({"str", "int", "float", "bool", "TextPart"})


def refuse(message: str, param: str, code: str = "invalid_value") -> NoReturn:
    """Refuse a call because of one of its fields."""
    raise ApiError(message, param=param, code=code)

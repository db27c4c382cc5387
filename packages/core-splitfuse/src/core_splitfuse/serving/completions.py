"""``/v1/completions``: going on with texts or token ids."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from core_splitfuse.serving.answers import Answers, Entry
from core_splitfuse.serving.errors import refuse
from core_splitfuse.serving.protocol import CompletionBody
from core_splitfuse.serving.service import How, Service
from core_splitfuse.serving.streams import ClientGoneError, EventStream, unless_gone
from core_splitfuse.serving.tokens import TokenTable

_TOKENS = 16
"""Tokens of an answer when the call does not say: OpenAI's number."""


async def complete(service: Service, body: CompletionBody, request: Request) -> Response:
    """Answer a call."""
    service.served.require(body.model)
    _refuse_what_is_not_there(body)
    prompts = await _prompts(service, body)
    wanted = await service.wanted(body)
    grammar = None if wanted is None else await service.compile(wanted)
    how = How(
        max_tokens=body.max_tokens,
        default=_TOKENS,
        top=-1 if body.logprobs is None else body.logprobs,
        grammar=grammar,
    )
    answers = await service.ask(prompts, body, how)
    completion = _Completion(service, body, answers, prompts)
    if body.stream:
        return EventStream(completion.events(), answers.close)
    try:
        return JSONResponse(await unless_gone(request.receive, completion.whole()))
    except ClientGoneError:
        return Response(status_code=499)
    finally:
        answers.close()


def _refuse_what_is_not_there(body: CompletionBody) -> None:
    if body.echo and body.logprobs is not None:
        refuse("log-probabilities of the prompt are not computed", "logprobs", "unsupported")
    if body.best_of is not None and body.best_of != (body.n or 1):
        refuse("answers are not ranked: leave it out, or give n", "best_of", "unsupported")


async def _prompts(service: Service, body: CompletionBody) -> list[list[int]]:
    """Token ids of every prompt."""
    ids: list[list[int]] = body.prompt
    if isinstance(body.prompt[0], str):
        ids = await service.encode(body.prompt, special=body.add_special_tokens)
    if not all(ids):
        refuse("the prompt is empty: give at least one token", "prompt")
    return ids


class _Completion:
    """One call and its answers, in OpenAI's form."""

    def __init__(
        self,
        service: Service,
        body: CompletionBody,
        answers: Answers,
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self._service = service
        self._body = body
        self._answers = answers
        self._prompts = prompts
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.served.name,
        }

    async def whole(self) -> Mapping[str, Any]:
        """The response that holds everything."""
        count = len(self._prompts) * (self._body.n or 1)
        texts = [self._echo(index) for index in range(count)]
        offsets = [len(text) for text in texts]
        entries: list[list[Entry]] = [[] for _ in texts]
        finishes: list[str | None] = [None] * count
        async for piece in self._answers.pieces():
            texts[piece.index] += piece.text
            entries[piece.index] += piece.entries
            finishes[piece.index] = piece.finish
        choices = [
            self._choice(index, texts[index], entries[index], finishes[index], offsets[index])
            for index in range(count)
        ]
        return {**self._head, "choices": choices, "usage": self._answers.usage}

    async def events(self) -> AsyncGenerator[Mapping[str, Any]]:
        """The response piece by piece."""
        offsets: dict[int, int] = {}
        usage = {"usage": None} if self._body.wants_usage else {}
        async for piece in self._answers.pieces():
            text = piece.text
            if piece.index not in offsets:
                echo = self._echo(piece.index)
                offsets[piece.index] = len(echo)
                text = echo + text
            if text or piece.entries or piece.finish:
                offset = offsets[piece.index]
                choice = self._choice(piece.index, text, piece.entries, piece.finish, offset)
                yield {**self._head, "choices": [choice], **usage}
        if self._body.wants_usage:
            yield {**self._head, "choices": [], "usage": self._answers.usage}

    def _echo(self, index: int) -> str:
        if not self._body.echo:
            return ""
        number = index // (self._body.n or 1)
        given = self._body.prompt[number]
        return given if isinstance(given, str) else self._service.served.decode(given)

    def _choice(
        self, index: int, text: str, entries: Sequence[Entry], finish: str | None, offset: int
    ) -> dict[str, Any]:
        told = None
        if self._body.logprobs is not None:
            told = _logprobs(self._service.served.table, entries, offset)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}


def _logprobs(table: TokenTable, entries: Sequence[Entry], offset: int) -> dict[str, Any]:
    """Log-probabilities in the form of completions; ``offset`` is where the answers begin."""
    return {
        "tokens": [table.text_of(entry.token) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [
            {table.text_of(token): logprob for token, logprob in reversed(entry.top)}
            | {table.text_of(entry.token): entry.logprob}
            for entry in entries
        ],
        "text_offset": [offset + entry.offset for entry in entries],
    }

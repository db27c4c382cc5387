"""``/v1/chat/completions``: messages in the model's own chat format, and calls of tools."""

from __future__ import annotations

import asyncio
import inspect
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from transformers import PreTrainedTokenizerBase

from core_splitfuse.serving.answers import Answers, Entry
from core_splitfuse.serving.errors import refuse
from core_splitfuse.serving.protocol import ChatBody, Message
from core_splitfuse.serving.service import How, Service
from core_splitfuse.serving.streams import ClientGoneError, EventStream, unless_gone
from core_splitfuse.serving.tokens import TokenTable
from core_splitfuse.serving.tools import Reader, template_messages

# A client that could name these would put its own template in the place of the model's.
_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


async def chat(service: Service, body: ChatBody, request: Request) -> Response:
    """Answer a call."""
    served = service.served
    served.require(body.model)
    max_tokens = _max_tokens(body)
    top = _top(body)
    wanted = await service.wanted(body)
    plan = await asyncio.to_thread(
        served.tools.plan,
        body.tools,
        body.tool_choice,
        parallel=body.parallel_tool_calls is not False,
        wanted=wanted,
    )
    values = body.chat_template_kwargs or {}
    if _RESERVED & values.keys():
        refuse(f"{min(_RESERVED & values.keys())} cannot be set", "chat_template_kwargs")
    prompt = await render(service, body.messages, plan.tools, values)
    # The template has written all special tokens that belong there.
    prompts = await service.encode([prompt], special=False)
    how = How(
        max_tokens=max_tokens,
        default=service.default_tokens,
        top=top,
        grammar=plan.grammar,
        keep_special=plan.keeps_special,
    )
    answers = await service.ask(prompts, body, how)
    readers = [plan.reader(prompt) for _ in range(body.n or 1)]
    completion = _Chat(service, body, answers, readers)
    if body.stream:
        return EventStream(completion.events(), answers.close)
    try:
        return JSONResponse(await unless_gone(request.receive, completion.whole()))
    except ClientGoneError:
        return Response(status_code=499)
    finally:
        answers.close()


async def render(
    service: Service,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    values: Mapping[str, Any] | None = None,
) -> str:
    """The prompt that the chat template makes of messages."""
    plain = [{"content": None, **message.model_dump(exclude_none=True)} for message in messages]
    made = template_messages(plain)
    return await asyncio.to_thread(service.served.render, made, tools, values)


def _max_tokens(body: ChatBody) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        refuse(f"max_tokens says {old}, and this says {new}", "max_completion_tokens")
    return new if old is None else old


def _top(body: ChatBody) -> int:
    if body.top_logprobs is not None and not body.logprobs:
        refuse("logprobs has to be true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else -1


class _Chat:
    """One call and its answers, in OpenAI's form."""

    def __init__(
        self, service: Service, body: ChatBody, answers: Answers, readers: Sequence[Reader]
    ) -> None:
        self._table = service.served.table
        self._body = body
        self._answers = answers
        self._readers = readers
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.served.name,
        }

    async def whole(self) -> Mapping[str, Any]:
        """The response that holds everything."""
        entries: list[list[Entry]] = [[] for _ in self._readers]
        finishes = [""] * len(self._readers)
        async for piece in self._answers.pieces():
            reader = self._readers[piece.index]
            reader.feed(piece.text)
            entries[piece.index] += piece.entries
            if piece.finish is not None:
                reader.finish()
                finishes[piece.index] = reader.finish_reason(piece.finish)
        choices = [
            {
                "index": index,
                "message": {"refusal": None, **reader.message()},
                "logprobs": self._logprobs(entries[index]),
                "finish_reason": finishes[index],
            }
            for index, reader in enumerate(self._readers)
        ]
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": self._answers.usage}

    async def events(self) -> AsyncGenerator[Mapping[str, Any]]:
        """The response piece by piece."""
        begun: set[int] = set()
        async for piece in self._answers.pieces():
            index, reader = piece.index, self._readers[piece.index]
            if index not in begun:
                begun.add(index)
                yield self._chunk(index, {"role": "assistant", "content": ""})
            deltas = [delta.as_dict() for delta in reader.feed(piece.text)] if piece.text else []
            if piece.finish is not None:
                deltas += [delta.as_dict() for delta in reader.finish()]
            if piece.entries and not deltas:
                deltas = [{"content": ""}]
            entries = piece.entries
            for delta in deltas:
                yield self._chunk(index, delta, entries)
                entries = ()
            if piece.finish is not None:
                yield self._chunk(index, {}, finish=reader.finish_reason(piece.finish))
        if self._body.wants_usage:
            head = {**self._head, "object": "chat.completion.chunk"}
            yield {**head, "choices": [], "usage": self._answers.usage}

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        entries: Sequence[Entry] = (),
        finish: str | None = None,
    ) -> Mapping[str, Any]:
        told = self._logprobs(entries) if entries else None
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}
        usage = {"usage": None} if self._body.wants_usage else {}
        head = {**self._head, "object": "chat.completion.chunk"}
        return {**head, "choices": [choice], **usage}

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": [_told(self._table, entry) for entry in entries], "refusal": None}


def _told(table: TokenTable, entry: Entry) -> dict[str, Any]:
    top = [_named(table, token, logprob) for token, logprob in entry.top]
    return {**_named(table, entry.token, entry.logprob), "top_logprobs": top}


def _named(table: TokenTable, token: int, logprob: float) -> dict[str, Any]:
    text, given = table.text_of(token), table.bytes_of(token)
    return {"token": text, "logprob": logprob, "bytes": list(given)}

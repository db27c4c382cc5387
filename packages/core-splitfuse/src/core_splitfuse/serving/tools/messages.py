"""Messages of OpenAI's API, as chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import EngineError


def template_messages(messages: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
    """Return messages for ``apply_chat_template``.

    Parts of text are joined, no content is empty content, and arguments of earlier calls are
    objects, not JSON text.

    Raises:
        EngineError: for parts that are no text, and for arguments that are no JSON object.

    Example:
        >>> template_messages([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])
        [{'role': 'user', 'content': 'Hello'}]
    """
    return [_message(message) for message in messages]


def _message(message: Mapping[str, object]) -> dict[str, Any]:
    made = {key: value for key, value in message.items() if value is not None}
    made["content"] = _content(message.get("content"))
    calls = made.get("tool_calls")
    if isinstance(calls, list) and calls:
        made["tool_calls"] = [_call(call) for call in calls]
    else:
        made.pop("tool_calls", None)
    return made


def _content(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise EngineError("this model reads text only", why="a message has parts that are no text")
    return "\n".join(str(text) for text in texts)


def _call(call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise EngineError("a call in tool_calls has no function")
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            name = function.get("name")
            raise EngineError(f"arguments of {name!r} are no JSON", why=str(error)) from None
    if not isinstance(arguments, Mapping):
        raise EngineError(f"arguments of {function.get('name')!r} are no JSON object")
    return {**call, "function": {**function, "arguments": arguments}}

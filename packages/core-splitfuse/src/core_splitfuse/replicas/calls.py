"""A call on its way to a replica, and what can be told of it without the model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

from core_splitfuse.replicas.choice import blocks_of

_BYTES_PER_TOKEN = 4
_UNSAID = 256
"""Tokens that an answer is taken for when the call does not say."""

_MOST = 2**20
"""Tokens that a call is taken for at most, whatever it says."""

_PRIVATE = frozenset({b"authorization", b"cookie"})

Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Call:
    """An HTTP request as it travels to a replica.

    Args:
        method: of HTTP.
        path: decoded.
        query: the query string.
        headers: names in lower case, and values.
        body: all of it.
        tokens: estimate of what is to be computed for it.
        blocks: names of the blocks of its prompt.
    """

    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    tokens: int = 0
    blocks: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> Call:
        """Read a request; keys stay where they have been checked."""
        tokens, blocks = weigh(body) if scope["method"] == "POST" else (0, ())
        return cls(
            method=scope["method"],
            path=scope["path"],
            query=scope.get("query_string", b""),
            headers=tuple((n, v) for n, v in scope["headers"] if n not in _PRIVATE),
            body=body,
            tokens=tokens,
            blocks=blocks,
        )


def weigh(body: bytes) -> tuple[int, tuple[bytes, ...]]:
    """Estimate the tokens of a call, and name the blocks of its prompt.

    A body that is no call of the API weighs something, too: the replica will tell what is wrong.

    Example:
        >>> tokens, blocks = weigh(b'{"prompt": [1, 2, 3], "max_tokens": 7, "n": 2}')
        >>> tokens, len(blocks)
        (17, 0)
    """
    try:
        return _weigh(json.loads(body))
    except (ValueError, RecursionError):
        return 0, ()


def _weigh(read: Any) -> tuple[int, tuple[bytes, ...]]:
    if not isinstance(read, dict):
        return 0, ()
    prompts = _prompts(read)
    new = _whole(read.get("max_completion_tokens")) or _whole(read.get("max_tokens")) or _UNSAID
    answers = (_whole(read.get("n")) or 1) * len(prompts)
    tokens = sum(count for _, count in prompts) + new * answers
    salt = str(read.get("cache_salt") or "").encode(errors="replace")
    # What the prompts of one call have in common does not matter: they go to one replica.
    return min(tokens, _MOST), blocks_of(prompts[0][0], salt)


def _prompts(read: Json) -> list[tuple[bytes, int]]:
    """Every prompt as bytes that begin alike when the prompts do, with its tokens."""
    if isinstance(read.get("messages"), list):
        # In the order in which chat templates write them.
        parts = [read.get("tools"), *read["messages"]]
        text = "\n".join(json.dumps(part, sort_keys=True) for part in parts).encode()
        return [(text, len(text) // _BYTES_PER_TOKEN)]
    prompt = read.get("prompt")
    if isinstance(prompt, list) and prompt and not _is_ids(prompt):
        return [_one(part) for part in prompt]
    return [_one(prompt)]


def _one(prompt: Any) -> tuple[bytes, int]:
    if isinstance(prompt, str):
        text = prompt.encode(errors="replace")
        return text, -(-len(text) // _BYTES_PER_TOKEN)
    if isinstance(prompt, list) and _is_ids(prompt):
        return b"".join(b"%d," % number for number in prompt), len(prompt)
    return b"", 0


def _is_ids(prompt: Sequence[Any]) -> bool:
    return all(type(part) is int for part in prompt)


def _whole(value: Any) -> int:
    return min(value, _MOST) if type(value) is int and value > 0 else 0

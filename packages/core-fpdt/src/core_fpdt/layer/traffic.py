"""What moves between host and device while a block of attention is gone backwards."""

from __future__ import annotations

from typing import Literal


def bytes_per_token(
    order: Literal["query", "key"], heads: int, kv_heads: int, width: int, element: int
) -> int:
    """Bytes that one block moves per token of the chunk that is streamed (paper, section 4.2).

    With queries outside, keys and values come, and their float32 gradients come and go; with keys
    outside, queries, outputs, their gradients and lse come, and float32 gradients of queries come and
    go.

    Args:
        order: what the outer loop goes over.
        heads: heads of queries.
        kv_heads: heads of keys.
        width: of a head.
        element: bytes of an element that is no accumulator.
    """
    if order == "query":
        return kv_heads * width * (2 * element + 16)
    return heads * width * (3 * element + 8) + 4 * heads


def cheaper_order(heads: int, kv_heads: int, width: int, element: int) -> Literal["query", "key"]:
    """The order that moves fewer bytes; ``query`` where they are equal, as it replays once."""
    orders: tuple[Literal["query", "key"], ...] = ("query", "key")
    return min(orders, key=lambda o: bytes_per_token(o, heads, kv_heads, width, element))

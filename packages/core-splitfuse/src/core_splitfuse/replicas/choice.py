"""Which replica answers a call: the one that knows most of its prompt, unless it has too much to do."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence

BLOCK = 128
"""Bytes of a prompt in a block; whole blocks are what is known of it."""

_LONGEST = 4096
"""Blocks of a prompt that are looked at."""

_KEPT = 2**16
"""Blocks that are remembered of a replica: about what fits into a large cache of prefixes."""


def blocks_of(prompt: bytes, salt: bytes = b"") -> tuple[bytes, ...]:
    """Name the whole blocks of a prompt, each by everything up to its end.

    Args:
        prompt: text, or token ids written out.
        salt: prompts with another one have nothing in common.

    Example:
        >>> first, second = (blocks_of(b"a" * 256 + end) for end in (b"b" * 128, b"c" * 128))
        >>> [x == y for x, y in zip(first, second)]
        [True, True, False]
    """
    names: list[bytes] = []
    name = hashlib.blake2b(salt, digest_size=16).digest()
    for end in range(BLOCK, min(len(prompt), BLOCK * _LONGEST) + 1, BLOCK):
        name = hashlib.blake2b(name + prompt[end - BLOCK : end], digest_size=16).digest()
        names.append(name)
    return tuple(names)


class Prefixes:
    """Beginnings of the prompts that every replica has been given, the latest ones.

    Args:
        kept: blocks that are remembered of a replica.
    """

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept = kept
        self._of: dict[str, OrderedDict[bytes, None]] = {}

    def known(self, replica: str, blocks: Sequence[bytes]) -> int:
        """How many of the blocks, from the first one on, a replica has been given."""
        seen = self._of.get(replica, OrderedDict[bytes, None]())
        return next((i for i, block in enumerate(blocks) if block not in seen), len(blocks))

    def remember(self, replica: str, blocks: Sequence[bytes]) -> None:
        """Note that a replica has been given a prompt."""
        seen = self._of.setdefault(replica, OrderedDict())
        # The first block last: without it nothing of the prompt would be found.
        for block in reversed(blocks):
            seen[block] = None
            seen.move_to_end(block)
        while len(seen) > self._kept:
            seen.popitem(last=False)

    def keep_only(self, replicas: Collection[str]) -> None:
        """Forget replicas that are gone."""
        for replica in self._of.keys() - set(replicas):
            del self._of[replica]


def in_order(
    replicas: Iterable[str], known: Mapping[str, int], loads: Mapping[str, int], threshold: int
) -> list[str]:
    """Order replicas by preference for a call.

    First the one that knows the longest beginning of the prompt, unless it has over ``threshold``
    more tokens to compute than the least busy one; then by tokens.

    Args:
        replicas: those that run.
        known: blocks of the prompt that each one knows; 0 where nothing is said.
        loads: tokens that each one still has to compute; 0 where nothing is said.
        threshold: difference of loads, in tokens, that a known prefix is worth.

    Example:
        >>> in_order(["a", "b"], known={"b": 3}, loads={"b": 100}, threshold=200)
        ['b', 'a']
        >>> in_order(["a", "b"], known={"b": 3}, loads={"b": 300}, threshold=200)
        ['a', 'b']
    """
    order = sorted(replicas, key=lambda replica: (loads.get(replica, 0), replica))
    if not order:
        return []
    least = loads.get(order[0], 0)
    # Of equally long ones the first in this order, which is the least busy.
    best = max(order, key=lambda replica: known.get(replica, 0))
    if known.get(best, 0) and loads.get(best, 0) - least <= threshold:
        order.remove(best)
        order.insert(0, best)
    return order

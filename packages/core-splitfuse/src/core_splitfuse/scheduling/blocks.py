"""Blocks of the key and value store: who owns them, who shares them, and what is kept for later.

A block holds the keys and values of ``size`` consecutive tokens. It is free, owned by one or more
sequences, or cached: owned by nobody, with its content kept under a key until the space is needed.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from core.errors import EngineError


class OutOfBlocksError(EngineError):
    """There are fewer free and cached blocks than asked for; nothing was taken."""


class BlockPool:
    """Counts references to a fixed number of blocks.

    Args:
        count: number of blocks.
        size: tokens in each.

    Example:
        >>> pool = BlockPool(4, 16)
        >>> table = pool.take(2)
        >>> pool.available
        2
        >>> pool.release(table)
        >>> pool.available
        4
    """

    def __init__(self, count: int, size: int) -> None:
        if count < 1 or size < 1:
            raise EngineError(f"{count} blocks of {size} tokens hold nothing")
        self.count = count
        self.size = size
        self._references = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Blocks that nobody owns and whose content is kept."""
        return len(self._cached)

    @property
    def owned(self) -> int:
        """Blocks that somebody owns."""
        return self.count - self.available

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.size)

    def references(self, block: int) -> int:
        """Number of owners of a block."""
        return self._references[block]

    def take(self, count: int) -> list[int]:
        """Take blocks; cached content gives way, the longest unused first.

        Raises:
            OutOfBlocksError: when there are not enough.
        """
        if count > self.available:
            raise OutOfBlocksError(
                f"{count} blocks are not there", why=f"{self.available} can be taken"
            )
        taken: list[int] = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _none = self._cached.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            self._references[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Own blocks once more that somebody owns.

        Raises:
            ValueError: for one that nobody owns; nothing is changed then.
        """
        wanted = list(blocks)
        self._require_owned(Counter(wanted), most=False)
        for block in wanted:
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give blocks back, the last ones first, so that beginnings stay cached longest.

        Raises:
            ValueError: for one that has fewer owners than are given back; nothing is changed then.
        """
        given = list(blocks)
        self._require_owned(Counter(given), most=True)
        for block in reversed(given):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def seal(self, block: int, key: bytes) -> None:
        """Say what a full block holds, so that :meth:`match` finds it.

        Another block of the same content keeps being the one that is found.

        Raises:
            ValueError: for a block that nobody owns.
        """
        self._require_owned(Counter([block]), most=False)
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Own the blocks of the longest run of keys, from the first on, that is there."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._references[block] += 1
            self._cached.pop(block, None)
            found.append(block)
        return found

    def writable(self, block: int) -> bool:
        """Whether a sequence may write into its block: nobody else reads it, and no key names it."""
        return self._references[block] == 1 and block not in self._key_of

    def forget(self) -> None:
        """Forget all content, as after a change of the weights; owners keep their blocks."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._key_of.clear()
        self._block_of.clear()

    def _require_owned(self, given: Counter[int], *, most: bool) -> None:
        for block, times in given.items():
            owners = self._references[block] if 0 <= block < self.count else 0
            if owners < (times if most else 1):
                raise ValueError(f"block {block} has {owners} owners")


def block_keys(tokens: Sequence[int], size: int, salt: str) -> list[bytes]:
    """Keys of the full blocks of a sequence; each depends on all tokens before its end.

    Args:
        tokens: token ids.
        size: tokens in a block.
        salt: everything else that keys and values depend on (:class:`core.CacheIdentity`).
    """
    keys: list[bytes] = []
    last = hashlib.sha256(salt.encode()).digest()
    for begin in range(0, len(tokens) - size + 1, size):
        ids = b"".join(token.to_bytes(8, "little") for token in tokens[begin : begin + size])
        last = hashlib.sha256(last + ids).digest()
        keys.append(last)
    return keys

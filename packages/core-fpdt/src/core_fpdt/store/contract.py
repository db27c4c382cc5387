"""Where the chunks of a sequence wait between their uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Lane(Protocol):
    """One tensor along the sequence, kept in chunks that are put and got by their number.

    A chunk is got as a tensor on the store's device. It may be read until :meth:`done`, which every
    ``get`` is followed by; what was queued on the current stream before ``done`` may still read it.
    Ranges are half-open and mean neighbouring chunks as one tensor, joined along the lane's
    dimension; only lanes that are ``whole`` give more than one at a time.

    A chunk that was got twice is given back twice. One that is out is neither put nor added to;
    :meth:`drop` and :meth:`close` give it back as well.
    """

    @property
    def whole(self) -> bool:
        """Whether any range of chunks can be got in one piece, for nothing."""
        ...

    def put(self, index: int, chunk: Tensor) -> None:
        """Keep a chunk; what ``chunk`` holds may be overwritten by work queued after this."""
        ...

    def prefetch(self, index: int) -> None:
        """Begin to bring a chunk to the device; harmless for one that is there or was never put."""
        ...

    def get(self, first: int, last: int | None = None) -> Tensor:
        """Chunk ``first``, or chunks ``[first, last)``.

        Raises:
            KeyError: for a chunk that was never put, or was dropped.
        """
        ...

    def done(self, first: int) -> None:
        """Give back what ``get(first, ...)`` gave."""
        ...

    def add(self, first: int, chunk: Tensor, last: int | None = None) -> None:
        """Add to a chunk, or to ``[first, last)``; one that was never put is zero. In the lane's dtype."""
        ...

    def drop(self, index: int) -> None:
        """Forget a chunk; harmless for one that is not there."""
        ...

    def close(self) -> None:
        """Forget all chunks and give all memory back; may be called twice."""
        ...


class Store(Protocol):
    """Makes lanes, and owns the memory behind them."""

    @property
    def device(self) -> torch.device:
        """Where chunks are put from and got to."""
        ...

    @property
    def offloads(self) -> bool:
        """Whether chunks leave the device; where they do not, a put is a copy on it."""
        ...

    def lane(
        self,
        name: str,
        edges: Sequence[int],
        *,
        dim: int,
        dtype: torch.dtype | None = None,
        whole: bool = True,
    ) -> Lane:
        """Open a lane.

        Args:
            name: for messages, such as ``"keys"``.
            edges: ``[0, c, 2c, ..., S]``: chunk ``i`` has tokens ``edges[i]`` to ``edges[i + 1]``.
            dim: the dimension of chunks that is the sequence.
            dtype: what chunks are kept in; that of the first one put if not given. Accumulators are
                float32.
            whole: make it one piece where that costs nothing; without it, dropping a chunk frees its
                memory at once.
        """
        ...

    def used(self) -> int:
        """Bytes in use outside of the device."""
        ...

    def close(self) -> None:
        """Close all lanes and free all buffers."""
        ...

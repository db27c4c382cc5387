"""What computes one block of attention: some queries against some keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from core.softmax import Partial
from core_fpdt.masks.tiles import Tile


@dataclass(frozen=True)
class Scores:
    """How scores come from products of queries and keys.

    Args:
        scale: their factor.
        softcap: ``softcap * tanh(score / softcap)`` follows, where given.
    """

    scale: float
    softcap: float | None = None


class Gradients(NamedTuple):
    """What a block adds to the gradients of its inputs; shapes of the inputs, any float dtype."""

    query: Tensor
    key: Tensor
    value: Tensor


class Kernel(Protocol):
    """Attention over blocks. Stateless; the tile is never empty.

    Shapes: query (B, H, Tq, D), key (B, Hkv, Tk, D), value (B, Hkv, Tk, Dv), all of one dtype and on one
    device, possibly strided; Hkv divides H, query head ``h`` reads key head ``h // (H / Hkv)``.
    """

    @property
    def name(self) -> str:
        """What ``fpdt.kernel`` calls it."""
        ...

    def works(self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, scores: Scores) -> str:
        """Why it cannot compute this, or an empty string. Fast: asked for every block."""
        ...

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, scores: Scores
    ) -> Partial:
        """Attend within the block.

        Returns:
            Output (B, H, Tq, Dv) in any float dtype and lse (B, H, Tq) in float32 (float64 for float64
            inputs), ``-inf`` in rows that see no key of the block.
        """
        ...

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        tile: Tile,
        scores: Scores,
    ) -> Gradients:
        """What the block adds to the gradients of a softmax over many blocks.

        With ``p = exp(score - lse)`` of the whole row and ``delta = sum(grad * output)`` of the whole
        row, the gradient of a score is ``p * (grad @ value^T - delta)``: nothing is un-merged.

        Args:
            grad: (B, H, Tq, Dv) gradient of the merged output.
            query: as in forward.
            key: as in forward.
            value: as in forward.
            output: (B, H, Tq, Dv) the merged output of the whole rows, of the query's dtype.
            lse: (B, H, Tq) of the whole rows; ``-inf`` where a row sees no key at all, whose
                gradients are 0.
            tile: as in forward.
            scores: as in forward.
        """
        ...

"""Where keys and values are kept: what the engine asks of a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.slabs import Slabs
from core_splitfuse.attention.spans import Ragged, Span


class Store(Protocol):
    """Keys and values of all layers, in blocks."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """Over all layers that have been written."""
        ...

    def write(self, layer: int, key: Tensor, value: Tensor, ragged: Ragged) -> None:
        """Keep the keys (Hkv, T, D) and values (Hkv, T, Dv) of a pass."""

    def read(self, layer: int, span: Span, first: int = 0) -> tuple[Tensor, Tensor]:
        """Keys (Hkv, L, D) and values (Hkv, L, Dv) of a span's sequence from token ``first`` on."""
        ...

    def attend(self, layer: int, query: Tensor, ragged: Ragged, rule: Rule) -> Tensor:
        """From queries (H, T, D) of the packed row to (T, H, Dv), over what is stored."""
        ...

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks ``(from, to)`` in all layers."""


def make_store(slots: int, block_size: int, device: torch.device) -> Store:
    """Make the store that serves a device.

    Args:
        slots: tokens that are held.
        block_size: tokens in a block.
        device: where the model is.
    """
    if device.type != "cuda":
        return Slabs(slots, block_size)
    from core_splitfuse.attention.gpu import Paged

    return Paged(slots, block_size, device)

"""Keys and values of all layers in blocks on a GPU, behind the interface of the slabs."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from core.errors import EngineError
from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.gpu.atoms import Spread
from core_splitfuse.attention.gpu.dispatch import attend
from core_splitfuse.attention.gpu.plan import Plan
from core_splitfuse.attention.gpu.rotation import Rotation
from core_splitfuse.attention.gpu.write import copy_blocks, write
from core_splitfuse.attention.slabs import behind
from core_splitfuse.attention.spans import Ragged, Span


class Paged:
    """The store of all layers on a GPU; layers get memory when they are first written.

    Args:
        slots: tokens that are held, a multiple of the size of a block.
        block_size: tokens in a block, a power of two from 16 on.
        device: where.
        spread: how programs share keys; by the device unless given.

    Raises:
        EngineError: for blocks of another size.
    """

    def __init__(
        self, slots: int, block_size: int, device: torch.device, *, spread: Spread | None = None
    ) -> None:
        if block_size < 16 or block_size & (block_size - 1):
            raise EngineError(
                f"blocks of {block_size} tokens cannot be read on a GPU",
                why="kernels want a power of two from 16 on",
                fix="choose splitfuse.block_size = 64",
            )
        self.slots = slots
        self.block_size = block_size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._own = Plan(block_size, device, spread=spread)
        self._given: Plan | None = None
        self._filled_for: Ragged | None = None

    @property
    def bytes_per_token(self) -> int:
        """Over all layers that have been written."""
        tensors = [tensor for layer in self._layers.values() for tensor in layer]
        return sum(t.shape[2] * t.shape[3] * t.element_size() for t in tensors)

    @contextmanager
    def planned(self, plan: Plan) -> Generator[None]:
        """Use a plan that somebody else fills, such as that of a CUDA graph."""
        self._given = plan
        try:
            yield
        finally:
            self._given = None

    def plan(self, ragged: Ragged | None) -> Plan:
        """The plan of a pass, made when its first layer asks."""
        if self._given is not None:
            return self._given
        assert ragged is not None
        if self._filled_for is not ragged:
            self._own.fill(ragged.spans)
            self._filled_for = ragged
        return self._own

    def write(self, layer: int, key: Tensor, value: Tensor, ragged: Ragged | None) -> None:
        """Keep the keys (Hkv, T, D) and values (Hkv, T, Dv) of a pass."""
        if layer not in self._layers:
            self._layers[layer] = self._empty(key), self._empty(value)
        keys, values = self._layers[layer]
        slots = self.plan(ragged).slots
        write(keys, values, key.transpose(0, 1), value.transpose(0, 1), slots)

    def read(self, layer: int, span: Span, first: int = 0) -> tuple[Tensor, Tensor]:
        """Keys (Hkv, L, D) and values (Hkv, L, Dv) of a span's sequence from token ``first`` on."""
        parts = behind(span.stretches(self.block_size), first)
        keys, values = (tensor.flatten(0, 1) for tensor in self._layers[layer])
        return _gathered(keys, parts), _gathered(values, parts)

    def attend(
        self,
        layer: int,
        query: Tensor,
        ragged: Ragged | None,
        rule: Rule,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Attend over what is stored.

        Args:
            layer: index of the layer.
            query: (H, T, D) of the packed row.
            ragged: the pass; not needed where a plan is given.
            rule: the layer's.
            rotation: for queries and stored keys that are unrotated.

        Returns:
            (T, H, Dv)
        """
        keys, values = self._layers[layer]
        return attend(query.transpose(0, 1), keys, values, self.plan(ragged), rule, rotation)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks ``(from, to)`` in all layers."""
        for layer in self._layers.values():
            for tensor in layer:
                copy_blocks(tensor, pairs)

    def _empty(self, like: Tensor) -> Tensor:
        blocks = self.slots // self.block_size
        return like.new_empty(blocks, self.block_size, like.shape[0], like.shape[2])


def _gathered(tensor: Tensor, parts: list[slice]) -> Tensor:
    return torch.cat([tensor[part] for part in parts]).transpose(0, 1)

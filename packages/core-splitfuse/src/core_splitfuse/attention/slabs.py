"""Keys and values in slabs: memory that the system commits when it is first written.

C kernels read blocks wherever they lie. Torch reads a sequence in place whose blocks lie behind each
other, which the pool of blocks prefers; what lies in several stretches is gathered for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core_splitfuse.attention.cpu import Listed, Native, Stored, choose
from core_splitfuse.attention.dense import Rule, attend, first_seen
from core_splitfuse.attention.spans import Ragged, Span


class _Layer(NamedTuple):
    keys: Tensor
    values: Tensor
    stored: Stored
    kernel: Native | None


class Slabs:
    """The store of all layers, for CPUs and as the plain way on any device.

    Args:
        slots: tokens that are held.
        block_size: tokens in a block.
    """

    def __init__(self, slots: int, block_size: int) -> None:
        self.slots = slots
        self.block_size = block_size
        self._layers: dict[int, _Layer] = {}

    @property
    def bytes_per_token(self) -> int:
        """Over all layers that have been written."""
        return sum(t.shape[0] * t.shape[2] * t.element_size() for t in self._tensors())

    def write(self, layer: int, key: Tensor, value: Tensor, ragged: Ragged) -> None:
        """Keep the keys (Hkv, T, D) and values (Hkv, T, Dv) of a pass.

        Raises:
            IndexError: for a slot that is not there.
        """
        if layer not in self._layers:
            self._layers[layer] = self._new(key, value)
        keys, values, stored, kernel = self._layers[layer]
        if kernel is not None:
            kernel.keep(stored, key, value, self._listed(ragged))
            return
        keys.index_copy_(1, ragged.slots, key)
        values.index_copy_(1, ragged.slots, value)

    def read(self, layer: int, span: Span, first: int = 0) -> tuple[Tensor, Tensor]:
        """Keys (Hkv, L, D) and values (Hkv, L, Dv) of a span's sequence from token ``first`` on."""
        stretches = behind(span.stretches(self.block_size), first)
        keys, values, _, _ = self._layers[layer]
        return _gathered(keys, stretches), _gathered(values, stretches)

    def attend(self, layer: int, query: Tensor, ragged: Ragged, rule: Rule) -> Tensor:
        """Attend over what is stored, rotated already.

        Args:
            layer: index of the layer.
            query: (H, T, D) of the packed row.
            ragged: the pass.
            rule: the layer's.

        Returns:
            (T, H, Dv)
        """
        _, values, stored, kernel = self._layers[layer]
        out = query.new_empty(query.shape[1], query.shape[0], values.shape[2])
        if kernel is not None:
            kernel.attend(stored, query, self._listed(ragged), rule, out)
            return out
        for span in ragged.spans:
            keys, values = self.read(layer, span, first_seen(span.begin, rule.window))
            found = attend(query[:, span.rows], keys, values, span.begin, rule, ragged.once)
            out[span.rows] = found.transpose(0, 1)
        return out

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks ``(from, to)`` in all layers."""
        size = self.block_size
        for old, new in pairs:
            for tensor in self._tensors():
                begin = old * size
                tensor[:, new * size : (new + 1) * size] = tensor[:, begin : begin + size]

    def _tensors(self) -> list[Tensor]:
        return [x for layer in self._layers.values() for x in (layer.keys, layer.values)]

    def _new(self, key: Tensor, value: Tensor) -> _Layer:
        keys, values = (x.new_empty(x.shape[0], self.slots, x.shape[2]) for x in (key, value))
        return _Layer(keys, values, Stored(keys, values), choose(keys, values).kernel)

    def _listed(self, ragged: Ragged) -> Listed:
        return ragged.once("listed", lambda: Listed(ragged.spans, ragged.slots, self.block_size))


def behind(stretches: list[slice], first: int) -> list[slice]:
    """Leave out the first slots of some stretches."""
    found: list[slice] = []
    for part in stretches:
        length = part.stop - part.start
        if first < length:
            found.append(slice(part.start + max(first, 0), part.stop))
        first -= length
    return found


def _gathered(tensor: Tensor, stretches: list[slice]) -> Tensor:
    parts = [tensor[:, part] for part in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

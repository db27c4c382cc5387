"""How attention is cut into programs: sizes of tiles by the shape of heads and the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

_TILE_BYTES: Final = 16384
"""Keys of one step of a program: two such steps in flight keep the memory of an H100 busy."""
_MOST_ROWS_OF_DECODES: Final = 64


@dataclass(frozen=True)
class Device:
    """What sizes depend on.

    Args:
        processors: multiprocessors.
        shared_memory: bytes that one program can have.
    """

    processors: int
    shared_memory: int


@dataclass(frozen=True)
class Heads:
    """Shape of the heads of a layer, and what its programs have to keep apart.

    Args:
        query: number of query heads.
        key: number of key heads.
        dim: of queries and keys.
        value_dim: of values.
        itemsize: bytes of a number in the store.
        apart: whether query heads of one key head need keys turned differently.
    """

    query: int
    key: int
    dim: int
    value_dim: int
    itemsize: int
    apart: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.query // self.key

    @property
    def width(self) -> int:
        """The larger of both dimensions, as a power of two."""
        return power_of_two(max(self.dim, self.value_dim, 16))


@dataclass(frozen=True)
class Tile:
    """Sizes of one program.

    Args:
        rows: tokens times heads, a power of two from 16 on.
        heads: query heads of one key head.
        keys: of one step, a power of two from 16 on.
        warps: of a program.
        stages: steps that are loaded ahead, the current one included.
    """

    rows: int
    heads: int
    keys: int
    warps: int
    stages: int

    @property
    def tokens(self) -> int:
        """Tokens of an atom."""
        return self.rows // self.heads


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()


def for_decodes(heads: Heads, device: Device) -> Tile:
    """A tile for sequences of one token or few: as few rows as matrix units take."""
    together = 1 if heads.apart else min(heads.group, _MOST_ROWS_OF_DECODES)
    rows = max(16, power_of_two(together))
    keys = min(128, max(16, _TILE_BYTES // (heads.width * heads.itemsize)))
    return _fitting(Tile(rows, together, keys, 4, 3), heads, device)


def for_chunks(heads: Heads, device: Device) -> Tile:
    """A tile for parts of prompts: as many rows as registers hold."""
    if heads.itemsize > 2:
        # No matrix units: larger tiles do not stay in registers.
        rows, keys = (64, 32) if heads.width <= 64 else (32 if heads.width <= 256 else 16, 16)
        warps = 8
    elif heads.width > 256:
        rows, keys, warps = 32, 16, 4
    elif heads.width > 128:
        rows, keys, warps = 64, 32, 8
    else:
        rows, keys, warps = 128, 64, 8
    together = 1 if heads.apart else min(heads.group, rows)
    return _fitting(Tile(rows, together, keys, warps, 3), heads, device)


def shared_memory(tile: Tile, heads: Heads) -> int:
    """Bytes of shared memory that a program needs, about."""
    queries = tile.rows * heads.width * heads.itemsize
    steps = tile.stages * tile.keys * 2 * heads.width * heads.itemsize
    return queries + steps


def _fitting(tile: Tile, heads: Heads, device: Device) -> Tile:
    """Less loaded ahead, then fewer rows, until it fits."""
    while shared_memory(tile, heads) > device.shared_memory:
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.rows > 16:
            rows = tile.rows // 2
            tile = replace(tile, rows=rows, heads=min(tile.heads, rows), warps=4)
        else:
            return replace(tile, stages=1)
    return tile


@functools.cache
def device_of(device: torch.device) -> Device:
    """Sizes of a device; of a small one for the interpreter."""
    if device.type != "cuda":
        return Device(processors=2, shared_memory=2**20)
    found: Any = torch.cuda.get_device_properties(device)
    return Device(found.multi_processor_count, found.shared_memory_per_block_optin)

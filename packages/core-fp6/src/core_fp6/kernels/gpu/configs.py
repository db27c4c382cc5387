"""How a product is cut into programs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from core_fp6.layouts.execution import BLOCK

MOST_SPLITS: Final = 16
_FEWEST_BLOCKS: Final = 4
"""Blocks of columns that a split must have, for its loads to overlap."""


@dataclass(frozen=True)
class Config:
    """Sizes of the fused kernel.

    Args:
        rows: of the weight in a tile, a multiple of ``16 * warps``.
        tokens: of the activations in a tile.
        splits: sums over columns that are made apart and then added in order.
        warps: of a program.
        stages: blocks of columns that are loaded ahead, the current one included.
    """

    rows: int
    tokens: int
    splits: int = 1
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        sizes_are_right = (
            self.rows in (64, 128, 256)
            and self.tokens in (16, 32, 64, 128)
            and 1 <= self.splits <= MOST_SPLITS
            and self.warps in (4, 8)
            and 1 <= self.stages <= 6
            and self.rows % (16 * self.warps) == 0
        )
        if not sizes_are_right:
            raise ValueError(f"no tile of the fused kernel: {self}")


@dataclass(frozen=True)
class Device:
    """What a configuration depends on.

    Args:
        name: of the device.
        processors: its multiprocessors.
        shared_memory: bytes that one program can have.
    """

    name: str
    processors: int
    shared_memory: int


def bucket(tokens: int) -> int:
    """Numbers of tokens that share a configuration: the next power of two, at least 16."""
    return max(16, 1 << (tokens - 1).bit_length())


def shared_memory(config: Config, itemsize: int) -> int:
    """Bytes of shared memory that a program needs, not less than it does.

    Args:
        config: sizes of tiles.
        itemsize: bytes of an activation.
    """
    planes = (config.stages - 1) * config.rows * BLOCK * 6 // 8
    activations = config.stages * config.tokens * BLOCK * itemsize
    return max(planes, 0) + activations + 4 * config.rows * config.tokens // 2


def default(tokens: int, rows: int, columns: int, itemsize: int, device: Device) -> Config:
    """A configuration for where nothing has been measured.

    As in FP6-LLM (arXiv 2401.14112, section 4) columns are split until every multiprocessor has a
    program. Tiles are as wide as the batch, so that weights are decoded once; from 64 tokens on,
    and for the three parts of float32, eight warps share the registers.

    Args:
        tokens: of the activations.
        rows: of the weight.
        columns: of the weight.
        itemsize: bytes of an activation.
        device: that computes.
    """
    wide = min(bucket(tokens), 128)
    config = Config(128, wide, warps=8 if wide >= 64 or itemsize == 4 else 4)
    while shared_memory(config, itemsize) > device.shared_memory:
        if config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        elif config.tokens > 16:
            config = replace(config, tokens=config.tokens // 2)
        else:
            break
    if tokens > 128:
        return config
    blocks = -(-columns // BLOCK)
    tiles = -(-rows // config.rows) * -(-tokens // config.tokens)
    splits = 1
    while tiles * splits < device.processors and blocks >= 2 * splits * _FEWEST_BLOCKS:
        splits *= 2
    return replace(config, splits=min(splits, MOST_SPLITS))


def candidates(tokens: int, columns: int, itemsize: int, device: Device) -> list[Config]:
    """Configurations worth measuring."""
    wide = min(bucket(tokens), 128)
    blocks = -(-columns // BLOCK)
    most = min(MOST_SPLITS, blocks // 2) if tokens <= 128 else 1
    shapes = ((64, 4), (128, 4), (128, 8))
    found = [
        Config(tall, width, splits, warps, stages)
        for width in sorted({wide, max(16, wide // 2)}, reverse=True)
        for tall, warps in shapes
        for splits in (1, 2, 4, 8, 16)
        for stages in (2, 3, 4)
        if splits <= max(most, 1)
    ]
    return [config for config in found if shared_memory(config, itemsize) <= device.shared_memory]
